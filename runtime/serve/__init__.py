"""``serve``: llama-server with the planned settings, behind a door that guards, queues and survives it."""

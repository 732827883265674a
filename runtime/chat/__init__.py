"""``chat``: a conversation at a terminal or through a pipe, with a model here or a server elsewhere."""

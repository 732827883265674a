"""An adapter in its forms: GGUF, PEFT, the file of 2023, merged into its base."""

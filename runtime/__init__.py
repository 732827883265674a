"""Loads a GGUF with settings chosen for this machine and streams what it says: ``python -m runtime``."""

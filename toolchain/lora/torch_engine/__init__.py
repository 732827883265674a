"""Training an adapter with torch on a base that stays in its GGUF blocks. Imported by children only."""

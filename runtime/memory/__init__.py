"""What a model takes of memory, and where to put it: pure arithmetic on its header."""

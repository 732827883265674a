"""What a training is worth: perplexity, drift, replies side by side."""

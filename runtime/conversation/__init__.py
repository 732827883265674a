"""What was said: messages, who said them, what of them fits, and what is found in a reply while it comes."""

"""Threads for this machine and model: from what the kernel grants, then measured."""

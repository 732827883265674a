"""Speed of a model on this machine, beside others on the same library: each contender in a child process, in turns."""

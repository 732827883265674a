"""Files of examples to the tokens of a training run, as the base's own runtime would read them.

``records`` reads the files, ``split`` keeps a part back, ``vocabulary`` and ``render`` make tokens, ``pack`` makes
rows; ``child`` does it beside llama_cpp, ``prepare`` is its parent's side.
"""

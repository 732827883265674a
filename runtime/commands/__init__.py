"""The verbs of ``python -m runtime``, one module each: ``add`` declares its options, ``run`` carries it out."""

"""The trainer of 2023 as an engine: llama.cpp's own ``finetune`` (examples/finetune at ac9ee6a), told by a recipe.

``refuse`` says no to what it cannot do, or does wrong; ``flags`` is its command line, ``start`` where it begins,
``train`` runs it, ``progress`` reads what it prints. Its result is a ggla file, which
``lora/forms/bridge.py`` converts.
"""

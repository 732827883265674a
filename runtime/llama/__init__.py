"""What the class ``LLaMa`` (``runtime/model.py``) stands on, a module for each concern."""

"""A model that is loaded, and text out of it, on the low-level C API of llama.cpp."""

from runtime.engine.engine import Engine
from runtime.engine.load import load

__all__ = ["Engine", "load"]

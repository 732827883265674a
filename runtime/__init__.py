"""Loads a GGUF with settings chosen for this machine and streams what it says: ``python -m runtime``, or LLaMa."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.model import LLaMa

__all__ = ["LLaMa"]


def __getattr__(name: str) -> object:
    """``from runtime import LLaMa`` imports what it needs, and nothing else does."""
    if name == "LLaMa":
        from runtime.model import LLaMa

        return LLaMa
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

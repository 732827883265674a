"""The adapters that somebody asks for (``--lora``): opened once, held against their model before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toolchain.base import console
from toolchain.base.errors import MemoryFitError

if TYPE_CHECKING:
    from runtime.engine.adapters import Adapter, AdapterFile
    from runtime.engine.model import Model
    from toolchain.base.gguf import GgufHeader

MAX_SCALE: Final = 3.4028234e38
"""The library keeps scales as float32."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """An adapter that fits its model, and the scale at which it is to work; 0 lets it rest."""

    file: AdapterFile
    scale: float

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def name(self) -> str:
        return self.path.name


def choose(typed: Sequence[str], base: Sequence[GgufHeader]) -> tuple[Chosen, ...]:
    """Each ``FILE`` or ``FILE=SCALE`` for the model of the headers ``base``; errors as of ``check_adapter``."""
    if not typed:
        return ()
    from runtime.engine.adapters import check_adapter, parse_adapter

    parsed = map(parse_adapter, typed)
    return tuple(Chosen(file=check_adapter(path, base), scale=scale) for path, scale in parsed)


def require_bases(chosen: Sequence[Chosen], base: GgufHeader, *, force: bool) -> None:
    """Raise AnotherBaseError if one was trained on other weights than ``base``, as of ``require_base``."""
    for each in chosen:
        from runtime.engine.adapters import require_base

        require_base(each.file, base, force=force)


def tell_effects(chosen: Sequence[Chosen]) -> None:
    """Warn of each that changes nothing, or less than it holds."""
    for each in chosen:
        if each.file.effect:
            console.warn(f"the adapter {each.name} {each.file.effect}")
        elif not each.scale:
            console.warn(f"the adapter {each.name} changes nothing: its scale is 0")


def bytes_of(chosen: Sequence[Chosen]) -> int:
    """What they take in memory together."""
    from runtime.memory.footprint import adapter_bytes

    return sum(adapter_bytes(each.file.header) for each in chosen)


def load(model: Model, chosen: Sequence[Chosen]) -> list[tuple[Adapter, float]]:
    """Each in memory, with its scale; errors as of ``load_adapter``."""
    if not chosen:
        return []
    from runtime.engine.adapters import load_adapter

    try:
        return [(load_adapter(model, each.file), each.scale) for each in chosen]
    except MemoryFitError as error:
        error.hint = error.hint or "lower --n-ctx, put fewer layers on the GPU (--n-gpu-layers), or leave out a --lora"
        raise

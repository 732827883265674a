"""What the constructor of LLaMa was given, and the request and header that it means."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from runtime.hub_model import HubName
from runtime.resolve import Resolved, locate
from runtime.settings import ENV_PREFIX, Value
from toolchain.base import files
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.prepare import Found, Request
    from toolchain.base.gguf import GgufHeader

Lora: TypeAlias = str | Path | tuple[str | Path, float]
"""An adapter: its file, ``FILE=SCALE``, or the file and its scale."""

DEFAULT_N_CTX: Final = 2048
PLANNED: Final = -1
ANY_QUANT: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The constructor's arguments. ``settings`` are by llama.cpp's names; PLANNED and None mean: not asked."""

    model_path: str | Path
    n_ctx: int
    settings: Mapping[str, Value | None]
    quantize_format: str
    is_70b: bool
    lora: tuple[Lora, ...]
    force_adapters: bool
    tune: bool
    verbose: int


def requested(asked: Asked) -> tuple[Request, Found]:
    """The request that ``asked`` means, with its model found (fetched or converted where it has to be).

    Raises what ``resolve`` and ``open_model`` raise, and UsageError for a file of another quantization or size than
    was said.
    """
    from runtime.prepare import Request, find, tuning_is_off

    typed = _with_quant(str(asked.model_path), asked.quantize_format)
    if asked.is_70b:
        _hold_legacy(typed)
    found = find(typed)
    resolved, header = found.resolved, found.header
    _require_quant(header, resolved, asked.quantize_format)
    if asked.is_70b:
        _require_70b(header)
    flags = {name: value for name, value in asked.settings.items() if value not in (None, PLANNED)}
    if (n_ctx := _n_ctx(asked.n_ctx, header, resolved)) is not None:
        flags["n_ctx"] = n_ctx
    request = Request(
        model=typed,
        flags=flags,
        lora=tuple(map(spelled_lora, asked.lora)),
        force=asked.force_adapters,
        tune=asked.tune and not tuning_is_off(),
        verbose=asked.verbose > 1,
    )
    return request, found


def hold(request: Request, found: Found) -> None:
    """Raise what loading would raise for a wrong value or adapter, before anything is given up for it."""
    from runtime.adapters import choose, require_bases
    from runtime.memory.here import all_headers
    from runtime.prepare import settle_with
    from toolchain.base import machine

    settle_with(request, found.header, machine.probe(), recipe=found.resolved.runtime)
    require_bases(choose(request.lora, all_headers(found.header)), found.header, force=request.force)


def spelled_lora(lora: Lora) -> str:
    """``FILE`` or ``FILE=SCALE``, as a Request has it."""
    if isinstance(lora, tuple):
        return f"{lora[0]}={lora[1]}"
    return str(lora)


def _with_quant(typed: str, quant: str) -> str:
    """What ``typed`` means with ``:quant`` behind it, where a recipe or a repository leaves the choice."""
    if quant == ANY_QUANT:
        return typed
    found = locate(typed)
    if isinstance(found, HubName):
        chosen = found.quant
    elif found.recipe is not None:
        chosen = found.type if typed.endswith(f":{found.type}") else None
    else:
        return typed
    if chosen is None:
        return f"{typed}:{quant}"
    if chosen.lower() != quant.lower():
        raise UsageError(
            f"{typed} names {chosen}, quantize_format {quant}", hint=f"leave quantize_format at {ANY_QUANT!r}"
        )
    return typed


def _require_quant(header: GgufHeader, resolved: Resolved, quant: str) -> None:
    """A file by its own path has to be what was said; of a recipe or a repository it was chosen by that."""
    chosen = resolved.recipe is not None or resolved.repo is not None
    if quant == ANY_QUANT or chosen or (header.file_type or "").lower() == quant.lower():
        return
    raise UsageError(
        f"{header.path.name} is {header.file_type or 'of a quantization that it does not name'}, not {quant}",
        evidence=f"{header.bits_per_weight:.2f} bits per weight",
        hint=f"name a {quant} file, or leave quantize_format at {ANY_QUANT!r}",
    )


def _hold_legacy(typed: str) -> None:
    """Let a GGML ``.bin`` of 2023 answer for itself before it is converted."""
    from runtime.legacy_ggml import converted, is_legacy_ggml

    path = files.expand(typed)
    if is_legacy_ggml(path):
        converted(path, is_70b=True)


def _require_70b(header: GgufHeader) -> None:
    from runtime.legacy_ggml import require_70b

    require_70b(header)


def _n_ctx(asked: int, header: GgufHeader, resolved: Resolved) -> int | None:
    """What is asked of the plan; of the default no more than the model has, and nothing where others have a say."""
    if asked == PLANNED:
        return None
    if asked != DEFAULT_N_CTX:
        return asked
    if "n_ctx" in resolved.runtime or os.environ.get(f"{ENV_PREFIX}N_CTX", "").strip():
        return None
    return min(asked, header.n_ctx_train or asked)


def as_loras(given: Lora | Sequence[Lora] | None) -> tuple[Lora, ...]:
    """One adapter or several, as a tuple of them; a pair of a file and a number is one."""
    match given:
        case str() | Path():
            return (given,)
        case (str() | Path() as path, int() | float() as scale):
            return ((path, float(scale)),)
        case _:
            return tuple(given or ())


def as_settings(given: Mapping[str, Value | Sequence[float] | None]) -> dict[str, Value | None]:
    """What was given as settings are spelled: shares of the GPUs in a row."""
    return {
        name: value if value is None or isinstance(value, int | float | str) else ",".join(map(str, value))
        for name, value in given.items()
    }

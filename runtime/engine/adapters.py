"""LoRA adapters: held against their base before the library sees them, switched without a reload."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runtime.adapters import MAX_SCALE
from runtime.engine.identity import gguf_identity
from runtime.engine.model import Model
from toolchain.base import console, files
from toolchain.base.errors import ArtifactError, MemoryFitError, UsageError
from toolchain.base.gguf import GgufHeader, TensorInfo, read_header
from toolchain.base.tensor_hash import BASE_NAME_KEY, BASE_SHA256_KEY, tensors_sha256

if TYPE_CHECKING:
    from runtime.engine.context import Context

_A: Final = ".lora_a"
_B: Final = ".lora_b"
_EMBEDDING: Final = "token_embd.weight"
_ANOTHER_BASE: Final = "load the model that it was trained on"
_CONVERT: Final = "convert it again with llama.cpp's convert_lora_to_gguf.py, or download it again"
_READ_BYTES: Final = 1 << 20
_QUIET_S: Final = 1.0
_SHOWN: Final = 12  # of a hash


class AnotherBaseError(ArtifactError):
    """An adapter was trained on other weights; ``hint`` tells the command line's way to use it all the same."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A checked adapter: ``alpha`` 0 means that its scale is used as it is; ``rank`` is the largest of its pairs.

    ``effect`` is empty, or says why it changes nothing or less than it holds; ``stamp`` changes with the file.
    """

    header: GgufHeader
    stamp: object
    alpha: float
    rank: int
    pairs: int
    effect: str

    @property
    def path(self) -> Path:
        return self.header.path


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A loaded adapter; it is freed with its model."""

    file: AdapterFile
    handle: Any

    @cached_property
    def identity(self) -> str:
        return gguf_identity(self.file.path)


def parse_adapter(typed: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE=SCALE``; the scale is 1 unless given. UsageError for a scale that is no number."""
    path, equals, scale = typed.rpartition("=")
    if not equals or files.expand(typed).is_file():
        return files.expand(typed), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not path or not abs(number) <= MAX_SCALE:
        raise UsageError(f"--lora {typed}: {scale!r} is not a scale", hint="--lora adapter.gguf=0.5")
    return files.expand(path), number


def check_adapter(path: Path, base: Sequence[GgufHeader]) -> AdapterFile:
    """The adapter at ``path`` if it goes with the model whose files have the headers ``base``.

    Raises ArtifactError when its header lies or it does not fit, naming the first tensor that does not.
    """
    header, stamp, name = read_header(path), _stamp(path), path.name
    if header.kind != "adapter":
        raise UsageError(f"{name} is not a LoRA adapter", hint="an adapter says general.type = adapter in its header")
    if header.text("adapter.type") != "lora":
        raise UsageError(
            f"{name} is an adapter of the kind {header.text('adapter.type')!r}, which the library does not apply",
            hint="merge it into its base (`./inv merge`) and load that, or give a plain LoRA",
        )
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise UsageError(
            f"{name} is an activated LoRA (aLoRA), which is to begin in the middle of a prompt",
            hint="this runtime applies adapters to all of a prompt only: give a plain LoRA",
        )
    if header.architecture != base[0].architecture:
        raise ArtifactError(
            f"{name} is an adapter for {header.architecture}, the model is {base[0].architecture}", hint=_ANOTHER_BASE
        )
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ArtifactError(f"{name}: adapter.lora.alpha is {alpha!r}, not a number", hint=_CONVERT)
    pairs = _pairs(header)
    tensors = {tensor.name: tensor for part in base for tensor in part.tensors}
    if _EMBEDDING in pairs and "output.weight" not in tensors:
        # The library applies the pair to the output too, where its halves stand the wrong way round, and aborts.
        raise ArtifactError(
            f"{name} changes {_EMBEDDING}, which in this model is the output's matrix too: the library cannot do that",
            hint="train it without the embedding",
        )
    for target, (a, b) in pairs.items():
        _check_shapes(name, target, tensors.get(target), a, b)
    rank = max((b.shape[0] for _, b in pairs.values()), default=0)
    effect = _effect(header, pairs)
    return AdapterFile(header=header, stamp=stamp, alpha=alpha, rank=rank, pairs=len(pairs), effect=effect)


def require_base(adapter: AdapterFile, base: GgufHeader, *, force: bool = False) -> None:
    """Raise AnotherBaseError if ``adapter`` says that it was trained on other weights than those of ``base``.

    ``base`` is the model's (first) header. The first time all of the model is read for it; for an adapter that does not
    say what it was trained on nothing is. With ``force`` another base is only warned of.
    """
    trained = adapter.header.text(BASE_SHA256_KEY)
    if not trained:
        return
    name, here = adapter.path.name, base.path.name
    with console.step(f"check that {name} belongs to {here}", quiet_s=_QUIET_S) as step:
        found = tensors_sha256(base, progress=step.advance)
    if found == trained:
        return
    own = adapter.header.text(BASE_NAME_KEY) or "a model that it does not name"
    if force:
        console.warn(f"the adapter {name} was trained on {own}, {here} has other weights: replies may be worse")
        return
    other = own if own != here else f"the {own} of then"
    raise AnotherBaseError(
        f"the adapter {name} was not trained on {here}",
        evidence=f"trained on  {own}  ({trained[:_SHOWN]}...)\nat hand     {here}  ({found[:_SHOWN]}...)",
        hint=f"load {other}, or insist with --force (LLaMa: force_adapters=True)",
    )


def open_adapter(model: Model, path: Path, *, force: bool = False) -> Adapter:
    """The adapter at ``path`` in the memory of a loaded model; errors as of the three steps.

    One that is there already is not read again, unless its file has changed; one without effect is warned of.
    """
    if path.is_file() and (known := model.adapters.get(_stamp(path))):
        return known
    assert model.path is not None
    base = [read_header(shard) for shard in read_header(model.path).shard_paths]
    found = check_adapter(path, base)
    require_base(found, base[0], force=force)
    if found.effect:
        console.warn(f"the adapter {path.name} {found.effect}")
    return load_adapter(model, found)


def load_adapter(model: Model, found: AdapterFile) -> Adapter:
    """The checked adapter in memory, at work nowhere yet; ArtifactError when the library refuses it."""
    if found.stamp in model.adapters:
        return model.adapters[found.stamp]
    name = found.path.name
    handle = model.lib.llama_adapter_lora_init(model.handle, os.fsencode(found.path)) if found.pairs else None
    if found.pairs and not handle:
        evidence = model.log.tail()
        if "failed to allocate" in evidence:
            raise MemoryFitError(
                f"the adapter {name} does not fit in memory",
                evidence=evidence,
                hint="put fewer layers on the GPU (--n-gpu-layers), or lower --n-ctx",
            )
        raise ArtifactError(f"the library refuses the adapter {name}", evidence=evidence, hint=_CONVERT)
    model.adapters[found.stamp] = adapter = Adapter(file=found, handle=handle)
    return adapter


def set_adapters(context: Context, chosen: Sequence[tuple[Adapter, float]]) -> None:
    """Let exactly these adapters work, each at its scale (0 turns it off); one that is named twice at the sum.

    What the cache holds was computed with the adapters of before, so it is emptied when anything changes.
    """
    scales: dict[Adapter, float] = {}
    for adapter, scale in chosen:
        scales[adapter] = scales.get(adapter, 0.0) + scale
    wanted = tuple((adapter, scale) for adapter, scale in scales.items() if scale and adapter.handle)
    if wanted == context.adapters:
        return
    apply_adapters(context.model.lib, context.handle, wanted)
    context.adapters = wanted
    context.clear()


def apply_adapters(lib: Any, context: Any, wanted: Sequence[tuple[Adapter, float]]) -> None:
    """The same for a bare llama_context."""
    handles = (lib.llama_adapter_lora_p_ctypes * len(wanted))(
        *(ctypes.cast(adapter.handle, lib.llama_adapter_lora_p_ctypes) for adapter, _ in wanted)
    )
    scales = (ctypes.c_float * len(wanted))(*(scale for _, scale in wanted))
    lib.llama_set_adapters_lora(context, handles, len(wanted), scales)


def _stamp(path: Path) -> object:
    """Equal for the same file by any name, until it is written again."""
    stat = path.stat()
    return path.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns


def _pairs(header: GgufHeader) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """(A, B) by the name of the tensor that they change."""
    halves: tuple[dict[str, TensorInfo], dict[str, TensorInfo]] = {}, {}
    for tensor in header.tensors:
        for suffix, found in zip((_A, _B), halves, strict=True):
            if tensor.name.endswith(suffix):
                found[tensor.name.removesuffix(suffix)] = tensor
        if not tensor.name.endswith((_A, _B, "_norm.weight")):
            raise ArtifactError(f"{header.path.name}: {tensor.name} belongs in no LoRA adapter", hint=_CONVERT)
    if odd := sorted(halves[0].keys() ^ halves[1].keys()):
        raise ArtifactError(f"{header.path.name}: of the pair for {odd[0]} one half is missing", hint=_CONVERT)
    return {target: (halves[0][target], halves[1][target]) for target in halves[0]}


def _check_shapes(name: str, target: str, weight: TensorInfo | None, a: TensorInfo, b: TensorInfo) -> None:
    """As llama_adapter_lora_init demands, and of experts too: A (in, rank), B (rank, out) for a weight (in, out)."""
    if weight is None:
        raise ArtifactError(f"{name} changes {target}, which the model does not have", hint=_ANOTHER_BASE)
    shapes = [tuple(tensor.shape) + (1,) * (3 - len(tensor.shape)) for tensor in (weight, a, b)]
    w, down, up = shapes
    if target == _EMBEDDING:  # A and B stand the other way round there: see llm_build_inp_embd
        fits = w[0] == up[1] and w[1] == down[1] and down[0] == up[0]
    else:
        fits = w[0] == down[0] and w[1] == up[1] and down[1] == up[0]
    if not fits or any(len(tensor.shape) > 3 for tensor in (weight, a, b)) or len({w[2], down[2], up[2]}) > 1:
        raise ArtifactError(
            f"{name} does not fit {target}",
            evidence=f"the model's is {weight.shape}; A is {a.shape}, B is {b.shape}",
            hint=_ANOTHER_BASE,
        )


def _effect(header: GgufHeader, pairs: Mapping[str, tuple[TensorInfo, TensorInfo]]) -> str:
    if not pairs:
        return "changes no tensor"
    if all(_is_zero(header, a) or _is_zero(header, b) for a, b in pairs.values()):
        return "changes nothing: all of its deltas are zero"
    norms = sum(tensor.name.endswith("_norm.weight") for tensor in header.tensors)
    return f"holds {norms} norm tensors, which the library leaves out (`./inv merge` does not)" if norms else ""


def _is_zero(header: GgufHeader, tensor: TensorInfo) -> bool:
    with header.path.open("rb") as file:
        file.seek(header.data_offset + tensor.offset)
        left = tensor.nbytes
        while left:
            piece = file.read(min(left, _READ_BYTES))
            if not piece or piece.strip(b"\0\x80"):  # 0x80: the sign of a negative zero
                return False
            left -= len(piece)
    return True

"""Which type a merged model can have, and its making by llama-quantize, as the pipeline does it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import GgufHeader, TensorInfo
from toolchain.build.toolchain import Toolchain
from toolchain.pipeline.recipe import Quantization
from toolchain.stages.quantize import BITS_PER_WEIGHT, NEEDS_IMATRIX, Quantize

# tensor_requires_imatrix in src/llama-quant.cpp at commit 0c1e570; without a matrix they come out broken.
_TENSORS_NEED_IMATRIX: Final = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
# Integers, float64, and the types that only products use: llama.cpp writes no weights in them.
_NEVER_WRITTEN: Final = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})


@dataclass(frozen=True, kw_only=True)
class _Requantize(Quantize):
    """Also from a file with quantized tensors; those that have the wanted type already are copied."""

    def command(self, output: Path) -> tuple[str, ...]:
        tool, *rest = super().command(output)
        return (tool, "--allow-requantize", *rest)


def parse_type(typed: str) -> Quantization:
    """The llama-quantize type that was typed; UsageError for one that it cannot make here."""
    if typed.upper() in NEEDS_IMATRIX:
        raise UsageError(
            f"{typed} is made with an importance matrix only, and merging has none",
            hint=f"the nearest type without one is {nearest(typed)}",
        )
    try:
        return Quantization.model_validate({"type": typed})
    except ValidationError as error:
        words = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"merge.type: {words}", hint=f"known: {', '.join(BITS_PER_WEIGHT)}") from error


def require_own_types(base: GgufHeader, changed: Iterable[TensorInfo]) -> None:
    """UsageError where a changed tensor cannot be written again in the type that it has."""
    for tensor in changed:
        if tensor.type in _TENSORS_NEED_IMATRIX:
            label = base.file_type if base.file_type and base.file_type in BITS_PER_WEIGHT else tensor.type
            raise UsageError(
                f"{tensor.name} is {tensor.type}, which is made with an importance matrix only, and merging has none",
                hint=f"name another type: the nearest is {nearest(label)}, as merge.type or --type {nearest(label)}",
            )
        if tensor.type in _NEVER_WRITTEN:
            raise ArtifactError(f"{tensor.name} is of type {tensor.type}, to which nothing can be added")


def nearest(type: str) -> str:
    """The smallest type of no fewer bits than ``type``, a file's or a tensor's, that needs no importance matrix."""
    kind = GGML_TYPES_BY_NAME.get(type.upper())
    bits = BITS_PER_WEIGHT.get(type.upper()) or (8 * kind.block_bytes / kind.block_size if kind else 0.0)
    able = [name for name, its in BITS_PER_WEIGHT.items() if name not in NEEDS_IMATRIX and its >= bits]
    return min(able, key=BITS_PER_WEIGHT.__getitem__)


def quantization(source: Path, asked: Quantization, *, n_params: int, toolchain: Toolchain) -> Quantize:
    """llama-quantize of ``source`` as ``asked``; what there is to note stands in its header already."""
    return _Requantize(
        source=source,
        type=asked.type,
        tensors=tuple(sorted(asked.tensors.items())),
        notes=(),
        tool=toolchain.tool("quantize"),
        source_digest="",
        toolchain_id=toolchain.id,
        n_params=n_params,
    )

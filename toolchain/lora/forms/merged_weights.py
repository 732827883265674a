"""Adapters added into the weights of a model, piece by piece, in float32.

W + scale * alpha/rank * B A for each pair (arXiv 2106.09685); with DoRA's magnitudes m (arXiv 2402.09353) each row of
that sum brought to its length in m; norms plus their vectors. Whatever no adapter names stays as it is, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import GgufHeader, TensorInfo
from toolchain.lora.forms.adapter import EMBEDDING, AdapterModel
from toolchain.lora.forms.ggml_values import GgmlValues
from toolchain.lora.forms.rewrite import rewrite

if TYPE_CHECKING:
    from toolchain.lora.forms.adapter import Floats

EXACT: Final = "F32"
_PIECE_ELEMENTS: Final = 1 << 23
"""32 MiB of float32; a sum needs about three times as much."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled:
    """An adapter of the file ``name`` and how much of it counts."""

    name: str
    adapter: AdapterModel
    scale: float = 1.0


def changed_tensors(shards: Sequence[GgufHeader], scaled: Sequence[Scaled]) -> dict[str, TensorInfo]:
    """By name, what the adapters change. UsageError where that cannot be written into this model's weights."""
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    wanted = {name for one in scaled for name in (*one.adapter.pairs, *one.adapter.norms)}
    for name in wanted:
        if f"{name.removesuffix('.weight')}.scale" in tensors:
            raise UsageError(
                f"{name} has a scale of its own beside its numbers, so nothing can be added to it",
                hint="merge into another file of the model, such as its Q8_0",
            )
    if EMBEDDING in wanted and "output.weight" not in tensors:
        raise UsageError(
            "the adapter changes the token embedding, which in this model is the output's matrix too",
            hint="train it without the embedding",
        )
    if len(scaled) > 1 or any(one.scale != 1 for one in scaled):
        for one in scaled:
            if one.adapter.dora:
                raise UsageError(
                    f"{one.name} is a DoRA: it sets the lengths of rows, so it has no scale and bears no other adapter",
                    hint="merge it alone, at scale 1",
                )
    return {name: tensors[name] for name in tensors if name in wanted}


def write_merged(
    shards: Sequence[GgufHeader],
    scaled: Sequence[Scaled],
    output: Path,
    *,
    types: Mapping[str, str],
    values: GgmlValues,
    notes: Mapping[str, str],
    on_progress: OnProgress = lambda *_: None,
) -> None:
    """Write the model with the adapters in it to ``output``, which the caller stages; changed tensors in ``types``."""

    def content(shard: GgufHeader, tensor: TensorInfo) -> Iterator[memoryview]:
        return _merged(shard, tensor, scaled, types[tensor.name], values)

    rewrite(shards, output, types=types, content=content, notes=notes, on_progress=on_progress)


def _merged(
    shard: GgufHeader, tensor: TensorInfo, scaled: Sequence[Scaled], kind: str, values: GgmlValues
) -> Iterator[memoryview]:
    import numpy as np

    cols, rows, experts = (*tensor.shape, 1, 1)[:3]
    row_bytes = tensor.nbytes // (rows * experts)
    at_once = max(1, _PIECE_ELEMENTS // cols)
    offset = shard.data_offset + tensor.offset
    for expert in range(experts):
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            start = offset + (expert * rows + first) * row_bytes
            blocks = np.fromfile(shard.path, np.uint8, count * row_bytes, offset=start).reshape(count, row_bytes)
            numbers = values.unpack(blocks, tensor.type)
            for one in scaled:
                _add(numbers, one, tensor.name, expert, first)
            if not np.isfinite(numbers).all():
                raise ArtifactError(
                    f"{tensor.name} has numbers that are not finite once the adapter is in it",
                    hint="the adapter or the base is broken: look at the perplexity of each",
                )
            yield values.pack(numbers, kind).data


def _add(numbers: Floats, one: Scaled, target: str, expert: int, first: int) -> None:
    """Add to ``numbers``, the rows from ``first`` on of one expert's matrix, in place."""
    import numpy as np

    last = first + len(numbers)
    if (vector := one.adapter.norms.get(target)) is not None:
        numbers += np.float32(one.scale) * vector
    if (pair := one.adapter.pairs.get(target)) is None:
        return
    a, b = (pair.a[expert], pair.b[expert]) if pair.a.ndim == 3 else (pair.a, pair.b)
    delta = b[first:last] @ a
    delta *= np.float32(one.scale * one.adapter.factor(target))
    numbers += delta
    if pair.magnitude is not None:
        wanted = (pair.magnitude[expert] if pair.a.ndim == 3 else pair.magnitude)[first:last]
        lengths = np.linalg.norm(numbers, axis=1)
        numbers *= np.divide(wanted, lengths, out=np.ones_like(lengths), where=lengths > 0)[:, None]

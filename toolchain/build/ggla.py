"""Read an adapter file of 2023: ``ggla`` version 1, what ``finetune`` writes and ``export-lora`` reads.

All integers are little-endian u32. The magic 0x67676c61 ('ggla') therefore stands on disk as ``algg``; behind it
the version, the rank r and alpha (the adapter counts alpha/r times). Then tensors until the end of the file:
dimensions, bytes of the name, type, the widths (innermost first), the name, zeros up to a multiple of 32, the data.
Source: ``save_as_llama_lora`` in examples/finetune/finetune.cpp of llama.cpp at ac9ee6a.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

from toolchain.base.errors import ArtifactError

MAGIC = 0x67676C61
VERSION = 1
F32 = 0  # ggml's type number
ALIGNMENT = 32
MAX_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class AdapterTensor:
    """``values`` holds the product of ``shape`` numbers; ``shape[0]`` is the rank, in A as in B."""

    name: str
    shape: tuple[int, ...]
    values: array[float]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One file: the rank and alpha of its header, and its tensors in their order."""

    path: Path
    rank: int
    alpha: int
    tensors: tuple[AdapterTensor, ...]

    def pairs(self) -> list[tuple[AdapterTensor, AdapterTensor]]:
        """(A, B) of each adapted weight; ArtifactError where one lacks.

        In rows and columns A is (in, rank), B (out, rank), and the weight (out, in) grows by B A^T alpha/rank.
        """
        by_name = {tensor.name: tensor for tensor in self.tensors}
        weights = list(dict.fromkeys(name.removesuffix(".loraA").removesuffix(".loraB") for name in by_name))
        lacking = [f"{w}.lora{half}" for w in weights for half in "AB" if f"{w}.lora{half}" not in by_name]
        if lacking or not weights:
            raise _damaged(self.path, f"no {lacking[0]} in it" if lacking else "it holds no tensors")
        return [(by_name[f"{weight}.loraA"], by_name[f"{weight}.loraB"]) for weight in weights]


def read_adapter(path: Path) -> Adapter:
    """The adapter in ``path``; ArtifactError when it is missing, cut, or of another format, version or type."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, str(error)) from error
    reader = _Reader(path, data)
    if (magic := reader.integer()) != MAGIC:
        raise _damaged(path, f"it begins with 0x{magic:08x}, an adapter with 0x{MAGIC:08x}")
    if (version := reader.integer()) != VERSION:
        raise _damaged(path, f"it is of version {version}, known is {VERSION}")
    rank, alpha = reader.integer(), reader.integer()
    tensors = []
    while not reader.at_end():
        tensors.append(reader.tensor())
    return Adapter(path=path, rank=rank, alpha=alpha, tensors=tuple(tensors))


class _Reader:
    """A place in the file's bytes; every step forward is checked against the end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.offset = path, data, 0

    def at_end(self) -> bool:
        return self.offset == len(self.data)

    def take(self, count: int) -> bytes:
        taken = self.data[self.offset : self.offset + count]
        if len(taken) < count:
            raise _damaged(self.path, f"it ends after {len(self.data)} bytes, within a tensor or its header")
        self.offset += count
        return taken

    def integer(self) -> int:
        value: int = struct.unpack("<I", self.take(4))[0]
        return value

    def tensor(self) -> AdapterTensor:
        begins = self.offset
        dimensions, name_bytes, kind = self.integer(), self.integer(), self.integer()
        if not 1 <= dimensions <= MAX_DIMENSIONS or kind != F32:
            raise _damaged(self.path, f"a tensor at byte {begins} has {dimensions} dimensions and type {kind}")
        shape = tuple(self.integer() for _ in range(dimensions))
        name = self.take(name_bytes).decode(errors="replace")
        self.take(-self.offset % ALIGNMENT)
        values = array("f", self.take(4 * math.prod(shape)))
        if sys.byteorder == "big":
            values.byteswap()
        return AdapterTensor(name=name, shape=shape, values=values)


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path.name} is not a whole ggla adapter", evidence=why, hint="train it again")

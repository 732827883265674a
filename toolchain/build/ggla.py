"""Read an adapter file of 2023: ``ggla`` version 1, what ``finetune`` writes and ``export-lora`` reads.

All integers are little-endian u32. The magic 0x67676c61 ('ggla') therefore stands on disk as ``algg``; behind it
the version, the rank r and alpha (the adapter counts alpha/r times). Then tensors until the end of the file:
dimensions, bytes of the name, type, the widths (innermost first), the name, zeros up to a multiple of 32, the data.
Sources, in llama.cpp at ac9ee6a: ``save_as_llama_lora`` in examples/finetune/finetune.cpp, convert-lora-to-ggml.py,
which writes float16 as well, and ``llama_apply_lora_from_file_internal`` in llama.cpp, which reads both.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from toolchain.base.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC: Final = 0x67676C61
VERSION: Final = 1
ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 2  # the old runtime takes no more
MAX_NAME: Final = 63  # GGML_MAX_NAME less its NUL
MAX_TENSORS: Final = 65_536
_TYPES: Final = {0: "<f4", 1: "<f2"}  # ggml's F32 and F16, as numpy spells them


@dataclass(frozen=True, kw_only=True)
class AdapterTensor:
    """One half of a pair: ``shape[0]`` is the rank, in A as in B; ``offset`` is where its bytes begin in the file."""

    name: str
    shape: tuple[int, ...]
    path: Path = field(repr=False)
    offset: int
    dtype: str

    @property
    def values(self) -> NDArray[np.float32]:
        """The product of ``shape`` numbers, read from the file now."""
        import numpy as np

        try:
            found = np.fromfile(self.path, dtype=self.dtype, count=math.prod(self.shape), offset=self.offset)
        except OSError as error:
            raise _damaged(self.path, str(error)) from error
        if found.size != math.prod(self.shape):
            raise _damaged(self.path, f"it became shorter while it was read: {self.name} is cut")
        return found.astype(np.float32, copy=False)

    @property
    def matrix(self) -> NDArray[np.float32]:
        """(width, rank): of A the weight's inputs, of B its outputs; those of a norm are 1."""
        return self.values.reshape(-1, self.shape[0])


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One file: the rank and alpha of its header, and its tensors in their order."""

    path: Path
    rank: int
    alpha: int
    tensors: tuple[AdapterTensor, ...]

    def pairs(self) -> list[tuple[AdapterTensor, AdapterTensor]]:
        """(A, B) of each adapted weight; ArtifactError where one lacks or the two differ in rank.

        As matrices A is (in, rank), B (out, rank), and the weight (out, in) grows by B A^T alpha/rank, the rank being
        the header's, whatever that of the pair is.
        """
        by_name = {tensor.name: tensor for tensor in self.tensors}
        weights = list(dict.fromkeys(name.removesuffix(".loraA").removesuffix(".loraB") for name in by_name))
        lacking = [f"{w}.lora{half}" for w in weights for half in "AB" if f"{w}.lora{half}" not in by_name]
        if lacking or not weights:
            raise _damaged(self.path, f"no {lacking[0]} in it" if lacking else "it holds no tensors")
        pairs = [(by_name[f"{weight}.loraA"], by_name[f"{weight}.loraB"]) for weight in weights]
        for a, b in pairs:
            if a.shape[0] != b.shape[0]:
                raise _damaged(self.path, f"{a.name} is of rank {a.shape[0]}, {b.name} of rank {b.shape[0]}")
        return pairs


def read_adapter(path: Path) -> Adapter:
    """The adapter in ``path``; ArtifactError when it is missing, cut, or of another format, version or type.

    Only headers are read, each number of them held against the file's size; ``values`` reads the rest.
    """
    try:
        with path.open("rb") as file:
            reader = _Reader(path, file)
            if (magic := reader.integer()) != MAGIC:
                raise _damaged(path, f"it begins with 0x{magic:08x}, an adapter with 0x{MAGIC:08x}")
            if (version := reader.integer()) != VERSION:
                raise _damaged(path, f"it is of version {version}, known is {VERSION}")
            rank, alpha = reader.signed(), reader.signed()
            if rank < 1:
                raise _damaged(path, f"its rank is {rank}")
            tensors: dict[str, AdapterTensor] = {}
            while not reader.at_end():
                tensor = reader.tensor()
                if tensor.name in tensors or len(tensors) == MAX_TENSORS:
                    raise _damaged(path, f"{tensor.name} is in it twice" if tensor.name in tensors else "no end")
                tensors[tensor.name] = tensor
    except OSError as error:
        raise _damaged(path, str(error)) from error
    return Adapter(path=path, rank=rank, alpha=alpha, tensors=tuple(tensors.values()))


class _Reader:
    """A place in the file; every step forward is checked against its end before anything is read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.offset = path, file, 0
        self.size = os.fstat(file.fileno()).st_size

    def at_end(self) -> bool:
        return self.offset == self.size

    def skip(self, count: int) -> None:
        if self.offset + count > self.size:
            raise _damaged(self.path, f"it ends after {self.size} bytes, within a tensor or its header")
        self.offset += count

    def take(self, count: int) -> bytes:
        start = self.offset
        self.skip(count)
        self.file.seek(start)
        return self.file.read(count)

    def integer(self) -> int:
        value: int = struct.unpack("<I", self.take(4))[0]
        return value

    def signed(self) -> int:
        value: int = struct.unpack("<i", self.take(4))[0]
        return value

    def tensor(self) -> AdapterTensor:
        begins = self.offset
        dimensions, name_bytes, kind = self.integer(), self.integer(), self.integer()
        if not 1 <= dimensions <= MAX_DIMENSIONS or kind not in _TYPES:
            raise _damaged(self.path, f"a tensor at byte {begins} has {dimensions} dimensions and type {kind}")
        shape = tuple(self.integer() for _ in range(dimensions))
        if not 1 <= name_bytes <= MAX_NAME or 0 in shape:
            raise _damaged(self.path, f"a tensor at byte {begins} has a name of {name_bytes} bytes and shape {shape}")
        try:
            name = self.take(name_bytes).decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"the name of the tensor at byte {begins} is no text: {error}") from None
        if not name.endswith((".loraA", ".loraB")):
            raise _damaged(self.path, f"{name!r} is neither the A nor the B of a pair")
        self.skip(-self.offset % ALIGNMENT)
        tensor = AdapterTensor(name=name, shape=shape, path=self.path, offset=self.offset, dtype=_TYPES[kind])
        self.skip(int(tensor.dtype[-1]) * math.prod(shape))
        return tensor


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} is not a whole ggla adapter", evidence=why, hint="train it again, or fetch it again"
    )

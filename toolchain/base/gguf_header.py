"""What a checked GGUF header tells: metadata, tensors, and what follows from them."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias, overload

from toolchain.base.errors import ArtifactError
from toolchain.base.ggml_types import FILE_TYPE_GUESSED_BIT, FILE_TYPES

U64: Final = struct.Struct("<Q")

Kind: TypeAlias = Literal["model", "adapter", "vocab", "imatrix", "mmproj", "other"]


@dataclass(frozen=True)
class StringArray(Sequence[str]):
    """Strings decoded when asked for; bytes that are not UTF-8 (old token pieces) as surrogate escapes."""

    _packed: bytes
    _starts: array[int]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        start = self._starts[index]
        (length,) = U64.unpack_from(self._packed, start - 8)
        return self._packed[start : start + length].decode("utf-8", "surrogateescape")


# Arrays of numbers are read-only views: index, iterate, len() and tuple() them.
MetadataValue: TypeAlias = (
    "str | int | float | bool | StringArray | memoryview[int] | memoryview[float] | memoryview[bool]"
)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor: ``shape`` in ggml order (ne[0] first), ``offset`` in bytes from the data's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """A checked header: every tensor lies inside the file, every name is unique, known keys have their type.

    Sizes are of this one file; of a split model each shard has its own header.
    """

    path: Path
    version: int
    byte_order: Literal["little"]
    metadata: Mapping[str, MetadataValue] = field(repr=False, hash=False)
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    alignment: int
    data_offset: int
    file_bytes: int

    @property
    def kind(self) -> Kind:
        declared = self.text("general.type")
        if self.architecture == "clip" or declared == "mmproj":
            return "mmproj"
        if declared not in (None, "model"):
            return "adapter" if declared == "adapter" else "imatrix" if declared == "imatrix" else "other"
        return "model" if self.tensors or self.split else "vocab"

    @property
    def architecture(self) -> str:
        """Such as "llama"; empty for an importance matrix and for every shard but the first."""
        return self.text("general.architecture") or ""

    @property
    def file_type(self) -> str | None:
        """The mix the quantizer was asked for, such as "Q4_K_M"."""
        number = self.metadata.get("general.file_type")
        if not isinstance(number, int):
            return None
        return FILE_TYPES.get(number & ~FILE_TYPE_GUESSED_BIT, f"file type {number}")

    @property
    def n_params(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """0.0 where there are no tensors."""
        return 8 * self.tensor_bytes / self.n_params if self.tensors else 0.0

    @property
    def n_ctx_train(self) -> int | None:
        return self.arch_int("context_length")

    @property
    def n_layer(self) -> int | None:
        return self.arch_int("block_count")

    @property
    def n_vocab(self) -> int | None:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, StringArray) else self.arch_int("vocab_size")

    @property
    def chat_template(self) -> str | None:
        return self.text("tokenizer.chat_template")

    @property
    def split(self) -> tuple[int, int] | None:
        """(number of this shard from 0, number of shards); None for a whole file."""
        no, count = self.metadata.get("split.no"), self.metadata.get("split.count")
        return (no, count) if isinstance(no, int) and isinstance(count, int) and count > 1 else None

    @property
    def shard_paths(self) -> tuple[Path, ...]:
        """The files of the model, this one among them, by llama.cpp's naming (x-00001-of-00003.gguf)."""
        if self.split is None:
            return (self.path,)
        no, count = self.split
        stem, tail = self.path.name[:-20], f"-{no + 1:05d}-of-{count:05d}.gguf"
        if self.path.name != stem + tail:
            what = f"{self.path.name}: shard {no + 1} of {count} by its header, but not by its name"
            raise ArtifactError(what, evidence=str(self.path), hint=f"rename it to end in {tail}")
        return tuple(self.path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1))

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def arch_int(self, suffix: str) -> int | None:
        """The integer under ``<architecture>.<suffix>``; None if absent or not one integer."""
        value = self.metadata.get(f"{self.architecture}.{suffix}")
        return value if type(value) is int else None

    def arch_ints(self, suffix: str) -> tuple[int, ...] | None:
        """That key layer by layer: the array, or one integer repeated (head_count_kv may be either)."""
        value = self.metadata.get(f"{self.architecture}.{suffix}")
        if isinstance(value, memoryview):
            return None if value.format in ("f", "d") else tuple(int(item) for item in value)
        return (value,) * (self.n_layer or 1) if type(value) is int else None

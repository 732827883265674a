"""The header of a GGML ``.bin`` of 2023 (GGML, GGMF, GGJT v1 to v3), read without trusting a byte of it.

Layout: convert_llama_ggml_to_gguf.py of llama.cpp commit 0c1e570, and the llama.cpp of June 2023 that wrote such files.
All of it is little endian: the magic, a version (not in GGML), seven u32 of hyperparameters, the vocabulary (length,
bytes and, but for GGML, an f32 score of each piece), then tensors to the end of the file (dimensions, length of the
name, type, extents, name, in GGJT padding to 32 bytes, data).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, Literal, NoReturn, TypeAlias

from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.ggml_types import FILE_TYPES, GGML_TYPES

Container: TypeAlias = Literal["GGML", "GGMF", "GGJT"]

MAGICS: Final[Mapping[bytes, Container]] = MappingProxyType({b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT"})
"""First four bytes: the u32 constants of llama.h in little endian, so their letters lie backwards."""

_ALIGNMENT: Final = 32
_MOST_LAYERS: Final = 1024  # LLaMA 65B has 80
_MOST_PIECE_BYTES: Final = 4096  # the converter's own bound, for names as well
_MOST_PIECES: Final = 1 << 20
_FIRST_PIECES: Final = 3  # <unk>, <s>, </s>
_SOME_F16: Final = 4  # MOSTLY_Q4_1_SOME_F16, which llama.h has no name for any more
_FTYPES: Final = frozenset(range(5)) | frozenset(range(7, 19))  # GGMLFType of the converter
_PLAIN_TYPES: Final = frozenset({"F32", "F16"})
_CHANGED_IN_V3: Final = frozenset({"Q4_0", "Q4_1", "Q8_0"})  # their scale became an f16


@dataclass(frozen=True, kw_only=True)
class LegacyHeader:
    """A checked header: the tensors are those of a LLaMA, have its shapes, and fill the file exactly.

    ``version`` is 1 for GGML, which states none. ``file_type`` is in the spelling of GgufHeader.
    """

    path: Path
    container: Container
    version: int
    n_vocab: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_layer: int
    n_ff: int
    file_type: str
    n_params: int
    file_bytes: int

    @property
    def format(self) -> str:
        """Such as ``GGJT v3``."""
        return self.container if self.container == "GGML" else f"{self.container} v{self.version}"

    @property
    def gqa(self) -> int:
        """Heads of queries for each head of keys: 8 in Llama 2 70B, else 1."""
        return self.n_head // self.n_head_kv


def read_legacy_header(path: Path) -> LegacyHeader:
    """The header of the ``.bin`` at ``path``, of which no tensor's data is read.

    Raises ArtifactError for a file that is cut or lies, UsageError for one that cannot be converted (blocks of an older
    layout, a part of a model, another architecture) or not be read.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise UsageError(f"{path} cannot be read", evidence=str(error), hint="check the path") from error


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    type: str


class _Reader:
    """Where it stands, and whether the next bytes are there to be read."""

    def __init__(self, file: BinaryIO, path: Path, file_bytes: int) -> None:
        self.file, self.path, self.file_bytes = file, path, file_bytes
        self.at = 0

    def header(self) -> LegacyHeader:
        container, version = self._format()
        n_vocab, n_embd, _n_mult, n_head, n_layer, n_rot, ftype = self._u32s(7, "the hyperparameters")
        name = f"{container} v{version}" if container != "GGML" else container
        if not (0 < n_layer <= _MOST_LAYERS and 0 < n_head <= n_embd and n_head * n_rot == n_embd) or (
            ftype not in _FTYPES
        ):
            facts = f"n_embd {n_embd}, n_head {n_head}, n_layer {n_layer}, n_rot {n_rot}, file type {ftype}"
            what = f"{self.path.name} is a {name} file, but not of a LLaMA (or its header is damaged)"
            hint = "only LLaMA models of that format can be converted; look for the model in GGUF"
            raise UsageError(what, evidence=facts, hint=hint)
        file_type = "Q4_1" if ftype == _SOME_F16 else FILE_TYPES[ftype]
        self._check_blocks({file_type}, name, container, version, file_type)
        self._vocabulary(n_vocab, scores=container != "GGML")
        tensors = self._tensors(padded=container == "GGJT")
        self._check_blocks({each.type for each in tensors.values()}, name, container, version, file_type)
        n_kv_width, n_ff = self._check_shapes(tensors, n_vocab, n_embd, n_layer)
        if n_kv_width % n_rot or (n_head * n_rot) % n_kv_width:
            self._lie(f"keys of width {n_kv_width}, which {n_head} heads of {n_rot} do not share", "attention.wk")
        return LegacyHeader(
            path=self.path,
            container=container,
            version=version,
            n_vocab=n_vocab,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_kv_width // n_rot,
            n_layer=n_layer,
            n_ff=n_ff,
            file_type=file_type,
            n_params=sum(math.prod(each.shape) for each in tensors.values()),
            file_bytes=self.file_bytes,
        )

    def _format(self) -> tuple[Container, int]:
        container = MAGICS.get(self._take(4, "the magic"))
        if container is None:
            raise UsageError(f"{self.path.name} is no GGML .bin of 2023", hint="name a model file")
        version = 1 if container == "GGML" else self._u32s(1, "the version")[0]
        if version not in {"GGML": (1,), "GGMF": (1,), "GGJT": (1, 2, 3)}[container]:
            self._lie(f"{container} of a version that never was", version)
        return container, version

    def _check_blocks(self, types: set[str], name: str, container: str, version: int, file_type: str) -> None:
        """Refuse blocks whose layout changed after the file was written, as the converter does."""
        old = types - _PLAIN_TYPES if container != "GGJT" or version < 2 else set[str]()
        old |= types & _CHANGED_IN_V3 if version < 3 else set()
        if old:
            raise UsageError(
                f"{self.path.name} is a {name} file of type {file_type}, whose blocks no llama.cpp reads any more",
                evidence=f"the layout of {', '.join(sorted(old))} changed after it was written (May 2023)",
                hint="quantize the original weights again through a recipe (`./inv quantize`), or take its GGUF",
            )

    def _vocabulary(self, n_vocab: int, *, scores: bool) -> None:
        least = n_vocab * (8 if scores else 4)
        if not _FIRST_PIECES <= n_vocab <= _MOST_PIECES or least > self.file_bytes - self.at:
            self._lie("a vocabulary that the file cannot hold", f"n_vocab {n_vocab}")
        for number in range(n_vocab):
            (length,) = self._u32s(1, f"piece {number} of the vocabulary")
            if length >= _MOST_PIECE_BYTES:
                self._lie(
                    f"a piece of the vocabulary of {_MOST_PIECE_BYTES} bytes or more", f"piece {number}: {length}"
                )
            self._take(length + 4 * scores, f"piece {number} of the vocabulary")

    def _tensors(self, *, padded: bool) -> dict[str, _Tensor]:
        found: dict[str, _Tensor] = {}
        while self.at < self.file_bytes:
            tensor = self._tensor(f"tensor {len(found)}", padded=padded)
            if tensor.name in found:
                self._lie("a tensor appears twice", tensor.name)
            if len(found) > 16 * _MOST_LAYERS:
                self._lie("more tensors than a LLaMA has", len(found))
            found[tensor.name] = tensor
        return found

    def _tensor(self, label: str, *, padded: bool) -> _Tensor:
        n_dims, name_bytes, code = self._u32s(3, label)
        if n_dims not in (1, 2) or name_bytes >= _MOST_PIECE_BYTES:
            self._lie(f"{label} has {n_dims} dimensions and a name of {name_bytes} bytes", "a LLaMA has none such")
        shape = self._u32s(n_dims, label)
        name = self._take(name_bytes, f"the name of {label}").decode("utf-8", "replace")
        kind = GGML_TYPES.get(code)
        if kind is None or shape[0] % kind.block_size or not all(shape):
            self._lie(f"{label} has no known type or is not whole blocks of it", f"type {code}, {shape}")
        self.at += -self.at % _ALIGNMENT if padded else 0
        self.at += kind.nbytes(math.prod(shape))
        if self.at > self.file_bytes:
            self._lie(f"the file ends inside {_shown(name)}", f"{self.at - self.file_bytes} bytes are missing")
        self.file.seek(self.at)
        return _Tensor(name=name, shape=shape, type=kind.name)

    def _check_shapes(self, tensors: Mapping[str, _Tensor], n_vocab: int, n_embd: int, n_layer: int) -> tuple[int, int]:
        """Width of the keys, and of the feed-forward blocks; every tensor that a LLaMA has is there, and no other."""
        first = {name: tensors[key].shape for name in ("wk", "w1") if (key := _first(name)) in tensors}
        kv, ff = (first[name][-1] if name in first else 0 for name in ("wk", "w1"))
        wanted = _shapes(n_vocab=n_vocab, n_embd=n_embd, n_layer=n_layer, kv=kv, ff=ff)
        if missing := next((name for name in wanted if name not in tensors), None):
            self._lie("a tensor is missing (the file may be cut, or one part of several)", missing)
        if strange := next((name for name in tensors if name not in wanted), None):
            self._lie("a tensor that a LLaMA does not have", _shown(strange))
        wrong = next((each for each in tensors.values() if each.shape != wanted[each.name]), None)
        if wrong:
            self._lie(
                f"{wrong.name} is {wrong.shape}, not {wanted[wrong.name]} (the file may be one part of several)",
                f"n_vocab {n_vocab}, n_embd {n_embd}",
            )
        return kv, ff

    def _u32s(self, count: int, label: str) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self._take(4 * count, label))

    def _take(self, size: int, label: str) -> bytes:
        data = self.file.read(size) if self.at + size <= self.file_bytes else b""
        if len(data) != size:
            self._lie(f"the file ends inside {label}", f"{size} bytes wanted, {self.file_bytes - self.at} left")
        self.at += size
        return data

    def _lie(self, what: str, value: object) -> NoReturn:
        raise ArtifactError(
            f"{self.path.name}: {what}",
            evidence=f"value  {value}\nat     byte {self.at} of {self.file_bytes}\nfile   {self.path}",
            hint="fetch the file again and compare its size and SHA-256 with the publisher's",
        )


def _first(name: str) -> str:
    return f"layers.0.{'attention' if name == 'wk' else 'feed_forward'}.{name}.weight"


def _shapes(*, n_vocab: int, n_embd: int, n_layer: int, kv: int, ff: int) -> dict[str, tuple[int, ...]]:
    """Extents of every tensor of a LLaMA by its name of 2023, in ggml order."""
    found: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (n_embd, n_vocab),
        "norm.weight": (n_embd,),
        "output.weight": (n_embd, n_vocab),
    }
    for layer in range(n_layer):
        wide = {"attention.wq": n_embd, "attention.wk": kv, "attention.wv": kv, "attention.wo": n_embd}
        wide |= {"feed_forward.w1": ff, "feed_forward.w3": ff}
        found |= {f"layers.{layer}.{name}.weight": (n_embd, width) for name, width in wide.items()}
        found[f"layers.{layer}.feed_forward.w2.weight"] = (ff, n_embd)
        found |= {f"layers.{layer}.{name}.weight": (n_embd,) for name in ("attention_norm", "ffn_norm")}
    return found


def _shown(name: str) -> str:
    return repr(name[:80])

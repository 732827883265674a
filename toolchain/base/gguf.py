"""Reads a GGUF's header without trusting a byte of it.

Each length and count is held against the bytes that are left before anything is allocated or looped
over, so a hostile file costs no more time or memory than its own header bytes, and tensor data is never
read. Layout: the GGUF specification (docs/gguf.md of ggml); which deviations are lies: what gguf_init and
the model loader of llama.cpp commit 0c1e570 refuse, and what they would silently misread.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, Literal, Self, TypeAlias

from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.ggml_types import GGML_TYPES, REMOVED_GGML_TYPES, name_format
from toolchain.base.gguf_header import U64, GgufHeader, MetadataValue, StringArray, TensorInfo

__all__ = [
    "GGML_TYPES",
    "GgufHeader",
    "HeaderLimits",
    "MetadataValue",
    "StringArray",
    "TensorInfo",
    "parse_header",
    "read_header",
]


@dataclass(frozen=True, kw_only=True)
class HeaderLimits:
    """What a header may ask for however large its file is; each several times the largest real one."""

    header_bytes: int = 128 * 2**20
    kv_count: int = 65_536
    tensor_count: int = 131_072
    string_bytes: int = 16 * 2**20
    array_items: int = 8 * 2**20
    alignment: int = 2 * 2**20
    layers: int = 4_096


def read_header(path: Path, *, limits: HeaderLimits = HeaderLimits()) -> GgufHeader:
    """The header of the GGUF at ``path``. ArtifactError names the first lie; UsageError: no readable file."""
    try:
        mode = path.stat().st_mode  # before opening: opening a FIFO would wait for its writer
        if stat.S_ISREG(mode):
            with path.open("rb", buffering=_CHUNK) as file:
                return parse_header(file, path, os.fstat(file.fileno()).st_size, limits=limits)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", evidence=str(error), hint="check the path") from error
    hint = "name the .gguf file inside it" if stat.S_ISDIR(mode) else "name a regular file"
    raise UsageError(f"{path} is not a file", hint=hint)


def parse_header(file: BinaryIO, path: Path, file_bytes: int, *, limits: HeaderLimits = HeaderLimits()) -> GgufHeader:
    """As ``read_header``, from anything that reads and seeks; ``path`` is only the name that the header bears."""
    return _parse(_Cursor(file, path, file_bytes, limits))


_NumberCode: TypeAlias = Literal["B", "b", "H", "h", "I", "i", "f", "?", "Q", "q", "d"]

_CHUNK: Final = 64 * 1024
_U32_TYPE, _STRING_TYPE, _ARRAY_TYPE = 4, 8, 9
# By value type number (enum gguf_type of gguf.h), as struct and memoryview spell it.
_NUMBERS: Final[Mapping[int, _NumberCode]] = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i"},
    **{6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"},
}
_KEY_TYPES: Final[Mapping[type, tuple[str, ...]]] = {
    str: ("general.architecture", "general.type", "tokenizer.ggml.model", "tokenizer.chat_template"),
    int: ("general.file_type", "general.alignment", "split.no", "split.count", "split.tensors.count"),
    StringArray: ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"),
    memoryview: ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"),
}
_TYPE_NAMES: Final[Mapping[type, str]] = {
    str: "a string",
    int: "an integer",
    StringArray: "an array of strings",
    memoryview: "an array of numbers",
}
_KEY_TYPE: Final = {key: kind for kind, keys in _KEY_TYPES.items() for key in keys}
_ARCH_INTS: Final = (".context_length", ".block_count", ".embedding_length")
_AGAIN: Final = "fetch or convert the file again and compare its size and SHA-256 with the publisher's"
_REBUILD: Final = "convert the original model again with the current converter"
_NEWER: Final = "if the file is sound, it is newer than this llama.cpp: `./inv build --source git:https://github.com/ggml-org/llama.cpp@master`"
_RAISE: Final = "no known model needs so much: do not load it unless you know who made it, and how"


class _Cursor:
    """Where the reader stands, what it read last, and whether the next bytes are there to be read."""

    def __init__(self, file: BinaryIO, path: Path, file_bytes: int, limits: HeaderLimits) -> None:
        self.file, self.path, self.file_bytes, self.limits = file, path, file_bytes, limits
        self.at = self.label_at = 0
        self.label = "magic"

    @property
    def left(self) -> int:
        return self.file_bytes - self.at

    def point(self, label: str, at: int) -> Self:
        self.label, self.label_at = label, at
        return self

    def lie(self, what: str, value: object, *, skip: int = 0, hint: str = _AGAIN) -> ArtifactError:
        """The error about what was read last, or pointed at."""
        where = f"byte {self.label_at + skip} of {self.file_bytes}"
        evidence = f"field  {self.label}\nvalue  {_shown(value)}\nat     {where}\nfile   {self.path}"
        return ArtifactError(f"{self.path.name}: {what}", evidence=evidence, hint=hint)

    def take(self, size: int, label: str) -> bytes:
        self.point(label, self.at)
        if size > self.left:
            raise self.lie("the file ends inside its header", f"{size} bytes wanted, {self.left} left")
        if self.at + size > self.limits.header_bytes:
            most = self.limits.header_bytes
            raise self.lie(f"a header above {most} bytes", f"{size} bytes more", hint=_RAISE)
        data = self.file.read(size)
        if len(data) != size:
            raise self.lie("the file shrank while it was read", f"{len(data)} of {size} bytes came")
        self.at += size
        return data

    def number(self, code: _NumberCode, label: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code), label))[0])

    def count(self, label: str, *, item_bytes: int, limit: int) -> int:
        """How many items follow, of ``item_bytes`` at least: no more than the rest of the file can hold."""
        value = self.number("Q", label)
        if value * item_bytes > self.left:
            raise self.lie("more items announced than the file can hold", value)
        if value > limit:
            raise self.lie(f"more than {limit} items announced", value, hint=_RAISE)
        return value

    def text(self, label: str, *, longest: int) -> str:
        length = self.number("Q", f"length of {label}")
        if length > self.left:
            raise self.lie("a string runs past the end of the file", length)
        if length > longest:
            raise self.lie(f"a string longer than {longest} bytes", length)
        raw = self.take(length, label)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.lie("text is not UTF-8", raw[error.start :][:16], skip=error.start) from None

    def name(self, label: str, *, longest: int) -> str:
        name = self.text(label, longest=longest)
        if not name or "\0" in name:  # C readers stop at the NUL and see another name
            raise self.lie("a name is empty or holds a NUL byte", name)
        return name

    def strings(self, count: int, label: str) -> StringArray:
        """Steps over ``count`` strings, reading block by block and noting where each starts."""
        first, packed, starts, end = self.at, bytearray(), array("Q"), 0
        while len(starts) < count or end > len(packed):
            wanted = end + 8 * (len(starts) < count) - len(packed)
            if wanted > 0:
                room = min(self.left, self.limits.header_bytes - self.at)
                packed += self.take(max(wanted, min(_CHUNK, room)), label)
                continue
            (length,) = U64.unpack_from(packed, end)
            if length > self.file_bytes - first - end - 8:
                self.point(f"length of {label}[{len(starts)}]", first + end)
                raise self.lie("a string runs past the end of the file", length)
            starts.append(end + 8)
            end += 8 + length
        self.at = self.file.seek(first + end)
        return StringArray(bytes(memoryview(packed)[:end]), starts)


def _parse(cursor: _Cursor) -> GgufHeader:
    version = _read_version(cursor)
    # The least a tensor takes: name length, a byte of name, dimension count, type, offset. A key likewise.
    n_tensors = cursor.count("tensor count", item_bytes=25, limit=cursor.limits.tensor_count)
    n_keys = cursor.count("key count", item_bytes=14, limit=cursor.limits.kv_count)
    metadata = _read_metadata(cursor, n_keys)
    alignment = metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)
    tensors = _read_tensors(cursor, n_tensors, alignment)
    data_offset = _padded(cursor.at, alignment) if tensors else cursor.at
    for tensor in tensors:
        start = data_offset + tensor.offset
        if start + tensor.nbytes > cursor.file_bytes:
            cursor.point(f"data of {_shown(tensor.name)}", start)
            raise cursor.lie("the file ends inside its tensor data", f"{tensor.nbytes} bytes")
    return GgufHeader(
        path=cursor.path,
        version=version,
        byte_order="little",
        metadata=MappingProxyType(metadata),
        tensors=tensors,
        alignment=alignment,
        data_offset=data_offset,
        file_bytes=cursor.file_bytes,
    )


def _read_version(cursor: _Cursor) -> int:
    head = cursor.file.read(256)
    if head[:4] != b"GGUF":
        raise cursor.lie(f"not a GGUF but {name_format(head)}", head[:8])
    cursor.at = cursor.file.seek(4)
    match cursor.number("I", "version"):
        case 2 | 3 as version:
            return version
        case 1:
            raise cursor.lie("GGUF version 1, of August 2023, is no longer read", 1, hint=_REBUILD)
        case version if version and version % 2**16 == 0:
            hint = "fetch the little-endian build of the model, or convert the original here"
            raise cursor.lie("a big-endian GGUF", version, hint=hint)
        case version:
            raise cursor.lie("neither GGUF version 2 nor 3", version, hint=_NEWER)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    """Every key once, those the project relies on of their type and in their range."""
    metadata: dict[str, MetadataValue] = {}
    places: dict[str, int] = {}
    for index in range(count):
        key = cursor.name(f"key {index}", longest=65_535)
        if key in metadata:
            raise cursor.lie("a key appears twice", key)
        places[key] = cursor.at
        metadata[key] = value = _read_value(cursor, key)
        cursor.point(_shown(key), places[key])
        wanted = int if key.endswith(_ARCH_INTS) else _KEY_TYPE.get(key)
        if wanted and type(value) is not wanted:
            raise cursor.lie(f"a key that is not {_TYPE_NAMES[wanted]}", value)
        if wanted is int and isinstance(value, int):
            _check_range(cursor, key, value)
    no, shards = metadata.get("split.no", -1), metadata.get("split.count", 0)
    if isinstance(no, int) and isinstance(shards, int) and shards > 1 and not 0 <= no < shards:
        cursor.point("split.no", places["split.count"])
        raise cursor.lie(f"not the number of one of the {shards} shards", metadata.get("split.no"))
    tokens = metadata.get("tokenizer.ggml.tokens")
    for key in _KEY_TYPES[memoryview]:
        values = metadata.get(key)
        if isinstance(tokens, StringArray) and isinstance(values, memoryview) and len(values) < len(tokens):
            raise cursor.point(key, places[key]).lie(f"fewer values than the {len(tokens)} tokens", values)
    later_shard = isinstance(no, int) and no > 0  # gguf-split repeats no metadata in these
    architecture = metadata.get("general.architecture")
    if not architecture and not later_shard and metadata.get("general.type") != "imatrix":
        cursor.point("general.architecture", cursor.at)
        raise cursor.lie("no architecture is named", architecture, hint=_REBUILD)
    return metadata


def _check_range(cursor: _Cursor, key: str, value: int) -> None:
    if value < 0:
        raise cursor.lie("a count is negative", value)
    if key.endswith(".block_count") and value > cursor.limits.layers:
        raise cursor.lie(f"more than {cursor.limits.layers} layers", value, hint=_RAISE)
    if key == "split.count" and value > 65_535:  # a u16 in llama.cpp
        raise cursor.lie("more than 65535 shards", value)
    if key == "general.alignment":  # the specification wants a multiple of 8, llama.cpp a power of two
        if value < 8 or value & (value - 1):
            raise cursor.lie("an alignment that is not a power of two from 8 up", value)
        if value > cursor.limits.alignment:
            raise cursor.lie(f"an alignment above {cursor.limits.alignment}", value, hint=_RAISE)


def _read_value(cursor: _Cursor, key: str) -> MetadataValue:
    label = f"value of {_shown(key)}"
    code = cursor.number("I", f"type of {label}")
    if key == "general.alignment" and code != _U32_TYPE:
        raise cursor.lie("an alignment that is not a u32", code)
    if code == _STRING_TYPE:
        return cursor.text(label, longest=cursor.limits.string_bytes)
    if code != _ARRAY_TYPE:
        return _read_numbers(cursor, _number_code(cursor, code), 1, label)[0]
    code = cursor.number("I", f"item type of {label}")
    item = None if code == _STRING_TYPE else _number_code(cursor, code)
    item_bytes = struct.calcsize(item) if item else 8
    count = cursor.count(f"size of {label}", item_bytes=item_bytes, limit=cursor.limits.array_items)
    return _read_numbers(cursor, item, count, label) if item else cursor.strings(count, label)


def _number_code(cursor: _Cursor, code: int) -> _NumberCode:
    if code not in _NUMBERS:
        fault = "an array of arrays, which llama.cpp refuses" if code == _ARRAY_TYPE else "no such value type"
        raise cursor.lie(fault, code)
    return _NUMBERS[code]


def _read_numbers(
    cursor: _Cursor, code: _NumberCode, count: int, label: str
) -> memoryview[int] | memoryview[float] | memoryview[bool]:
    raw = cursor.take(count * struct.calcsize(code), label)
    if code == "?" and (strange := raw.strip(b"\0\1")):
        raise cursor.lie("a bool that is neither 0 nor 1", strange[0], skip=raw.index(strange[0]))
    if sys.byteorder == "big" and code != "?":
        numbers = array(code, raw)
        numbers.byteswap()
        raw = numbers.tobytes()
    return memoryview(raw).cast(code)


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    """Every name once; each tensor begins where the one before it, padded, ends, as gguf_init demands."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for index in range(count):
        name = cursor.name(f"name of tensor {index}", longest=63)  # GGML_MAX_NAME less its NUL
        if name in tensors:
            raise cursor.lie("a tensor name appears twice", name)
        tensors[name] = tensor = _read_tensor(cursor, name)
        if tensor.offset % alignment:
            raise cursor.lie(f"a tensor not aligned to {alignment} bytes", tensor.offset)
        if tensor.offset != expected:
            fault = "overlaps the one before it" if tensor.offset < expected else "leaves a gap before it"
            raise cursor.lie(f"a tensor {fault}", f"{tensor.offset}, expected {expected}")
        expected = _padded(tensor.offset + tensor.nbytes, alignment)
    return tuple(tensors.values())


def _read_tensor(cursor: _Cursor, name: str) -> TensorInfo:
    label = f"tensor {_shown(name)}"
    n_dims = cursor.number("I", f"dimension count of {label}")
    if n_dims > 4:
        raise cursor.lie("a tensor of more than 4 dimensions", n_dims)
    raw = cursor.take(8 * n_dims, f"shape of {label}")
    shape = struct.unpack(f"<{n_dims}Q", raw) or (1,)  # no dimensions: one element, as in ggml
    n_elements = math.prod(shape)
    if not 0 < n_elements < 2**63:
        raise cursor.lie("a tensor of no elements, or of more than an int64 counts", shape)
    code = cursor.number("i", f"type of {label}")
    if code in REMOVED_GGML_TYPES:
        hint = "quantize the original model again: llama.cpp has dropped this type"
        raise cursor.lie(f"the removed tensor type {REMOVED_GGML_TYPES[code]}", code, hint=hint)
    if code not in GGML_TYPES:
        raise cursor.lie("no such tensor type", code, hint=_NEWER)
    kind = GGML_TYPES[code]
    if shape[0] % kind.block_size:
        raise cursor.lie(f"rows that are not whole {kind.name} blocks of {kind.block_size}", shape)
    offset = cursor.number("Q", f"offset of {label}")
    return TensorInfo(name=name, shape=shape, type=kind.name, offset=offset, nbytes=kind.nbytes(n_elements))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _shown(value: object) -> str:
    """Short and printable, whatever a file put into it."""
    if isinstance(value, StringArray | memoryview):
        return f"an array of {len(value)}"
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 96 else f"{text[:93]}..."

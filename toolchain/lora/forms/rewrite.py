"""A GGUF once more, with some of its tensors changed: metadata to the byte, the other tensors to the byte.

Shards are written as one file. One piece of one tensor is in memory at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from toolchain.base import files
from toolchain.base.command import OnProgress
from toolchain.base.errors import ArtifactError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import GgufHeader, TensorInfo

Content = Callable[[GgufHeader, TensorInfo], Iterable[bytes | memoryview]]
"""The new data of a tensor, piece by piece."""

_COPY_BYTES: Final = 1 << 24
_SPLIT_KEYS: Final = frozenset({"split.no", "split.count", "split.tensors.count"})
_STRING, _ARRAY = 8, 9
# Bytes by value type number (enum gguf_type of gguf.h).
_NUMBER_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def rewritten_bytes(shards: Sequence[GgufHeader], types: Mapping[str, str]) -> int:
    """About how large the file becomes whose changed tensors have ``types``."""
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return shards[0].data_offset + sum(_padded(_nbytes(t, types), shards[0].alignment) for t in tensors)


def rewrite(
    shards: Sequence[GgufHeader],
    output: Path,
    *,
    types: Mapping[str, str],
    content: Content,
    notes: Mapping[str, str],
    on_progress: OnProgress = lambda *_: None,
) -> None:
    """Write the model of ``shards`` to ``output``, which the caller stages.

    Each tensor named in ``types`` is stored in that type with what ``content`` gives; ``notes`` are keys of the header,
    in the place of the base's own of the same name. ``on_progress`` is told bytes of the base.
    """
    tensors = [(shard, tensor) for shard in shards for tensor in shard.tensors]
    alignment = shards[0].alignment
    total, done = sum(tensor.nbytes for _, tensor in tensors), 0
    with files.disk_errors(output), output.open("wb") as sink:
        sink.write(_header(shards[0], [tensor for _, tensor in tensors], types, notes))
        sink.write(bytes(-sink.tell() % alignment))
        for shard, tensor in tensors:
            at = sink.tell()
            for piece in content(shard, tensor) if tensor.name in types else _copied(shard, tensor):
                sink.write(piece)
            if sink.tell() - at != _nbytes(tensor, types):
                raise ArtifactError(f"{shard.path.name} changed while it was read", evidence=tensor.name)
            sink.write(bytes(-sink.tell() % alignment))
            done += tensor.nbytes
            on_progress(done, total)


def _header(
    first: GgufHeader, tensors: Sequence[TensorInfo], types: Mapping[str, str], notes: Mapping[str, str]
) -> bytes:
    left_out = _SPLIT_KEYS | notes.keys()
    pairs = [raw for key, raw in _metadata(first) if key not in left_out]
    pairs += [_text(key) + struct.pack("<I", _STRING) + _text(value) for key, value in notes.items()]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(pairs)), *pairs]
    offset = 0
    for tensor in tensors:
        kind = GGML_TYPES_BY_NAME[types.get(tensor.name, tensor.type)]
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        parts += [_text(tensor.name), shape, struct.pack("<IQ", kind.id, offset)]
        offset += _padded(_nbytes(tensor, types), first.alignment)
    return b"".join(parts)


def _metadata(header: GgufHeader) -> Iterator[tuple[str, bytes]]:
    """Each key with its bytes in the file, key and value; the header was checked."""
    with header.path.open("rb") as file:
        raw = file.read(header.data_offset)
    (count,) = struct.unpack_from("<Q", raw, 16)
    at = 24
    for _ in range(count):
        start, after_key = at, _after_string(raw, at)
        (kind,) = struct.unpack_from("<I", raw, after_key)
        at = _after_value(raw, after_key + 4, kind)
        yield raw[start + 8 : after_key].decode(), raw[start:at]


def _after_value(raw: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _after_string(raw, at)
    if kind != _ARRAY:
        return at + _NUMBER_BYTES[kind]
    item, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    if item != _STRING:
        return at + int(count) * _NUMBER_BYTES[item]
    for _ in range(count):
        at = _after_string(raw, at)
    return at


def _after_string(raw: bytes, at: int) -> int:
    return at + 8 + int(struct.unpack_from("<Q", raw, at)[0])


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _copied(shard: GgufHeader, tensor: TensorInfo) -> Iterator[bytes]:
    left = tensor.nbytes
    with shard.path.open("rb") as file:
        file.seek(shard.data_offset + tensor.offset)
        while left and (piece := file.read(min(left, _COPY_BYTES))):
            left -= len(piece)
            yield piece


def _nbytes(tensor: TensorInfo, types: Mapping[str, str]) -> int:
    return GGML_TYPES_BY_NAME[types.get(tensor.name, tensor.type)].nbytes(tensor.n_elements)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

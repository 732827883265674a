"""Which weights a GGUF holds, whatever its metadata say: the hash by which adapter and base know each other.

A changed chat template or name leaves it as it is, and so do other shards; another quantization, another fine-tune, one
changed block do not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from toolchain.base import files
from toolchain.base.errors import ArtifactError, FoundryError
from toolchain.base.gguf import GgufHeader, TensorInfo, read_header

BASE_SHA256_KEY: Final = "foundry.lora.base_sha256"
"""In an adapter's header: ``tensors_sha256`` of the base that it was trained on."""
BASE_NAME_KEY: Final = "foundry.lora.base"
"""In an adapter's header: the file name of that base."""

_READ_BYTES: Final = 1 << 20


def tensors_sha256(header: GgufHeader, *, progress: Callable[[int, int], None] | None = None) -> str:
    """Hex SHA-256 over name, type, shape and data hash of every tensor of the model, all shards, in order of name.

    The file is read whole, on all cores; the result is remembered by the shards' inode, size and time, where
    FOUNDRY_HOME can be written. ``progress`` is told bytes done and in all. ArtifactError for a file that changes
    while it is read.
    """
    paths = header.shard_paths
    seen = _seen(paths)
    place = files.sha256_text(str(header.path.resolve()))[:32]
    note = files.foundry_home() / "work" / "digests" / f"tensors-{place}.json"
    match files.read_json(note):
        case {"seen": known, "sha256": str(value)} if known == seen:
            return value
    value = files.digest(_rows([read_header(path) for path in paths], progress))
    if _seen(paths) != seen:
        raise ArtifactError(
            f"{header.path.name} changed while it was read", hint="run it again when nothing writes to the file"
        )
    with suppress(FoundryError, OSError):
        files.write_json(note, {"path": str(header.path), "seen": seen, "sha256": value})
    return value


def _seen(paths: Sequence[Path]) -> list[list[int]]:
    stats = [path.stat() for path in paths]
    return [[stat.st_ino, stat.st_size, stat.st_mtime_ns] for stat in stats]


def _rows(shards: Sequence[GgufHeader], progress: Callable[[int, int], None] | None) -> list[list[object]]:
    """Name, type, shape and hash of every tensor, by name."""
    parts = [(shard, tensor) for shard in shards for tensor in shard.tensors]
    done, total = 0, sum(tensor.nbytes for _, tensor in parts)
    rows: list[list[object]] = []
    pool = ThreadPoolExecutor(os.cpu_count())  # hashlib releases the interpreter for each large buffer
    try:
        for (_, tensor), value in zip(parts, pool.map(lambda part: _sha256(*part), parts), strict=True):
            rows.append([tensor.name, tensor.type, list(tensor.shape), value])
            done += tensor.nbytes
            if progress:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for what is being read, not for the rest
    return sorted(rows, key=lambda row: str(row[0]))


def _sha256(shard: GgufHeader, tensor: TensorInfo) -> str:
    found, left = hashlib.sha256(), tensor.nbytes
    with shard.path.open("rb", buffering=0) as file:
        file.seek(shard.data_offset + tensor.offset)
        while left and (piece := file.read(min(left, _READ_BYTES))):
            found.update(piece)
            left -= len(piece)
    return found.hexdigest()

"""Which weights a GGUF holds, whatever its metadata say: the hash by which adapter and base know each other.

A changed chat template or name leaves it as it is; another quantization, another fine-tune, one changed block do not.
"""

from __future__ import annotations

import hashlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from toolchain.base import files
from toolchain.base.gguf import GgufHeader, read_header

BASE_SHA256_KEY: Final = "foundry.lora.base_sha256"
"""In an adapter's header: ``tensors_sha256`` of the base that it was trained on."""
BASE_NAME_KEY: Final = "foundry.lora.base"
"""In an adapter's header: the file name of that base."""


def tensors_sha256(header: GgufHeader) -> str:
    """Hex SHA-256 over name, type, shape and data hash of every tensor of the model, all shards, in order of name.

    The file is read whole, on all cores; the result is remembered by the shards' inode, size and time.
    """
    shards = [read_header(path) for path in header.shard_paths]
    stats = [(shard.path.stat().st_ino, shard.path.stat().st_size, shard.path.stat().st_mtime_ns) for shard in shards]
    place = files.sha256_text(str(header.path.resolve()))[:32]
    note = files.home_dir("work") / "digests" / f"tensors-{place}.json"
    seen = [list(stat) for stat in stats]
    match files.read_json(note):
        case {"seen": known, "sha256": str(value)} if known == seen:
            return value
    rows = sorted(row for shard in shards for row in _tensor_rows(shard))
    value = files.digest(rows)
    files.write_json(note, {"path": str(header.path), "seen": seen, "sha256": value})
    return value


def _tensor_rows(shard: GgufHeader) -> list[list[object]]:
    with shard.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            spans = [(shard.data_offset + t.offset, shard.data_offset + t.offset + t.nbytes) for t in shard.tensors]
            with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter for each large buffer
                hashes = pool.map(lambda span: hashlib.sha256(view[span[0] : span[1]]).hexdigest(), spans)
                named = zip(shard.tensors, hashes, strict=True)
                return [[t.name, t.type, list(t.shape), value] for t, value in named]
        finally:
            view.release()

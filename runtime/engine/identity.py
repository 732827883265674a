"""Which GGUF it is: a digest of its beginning and of samples of all of it, in a millisecond whatever its size."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

HEAD_BYTES: Final = 2**20
"""All of a header but the end of a large vocabulary."""
SAMPLES: Final = 64
SAMPLE_BYTES: Final = 4096
_SHARD: Final = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def gguf_identity(path: Path) -> str:
    """Hex digest of the size, the first MiB and evenly spread samples of ``path``, and of each of its other shards.

    For a file that was checked before: nothing is parsed. A fine-tuned copy has the header of its base, which is why
    data counts; one that differs between the samples alone goes unnoticed.
    """
    total = hashlib.sha256()
    for shard in _shards(path):
        size = shard.stat().st_size
        total.update(size.to_bytes(8, "little"))
        with shard.open("rb") as file:
            total.update(file.read(HEAD_BYTES))
            for number in range(1, SAMPLES + 1):
                file.seek(max(0, size * number // SAMPLES - SAMPLE_BYTES))
                total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()


def _shards(path: Path) -> list[Path]:
    """By llama.cpp's naming, x-00001-of-00003.gguf."""
    if not (found := _SHARD.search(path.name)):
        return [path]
    stem, count = path.name[: found.start()], int(found[1])
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]

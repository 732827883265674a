"""An image file as a part of a message."""

from __future__ import annotations

import base64
from contextlib import suppress
from pathlib import Path
from typing import Final

from runtime.engine.images import decode_image, read_image
from toolchain.base import files
from toolchain.base.errors import MissingError, UsageError

MOST_BYTES: Final = 20 * 2**20
"""What OpenAI takes of one image; a photograph has a tenth of it."""

# how a file begins, and its type: https://mimesniff.spec.whatwg.org/#image-type-pattern-matching-algorithm
_BEGINNINGS: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
)


def image_url(path: Path) -> str:
    """The image at ``path`` as a ``data:`` URL; UsageError for what is too large or no image that models take."""
    raw = read_image(path, most_bytes=MOST_BYTES)
    kind = next((kind for beginning, kind in _BEGINNINGS if raw.startswith(beginning)), None)
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        raise UsageError(f"{path.name} is no image that a model takes", hint="PNG, JPEG, GIF, WebP or BMP")
    with suppress(MissingError):  # where Pillow is not installed, who sees it tells
        decode_image(raw)
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def named_file(rest: str) -> tuple[Path, str]:
    """The file and the text behind it; a name with spaces stands in quotes."""
    quote = rest[:1]
    if quote in ("'", '"') and quote in rest[1:]:
        name, _, text = rest[1:].partition(quote)
    elif files.expand(rest).is_file():
        name, text = rest, ""
    else:
        name, _, text = rest.partition(" ")
    return files.expand(name), text.strip()

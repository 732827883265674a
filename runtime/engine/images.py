"""An image as a model takes it: decoded to rows of RGB, within bounds, whoever sent it."""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolchain.base.errors import MissingError, UsageError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_BYTES: Final = 64 * 2**20
MOST_PIXELS: Final = 64 * 10**6
"""A large camera's picture; vision parts scale everything down to a few million."""
MOST_SIDE_RATIO: Final = 200
"""Above it (Qwen's own bound) a resized picture has no height left."""

_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+(?:;[\w.+=-]+)*?;base64,", re.IGNORECASE)
_HINT: Final = "PNG, JPEG, WebP, GIF or BMP"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """``rgb`` holds ``height`` rows of ``width`` pixels, three bytes each."""

    width: int
    height: int
    rgb: bytes

    def shrunk(self, factor: float) -> Picture:
        """The picture with each side ``factor`` times as long, a pixel at least."""
        from PIL import Image

        size = (max(1, int(self.width * factor)), max(1, int(self.height * factor)))
        small = Image.frombytes("RGB", (self.width, self.height), self.rgb).resize(size, Image.Resampling.BOX)
        return Picture(width=size[0], height=size[1], rgb=small.tobytes())


def read_image(path: Path, *, most_bytes: int = MOST_BYTES) -> bytes:
    """The file at ``path``, which may be a pipe; UsageError where it cannot be read or has more than ``most_bytes``."""
    try:
        with path.open("rb") as file:
            raw = file.read(most_bytes + 1)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read", evidence=str(error), hint="check the path, and quote a name with spaces"
        ) from error
    if len(raw) > most_bytes:
        raise UsageError(
            f"{path.name} has more than {most_bytes >> 20} MiB, the most that an image may have", hint="make it smaller"
        )
    return raw


def image_bytes(url: str) -> bytes:
    """The file in a ``data:image/...;base64,`` URL; UsageError for any other (nothing is fetched)."""
    found = _DATA_URL.match(url)
    if found is None:
        raise UsageError(
            "an image is given as data:image/...;base64,...", evidence=url[:60], hint="send the file itself"
        )
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError("an image's base64 is damaged", evidence=str(error), hint="send the file itself") from error


def decode_image(raw: bytes) -> Picture:
    """The image file ``raw``: its first frame, upright, on white where it is transparent.

    Raises UsageError for what is no image of ``FORMATS``, is cut or damaged, or beyond the bounds above.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingError("images need Pillow", evidence=str(error), hint="run `./inv`") from error

    if len(raw) > MOST_BYTES:
        raise UsageError(f"the image has {len(raw)} bytes, {MOST_BYTES} are the most", hint="make it smaller")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE_RATIO * min(width, height):
                raise UsageError(
                    f"the image is {width} x {height} pixels",
                    hint=f"{MOST_PIXELS // 10**6} million pixels are the most, {MOST_SIDE_RATIO}:1 the longest form",
                )
            upright = ImageOps.exif_transpose(image)
            picture = _on_white(upright)
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError("this is no image that a model takes", evidence=repr(raw[:16]), hint=_HINT) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UsageError("the image cannot be read", evidence=f"{type(error).__name__}: {error}", hint=_HINT) from error
    return Picture(width=picture.width, height=picture.height, rgb=picture.tobytes())


def _on_white(image: Any) -> Any:
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")

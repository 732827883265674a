from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from runtime.engine.images import MOST_PIXELS, decode_image, image_bytes
from runtime.vision_file import vision_part
from tests.generated_models import write_header
from tests.generated_vision import picture, write_mmproj
from toolchain.base.errors import UsageError


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures_of_these_formats_become_rows_of_rgb(kind: str) -> None:
    found = decode_image(picture("any", kind=kind, width=24, height=12))
    assert (found.width, found.height, len(found.rgb)) == (24, 12, 3 * 24 * 12)


def test_transparent_parts_lie_on_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(out, "PNG")
    assert decode_image(out.getvalue()).rgb == b"\xff" * 6


def test_a_photograph_is_turned_upright() -> None:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was held upright
    Image.new("RGB", (8, 4)).save(out, "JPEG", exif=exif)
    found = decode_image(out.getvalue())
    assert (found.width, found.height) == (4, 8)


@pytest.mark.parametrize(
    "raw",
    [b"", b"words", b"ID3\x04 a song", b"RIFF\0\0\0\0WAVEfmt ", b"GIF89a", b"\0\0\0\x18ftypmp42", b"%PDF-1.7"],
)
def test_what_is_no_image_is_refused(raw: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        decode_image(raw)
    assert "PNG" in caught.value.hint


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_cut_image_is_refused(kind: str) -> None:
    whole = picture("cut", kind=kind, width=64, height=64)
    with pytest.raises(UsageError, match="image"):
        decode_image(whole[: len(whole) // 2])


def test_an_image_that_would_unpack_to_gigabytes_is_refused_by_its_header() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = 60_000
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    assert side * side > MOST_PIXELS
    with pytest.raises(UsageError):
        decode_image(bomb)


def test_an_image_with_no_height_to_speak_of_is_refused() -> None:
    with pytest.raises(UsageError, match="1000 x 2 pixels"):
        decode_image(picture("thin", width=1000, height=2))


def test_image_of_a_data_url_is_its_file() -> None:
    raw = picture("url")
    assert image_bytes("data:image/png;base64," + base64.b64encode(raw).decode()) == raw


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/cat.png", "file:///etc/passwd", "data:text/plain;base64,eA==", "data:image/png;base64,?"]
)
def test_nothing_but_a_data_url_is_read(url: str) -> None:
    with pytest.raises(UsageError):
        image_bytes(url)


def test_the_only_vision_part_beside_a_model_is_found_when_it_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_header(tmp_path / "model.gguf", "llama")
    assert vision_part(None, model, look_beside=True) is None
    beside = write_mmproj(tmp_path / "mmproj-model-f16.gguf", 256)
    found = vision_part(None, model, look_beside=True)
    assert found is not None
    assert found.path == beside
    assert vision_part(None, model, look_beside=False) is None
    other = write_mmproj(tmp_path / "mmproj-model-q8.gguf", 256)
    assert vision_part(None, model, look_beside=True) is None
    assert "--mmproj FILE names one" in capsys.readouterr().err
    named = vision_part(str(other), model, look_beside=True)
    assert named is not None
    assert named.path == other


def test_a_file_named_as_vision_part_must_be_one(tmp_path: Path) -> None:
    model = write_header(tmp_path / "model.gguf", "llama")
    with pytest.raises(UsageError, match="no vision or audio part"):
        vision_part(str(model), model, look_beside=True)


def test_a_damaged_file_beside_the_model_is_told_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_header(tmp_path / "model.gguf", "llama")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert vision_part(None, model, look_beside=True) is None
    assert "mmproj-model.gguf lies beside the model and is not used" in capsys.readouterr().err

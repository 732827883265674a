"""The reader of 2023's adapters: whatever is not whole is refused, for the price of its headers."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.ggla_files import tensor_header, write_ggla
from toolchain.base.errors import ArtifactError
from toolchain.build.ggla import MAGIC, read_adapter

HEADER = struct.pack("<4I", MAGIC, 1, 4, 4)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    numbers = np.random.default_rng(0)
    a, b = (numbers.standard_normal((rows, 4)).astype(np.float32) for rows in (6, 10))
    norm = numbers.standard_normal((6, 1)).astype(np.float32), np.ones((1, 1), np.float32)
    return write_ggla(tmp_path / "a.bin", {"output.weight": (a, b), "output_norm.weight": norm})


def why(path: Path) -> str:
    with pytest.raises(ArtifactError) as refused:
        read_adapter(path).pairs()
    return refused.value.evidence


def test_matrices_come_back_as_they_were_written(tmp_path: Path) -> None:
    a = np.arange(12, dtype=np.float32).reshape(6, 2)
    b = np.arange(20, dtype=np.float16).reshape(10, 2)
    found = read_adapter(write_ggla(tmp_path / "a.bin", {"output.weight": (a, b)}, rank=2, alpha=-3))
    assert (found.rank, found.alpha) == (2, -3)
    [(left, right)] = found.pairs()
    assert (left.name, left.shape, right.shape) == ("output.weight.loraA", (2, 6), (2, 10))
    np.testing.assert_array_equal(left.matrix, a)
    np.testing.assert_array_equal(right.matrix, b.astype(np.float32))


def test_the_pair_of_a_norm_has_one_output(whole: Path) -> None:
    _, (a, b) = read_adapter(whole).pairs()
    assert (a.matrix.shape, b.matrix.shape) == ((6, 1), (1, 1))


def test_a_file_cut_anywhere_is_refused(whole: Path) -> None:
    data = whole.read_bytes()
    refused = 0
    for size in range(len(data)):
        whole.write_bytes(data[:size])
        try:
            names = [a.name for a, _ in read_adapter(whole).pairs()]
        except ArtifactError:
            refused += 1
        else:
            assert names == ["output.weight.loraA"]
    assert refused == len(data) - 1  # behind the first pair, where what is left is a smaller adapter


def test_a_huge_file_costs_only_its_headers(tmp_path: Path) -> None:
    path, widths = tmp_path / "huge.bin", (16, 1 << 26)
    header = HEADER + tensor_header("output.weight.loraA", widths)
    header += bytes(-len(header) % 32)
    second = tensor_header("output.weight.loraB", widths)
    place = len(header) + 4 * 16 * (1 << 26)
    with path.open("wb") as file:
        file.write(header)
        file.seek(place)
        file.write(second + bytes(-(place + len(second)) % 32))
        file.truncate(file.tell() + 4 * 16 * (1 << 26))
    tracemalloc.start()
    [(a, b)] = read_adapter(path).pairs()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert a.shape == b.shape == widths
    assert path.stat().st_size > 8 << 30


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        pytest.param(tensor_header("x.loraA", (4, 1 << 31)), "it ends after", id="data beyond the end"),
        pytest.param(tensor_header("x.loraA", (0, 4)), "shape (0, 4)", id="no elements"),
        pytest.param(tensor_header("x.loraA", (1, 2, 3)), "3 dimensions", id="dimensions"),
        pytest.param(tensor_header("x.loraA", ()), "0 dimensions", id="no dimensions"),
        pytest.param(tensor_header("x.loraA", (4, 4), kind=2), "type 2", id="quantized"),
        pytest.param(tensor_header("x" * 80 + ".loraA", (4, 4)), "a name of 86 bytes", id="long name"),
        pytest.param(struct.pack("<4I", 1, 1 << 31, 0, 4), "a name of 2147483648 bytes", id="huge name"),
        pytest.param(tensor_header("x.weight", (4, 4)), "neither the A nor the B", id="no half"),
        pytest.param(struct.pack("<4I", 1, 4, 0, 4) + b"\xff\xfe\xfd\xfc", "is no text", id="bytes for a name"),
        pytest.param(b"", "it holds no tensors", id="empty"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, rest: bytes, told: str) -> None:
    path = tmp_path / "hostile.bin"
    path.write_bytes(HEADER + rest)
    assert told in why(path)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (struct.pack("<4I", 0x67676D6C, 1, 4, 4), "0x67676d6c"),
        (struct.pack("<4I", MAGIC, 2, 4, 4), "version 2"),
        (struct.pack("<4I", MAGIC, 1, 0, 4), "its rank is 0"),
        (b"GGUF", "0x46554747"),
    ],
)
def test_another_format_or_version_is_refused(tmp_path: Path, header: bytes, told: str) -> None:
    (tmp_path / "x.bin").write_bytes(header)
    assert told in why(tmp_path / "x.bin")


def test_halves_that_do_not_go_together_are_refused(tmp_path: Path, whole: Path) -> None:
    a, b = np.ones((6, 4), np.float32), np.ones((10, 3), np.float32)
    assert "is of rank 4, output.weight.loraB of rank 3" in why(
        write_ggla(tmp_path / "r.bin", {"output.weight": (a, b)})
    )
    twice = whole.read_bytes() + whole.read_bytes()[16:]
    whole.write_bytes(twice)
    assert "is in it twice" in why(whole)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert "No such file" in why(tmp_path / "nowhere.bin")

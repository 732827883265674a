"""A disk that fills while the data is prepared: said so, and nothing is left that looks like a dataset."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.front_door import on_small_disk

PROGRAM = """
import sys
from pathlib import Path
from toolchain.base.errors import FoundryError
from toolchain.lora.data.prepare import DataRequest, prepare_data
from toolchain.lora.data.records import DataFile

base, text, folder = sys.argv[1:]
request = DataRequest(
    base=base, sources=(DataFile(path=text, kind="text"),), held_out=0.1, held_out_file=None,
    n_ctx=256, packing=True, learn_prompts=False, seed=1, n_threads=1,
)
try:
    prepare_data(request, Path(folder), log=Path(text).with_name("log"))
except FoundryError as error:
    print(type(error).__name__, error.message, error.hint, sep="|")
"""


@pytest.mark.parametrize("size", ["16k", "300k", "3m"])
def test_a_full_disk_is_told_and_leaves_no_dataset(size: str, demo_gguf: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"Line {n} of a text with some words in it.\n" for n in range(20_000)))
    disk = tmp_path / "disk"
    argv = [sys.executable, "-c", PROGRAM, str(demo_gguf), str(text), str(disk / "data")]
    done, left = on_small_disk(size, disk, argv, env={})
    kind, message, hint = done.stdout.strip().split("|")
    assert kind == "MissingError", done.stdout
    assert "disk" in message
    assert "free some space" in hint
    assert not left

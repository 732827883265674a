"""The hash by which an adapter knows its base: of the weights, and of nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from toolchain.base import files, tensor_hash
from toolchain.base.errors import ArtifactError
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import tensors_sha256


def write(path: Path, *, name: str = "a", seed: int = 0, split: int = 0) -> Path:
    """A model of four tensors; ``split`` of them a file, if any. The path of its (first) file."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_name(name)
    writer.add_vocab_size(7)
    numbers = np.random.default_rng(seed)
    for number in range(4):
        writer.add_tensor(f"blk.{number}.ffn_up.weight", numbers.normal(size=(8, 32)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else path.with_name(f"{path.stem}-00001-of-{-(-4 // split):05d}.gguf")


def hash_of(path: Path) -> str:
    return tensors_sha256(read_header(path))


def test_another_name_leaves_the_hash_and_another_weight_changes_it(tmp_path: Path) -> None:
    first = hash_of(write(tmp_path / "one.gguf"))
    assert hash_of(write(tmp_path / "two.gguf", name="another and a longer one")) == first
    assert hash_of(write(tmp_path / "three.gguf", seed=1)) != first


def test_one_flipped_bit_changes_it(tmp_path: Path) -> None:
    path = write(tmp_path / "one.gguf")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    (tmp_path / "two.gguf").write_bytes(raw)
    assert hash_of(tmp_path / "two.gguf") != hash_of(path)


@pytest.mark.parametrize("split", [1, 3])
def test_a_split_model_has_the_hash_of_the_whole_one(tmp_path: Path, split: int) -> None:
    assert hash_of(write(tmp_path / "parts.gguf", split=split)) == hash_of(write(tmp_path / "whole.gguf"))


def test_a_model_is_read_once_until_it_is_written_again(tmp_path: Path) -> None:
    path = write(tmp_path / "one.gguf")
    told: list[tuple[int, int]] = []
    first = tensors_sha256(read_header(path), progress=lambda done, total: told.append((done, total)))
    assert told == [(1024 * number, 4096) for number in (1, 2, 3, 4)]
    told.clear()
    assert tensors_sha256(read_header(path), progress=lambda done, total: told.append((done, total))) == first
    assert told == []
    write(path, seed=1)
    assert hash_of(path) != first


def test_a_home_that_cannot_be_written_costs_only_the_memory_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "one.gguf")
    first = hash_of(path)
    (tmp_path / "taken").touch()
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "taken" / "home"))
    assert hash_of(path) == first


def test_a_file_that_is_replaced_while_it_is_read_is_told(tmp_path: Path) -> None:
    path, other = write(tmp_path / "one.gguf"), write(tmp_path / "two.gguf", seed=1)

    def replace(done: int, total: int) -> None:
        if done == total:
            os.replace(other, path)

    with pytest.raises(ArtifactError, match=r"one.gguf changed while it was read"):
        tensors_sha256(read_header(path), progress=replace)
    assert not list((files.foundry_home() / "work" / "digests").glob("tensors-*"))


def test_keys_are_those_that_adapters_carry() -> None:
    """Adapters that exist have them."""
    assert tensor_hash.BASE_SHA256_KEY == "foundry.lora.base_sha256"
    assert tensor_hash.BASE_NAME_KEY == "foundry.lora.base"

"""Adapters in GGUF form: what is written is read again, stands as llama.cpp wants it, and half a file is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from runtime.engine.adapters import check_adapter
from tests.generated_models import Family, write_model
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import BASE_NAME_KEY, BASE_SHA256_KEY
from toolchain.lora.forms.adapter import AdapterModel, Pair, check_against, read_adapter, write_adapter

NUMBERS = np.random.default_rng(5)


def pair(rows: int, cols: int, *, rank: int = 4, experts: int = 0, dora: bool = False) -> Pair:
    front = (experts,) if experts else ()

    def numbers(*shape: int) -> Any:
        return NUMBERS.standard_normal(shape).astype(np.float32)

    return Pair(a=numbers(*front, rank, cols), b=numbers(*front, rows, rank), magnitude=numbers(rows) if dora else None)


def adapter_for(base: Path, *parts: str, **changes: Any) -> AdapterModel:
    """Random pairs for the weights of ``base`` whose names hold one of ``parts``."""
    header = read_header(base)
    pairs = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1 and any(part in tensor.name for part in parts):
            cols, rows, experts = (*tensor.shape, 0)[:3]
            pairs[tensor.name] = pair(rows, cols, experts=experts)
    return replace(AdapterModel(architecture=header.architecture, alpha=8.0, pairs=pairs), **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base.gguf", "llama", n_layer=2)


def same(one: AdapterModel, other: AdapterModel) -> bool:
    assert one.pairs.keys() == other.pairs.keys()
    for target, mine in one.pairs.items():
        yours = other.pairs[target]
        np.testing.assert_array_equal(mine.a, yours.a)
        np.testing.assert_array_equal(mine.b, yours.b)
        assert (mine.magnitude is None) == (yours.magnitude is None)
        if mine.magnitude is not None and yours.magnitude is not None:
            np.testing.assert_array_equal(mine.magnitude, yours.magnitude)
    assert one.norms.keys() == other.norms.keys()
    return all((vector == other.norms[norm]).all() for norm, vector in one.norms.items())


def test_an_adapter_is_read_as_it_was_written(tmp_path: Path, base: Path) -> None:
    written = adapter_for(
        base, "attn_q", "token_embd", "ffn", base_sha256="ab" * 32, base_name="base.gguf", name="X", notes={"a.b": "c"}
    )
    write_adapter(tmp_path / "a.gguf", written)
    found = read_adapter(tmp_path / "a.gguf")
    assert same(written, found)
    assert (found.architecture, found.alpha, found.name) == ("llama", 8.0, "X")
    assert (found.base_sha256, found.base_name, dict(found.notes)) == ("ab" * 32, "base.gguf", {"a.b": "c"})
    metadata = read_header(tmp_path / "a.gguf").metadata
    assert metadata[BASE_SHA256_KEY] == "ab" * 32
    assert metadata[BASE_NAME_KEY] == "base.gguf"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_runtime_takes_what_is_written(tmp_path: Path, family: Family) -> None:
    base = write_model(tmp_path / "base.gguf", family, n_layer=2)
    write_adapter(tmp_path / "a.gguf", adapter_for(base, "attn", "token_embd", "exps", "output.weight"))
    found = check_adapter(tmp_path / "a.gguf", [read_header(base)])
    assert (found.rank, found.alpha, found.effect) == (4, 8.0, "")
    assert found.pairs == len(read_adapter(tmp_path / "a.gguf").pairs)


def test_the_embedding_s_halves_stand_exchanged_in_the_file(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "a.gguf", adapter_for(base, "token_embd", "attn_k"))
    shapes = {tensor.name: tensor.shape for tensor in read_header(tmp_path / "a.gguf").tensors}
    assert shapes["token_embd.weight.lora_a"] == (4, 512)  # (rank, n_vocab): a row for each token
    assert shapes["token_embd.weight.lora_b"] == (4, 256)
    assert shapes["blk.0.attn_k.weight.lora_a"] == (256, 4)
    assert shapes["blk.0.attn_k.weight.lora_b"] == (4, 128)


def test_magnitudes_and_norms_are_kept_and_no_runtime_takes_the_former(tmp_path: Path, base: Path) -> None:
    dora = AdapterModel(
        architecture="llama",
        alpha=4.0,
        pairs={"blk.0.attn_q.weight": pair(256, 256, dora=True)},
        norms={"blk.0.attn_norm.weight": np.ones(256, np.float32)},
    )
    write_adapter(tmp_path / "d.gguf", dora)
    assert same(dora, read_adapter(tmp_path / "d.gguf"))
    with pytest.raises(UsageError, match="dora"):
        check_adapter(tmp_path / "d.gguf", [read_header(base)])
    norms = replace(dora, pairs={"blk.0.attn_q.weight": pair(256, 256)})
    write_adapter(tmp_path / "n.gguf", norms)
    assert "1 norm" in check_adapter(tmp_path / "n.gguf", [read_header(base)]).effect


@pytest.mark.parametrize("alpha", [0.0, 6.0])
def test_each_pair_counts_by_alpha_over_its_own_rank(alpha: float) -> None:
    pairs = {"x": pair(8, 8, rank=2), "y": pair(8, 8, rank=4)}
    adapter = AdapterModel(architecture="llama", alpha=alpha, pairs=pairs)
    assert (adapter.factor("x"), adapter.factor("y")) == ((3.0, 1.5) if alpha else (1.0, 1.0))


@pytest.mark.parametrize(
    ("pairs", "norms", "words"),
    [
        ({}, {}, "changes no tensor"),
        ({"x": Pair(a=np.ones((2, 8), np.float32), b=np.ones((8, 3), np.float32))}, {}, "do not go together"),
        ({"x": Pair(a=np.ones(8, np.float32), b=np.ones(8, np.float32))}, {}, "do not go together"),
        ({"x": replace(pair(8, 8), magnitude=np.ones(7, np.float32))}, {}, "do not go together"),
        ({"x": replace(pair(8, 8), a=np.full((4, 8), np.nan, np.float32))}, {}, "not finite"),
        ({"x": pair(8, 8)}, {"blk.0.attn_norm.weight": np.full(8, np.inf, np.float32)}, "not finite"),
        ({"x": pair(8, 8)}, {"blk.0.attn_q.bias": np.ones(8, np.float32)}, "belongs in no"),
    ],
)
def test_an_adapter_that_is_not_whole_is_not_written(
    tmp_path: Path, pairs: Mapping[str, Pair], norms: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(ArtifactError, match=words):
        write_adapter(tmp_path / "a.gguf", AdapterModel(architecture="llama", alpha=1.0, pairs=pairs, norms=norms))
    assert not (tmp_path / "a.gguf").exists()


def written(path: Path, tensors: Mapping[str, Any], **keys: str) -> Path:
    """A file that says it is an adapter, with whatever ``tensors``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    for key, value in {"adapter.type": "lora", **keys}.items():
        writer.add_string(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


A, B = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x.lora_a": A}, "the pair for x is not whole"),
        ({"x.lora_a": A, "x.lora_b": B, "y.lora_magnitude": A[0]}, "the pair for y is not whole"),
        ({"x.lora_a": A, "x.lora_b": A}, "do not go together"),
        ({"x.lora_a": A, "x.lora_b": B * np.nan}, "not finite"),
        ({"x.lora_a": A, "x.lora_b": B.astype(np.int32)}, "of type I32"),
        ({"x.lora_a": A[0], "x.lora_b": B}, "of 1 and 2 dimensions"),
        ({"x.lora_a": A, "x.lora_b": B, "blk.0.attn_norm.weight": A[0]}, "added or takes the norm's place"),
        ({}, "changes no tensor"),
    ],
)
def test_a_file_that_is_no_whole_adapter_is_refused(tmp_path: Path, tensors: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        read_adapter(written(tmp_path / "a.gguf", tensors))


def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "a.gguf", adapter_for(base, "ffn"))
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="ends inside its tensor data"):
        read_adapter(tmp_path / "a.gguf")


def test_what_is_no_adapter_is_refused_by_what_it_is(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UsageError, match="of the kind 'model'"):
        read_adapter(base)
    with pytest.raises(UsageError, match="control_vector"):
        read_adapter(written(tmp_path / "c.gguf", {"x.lora_a": A, "x.lora_b": B}, **{"adapter.type": "control_vector"}))


def test_an_adapter_fits_only_a_model_with_its_weights(tmp_path: Path, base: Path) -> None:
    header = read_header(base)
    check_against(adapter_for(base, "attn", "ffn", "token_embd", "output.weight"), header)
    narrow = write_model(tmp_path / "narrow.gguf", "llama", n_layer=2, n_ff=256)
    with pytest.raises(ArtifactError, match=r"does not fit blk\.0\.ffn") as raised:
        check_against(adapter_for(narrow, "ffn", base_name="narrow.gguf"), header)
    assert raised.value.hint == "it was trained on narrow.gguf"
    deep = write_model(tmp_path / "deep.gguf", "llama", n_layer=3)
    with pytest.raises(ArtifactError, match=r"changes blk\.2\.attn_q\.weight, which base\.gguf does not have"):
        check_against(adapter_for(deep, "attn_q"), header)
    other = write_model(tmp_path / "other.gguf", "qwen3", n_layer=2)
    with pytest.raises(ArtifactError, match=r"is for qwen3, base\.gguf is a llama"):
        check_against(adapter_for(other, "attn_q"), header)
    experts = write_model(tmp_path / "experts.gguf", "mixtral", n_layer=1)
    check_against(adapter_for(experts, "exps"), read_header(experts))

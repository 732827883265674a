"""What the torch engine reads of a GGUF before it computes: names, orders, sizes, refusals. No built library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.generated_models import write_model
from toolchain.base.errors import UsageError

torch = pytest.importorskip("torch")

from toolchain.lora.torch_engine.architecture import find_architecture, model_config  # noqa: E402
from toolchain.lora.torch_engine.names import Converted  # noqa: E402
from toolchain.lora.torch_engine.unpack import require_known  # noqa: E402
from toolchain.lora.torch_engine.weights_file import WeightsFile  # noqa: E402


def test_blocks_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "qwen3moe", type="f16", random=True)
    file = WeightsFile([path])
    for tensor in gguf.GGUFReader(path).tensors:
        assert file.blocks(tensor.name).numpy().tobytes() == tensor.data.tobytes(), tensor.name


def test_writing_to_blocks_never_reaches_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", random=True)
    before = path.read_bytes()
    WeightsFile([path]).blocks("output.weight").fill_(7)
    assert path.read_bytes() == before


def test_reordered_rows_are_the_files_rows_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.lora.torch_engine.weights_file._READ_BYTES", 3000)  # not a multiple of a row
    file = WeightsFile([write_model(tmp_path / "model.gguf", "llama", random=True)])
    order = np.random.default_rng(1).permutation(512)
    rows = file.rows("output.weight")
    assert torch.equal(file.reordered_rows("output.weight", order), rows[torch.from_numpy(order)])


def test_the_order_of_llamas_rows_undoes_what_the_converter_did(tmp_path: Path) -> None:
    """The converter's own lines: conversion/llama.py, LlamaModel.permute."""
    file = WeightsFile([write_model(tmp_path / "model.gguf", "llama", n_head=8, n_head_kv=2, head=32)])
    converted = Converted(find_architecture(file.first), model_config(file).to_dict())
    numbers = np.random.default_rng(1)
    for name, heads in (("attn_q", 8), ("attn_k", 2)):
        original = numbers.standard_normal((heads * 32, 256))
        filed = original.reshape(heads, 2, 16, 256).swapaxes(1, 2).reshape(original.shape)
        order = converted.row_order(f"blk.0.{name}.weight", len(filed))
        assert order is not None
        assert (filed[order] == original).all()
    assert converted.row_order("blk.0.attn_v.weight", 64) is None


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    file = WeightsFile([write_model(tmp_path / "model.gguf", "granitehybrid")])
    with pytest.raises(UsageError, match="granitehybrid cannot be trained") as refused:
        model_config(file)
    assert "gemma3, granite, lfm2, llama" in refused.value.evidence


def test_a_type_without_a_way_to_floats_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(UsageError, match="Q8_K") as refused:
        require_known("Q8_K")
    assert {"F16", "Q4_K", "IQ4_XS", "MXFP4"} <= set(refused.value.evidence.replace(",", "").split())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.rope.scaling.type", "su", "scaled by su"),
        ("llama.attention.value_length", 128, "heads of 64 and 128 values"),
        ("llama.attention.head_count", 0, "how many heads"),
        ("llama.attention.head_count", 3, "no llama of the sizes"),
        ("llama.rope.dimension_count", 32, "32 of 64"),
    ],
)
def test_a_header_that_asks_for_another_function_is_refused(key: str, value: object, said: str, tmp_path: Path) -> None:
    """Rather than read as if it had not asked: the adapter would be trained for a model that nobody runs."""
    file = WeightsFile([write_model(tmp_path / "model.gguf", "llama")])
    file.headers[0] = replace(file.first, metadata={**file.first.metadata, key: value})
    with pytest.raises(UsageError, match=said):
        model_config(file)


def test_the_size_of_heads_is_the_files_and_not_the_width_by_heads(tmp_path: Path) -> None:
    file = WeightsFile([write_model(tmp_path / "model.gguf", "qwen3", n_embd=256, n_head=4, head=128)])
    assert model_config(file).head_dim == 128

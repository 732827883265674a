from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.memory.footprint import (
    CUDA,
    RPC,
    BufferBytes,
    Demand,
    Placement,
    adapter_bytes,
    footprint,
    layer_table,
    mmproj_bytes,
    repacked_types,
    supported,
)
from tests.generated_models import FAMILIES, Family, write_header
from toolchain.base.errors import ArtifactError
from toolchain.base.gguf import GgufHeader, read_header

DEMAND = Demand(n_ctx=4096)
ON_HOST = Placement(n_gpu_layers=0)


def header(tmp_path: Path, family: Family = "llama", type: str = "f16", **extents: int) -> GgufHeader:
    return read_header(write_header(tmp_path / "model.gguf", family, type=type, **extents))


def host(header: GgufHeader, demand: Demand = DEMAND) -> BufferBytes:
    return footprint(header, demand, ON_HOST, 0)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_make_up_the_whole(tmp_path: Path, family: Family) -> None:
    model = header(tmp_path, family)
    table, whole = layer_table(model, DEMAND), host(model)
    inside = sum(layer.dense + layer.experts for layer in table.layers)
    tied = 0 if any(t.name == "output.weight" for t in model.tensors) else model.tensors[0].nbytes
    assert inside + table.input + table.output - tied == whole.weights
    assert sum(layer.kv for layer in table.layers) == whole.kv
    assert sum(layer.experts for layer in table.layers) == whole.experts
    assert (whole.experts > 0) == (family in ("mixtral", "qwen2moe", "qwen3moe"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_lies_somewhere_however_it_is_split(tmp_path: Path, family: Family) -> None:
    model = header(tmp_path, family)
    whole = host(model)
    for layers in range(7):
        parts = footprint(model, DEMAND, Placement(n_gpu_layers=layers, tensor_split=(2, 1)), 2, traits=RPC)
        moved = sum(part.weights for part in parts) - whole.weights
        tied = not any(t.name == "output.weight" for t in model.tensors)
        assert moved == (model.tensors[0].nbytes if tied and layers else 0)  # the output layer's copy of the embedding
        assert sum(part.kv for part in parts) == whole.kv


def test_output_layer_goes_to_the_gpu_first(tmp_path: Path) -> None:
    model = header(tmp_path)
    table = layer_table(model, DEMAND)
    gpu = footprint(model, DEMAND, Placement(n_gpu_layers=1), 1, traits=RPC)[1]
    assert gpu.weights == table.output
    gpu = footprint(model, DEMAND, Placement(n_gpu_layers=3), 1, traits=RPC)[1]
    assert gpu.weights == table.output + sum(layer.dense for layer in table.layers[-2:])


def test_experts_stay_on_the_host_when_asked_to(tmp_path: Path) -> None:
    model = header(tmp_path, "qwen3moe")
    for kept in (2, frozenset({0, 3})):
        placement = Placement(n_gpu_layers=99, cpu_expert_layers=kept)
        on_host, on_gpu = footprint(model, DEMAND, placement, 1)
        assert on_host.experts == on_gpu.experts == host(model).experts // 2
        assert on_gpu.kv == host(model).kv


def test_experts_on_the_host_cost_the_gpu_room_for_their_transfer(tmp_path: Path) -> None:
    model = header(tmp_path, "mixtral", n_expert=64)
    one_matrix = next(t.nbytes for t in model.tensors if "exps" in t.name)
    away = footprint(model, DEMAND, Placement(n_gpu_layers=99, cpu_expert_layers=99), 1)[1]
    there = footprint(model, DEMAND, Placement(n_gpu_layers=99), 1)[1]
    assert away.compute > one_matrix > there.compute / 4


def test_logits_of_a_whole_micro_batch_are_the_spike(tmp_path: Path) -> None:
    model = header(tmp_path, n_vocab=151_936)
    lean, full = host(model), host(model, replace(DEMAND, n_outputs_max=0))
    assert (lean.output, full.output) == (4 * 151_936, 4 * 151_936 * 512)
    assert full.compute > lean.compute + 0.9 * full.output
    assert full.results == 4 * 151_936 * 2048


def test_window_bounds_the_cache(tmp_path: Path) -> None:
    model = header(tmp_path, "gemma3", n_layer=12, window=1024)
    one_layer = 4096 * 2 * 2 * 64 * 2  # tokens, keys and values, heads, their width, f16
    assert host(model).kv == 2 * one_layer + 10 * one_layer * (1024 + 512) // 4096
    assert host(model, replace(DEMAND, swa_full=True)).kv == 12 * one_layer


def test_recurrent_state_does_not_grow_with_the_context(tmp_path: Path) -> None:
    model = header(tmp_path, "lfm2", n_layer=2)
    short, long = (layer_table(model, Demand(n_ctx=n)).layers for n in (512, 32768))
    assert short[0].kv == long[0].kv > 0
    assert long[1].kv == 64 * short[1].kv


def test_quantized_cache_takes_its_share(tmp_path: Path) -> None:
    model = header(tmp_path)
    q8 = host(model, replace(DEMAND, type_k="q8_0", type_v="q8_0")).kv
    assert q8 * 32 == host(model).kv * 17  # 34 bytes for 32 elements


def test_quantized_cache_is_widened_for_flash_attention_on_cuda(tmp_path: Path) -> None:
    model, long = header(tmp_path), replace(DEMAND, n_ctx=32768)
    one_layer = host(model, long).kv / 4
    wide, narrow = (
        footprint(model, replace(long, type_k="q8_0", type_v="q8_0"), Placement(n_gpu_layers=99), 1, traits=traits)[1]
        for traits in (CUDA, replace(CUDA, widens_cache=False))
    )
    assert wide.compute > narrow.compute + 0.8 * one_layer  # a part of it fits where something else was


def test_tied_embedding_that_the_cpu_rearranges_is_kept_twice(tmp_path: Path) -> None:
    kept_once, kept_twice = (host(header(tmp_path, "llama-tied", type=kind)).weights for kind in ("q6_K", "q4_K"))
    once = sum(t.nbytes for t in header(tmp_path, "llama-tied", type="q6_K").tensors)
    four = header(tmp_path, "llama-tied", type="q4_K").tensors
    assert (kept_once, kept_twice) == (once, sum(t.nbytes for t in four) + four[0].nbytes)
    assert "Q4_K" in repacked_types({"avx2"})
    assert not repacked_types({"sse4_2"})


def test_shards_add_up(tmp_path: Path) -> None:
    whole = header(tmp_path, "qwen3moe")
    first = replace(whole, tensors=whole.tensors[:20])
    second = replace(whole, tensors=whole.tensors[20:], metadata={})
    for placement, n_gpus in ((ON_HOST, 0), (Placement(n_gpu_layers=3), 1)):
        assert footprint([first, second], DEMAND, placement, n_gpus) == footprint(whole, DEMAND, placement, n_gpus)


def test_unknown_architecture_is_estimated_with_a_margin(tmp_path: Path) -> None:
    known = header(tmp_path)
    metadata = {key.replace("llama.", "novel."): value for key, value in known.metadata.items()}
    novel = replace(known, metadata={**metadata, "general.architecture": "novel"})
    assert (supported(known), supported(novel)) == ("exact", "estimated")
    assert host(novel).compute == int(host(known).compute * 1.25)
    assert host(novel).weights == host(known).weights


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    whole = header(tmp_path)
    cut = replace(whole, tensors=tuple(t for t in whole.tensors if t.name != "blk.1.ffn_down.weight"))
    with pytest.raises(ArtifactError, match=r"lacks a tensor: blk\.1\.ffn_down\.weight"):
        footprint(cut, DEMAND, ON_HOST, 0)


def test_projector_and_adapter_take_their_tensors(tmp_path: Path) -> None:
    model = header(tmp_path)
    least = sum(tensor.nbytes for tensor in model.tensors)
    assert least <= mmproj_bytes(model) == adapter_bytes(model) < least + 128 * len(model.tensors)


def test_equal_questions_get_the_same_answer(tmp_path: Path) -> None:
    model = header(tmp_path, n_layer=80)
    placement = Placement(n_gpu_layers=40)
    first = footprint(model, DEMAND, placement, 2)
    assert footprint(model, replace(DEMAND), replace(placement), 2) == first

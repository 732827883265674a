"""Bytes that a token reads, on headers described here: the arithmetic that a share of bandwidth stands on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from runtime.bench.case import fitting_lengths, make_case, parse_case, random_prompt
from runtime.bench.reads import cache_read_bytes, read_bytes_per_token, weight_read_bytes
from runtime.settings import settle
from tests.described import machine
from toolchain.base.errors import UsageError
from toolchain.base.ggml_types import GGML_TYPES_BY_NAME
from toolchain.base.gguf import GgufHeader, MetadataValue, TensorInfo

WIDTH, VOCAB, LAYERS = 256, 4096, 2


def tensor(name: str, *shape: int, type_name: str = "Q8_0") -> TensorInfo:
    nbytes = GGML_TYPES_BY_NAME[type_name].nbytes(math.prod(shape))
    return TensorInfo(name=name, shape=shape, type=type_name, offset=0, nbytes=nbytes)


def header(*tensors: TensorInfo, **metadata: MetadataValue) -> GgufHeader:
    """A Llama of two layers, 256 wide, four heads of which two are KV heads."""
    known: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 512,
        "llama.vocab_size": VOCAB,
    }
    known.update({name.replace("__", "."): value for name, value in metadata.items()})
    return GgufHeader(
        path=Path("some.gguf"),
        version=3,
        byte_order="little",
        metadata=known,
        tensors=tensors,
        alignment=32,
        data_offset=0,
        file_bytes=0,
    )


EMBEDDING = tensor("token_embd.weight", WIDTH, VOCAB)
OUTPUT = tensor("output.weight", WIDTH, VOCAB, type_name="Q6_K")
QUERIES = tensor("blk.0.attn_q.weight", WIDTH, WIDTH)
ROW = WIDTH // 32 * 34


def test_of_the_embedding_a_token_reads_one_row() -> None:
    assert weight_read_bytes([header(EMBEDDING, OUTPUT, QUERIES)]) == ROW + OUTPUT.nbytes + QUERIES.nbytes


def test_a_tied_embedding_is_read_whole_as_the_output_layer() -> None:
    assert weight_read_bytes([header(EMBEDDING, QUERIES)]) == ROW + EMBEDDING.nbytes + QUERIES.nbytes


def test_only_the_experts_that_are_used_are_read() -> None:
    experts = tensor("blk.1.ffn_up_exps.weight", WIDTH, 512, 8)
    shared = tensor("blk.1.ffn_up_shexp.weight", WIDTH, 512)
    router = tensor("blk.1.ffn_gate_inp.weight", WIDTH, 8, type_name="F32")
    model = header(EMBEDDING, OUTPUT, experts, shared, router, llama__expert_count=8, llama__expert_used_count=2)
    assert weight_read_bytes([model]) == ROW + OUTPUT.nbytes + experts.nbytes / 4 + shared.nbytes + router.nbytes


def test_the_shards_of_a_model_count_together() -> None:
    one = header(EMBEDDING, OUTPUT)
    assert weight_read_bytes([one, header(QUERIES)]) == weight_read_bytes([header(EMBEDDING, OUTPUT, QUERIES)])


def test_layers_that_only_predict_drafts_are_not_read() -> None:
    drafts = tensor("blk.1.attn_q.weight", WIDTH, WIDTH)
    model = header(EMBEDDING, OUTPUT, drafts, llama__nextn_predict_layers=1)
    assert weight_read_bytes([model]) == ROW + OUTPUT.nbytes


@pytest.mark.parametrize(("kv_type", "per_element"), [("f16", 2), ("q8_0", 34 / 32)])
def test_keys_and_values_of_every_token_in_the_cache_are_read(kv_type: str, per_element: float) -> None:
    found = cache_read_bytes([header()], type_k=kv_type, type_v=kv_type, tokens=100)
    assert found == 100 * LAYERS * 2 * (2 * 64) * per_element


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    plain = header(general__architecture="gemma3", **gemma(window=0))
    sliding = header(general__architecture="gemma3", **gemma(window=32))
    kv = {"type_k": "f16", "type_v": "f16"}
    assert cache_read_bytes([sliding], tokens=16, **kv) == cache_read_bytes([plain], tokens=16, **kv)
    assert cache_read_bytes([sliding], tokens=1000, **kv) == cache_read_bytes([plain], tokens=32, **kv)


def gemma(window: int) -> dict[str, MetadataValue]:
    return {
        "gemma3__block_count": LAYERS,
        "gemma3__embedding_length": WIDTH,
        "gemma3__attention__head_count": 4,
        "gemma3__attention__sliding_window": window,
    }


def test_weights_and_cache_add_up() -> None:
    model = header(EMBEDDING, OUTPUT, QUERIES)
    whole = read_bytes_per_token([model], type_k="f16", type_v="f16", tokens=7)
    assert whole == weight_read_bytes([model]) + cache_read_bytes([model], type_k="f16", type_v="f16", tokens=7)


def test_a_prompt_nobody_asked_for_fits_the_model() -> None:
    assert fitting_lengths(512, depth=0, prompt=None, gen=128).prompt == 383
    assert fitting_lengths(32768, depth=2048, prompt=None, gen=128).prompt == 512
    assert fitting_lengths(None, depth=0, prompt=None, gen=128).prompt == 512


@pytest.mark.parametrize(("depth", "prompt", "gen"), [(0, 512, 128), (600, None, 1), (0, None, 512), (511, 1, 1)])
def test_lengths_beyond_the_models_context_are_refused(depth: int, prompt: int | None, gen: int) -> None:
    with pytest.raises(UsageError, match="more than the model's context of 512"):
        fitting_lengths(512, depth=depth, prompt=prompt, gen=gen)


def test_a_random_prompt_is_the_same_for_everyone_and_free_of_control_tokens() -> None:
    kinds = memoryview(bytes([2, 3, 3] + [1] * 60 + [6])).cast("B")
    model = header(
        **{
            "llama__vocab_size": 64,
            "tokenizer__ggml__token_type": kinds,
            "tokenizer__ggml__bos_token_id": 1,
        }
    )
    tokens = random_prompt(model, 200, seed=3)
    assert tokens == random_prompt(model, 200, seed=3) != random_prompt(model, 200, seed=4)
    assert tokens[0] == 1
    assert all(3 <= token < 63 for token in tokens[1:])


def test_a_case_survives_its_way_to_a_child() -> None:
    settings = settle(machine=machine(), n_ctx_train=512, flags={"type_k": "q8_0"})
    case = make_case(header(), settings, fitting_lengths(512, depth=8, prompt=16, gen=4), seed=0)
    assert parse_case(case.to_json()) == case
    assert len(case.tokens) == 24

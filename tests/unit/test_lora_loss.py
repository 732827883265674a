"""What the training computes: loss in chunks, packed rows, whose turn it is, at what rate, the adapter's form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from tests.lora_runs import counting_rows, train_spec
from toolchain.base.errors import UsageError
from toolchain.lora.dataset_file import IGNORED
from toolchain.lora.estimate import LOSS_LOGITS
from toolchain.lora.spec import TrainSpec
from toolchain.lora.torch_engine.adapt import adapt, adapter_model
from toolchain.lora.torch_engine.loop import learning_rate, step_rows
from toolchain.lora.torch_engine.loss import CHUNK_LOGITS, examples_stay_apart, summed_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's use of transformers
N_VOCAB, N_EMBD = 96, 32
WINDOW = 6
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": WINDOW, "attn_implementation": "eager", "head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": WINDOW, "head_dim": 8},
    "granite": {"logits_scaling": 0.05},
    "cohere": {"logit_scale": 9.0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
}


def tiny(kind: str) -> Any:
    """A model of two layers, random enough that each of its parts shows in the logits."""
    torch.manual_seed(3)
    extents = {"hidden_size": N_EMBD, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": N_VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    more = dict(MODELS[kind])
    attention = more.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(kind, **extents, **heads, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def as_in_gguf(model: Any) -> Any:
    """``model`` with its linear layers named as a loaded base has them."""
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for number, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if suffix := names.get(name.rpartition(".")[2]):
                module.gguf_name, module.row_order = f"blk.{number}.{suffix}.weight", None
    return model.requires_grad_(False)


def test_the_estimate_counts_the_logits_that_the_loss_computes_at_once() -> None:
    assert LOSS_LOGITS == CHUNK_LOGITS


def spec(**changes: Any) -> TrainSpec:
    return train_spec(Path("base.gguf"), Path("data.npz"), Path("run"), Path("lib"), **changes)


def tensors(rows: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, labels, positions = (torch.from_numpy(part).long() for part in (rows.ids, rows.labels, rows.positions))
    return ids, labels, positions


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere"])
def test_loss_and_gradient_in_chunks_are_those_of_all_logits_at_once(kind: str) -> None:
    """Also where the model scales or caps its logits. A chunk is seven tokens here, which divides nothing."""
    model = tiny(kind)
    ids, labels, positions = tensors(counting_rows(3, 20, n_vocab=N_VOCAB, seed=1))
    labels[0, :9] = IGNORED
    weight = model.model.layers[0].self_attn.v_proj.weight
    whole = functional.cross_entropy(
        model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    (expected,) = torch.autograd.grad(whole, weight)
    model.lm_head.weight.requires_grad_(False)
    chunked = summed_loss(model, ids, labels, positions, chunk=7 * N_VOCAB)
    (found,) = torch.autograd.grad(3 * chunked, weight)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-5)
    assert (found / 3 - expected).norm() <= 1e-5 * expected.norm()


def test_only_learned_positions_meet_the_output_matrix_and_only_a_chunk_at_once() -> None:
    model = tiny("llama").requires_grad_(False)
    ids, labels, positions = tensors(counting_rows(4, 16, n_vocab=N_VOCAB, seed=1))
    labels[:, :10] = IGNORED
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[-2]))
    summed_loss(model, ids, labels, positions, chunk=5 * N_VOCAB)
    assert sum(seen) == int((labels != IGNORED).sum()) == 24
    assert max(seen) == 5


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "granite"])
def test_a_packed_row_costs_what_its_examples_cost_alone(kind: str) -> None:
    """The second row has two examples longer than the windows of the Gemmas; the first one has an unused end."""
    model, lengths = tiny(kind), ((9, 4), (11, 13))
    rows = [
        tensors(counting_rows(1, 24, n_vocab=N_VOCAB, seed=seed, lengths=each)) for seed, each in enumerate(lengths)
    ]
    ids, labels, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    with torch.no_grad():
        packed = summed_loss(model, ids, labels, positions).item()
        alone = 0.0
        for row, each in enumerate(lengths):
            for begin, end in ((0, each[0]), (each[0], sum(each))):
                span = slice(begin, end)
                alone += summed_loss(model, ids[row : row + 1, span], labels[row : row + 1, span], None).item()
        mixed = summed_loss(model, ids, labels, None).item()
    assert packed == pytest.approx(alone, rel=1e-5)
    assert abs(mixed - alone) > 1e-3 * alone  # the examples would be seen, were they not kept apart


@pytest.mark.parametrize(("kind", "apart"), [("llama", True), ("gemma3_text", True), ("lfm2", False)])
def test_a_model_that_carries_one_example_into_the_next_is_found_out(kind: str, apart: bool) -> None:
    assert examples_stay_apart(tiny(kind), np.arange(5, 37, dtype=np.int32)) is apart


def test_an_epoch_has_each_row_once_and_another_epoch_another_order() -> None:
    line = np.concatenate([step_rows(10, 4, seed=-7, step=step) for step in range(1, 6)])
    first, second = line[:10], line[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert step_rows(10, 4, seed=-6, step=1).tolist() != line[:4].tolist()


def test_a_step_may_be_longer_than_an_epoch() -> None:
    assert sorted(np.bincount(step_rows(3, 7, seed=1, step=1))) == [2, 2, 3]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_over_the_warmup_and_then_never_again(schedule: Any) -> None:
    plan = spec(schedule=schedule, steps=20, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(plan, step) for step in range(1, 21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == 1.0 if schedule == "constant" else 0.0 < rates[-1] < 0.1


def test_every_block_gets_a_pair_on_the_matrices_that_are_named() -> None:
    adapted = adapt(as_in_gguf(tiny("llama")), spec(targets=("attn_q", "ffn_down"), rank=2))
    pairs = adapter_model(adapted, architecture="llama").pairs
    assert sorted(pairs) == [f"blk.{layer}.{name}.weight" for layer in range(2) for name in ("attn_q", "ffn_down")]
    assert adapted.trained_parameters == sum(pair.a.size + pair.b.size for pair in pairs.values())


def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match="attn_qkv") as refused:
        adapt(as_in_gguf(tiny("llama")), spec(targets=("attn_q", "attn_qkv")))
    assert "ffn_down" in refused.value.evidence


@pytest.mark.parametrize("rslora", [False, True])
def test_the_written_pairs_are_the_trained_function_in_the_order_of_the_file(rslora: bool) -> None:
    """llama.cpp adds alpha/rank * B A x to the rows as they lie in the file, whatever the order in the model."""
    model = as_in_gguf(tiny("llama"))
    layer = model.model.layers[1].self_attn.q_proj
    layer.row_order = torch.randperm(layer.out_features, generator=torch.Generator().manual_seed(1))
    adapted = adapt(model, spec(targets=("attn_q",), rank=4, alpha=6.0, rslora=rslora, dropout=0.0))
    wrapped = model.model.layers[1].self_attn.q_proj
    nn.init.normal_(wrapped.lora_B["default"].weight)
    x = torch.randn(5, N_EMBD)
    written = adapter_model(adapted, architecture="llama")
    pair = written.pairs["blk.1.attn_q.weight"]
    in_file = x.numpy() @ (written.alpha / pair.rank * pair.b @ pair.a).T
    with torch.no_grad():
        difference = (wrapped(x) - layer(x)).numpy()
    np.testing.assert_allclose(in_file[:, layer.row_order.numpy()], difference, rtol=1e-4, atol=1e-5)


def test_the_start_of_an_adapter_comes_from_the_seed_alone() -> None:
    starts = [adapt(as_in_gguf(tiny("llama")), replace(spec(), seed=seed)).parameters for seed in (5, 5, 6)]
    equal = [all(torch.equal(starts[0][name], other[name]) for name in other) for other in starts[1:]]
    assert equal == [True, False]

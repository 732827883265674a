"""What the trainer of 2023 cannot do, or does wrong without a word: refused before it is started, with the reason.

Its forward pass is a Llama's of September 2023 (``llama_build_lora_finetune_graphs`` in examples/finetune/finetune.cpp
at ac9ee6a): nine tensors a block, as many key and value heads as heads, plain rotary positions, a SentencePiece
vocabulary. What else a file holds it passes over in silence and trains another function than the one that will run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from toolchain.base.errors import UsageError
from toolchain.base.gguf import GgufHeader, MetadataValue
from toolchain.build.toolchain import Toolchain
from toolchain.lora.ggml_engine.start import LAYER, WHOLE
from toolchain.lora.recipe import LoraRecipe

MATRIX_TYPES: Final = frozenset(
    {"F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    | {"IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"}
)
"""Those that ``ggml_compute_forward_add`` of its ggml.c unpacks. Each was trained on, and old and new llama.cpp give
its weights the same perplexity. IQ1_M, BF16, TQ and MXFP4 came later and are beyond the end of its enum."""
MOST_SEED: Final = 2**31 - 1
MOST_LAYERS: Final = (2048 - 6) // 18
"""GGML_MAX_PARAMS of its ggml.h: 6 tensors to learn, and 18 in each block."""
_TORCH: Final = "set engine: torch"

_ANY: Final = frozenset(
    {"context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "rope.freq_base"}
    | {"attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"}
    | {"rope.scaling.original_context_length", "rope.scaling.finetuned"}  # count with a scaling only
)
_HEAD_WIDTHS: Final = frozenset({"rope.dimension_count", "attention.key_length", "attention.value_length"})
_ONLY: Final[Mapping[str, MetadataValue]] = {
    **{"expert_count": 0, "expert_used_count": 0},
    **{"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0},
}
"""Hyperparameters of a Llama that the trainer computes with, and the values of others at which it need not."""


def check_recipe(recipe: LoraRecipe) -> None:
    """Raise UsageError, naming every key, when ``recipe`` asks for something that the trainer does not have."""
    adapter, train = recipe.adapter, recipe.train
    kinds = sorted({source.kind for source in recipe.data.sources} - {"text"})
    found = [
        f"{key}: {value}  {why}"
        for key, value, asked, why in (
            (
                *("adapter.alpha", adapter.alpha, adapter.alpha not in (None, adapter.rank)),
                f"it learns at a scale of 1: alpha has to be the rank, {adapter.rank}",
            ),
            ("adapter.dropout", adapter.dropout, adapter.dropout > 0, "it drops nothing"),
            ("adapter.rslora", "true", adapter.rslora, "its scale is alpha/rank"),
            ("adapter.dora", "true", adapter.dora, "it learns no magnitudes"),
            (
                *("data.sources", " and ".join(kinds), bool(kinds)),
                "it reads plain text: no special tokens, and every token is learned, those of prompts too",
            ),
            ("train.schedule", train.schedule, train.schedule == "linear", "it knows cosine and constant"),
            ("train.processes", train.processes, train.processes > 1, "it is one process, with threads"),
            ("train.device", "cuda", train.device == "cuda", "it computes on the CPU, whatever it was built for"),
            ("train.dtype", train.dtype, train.dtype == "bfloat16", "it computes in float32"),
            ("train.seed", train.seed, not 0 <= train.seed <= MOST_SEED, f"it takes 0 to {MOST_SEED}"),
            (
                *("train.micro_batch", train.micro_batch, bool(train.batch % (train.micro_batch or 1))),
                f"it has to divide train.batch, {train.batch}",
            ),
        )
        if asked
    ]
    if found:
        raise UsageError(
            "the trainer of 2023 (engine: ggml) cannot do what the recipe asks",
            evidence="\n".join(found),
            hint=f"change these, or {_TORCH}",
        )


def check_base(base: GgufHeader, trainer: Toolchain) -> None:
    """Raise UsageError, with every reason, when ``base`` is not what the trainer can learn on."""
    found = [problem for check in _CHECKS for problem in check(base)] if base.architecture == "llama" else []
    if base.architecture != "llama":
        found = [f"it is a {base.architecture or 'file without an architecture'}; the trainer knows llama alone"]
    if found:
        raise UsageError(
            f"the trainer of 2023 ({trainer.short_commit}) cannot learn on {base.path.name}",
            evidence="\n".join(found),
            hint=_TORCH,
        )


def _file(base: GgufHeader) -> list[str]:
    return ["it is split into shards; the trainer reads one file"] if base.split else []


def _heads(base: GgufHeader) -> list[str]:
    """With grouped queries it ends in an assertion, or with flash attention learns a wrong adapter silently."""
    heads, grouped = base.arch_int("attention.head_count"), base.metadata.get("llama.attention.head_count_kv")
    width = base.arch_int("embedding_length")
    if not heads or not width or width % heads:
        return [f"its {heads} heads do not share its width of {width}"]
    if not isinstance(grouped, int | None):
        return ["its key and value heads differ from layer to layer; the trainer wants one number"]
    if grouped not in (None, heads):
        return [f"grouped queries: {heads} heads share {grouped} key and value heads; the trainer wants {heads}"]
    return []


def _hyperparameters(base: GgufHeader) -> list[str]:
    heads, width = base.arch_int("attention.head_count"), base.arch_int("embedding_length")
    head_width = width // heads if width and heads else None
    found = []
    for key, value in base.metadata.items():
        word = key.removeprefix("llama.")
        if word == key or word in _ANY or (word in _HEAD_WIDTHS and value == head_width):
            continue
        if word not in _ONLY or value != _ONLY[word]:
            shown = value if isinstance(value, str | int | float) else "an array"
            found.append(f"{key} is {shown}: the trainer computes without it")
    if not 1 <= (base.n_layer or 0) <= MOST_LAYERS:
        found.append(f"it has {base.n_layer} layers; the trainer takes 1 to {MOST_LAYERS}")
    return found


def _vocabulary(base: GgufHeader) -> list[str]:
    """It knows GPT-2's splitting alone for BPE (llm_tokenizer_bpe), none of the pre-tokenizers that came in 2024."""
    model = base.text("tokenizer.ggml.model")
    return [] if model == "llama" else [f"its tokenizer is {model}; the trainer splits as SentencePiece (llama) does"]


def _tensors(base: GgufHeader) -> list[str]:
    layers = range(base.n_layer or 0)
    wanted = {f"{name}.weight" for name in WHOLE}
    wanted |= {f"blk.{layer}.{name}.weight" for layer in layers for name in LAYER}
    types = {tensor.name: tensor.type for tensor in base.tensors}
    found = []
    if "output.weight" not in types:
        found.append("its output shares the embedding's weights; the trainer wants an output.weight")
        wanted.discard("output.weight")
    for names, why in (
        (types.keys() - wanted, "the trainer would compute without"),
        (wanted - types.keys(), "the trainer needs"),
    ):
        if names:
            kinds = sorted({re.sub(r"^blk\.\d+\.", "", name) for name in names})
            found.append(f"{why} {', '.join(kinds)} ({len(names)} tensors)")
    foreign = {kind for kind in types.values() if kind not in MATRIX_TYPES}
    foreign |= {kind for name, kind in types.items() if name.endswith("_norm.weight") and kind not in ("F32", "F16")}
    if foreign:
        found.append(f"tensors of type {', '.join(sorted(foreign))}, which the trainer does not read")
    return found


_CHECKS: Final = (_file, _heads, _hyperparameters, _vocabulary, _tensors)

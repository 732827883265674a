"""The trainer of 2023 as an engine, without the trainer: what is refused, what it is told, what comes back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import described
from tests.generated_models import FAMILIES, Family, write_header, write_model
from tests.ggla_files import Halves, write_ggla
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import GgufHeader, MetadataValue, read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.lora.forms.adapter import read_adapter
from toolchain.lora.forms.bridge import convert
from toolchain.lora.ggml_engine.checkpoints import keep, resume
from toolchain.lora.ggml_engine.flags import finetune_argv, micro_rows, rate_at, settle_targets, warmup_steps
from toolchain.lora.ggml_engine.progress import Iteration, parse_iteration, parse_tokens
from toolchain.lora.ggml_engine.refuse import check_base, check_recipe
from toolchain.lora.ggml_engine.start import write_start
from toolchain.lora.recipe import LoraRecipe
from toolchain.lora.spec import CHECKPOINTS, METRICS

HEADS = 4
TRAINER = described.toolchain(Path("nowhere"), id="ac9ee6a-0", commit="ac9ee6a", kind="trainer")


def recipe_of(**parts: dict[str, Any]) -> LoraRecipe:
    plain = {"name": "x", "base": {"gguf": "x.gguf"}, "data": {"sources": [{"text": "t.txt"}]}, "engine": "ggml"}
    return LoraRecipe.model_validate({**plain, **parts})


@pytest.fixture
def mha(tmp_path: Path) -> GgufHeader:
    return read_header(write_header(tmp_path / "mha.gguf", "llama", n_head_kv=HEADS))


def told(base: GgufHeader) -> str:
    with pytest.raises(UsageError) as refused:
        check_base(base, TRAINER)
    assert "engine: torch" in refused.value.hint
    return refused.value.evidence


def test_a_llama_with_as_many_kv_heads_as_heads_is_taken(mha: GgufHeader) -> None:
    check_base(mha, TRAINER)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_family_is_refused(tmp_path: Path, family: Family) -> None:
    kv_heads = HEADS // 2 if family == "llama" else HEADS
    reasons = told(read_header(write_header(tmp_path / "x.gguf", family, n_head_kv=kv_heads)))
    expected = {
        "llama": "grouped queries: 4 heads share 2 key and value heads",
        "llama-tied": "shares the embedding's weights",
        "mixtral": "llama.expert_count is 8",
    }
    assert expected.get(family, f"it is a {family}; the trainer knows llama alone") in reasons


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.rope.scaling.type", "linear", "llama.rope.scaling.type is linear"),
        ("llama.rope.scaling.factor", 4.0, "llama.rope.scaling.factor is 4.0"),
        ("llama.rope.dimension_count", 32, "llama.rope.dimension_count is 32"),
        ("llama.attention.key_length", 128, "llama.attention.key_length is 128"),
        ("llama.attention.scale", 0.1, "llama.attention.scale is 0.1"),
        ("llama.attention.head_count_kv", memoryview(b"\4\4\4\4"), "differ from layer to layer"),
        ("llama.block_count", 200, "200 layers"),
        ("tokenizer.ggml.model", "gpt2", "its tokenizer is gpt2"),
        ("split.count", 2, "split into shards"),
    ],
)
def test_what_it_would_pass_over_is_refused(mha: GgufHeader, key: str, value: MetadataValue, reason: str) -> None:
    metadata: dict[str, MetadataValue] = {**mha.metadata, "split.no": 0, key: value}
    assert reason in told(replace(mha, metadata=metadata))


@pytest.mark.parametrize("kind", ["BF16", "IQ1_M", "MXFP4", "TQ1_0"])
def test_a_tensor_type_that_came_later_is_refused(mha: GgufHeader, kind: str) -> None:
    tensors = (*mha.tensors[:-1], replace(mha.tensors[-1], type=kind))
    assert f"tensors of type {kind}" in told(replace(mha, tensors=tensors))


def test_tensors_that_the_trainer_does_not_know_are_named(mha: GgufHeader) -> None:
    bias = replace(mha.tensors[1], name="blk.0.attn_q.bias")
    factors = replace(mha.tensors[1], name="rope_freqs.weight")
    reasons = told(replace(mha, tensors=(*mha.tensors, bias, factors)))
    assert "the trainer would compute without attn_q.bias, rope_freqs.weight (2 tensors)" in reasons


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("adapter", "dropout", 0.1),
        ("adapter", "rslora", True),
        ("adapter", "dora", True),
        ("adapter", "alpha", 32),
        ("train", "schedule", "linear"),
        ("train", "processes", 2),
        ("train", "device", "cuda"),
        ("train", "dtype", "bfloat16"),
        ("train", "seed", -1),
        ("train", "micro_batch", 3),
        ("data", "sources", [{"chat": "talk.jsonl"}]),
        ("data", "sources", [{"text": "t.txt"}, {"instruct": "do.jsonl"}]),
    ],
)
def test_what_the_trainer_cannot_do_is_refused_by_its_key(part: str, key: str, value: object) -> None:
    with pytest.raises(UsageError) as refused:
        check_recipe(recipe_of(**{part: {key: value}}))
    assert refused.value.evidence.startswith(f"{part}.{key}: ")
    assert "engine: torch" in refused.value.hint


def test_all_that_is_wrong_is_told_at_once_and_what_is_right_passes() -> None:
    check_recipe(recipe_of(adapter={"rank": 8, "alpha": 8.0}, train={"schedule": "constant", "dtype": "float32"}))
    with pytest.raises(UsageError) as refused:
        check_recipe(recipe_of(adapter={"dropout": 0.5, "dora": True}, train={"processes": 4}))
    assert len(refused.value.evidence.splitlines()) == 3


def test_the_rate_rises_and_falls_as_in_the_other_engine() -> None:
    """A linear warmup from nothing, then half a cosine over what is left: transformers' cosine schedule."""
    train = recipe_of(train={"learning_rate": 0.01, "warmup": 0.2}).train
    rates = [rate_at(train, 10, step) for step in range(1, 11)]
    assert rates[:3] == [0.0, 0.005, 0.01]
    assert rates[6] == pytest.approx(0.005)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    constant = train.model_copy(update={"schedule": "constant"})
    assert [rate_at(constant, 10, step) for step in (1, 2, 3, 10)] == [0.0, 0.005, 0.01, 0.01]
    assert warmup_steps(train.model_copy(update={"warmup": 0.99}), 1) == 0


def test_a_step_is_computed_in_equal_parts_that_fit() -> None:
    train = recipe_of(train={"n_ctx": 512, "batch": 12}).train
    assert micro_rows(train, n_vocab=4096) == 12
    assert micro_rows(train, n_vocab=32000) == 4
    assert micro_rows(train, n_vocab=1 << 20) == 1
    assert micro_rows(train.model_copy(update={"micro_batch": 6}), n_vocab=1 << 20) == 6


def test_the_command_line_says_what_the_recipe_says() -> None:
    adapter = {"rank": 8, "targets": ["attn_q", "output"]}
    train = {"n_ctx": 64, "batch": 6, "micro_batch": 2, "warmup": 0.1, "seed": 7, "schedule": "constant"}
    argv = finetune_argv(
        Path("finetune"),
        recipe_of(adapter=adapter, train={**train, "gradient_checkpointing": False}),
        base=Path("/b.gguf"),
        text="../t.txt",
        targets=("attn_q", "output"),
        n_vocab=100,
        start=20,
        steps=50,
        n_threads=3,
    )
    said = {word: argv[place + 1] for place, word in enumerate(argv[:-1]) if word.startswith("--")}
    wanted = {"--checkpoint-in": "20", "--adam-iter": "30", "--warmup": "5", "--cos-decay-steps": "45"}
    wanted |= {"--batch": "2", "--grad-acc": "3", "--lora-r": "8", "--lora-alpha": "8", "--seed": "7"}
    wanted |= {"--rank-wq": "8", "--rank-out": "8", "--rank-wk": "1", "--rank-tok-embd": "1"}
    wanted |= {"--cos-decay-min": "1", "--adam-decay": "0.0", "--threads": "3", "--train-data": "../t.txt"}
    assert wanted.items() <= said.items()
    assert "--no-checkpointing" in argv


def test_targets_are_those_of_the_other_engine_and_what_this_one_can_beside(mha: GgufHeader) -> None:
    all_linear = settle_targets(mha, "all-linear")
    assert "attn_output" in all_linear
    assert not {"output", "token_embd", "attn_norm"} & {*all_linear}
    assert settle_targets(mha, ("q_proj", "attn_norm", "output")) == ("attn_norm", "attn_q", "output")
    with pytest.raises(UsageError, match="has no atn_q"):
        settle_targets(mha, ("atn_q",))


def test_what_is_not_asked_for_starts_at_rest(tmp_path: Path) -> None:
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_head_kv=HEADS, n_layer=2, n_vocab=300))
    for name in ("a", "b"):
        write_start(tmp_path / name, base, rank=8, targets=("attn_q", "ffn_norm"), seed=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    start = read_header(tmp_path / "a")
    shapes = {tensor.name: tensor.shape for tensor in start.tensors}
    assert shapes["blk.1.attn_q.weight.lora_a"] == (8, 256)
    assert shapes["blk.1.attn_k.weight.lora_a"] == (1, 256)
    assert shapes["blk.1.ffn_norm.weight.lora_b"] == (1, 1)
    moving = set()
    for tensor in start.tensors:
        place = start.data_offset + tensor.offset
        if any(start.path.read_bytes()[place : place + tensor.nbytes]):
            moving.add(tensor.name)
    assert moving == {f"blk.{i}.{name}.weight.lora_a" for i in (0, 1) for name in ("attn_q", "ffn_norm")}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "train_opt_callback: iter=     5 sample=11/10096 sched=0.999944 loss=4.442699 dt=107.7ms eta=1ms |-->",
            Iteration(step=5, loss=4.442699),
        ),
        ("train_opt_callback: iter=123456 sample=1/2 sched=0.1 loss=0.25 |>", Iteration(step=123456, loss=0.25)),
        ("train_opt_callback: reshuffle samples. completed epochs: 1", None),
        ("main: opt iter 0", None),
    ],
)
def test_the_trainer_s_lines_are_read(line: str, found: Iteration | None) -> None:
    assert parse_iteration(line) == found


def test_a_loss_that_is_no_number_is_told_as_such() -> None:
    for text in ("nan", "-nan", "?"):
        found = parse_iteration(f"train_opt_callback: iter= 3 sample=1/2 sched=1.0 loss={text} |>")
        assert found is not None
        assert not np.isfinite(found.loss)
    assert parse_tokens("main: number of training tokens: 10128") == 10128


class Bridged:
    """A base and an adapter of 2023 for it; ``old`` is what the old runtime adds to each weight."""

    def __init__(self, folder: Path, ranks: dict[str, int], *, rank: int, alpha: int) -> None:
        self.folder, self.rank, self.alpha = folder, rank, alpha
        path = folder / "base.gguf"
        self.base = write_model(path, "llama", type="f32", random=True, n_head_kv=HEADS, n_layer=1, n_vocab=300)
        self.shapes = {tensor.name: tensor.shape for tensor in read_header(self.base).tensors}
        numbers = np.random.default_rng(1)
        self.pairs: dict[str, Halves] = {}
        for name, width in ranks.items():
            inputs, outputs = (*self.shapes[name], 1)[:2]
            a, b = (numbers.standard_normal((n, width)).astype(np.float32) for n in (inputs, outputs))
            self.pairs[name] = (a, b)

    def file(self, pairs: dict[str, Halves] | None = None) -> Path:
        path = self.folder / "old.bin"
        return write_ggla(path, self.pairs if pairs is None else pairs, rank=self.rank, alpha=self.alpha)

    def old(self, name: str) -> NDArray[np.float64]:
        a, b = (half.astype(np.float64) for half in self.pairs[name])
        return np.asarray(b @ a.T * self.alpha / self.rank)


RANKS = {
    "token_embd.weight": 4,
    "output_norm.weight": 1,
    "output.weight": 2,
    "blk.0.attn_norm.weight": 1,
    "blk.0.attn_q.weight": 4,
    "blk.0.attn_k.weight": 3,
    "blk.0.ffn_down.weight": 4,
}


def test_the_bridge_carries_every_matrix_and_norm(tmp_path: Path) -> None:
    old = Bridged(tmp_path, RANKS, rank=4, alpha=6)
    report = convert(old.file(), old.base, tmp_path / "new.gguf")
    new = read_adapter(tmp_path / "new.gguf")
    assert {*new.pairs, *new.norms} == {*RANKS}
    assert report.rescaled == ("output.weight", "blk.0.attn_k.weight")
    assert report.norms == ("output_norm.weight", "blk.0.attn_norm.weight")
    for name, pair in new.pairs.items():
        product = new.factor(name) * pair.b.astype(np.float64) @ pair.a
        np.testing.assert_allclose(product, old.old(name), rtol=1e-6, atol=1e-6)
    for name, vector in new.norms.items():
        np.testing.assert_allclose(vector, old.old(name)[0], rtol=1e-6, atol=1e-6)
    assert new.base_sha256 == tensors_sha256(read_header(old.base))
    assert new.base_name == "base.gguf"


def test_matrices_of_the_commonest_rank_keep_their_bits(tmp_path: Path) -> None:
    old = Bridged(tmp_path, RANKS, rank=4, alpha=6)
    convert(old.file(), old.base, tmp_path / "new.gguf")
    new = read_adapter(tmp_path / "new.gguf")
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
        a, b = old.pairs[name]
        assert new.pairs[name].a.tobytes() == np.ascontiguousarray(a.T).tobytes()
        assert new.pairs[name].b.tobytes() == b.tobytes()
    assert new.alpha == 6


def test_names_from_before_gguf_are_understood(tmp_path: Path) -> None:
    old = Bridged(tmp_path, RANKS, rank=4, alpha=4)
    names = {
        "tok_embeddings.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "output.weight": "output.weight",
        "layers.0.attention_norm.weight": "blk.0.attn_norm.weight",
        "layers.0.attention.wq.weight": "blk.0.attn_q.weight",
        "layers.0.attention.wk.weight": "blk.0.attn_k.weight",
        "layers.0.feed_forward.w2.weight": "blk.0.ffn_down.weight",
    }
    convert(old.file(), old.base, tmp_path / "new.gguf")
    old.file({before: old.pairs[after] for before, after in names.items()})
    convert(tmp_path / "old.bin", old.base, tmp_path / "same.gguf")
    new, same = read_adapter(tmp_path / "new.gguf"), read_adapter(tmp_path / "same.gguf")
    assert {*same.pairs, *same.norms} == {*new.pairs, *new.norms}
    for name, pair in same.pairs.items():
        np.testing.assert_array_equal(pair.b, new.pairs[name].b)


def test_pairs_that_change_nothing_are_left_out(tmp_path: Path) -> None:
    old = Bridged(tmp_path, RANKS, rank=4, alpha=4)
    still = {name: (a, np.zeros_like(b)) for name, (a, b) in old.pairs.items()}
    still["blk.0.attn_q.weight"] = old.pairs["blk.0.attn_q.weight"]
    report = convert(old.file(still), old.base, tmp_path / "new.gguf")
    assert report.pairs == ("blk.0.attn_q.weight",)
    assert len(report.unchanged) == len(RANKS) - 1
    assert "6 pairs that change nothing" in "\n".join(report.lines())
    old.alpha = 0  # the old runtime adds nothing then, the new one would count each pair once
    with pytest.raises(ArtifactError, match="changes nothing"):
        convert(old.file(), old.base, tmp_path / "new.gguf")


def test_another_base_is_refused_tensor_by_tensor(tmp_path: Path) -> None:
    old = Bridged(tmp_path, RANKS, rank=4, alpha=4)
    wrong = {**old.pairs, "blk.9.attn_q.weight": old.pairs["blk.0.attn_q.weight"]}
    wrong["blk.0.attn_v.weight"] = old.pairs["output.weight"]
    with pytest.raises(ArtifactError, match="is not an adapter for") as refused:
        convert(old.file(wrong), old.base, tmp_path / "new.gguf")
    assert refused.value.evidence.splitlines() == [
        "blk.9.attn_q.weight: the base has no such tensor",
        "blk.0.attn_v.weight: 256 x 256 in the base, the adapter is for 256 x 300",
    ]
    assert not (tmp_path / "new.gguf").exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    old = Bridged(tmp_path, RANKS, rank=4, alpha=4)
    old.pairs["output.weight"][0][0, 0] = np.nan
    with pytest.raises(ArtifactError, match="not finite"):
        convert(old.file(), old.base, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys, toolchain.lora.forms.bridge, toolchain.lora.ggml_engine.train\n"
        "print([name for name in ('torch', 'numpy', 'gguf', 'llama_cpp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cut_checkpoint_goes_and_the_one_before_it_counts(tmp_path: Path) -> None:
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_head_kv=HEADS, n_layer=1, n_vocab=300))
    folder = tmp_path / CHECKPOINTS
    folder.mkdir()
    for step in ("5", "10"):
        write_start(folder / step, base, rank=2, targets=("attn_q",), seed=1)
    curve = tmp_path / METRICS
    curve.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 13)))
    assert resume(tmp_path, 20) == 10
    assert len(curve.read_text().splitlines()) == 10
    assert resume(tmp_path, 8) == 5
    write_start(folder / "5", base, rank=2, targets=("attn_q",), seed=1)
    write_start(folder / "9", base, rank=2, targets=("attn_q",), seed=1)
    (folder / "9").write_bytes((folder / "9").read_bytes()[:-1])
    with curve.open("a") as opened, pytest.raises(ArtifactError, match="checkpoint 9 is cut"):
        keep(folder, 9, curve=opened)
    assert not (folder / "9").exists()
    assert resume(tmp_path, 20) == 5


def test_what_the_curve_reaches_stays_while_the_trainer_is_ahead(tmp_path: Path) -> None:
    """It writes checkpoints faster than its lines are read on a busy machine; a kill must not cost the steps told."""
    base = read_header(write_model(tmp_path / "b.gguf", "llama", n_head_kv=HEADS, n_layer=1, n_vocab=300))
    folder = tmp_path / CHECKPOINTS
    folder.mkdir()
    for step in range(5, 45, 5):
        write_start(folder / str(step), base, rank=2, targets=("attn_q",), seed=1)
    with (tmp_path / METRICS).open("a") as curve:
        for step in range(1, 22):
            curve.write(f'{{"step": {step}, "loss": 1.0}}\n')
            curve.flush()
            if (folder / str(step)).exists():
                keep(folder, step, curve=curve)
    assert resume(tmp_path, 100) == 20
    assert sorted(path.name for path in folder.iterdir()) == ["15", "20"]

"""The plan of a training: memory by arithmetic, the micro-batch that fits, steps within the budget."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.described import GIB, machine
from tests.front_door import run as run_process
from tests.generated_models import write_header
from toolchain.base.errors import MemoryFitError, MissingError, UsageError
from toolchain.base.gpu import Gpu
from toolchain.lora.base import BaseModel, read_base
from toolchain.lora.estimate import MARGIN, Form, Shape, Work, choose_work, needed, shape_of
from toolchain.lora.plan import Means, choose_device, require_measured_fit, settle_length, settle_means
from toolchain.lora.progress import Progress, duration, parse_step
from toolchain.lora.recipe import LoraRecipe
from toolchain.lora.spec import TrainOutcome

FORM = Form(rank=16, dora=False, dtype_bytes=4)
SEVEN_B = Shape(
    n_layer=32,
    n_embd=4096,
    n_ff=11008,
    n_head=32,
    q_width=4096,
    kv_width=4096,
    n_vocab=32000,
    weight_bytes=4 * GIB,
    pairs=((4096, 4096),) * 4 * 32 + ((4096, 11008),) * 2 * 32 + ((11008, 4096),) * 32,
)


def recipe(**parts: Any) -> LoraRecipe:
    least = {"name": "a", "base": {"gguf": "b.gguf"}, "data": {"sources": [{"text": "c.txt"}]}}
    return LoraRecipe.model_validate({**least, **parts})


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return read_base(write_header(tmp_path / "base.gguf", "llama", type="q4_k"), origin="gguf:base.gguf")


def test_with_memory_to_spare_nothing_is_computed_twice() -> None:
    work = choose_work(SEVEN_B, FORM, n_ctx=512, rows=8, free_bytes=2000 * GIB)
    assert work == Work(n_ctx=512, micro_rows=8, checkpointing=False)


@pytest.mark.parametrize("free_gib", [10, 12, 16, 24, 48, 96, 192])
def test_what_is_chosen_fits_and_is_the_cheapest_that_does(free_gib: int) -> None:
    chosen = choose_work(SEVEN_B, FORM, n_ctx=512, rows=8, free_bytes=free_gib * GIB)
    assert needed(SEVEN_B, FORM, chosen).total <= MARGIN * free_gib * GIB
    every = [Work(n_ctx=512, micro_rows=rows, checkpointing=way) for rows in (1, 2, 4, 8) for way in (False, True)]
    cheaper = [work for work in every if work.cost < chosen.cost]
    assert all(needed(SEVEN_B, FORM, work).total > MARGIN * free_gib * GIB for work in cheaper)


def test_more_memory_never_makes_a_training_dearer() -> None:
    costs = [choose_work(SEVEN_B, FORM, n_ctx=512, rows=8, free_bytes=gib * GIB).cost for gib in range(10, 200, 5)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_what_the_recipe_fixes_stays() -> None:
    fixed = choose_work(SEVEN_B, FORM, n_ctx=512, rows=8, free_bytes=2000 * GIB, micro_rows=2, checkpointing=True)
    assert fixed == Work(n_ctx=512, micro_rows=2, checkpointing=True)


def test_what_does_not_fit_is_refused_with_its_figures() -> None:
    with pytest.raises(MemoryFitError) as caught:
        choose_work(SEVEN_B, FORM, n_ctx=8192, rows=8, free_bytes=8 * GIB)
    assert caught.value.exit_code == 7
    told = caught.value.evidence
    for name in ("weights", "adapter", "activations", "loss", "total"):
        assert name in told
    assert "4.00 GiB" in told
    assert "train.n_ctx" in caught.value.hint
    with pytest.raises(MemoryFitError) as caught:
        choose_work(SEVEN_B, FORM, n_ctx=64, rows=1, free_bytes=4 * GIB)
    assert "smaller base" in caught.value.hint


def test_checkpointing_and_smaller_micro_batches_each_take_less() -> None:
    def total(rows: int, way: bool) -> int:
        return needed(SEVEN_B, FORM, Work(n_ctx=512, micro_rows=rows, checkpointing=way)).total

    assert total(8, True) < total(8, False)
    assert total(1, False) < total(8, False)
    halves = needed(SEVEN_B, replace(FORM, dtype_bytes=2), Work(n_ctx=512, micro_rows=8, checkpointing=False))
    assert halves.total < total(8, False)


def test_trained_parameters_are_those_of_the_targets(base: BaseModel) -> None:
    shape = shape_of(base.headers, ("attn_q", "ffn_down"))
    # of write_header's Llama: 4 layers, attn_q 256 -> 256 and ffn_down 512 -> 256
    assert shape.trained_parameters(replace(FORM, rank=8)) == 4 * 8 * (256 + 256 + 512 + 256)
    assert shape.trained_parameters(replace(FORM, rank=8, dora=True)) == 4 * (8 * (256 + 256 + 512 + 256) + 256 + 256)
    assert shape.weight_bytes == base.tensor_bytes


def test_a_training_that_cannot_fit_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    write_header(tmp_path / "b.gguf", "llama", n_layer=32, n_embd=4096, n_ff=11008, head=128, n_head=32)
    (tmp_path / "c.txt").write_text("some text\n" * 500)
    (tmp_path / "r.yaml").write_text(
        "name: a\nbase: {gguf: b.gguf}\ndata: {sources: [{text: c.txt}]}\nbudget: {memory_gib: 1}\n"
    )
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.described import machine\n"
        "from toolchain.base.errors import MemoryFitError\n"
        "from toolchain.lora.base import read_base\n"
        "from toolchain.lora.plan import settle_means\n"
        "from toolchain.lora.recipe import load_lora_recipe\n"
        "import toolchain.lora.base as place, toolchain.lora.verbs\n"
        "place.tensors_sha256 = lambda header: ''\n"  # a hole of gigabytes is not worth hashing
        f"folder = Path({str(tmp_path)!r})\n"
        "base = read_base(folder / 'b.gguf', origin='')\n"
        "try:\n    settle_means(load_lora_recipe(folder / 'r.yaml'), base, machine())\n"
        "except MemoryFitError as error:\n    print(error.evidence)\n"
        "assert not {'torch', 'transformers', 'peft', 'llama_cpp'} & set(sys.modules)\n"
    )
    done = run_process([__import__("sys").executable, "-c", program])
    assert done.returncode == 0, done.stderr
    assert "activations" in done.stdout


def test_the_machines_memory_is_shared_by_processes_and_bound_by_the_budget(base: BaseModel) -> None:
    here = machine(available_bytes=64 * GIB)
    assert settle_means(recipe(), base, here).free_bytes == 64 * GIB
    assert settle_means(recipe(train={"processes": 2}), base, here).free_bytes == 32 * GIB
    assert settle_means(recipe(budget={"memory_gib": 6}), base, here).free_bytes == 6 * GIB
    assert settle_means(recipe(train={"processes": 2}), base, here).threads == here.compute_threads // 2


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"batch": 3, "processes": 2}, "cannot be shared by 2 processes"),
        ({"batch": 8, "micro_batch": 3}, "does not divide"),
        ({"n_ctx": 1 << 18}, "is more than base.gguf was made for"),
    ],
)
def test_what_does_not_go_together_is_refused(base: BaseModel, train: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settle_means(recipe(train=train), base, machine())


def test_a_gpu_is_taken_where_torch_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu = machine(gpus=(Gpu(name="G", memory_bytes=24 * GIB, free_bytes=20 * GIB),))
    monkeypatch.setattr("toolchain.lora.plan.torch_cuda", lambda: True)
    assert choose_device(recipe(), with_gpu) == "cuda"
    assert choose_device(recipe(), machine()) == "cpu"
    assert choose_device(recipe(train={"device": "cpu"}), with_gpu) == "cpu"
    with pytest.raises(MissingError, match="no GPU"):
        choose_device(recipe(train={"device": "cuda"}), machine())
    monkeypatch.setattr("toolchain.lora.plan.torch_cuda", lambda: False)
    assert choose_device(recipe(), with_gpu) == "cpu"
    with pytest.raises(MissingError, match="CPUs only"):
        choose_device(recipe(train={"device": "cuda"}), with_gpu)


def test_a_gpus_free_memory_is_what_counts_on_it(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.lora.plan.torch_cuda", lambda: True)
    card = Gpu(name="G", memory_bytes=24 * GIB, free_bytes=20 * GIB)
    means = settle_means(recipe(), base, machine(gpus=(card,)))
    assert (means.device, means.dtype, means.free_bytes) == ("cuda", "bfloat16", 20 * GIB)
    two = settle_means(recipe(train={"processes": 2}), base, machine(gpus=(card, replace(card, free_bytes=GIB * 9))))
    assert two.free_bytes == 9 * GIB
    with pytest.raises(UsageError, match="1 GPUs are visible"):
        settle_means(recipe(train={"processes": 2}), base, machine(gpus=(card,)))


def test_epochs_become_steps_and_the_budget_lowers_them() -> None:
    assert settle_length(recipe(train={"epochs": 2, "batch": 8}), rows=100).steps == math.ceil(2 * 100 / 8)
    assert settle_length(recipe(train={"steps": 7}), rows=100).steps == 7
    short = settle_length(recipe(train={"steps": 700}, budget={"minutes": 1}), rows=100, seconds_per_step=2.0)
    assert (short.steps, short.cut) == (30, True)
    assert not settle_length(recipe(train={"steps": 7}, budget={"minutes": 1}), rows=100, seconds_per_step=2.0).cut
    with pytest.raises(UsageError, match="less than one step"):
        settle_length(recipe(budget={"minutes": 1}), rows=100, seconds_per_step=61.0)


def test_what_the_probe_measured_counts_more_than_the_estimate(base: BaseModel) -> None:
    means: Means = settle_means(recipe(), base, machine())
    outcome = TrainOutcome(
        steps=2,
        tokens_per_second=1.0,
        seconds_per_step=1.0,
        weight_bytes=1,
        import_bytes=GIB,
        peak_bytes=62 * GIB,
        trained_parameters=1,
        held_out_before=None,
        held_out_after=None,
    )
    require_measured_fit(outcome, means)
    with pytest.raises(MemoryFitError, match="the probe took"):
        require_measured_fit(replace(outcome, peak_bytes=64 * GIB), means)


def test_progress_tells_loss_speed_and_time_left() -> None:
    from toolchain.base.console import Step

    now = [0.0]
    shown = Step("train")
    progress = Progress(shown, steps=10, tokens=1000, done=4, clock=lambda: now[0])
    for step, seconds in ((5, 60.0), (6, 2.0)):  # the first one waited for the child's imports
        now[0] += seconds
        line = {"step": step, "loss": 3.5, "learning_rate": 0.1, "grad_norm": 1.0, "learned_tokens": 900}
        progress.on_line(json.dumps(line))
        if step == 5:
            assert shown.note == "loss 3.500"
    progress.on_line("Loading weights: 100%")
    assert (shown.done, shown.total) == (6, 10)
    assert shown.note == "loss 3.500, 500 tokens/s, 8 s left"
    assert parse_step('{"step": 1, "los') is None
    assert [duration(seconds) for seconds in (41.2, 720, 12_000)] == ["41 s", "12 min", "3 h 20 min"]

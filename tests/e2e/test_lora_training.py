"""Trainings by the child's own command line, on small generated bases: what it learns, writes, refuses and resumes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.front_door import PATIENCE_S, ROOT, environment, leftovers
from tests.generated_models import Family, write_model
from tests.lora_runs import child_argv, counting_rows, library_loss, make_dataset, train_child, train_spec
from toolchain.base import files
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import BASE_NAME_KEY, BASE_SHA256_KEY, tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.lora.dataset_file import Rows, read_dataset, write_dataset
from toolchain.lora.forms.adapter import read_adapter
from toolchain.lora.spec import TrainOutcome, TrainSpec
from toolchain.lora.targets import target_suffixes

N_VOCAB, N_CTX = 512, 24


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: Toolchain) -> None:
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "home"))


def prepared(
    folder: Path, toolchain: Toolchain, family: Family = "llama", *, train: Rows | None = None, **changes: Any
) -> TrainSpec:
    """A random base of two layers, twelve rows of which the held-out ones are the first four, and a spec for them."""
    folder.mkdir(exist_ok=True)
    base = write_model(folder / f"{family}.gguf", family, random=True, n_layer=2)
    train = train or counting_rows(12, N_CTX, n_vocab=N_VOCAB, seed=1)
    held = Rows(ids=train.ids[:4], labels=train.labels[:4], positions=train.positions[:4])
    dataset = make_dataset(folder / "data.npz", base, train, held)
    targets = target_suffixes([read_header(base)], "all-linear")
    return train_spec(base, dataset, folder / "run", toolchain.lib_dir, **{"targets": targets, **changes})


def trained(spec: TrainSpec, *, processes: int = 1) -> tuple[list[dict[str, Any]], TrainOutcome]:
    """The loss curve and the outcome of a training that must succeed."""
    done = train_child(spec, processes=processes)
    assert done.returncode == 0, done.stderr
    lines = (Path(spec.run_dir) / "metrics.jsonl").read_text().splitlines()
    outcome = TrainOutcome.from_json(json.loads((Path(spec.run_dir) / "outcome.json").read_text()))
    return [json.loads(line) for line in lines], outcome


def losses(curve: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in curve]


def beside(spec: TrainSpec, name: str, **changes: Any) -> TrainSpec:
    """The same training in another folder, with ``changes``."""
    return replace(spec, run_dir=f"{spec.run_dir}-{name}", **changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rslora": True}),
        ("qwen3", {"gradient_checkpointing": True}),
        ("gemma", {"packed": False}),
        ("gemma2", {"dtype": "bfloat16"}),
        ("gemma3", {}),
        ("phi3", {}),
        ("mixtral", {}),
    ],
)
def test_the_library_computes_what_was_trained(
    toolchain: Toolchain, tmp_path: Path, family: Family, changes: dict[str, Any]
) -> None:
    """The loss on learned rows falls in the training, and by as much where the library applies the written adapter."""
    spec = prepared(tmp_path, toolchain, family, steps=30, rank=8, **changes)
    curve, outcome = trained(spec)
    before, after = outcome.held_out_before, outcome.held_out_after
    assert before is not None
    assert after is not None
    assert [line["step"] for line in curve] == list(range(1, 31))
    assert after < before - 1.0
    base, adapter = Path(spec.base[0]), tmp_path / "run" / "adapter.gguf"
    held = read_dataset(Path(spec.dataset)).held
    tolerance = 0.05 if spec.dtype == "bfloat16" else 0.01
    assert library_loss(base, held, tmp_path) == pytest.approx(before, abs=tolerance)
    assert library_loss(base, held, tmp_path, adapter=adapter) == pytest.approx(after, abs=tolerance)


def test_a_dora_adapter_is_marked_as_one_that_only_a_merge_takes(toolchain: Toolchain, tmp_path: Path) -> None:
    spec = prepared(tmp_path, toolchain, dora=True, steps=30, rank=8)
    _, outcome = trained(spec)
    assert outcome.held_out_before is not None
    assert outcome.held_out_after is not None
    assert outcome.held_out_after < outcome.held_out_before - 1.0
    adapter = read_adapter(tmp_path / "run" / "adapter.gguf")
    assert adapter.dora
    assert outcome.trained_parameters == sum(
        pair.a.size + pair.b.size + (0 if pair.magnitude is None else pair.magnitude.size)
        for pair in adapter.pairs.values()
    )


def test_the_adapter_knows_its_base_and_both_forms_hold_the_same_numbers(toolchain: Toolchain, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    spec = prepared(tmp_path, toolchain, "qwen3", steps=2)
    trained(spec)
    base = Path(spec.base[0])
    header = read_header(tmp_path / "run" / "adapter.gguf")
    assert header.text(BASE_SHA256_KEY) == tensors_sha256(read_header(base))
    assert header.text(BASE_NAME_KEY) == base.name
    pair = read_adapter(header.path).pairs["blk.1.ffn_down.weight"]
    peft = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(peft[f"{module}.lora_A.weight"], pair.a)
    np.testing.assert_array_equal(peft[f"{module}.lora_B.weight"], pair.b)
    folder = tmp_path / "run" / "adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name
    assert "down_proj" in config["target_modules"]


def test_how_the_rows_of_a_step_are_grouped_changes_nothing(toolchain: Toolchain, tmp_path: Path) -> None:
    """One process or two, rows one by one or together, with recomputed activations or kept ones, packed or unpacked.

    Rows of very different learned lengths: a mean over rows, or over processes, would weigh their tokens wrongly.
    """
    train = counting_rows(12, N_CTX, n_vocab=N_VOCAB, seed=1, lengths=(9, 7))
    train.labels[::2, 3:] = -100
    spec = prepared(tmp_path, toolchain, train=train, dropout=0.0, micro_rows=4)
    expected = losses(trained(spec)[0])
    for other in (
        beside(spec, "single", micro_rows=1),
        beside(spec, "recomputed", gradient_checkpointing=True),
        beside(spec, "unpacked", packed=False),
    ):
        assert losses(trained(other)[0]) == pytest.approx(expected, rel=1e-4), other.run_dir
    curve, outcome = trained(beside(spec, "two"), processes=2)
    assert losses(curve) == pytest.approx(expected, rel=1e-4)
    assert outcome.steps == spec.steps
    assert expected[-1] < expected[0]


def test_two_machines_without_a_common_disk_for_results_train_as_one(toolchain: Toolchain, tmp_path: Path) -> None:
    """Two torchruns that meet at a port; the first one alone writes, and both go on from its checkpoint."""
    spec = prepared(tmp_path, toolchain, dropout=0.0, steps=6, checkpoint_steps=3)
    expected = losses(trained(spec)[0])
    folders = [beside(spec, f"machine{rank}") for rank in range(2)]
    for steps in (3, 6):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = []
        for rank, machine in enumerate(folders):
            meeting = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}")
            argv = child_argv(machine, rendezvous=meeting)
            both.append(subprocess.Popen(argv, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True))
        for running in both:
            _, told = running.communicate(timeout=PATIENCE_S)
            assert running.returncode == 0, told
        if steps == 3:  # as if the first machine had been lost after its third step
            first = tmp_path / "run-machine0"
            files.remove(first / "checkpoints" / "step-00000006", within=first)
            (first / "outcome.json").unlink()
    curve = (tmp_path / "run-machine0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in curve] == pytest.approx(expected, rel=1e-4)
    assert list((tmp_path / "run-machine1").iterdir()) == []


def test_examples_of_a_model_with_convolutions_are_computed_alone(toolchain: Toolchain, tmp_path: Path) -> None:
    """A convolution would carry the end of one example into the next: the curve is that of the rows one by one."""
    packed = counting_rows(4, N_CTX, n_vocab=N_VOCAB, seed=1, lengths=(10, 8))
    parts = [(slice(row, row + 1), begin, end) for row in range(4) for begin, end in ((0, 10), (10, 18))]

    def alone(array: np.ndarray[Any, np.dtype[np.int32]], filler: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        rows = np.full((8, N_CTX), filler, np.int32)
        for number, (row, begin, end) in enumerate(parts):
            rows[number, : end - begin] = array[row, begin:end][0]
        return rows

    single = Rows(
        ids=alone(packed.ids, 3),
        labels=alone(packed.labels, -100),
        positions=np.tile(np.arange(N_CTX, dtype=np.int32), (8, 1)),
    )
    spec = prepared(tmp_path / "packed", toolchain, "lfm2", train=packed, dropout=0.0)
    other = prepared(tmp_path / "single", toolchain, "lfm2", train=single, dropout=0.0, rows=8)
    assert losses(trained(spec)[0]) == pytest.approx(losses(trained(other)[0]), rel=1e-5)


def test_an_interrupted_training_keeps_its_last_step_and_ends_with_the_same_bytes(
    toolchain: Toolchain, tmp_path: Path
) -> None:
    spec = prepared(tmp_path, toolchain, steps=60, checkpoint_steps=1000)
    whole = beside(spec, "whole")
    trained(whole)
    for number in (signal.SIGINT, signal.SIGTERM):
        running = subprocess.Popen(
            child_argv(spec), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert running.stdout is not None
        for _ in range(5):
            running.stdout.readline()
        running.send_signal(number)
        running.send_signal(number)  # as a terminal and the process that started it would, at once
        _, told = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 130, told
        assert not (tmp_path / "run" / "outcome.json").exists()
        (kept,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert kept.name == f"step-{len(lines):08}"
        assert len(lines) < spec.steps
    trained(spec)
    for name in ("metrics.jsonl", "adapter.gguf", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "run-whole" / name).read_bytes(), name
    assert not leftovers(tmp_path)


def test_a_base_that_transformers_computes_differently_is_refused_with_both_figures(
    toolchain: Toolchain, tmp_path: Path
) -> None:
    """As it would be were positions misread: the library's logits are here those of the tokens in another order."""
    spec = prepared(tmp_path, toolchain)
    dataset = read_dataset(Path(spec.dataset))
    write_dataset(Path(spec.dataset), replace(dataset, probe_logits=dataset.probe_logits[::-1]))
    done = train_child(spec)
    assert done.returncode == 6, done.stderr
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert "differently than the library" in failure["message"]
    assert "the bound is 0.01" in failure["evidence"]
    assert float(failure["evidence"].split(":")[1].split(",")[0]) > 0.01
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_probe_tells_what_steps_cost_and_leaves_nothing_else(toolchain: Toolchain, tmp_path: Path) -> None:
    spec = prepared(tmp_path, toolchain, probe_steps=3)
    done = train_child(spec)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["outcome.json"]
    outcome = TrainOutcome.from_json(json.loads((tmp_path / "run" / "outcome.json").read_text()))
    assert outcome.steps == 3
    assert outcome.held_out_before is None
    tokens = spec.rows * N_CTX
    assert outcome.tokens_per_second * outcome.seconds_per_step == pytest.approx(tokens)
    assert outcome.peak_bytes > outcome.weight_bytes > 0


def test_a_training_that_diverges_stops_at_that_step_and_keeps_the_checkpoint_before(
    toolchain: Toolchain, tmp_path: Path
) -> None:
    spec = prepared(tmp_path, toolchain, learning_rate=1e30, warmup_steps=0, checkpoint_steps=1)
    done = train_child(spec)
    assert done.returncode == 5, done.stderr
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    taken = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert f"diverged in step {taken + 1}" in failure["message"]
    assert "learning_rate" in failure["hint"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{taken:08}").is_dir()


def test_a_target_that_the_base_has_not_is_refused(toolchain: Toolchain, tmp_path: Path) -> None:
    done = train_child(prepared(tmp_path, toolchain, targets=("attn_qkv",)))
    assert done.returncode == 2
    assert "no linear layer attn_qkv" in done.stderr

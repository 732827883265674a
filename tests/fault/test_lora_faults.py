"""Trainings killed at any moment, on a disk that fills up, with damaged checkpoints: the same bytes come out."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.front_door import PATIENCE_S, ROOT, environment, leftovers, on_small_disk
from tests.generated_models import write_model
from tests.lora_runs import child_argv, counting_rows, make_dataset, train_child, train_spec
from toolchain.base import files
from toolchain.build.toolchain import Toolchain
from toolchain.lora.spec import TrainSpec

KILLS = 6
RESULTS = ("metrics.jsonl", "adapter.gguf", "adapter/adapter_model.safetensors")


@pytest.fixture
def spec(toolchain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """A training of packed rows with dropout on a random Llama, a checkpoint after every third of 40 steps."""
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = write_model(tmp_path / "llama.gguf", "llama", random=True, n_layer=2)
    rows = [counting_rows(count, 24, n_vocab=512, seed=count, lengths=(11, 9)) for count in (10, 3)]
    dataset = make_dataset(tmp_path / "data.npz", base, *rows)
    return train_spec(base, dataset, tmp_path / "run", toolchain.lib_dir, steps=40)


def undisturbed(spec: TrainSpec) -> dict[str, str]:
    """The SHA-256 of what the training writes when nothing happens to it."""
    whole = replace(spec, run_dir=f"{spec.run_dir}-whole")
    done = train_child(whole)
    assert done.returncode == 0, done.stderr
    return hashes(whole)


def hashes(spec: TrainSpec) -> dict[str, str]:
    return {name: files.sha256_file(Path(spec.run_dir) / name) for name in RESULTS}


def test_a_training_killed_again_and_again_ends_with_the_same_bytes(spec: TrainSpec) -> None:
    """SIGKILL at moments from a printed seed; a checkpoint after each step, so that their writing is hit too."""
    spec, seed, killed = replace(spec, checkpoint_steps=1), random.randrange(1 << 30), 0
    print(f"seed {seed}")
    moments = random.Random(seed)
    for _ in range(KILLS):
        running = subprocess.Popen(
            child_argv(spec), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert running.stdout is not None
        for _ in range(moments.randint(1, 6)):
            running.stdout.readline()
        time.sleep(moments.random() * 0.05)
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
            killed += 1
        running.communicate(timeout=PATIENCE_S)
    assert killed == KILLS
    assert not (Path(spec.run_dir) / "outcome.json").exists()
    done = train_child(spec)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["step"] > KILLS  # each run came further than the one before
    assert hashes(spec) == undisturbed(spec)
    assert not leftovers(Path(spec.run_dir))


def test_a_disk_that_fills_up_before_a_checkpoint_is_told_and_a_rerun_with_space_goes_on(
    spec: TrainSpec, tmp_path: Path
) -> None:
    """A real file system, filled to the brim after some checkpoints; then there is space again."""
    small = tmp_path / "small"
    on_disk = replace(spec, run_dir=str(small / "run"), steps=200)
    argv = child_argv(replace(on_disk, run_dir=str(tmp_path / "on-disk")))
    Path(argv[-1]).write_text(json.dumps({**json.loads(Path(argv[-1]).read_text()), "run_dir": on_disk.run_dir}))
    child = shlex.join(argv)
    filler = shlex.quote(str(small / "filler"))
    twice = f"{child}; echo status $? >&2; cat {small}/run/failure.json >&2; rm {filler}; echo again; exec {child}"
    done, left = on_small_disk("32m", small, ["sh", "-c", twice], env={}, fill_after="step-0000001*")
    assert done.returncode == 0, done.stderr
    assert "status 3" in done.stderr
    assert f"the disk is full while writing {small}/run/" in done.stderr
    assert "free some space" in done.stderr
    first, second = done.stdout.split("again\n")
    assert "warning" not in second
    assert 9 < json.loads(second.splitlines()[0])["step"] <= len(first.splitlines()) + 1
    expected = undisturbed(replace(spec, steps=200))
    assert {name: left[f"run/{name}"] for name in RESULTS} == expected
    assert not [name for name in left if ".partial-" in name]


def test_a_checkpoint_that_is_damaged_or_was_never_finished_is_passed_over(spec: TrainSpec) -> None:
    expected, checkpoints = undisturbed(spec), Path(spec.run_dir) / "checkpoints"
    assert train_child(spec).returncode == 0

    def flipped(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    flipped(checkpoints / "step-00000040" / "optimizer.safetensors")
    again = train_child(spec)
    assert "step-00000040 is passed over: optimizer.safetensors is not what was written" in again.stdout
    assert '{"step": 40,' in again.stdout
    assert '{"step": 39,' not in again.stdout
    assert hashes(spec) == expected

    flipped(checkpoints / "step-00000040" / "adapter.safetensors")
    (checkpoints / "step-00000039" / "done.json").unlink()
    anew = train_child(spec)
    assert "step-00000039 is passed over: it was never finished" in anew.stdout
    assert '{"step": 1,' in anew.stdout
    assert hashes(spec) == expected


def test_a_checkpoint_of_another_training_is_passed_over(spec: TrainSpec) -> None:
    assert train_child(replace(spec, learning_rate=3e-3)).returncode == 0
    other = train_child(spec)
    assert "step-00000040 is passed over: it is of another training" in other.stdout
    assert hashes(spec) == undisturbed(spec)

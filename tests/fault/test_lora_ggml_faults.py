"""The trainer of 2023 stopped at any moment: what is made in the end is what an undisturbed run makes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.front_door import PATIENCE_S, ROOT, on_small_disk
from toolchain.build import legacy
from toolchain.build.toolchain import Toolchain
from toolchain.lora.ggml_engine.checkpoints import KEPT
from toolchain.lora.ggml_engine.train import ADAPTER_FILE
from toolchain.lora.spec import CHECKPOINTS, METRICS

STEPS, EVERY = 120, 10
TRAINING = """
import sys
from pathlib import Path

from toolchain.base import console
from toolchain.base.errors import FoundryError
from toolchain.build.toolchain import load
from toolchain.lora.ggml_engine.train import train
from toolchain.lora.recipe import LoraRecipe

base, text, run_dir, trainer, steps, every = sys.argv[1:]
recipe = LoraRecipe.model_validate({
    "name": "x", "engine": "ggml", "base": {"gguf": base}, "data": {"sources": [{"text": text}]},
    "adapter": {"rank": 8},
    "train": {"n_ctx": 32, "batch": 4, "micro_batch": 2, "learning_rate": 0.01, "checkpoint_steps": int(every)},
})
log = Path(run_dir) / "log"
try:
    train(recipe, Path(base), Path(text), Path(run_dir), load(trainer), steps=int(steps), n_threads=1, log=log)
except FoundryError as error:
    console.failure(error)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trainer's own proof: a base of 434 KB, and its text."""
    folder = tmp_path_factory.mktemp("given")
    program = Path(legacy.__file__).with_name("trainer_model.py")
    subprocess.run([sys.executable, program, folder / "base.gguf"], check=True)
    (folder / "text.txt").write_text(legacy.TEXT)
    return folder


def argv_of(given: Path, run_dir: Path, trainer: Toolchain, *, every: int = EVERY) -> list[str]:
    run_dir.mkdir(exist_ok=True)
    paths = (given / "base.gguf", given / "text.txt", run_dir)
    return [sys.executable, "-c", TRAINING, *map(str, (*paths, trainer.id, STEPS, every))]


def finish(given: Path, run_dir: Path, trainer: Toolchain) -> tuple[bytes, bytes]:
    """Run it to its end: the bytes of the loss curve and of the adapter."""
    argv = argv_of(given, run_dir, trainer)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return (run_dir / METRICS).read_bytes(), (run_dir / ADAPTER_FILE).read_bytes()


@pytest.fixture(scope="session")
def undisturbed(given: Path, trainer: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return finish(given, tmp_path_factory.mktemp("undisturbed"), trainer)


def start(given: Path, run_dir: Path, trainer: Toolchain) -> subprocess.Popen[bytes]:
    argv = argv_of(given, run_dir, trainer)
    return subprocess.Popen(argv, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)


def steps_told(run_dir: Path) -> int:
    path = run_dir / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(running: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    while running.poll() is None and steps_told(run_dir) < step:
        time.sleep(0.002)


def saved(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that the loss curve reaches; the trainer may have been further."""
    steps = sorted(int(path.name) for path in (run_dir / CHECKPOINTS).iterdir() if path.name.isdecimal())
    return [step for step in steps if step <= steps_told(run_dir)]


def test_kills_at_random_moments_change_nothing(
    given: Path, trainer: Toolchain, undisturbed: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """SIGKILL to the whole process group, again and again in one run; each goes on from where the last one was cut."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    moments, reached = random.Random(seed), 0
    run_dir = tmp_path / "run"
    for _ in range(4):
        running = start(given, run_dir, trainer)
        wait_for(running, run_dir, reached + moments.randrange(1, 25))
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        reached = steps_told(run_dir)
    assert 0 < reached < STEPS
    assert finish(given, run_dir, trainer) == undisturbed
    assert len(saved(run_dir)) == KEPT


def test_an_interrupt_keeps_the_last_checkpoint_and_leaves_no_process(
    given: Path, trainer: Toolchain, undisturbed: tuple[bytes, bytes], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    running = start(given, run_dir, trainer)
    wait_for(running, run_dir, 3 * EVERY + 2)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=PATIENCE_S) == 130
    assert subprocess.run(["ps", "-s", str(running.pid)], capture_output=True, check=False).returncode != 0
    kept = saved(run_dir)[-1]
    assert kept >= 3 * EVERY
    assert finish(given, run_dir, trainer) == undisturbed
    assert f"--checkpoint-in {kept} " in (run_dir / "log").read_text()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.9999])
def test_a_checkpoint_cut_by_a_kill_is_passed_over(
    given: Path, trainer: Toolchain, undisturbed: tuple[bytes, bytes], tmp_path: Path, share: float
) -> None:
    run_dir = tmp_path / "run"
    running = start(given, run_dir, trainer)
    wait_for(running, run_dir, 4 * EVERY + 2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    older, newest = saved(run_dir)[-2:]
    path = run_dir / CHECKPOINTS / str(newest)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert finish(given, run_dir, trainer) == undisturbed
    assert f"--checkpoint-in {older} " in (run_dir / "log").read_text()


def test_a_checkpoint_that_the_loss_curve_does_not_reach_is_passed_over(
    given: Path, trainer: Toolchain, undisturbed: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """The trainer was faster than we: a checkpoint is there, the line of its step was never written, or half."""
    run_dir = tmp_path / "run"
    running = start(given, run_dir, trainer)
    wait_for(running, run_dir, 4 * EVERY + 2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    older, newest = saved(run_dir)[-2:]
    lines = (run_dir / METRICS).read_bytes().splitlines(keepends=True)
    (run_dir / METRICS).write_bytes(b"".join(lines[: newest - 1]) + lines[newest - 1][:20])
    assert finish(given, run_dir, trainer) == undisturbed
    assert f"--checkpoint-in {older} " in (run_dir / "log").read_text()


def test_a_full_disk_at_a_checkpoint_is_told(given: Path, trainer: Toolchain, tmp_path: Path) -> None:
    """The trainer looks at no error when it writes. The disk is filled to the brim behind its second checkpoint."""
    small = tmp_path / "small"
    done, left = on_small_disk("16m", small, argv_of(given, small, trainer), env={}, fill_after=str(2 * EVERY))
    assert done.returncode == 3, done.stderr
    assert "the disk is full" in done.stderr
    assert {name.partition("/")[0] for name in left} >= {CHECKPOINTS, METRICS}


def test_a_disk_without_room_for_checkpoints_is_told_before(given: Path, trainer: Toolchain, tmp_path: Path) -> None:
    small = tmp_path / "small"
    done, left = on_small_disk("512k", small, argv_of(given, small, trainer), env={})
    assert done.returncode == 3, done.stderr
    assert "not enough disk space for the trainer's checkpoints" in done.stderr
    assert "log" not in left

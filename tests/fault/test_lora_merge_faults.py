"""A merge stopped at any moment, or without room: no file that looks like a model, and the next one is whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_lora_merge import in_a_child, merging, small_adapter
from tests.front_door import ROOT, environment, leftovers, on_small_disk
from toolchain.base.errors import MissingError
from toolchain.base.files import sha256_file
from toolchain.pipeline import provenance

KILLS = 6
MERGED = "merged-demo/merged-demo-Q4_K_M.gguf"


@pytest.fixture
def statements(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A merge by a recipe, of the demo model at full precision, into ``tmp_path / "models"``."""
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    return merging(tmp_path, demo_gguf, small_adapter(demo_gguf, tmp_path / "a.gguf"))


def whole_models(folder: Path) -> list[str]:
    """What a user sees, hidden files and folders left out."""
    if not folder.exists():
        return []
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.parts))


def test_kills_at_random_moments_leave_nothing_that_looks_like_a_model(statements: str, tmp_path: Path) -> None:
    """SIGKILL to all of its processes, at moments of a merge's length from a printed seed."""
    models, seed = tmp_path / "models", random.randrange(1 << 30)
    print(f"seed {seed}")
    moments, started = random.Random(seed), time.monotonic()
    undisturbed = json.loads(in_a_child(statements).stdout)
    length = time.monotonic() - started
    assert whole_models(models) == [MERGED, f"{MERGED}.json"]
    for name in whole_models(models):
        (models / name).unlink()
    for _ in range(KILLS):
        argv = [sys.executable, "-c", f"from pathlib import Path\n{statements}"]
        quiet = subprocess.DEVNULL
        running = subprocess.Popen(
            argv, cwd=ROOT, env=environment(), stdout=quiet, stderr=quiet, start_new_session=True
        )
        time.sleep(moments.uniform(0, length))
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        if MERGED in whole_models(models):  # it had got to its end
            assert sha256_file(models / MERGED) == undisturbed["sha256"]
        else:
            assert whole_models(models) == []
    again = json.loads(in_a_child(statements).stdout)
    assert {**again, "seconds": 0, "reused": False} == {**undisturbed, "seconds": 0}
    assert provenance.verify(models / MERGED)["sha256"] == undisturbed["sha256"]
    assert not leftovers(models)


@pytest.mark.parametrize(
    ("size", "fill_after", "words"),
    [("8m", "", "not enough disk space for merged-demo-Q4_K_M.gguf"), ("64m", "sum.gguf", "the disk is full")],
    ids=["too small", "filled meanwhile"],
)
def test_a_disk_without_room_is_told(statements: str, tmp_path: Path, size: str, fill_after: str, words: str) -> None:
    argv = [sys.executable, "-c", f"from pathlib import Path\n{statements}"]
    done, left = on_small_disk(size, tmp_path / "models", argv, env={}, fill_after=fill_after)
    assert done.returncode != 0
    assert MissingError.__name__ in done.stderr
    assert words in done.stderr
    assert [name for name in left if not name.endswith(".lock")] == []

"""`inv quantize` killed at any moment: what lies under a final name is whole, and the next run ends well."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.front_door import ROOT, environment, inv_argv, inv_json, leftovers, on_small_disk
from toolchain.base import files
from toolchain.build.toolchain import Toolchain

KILLS = 10
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


@pytest.fixture
def recipe(demo: object, toolchain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's folder converted, made into six types and judged briefly; only the toolchain is shared."""
    folder = next((files.home_dir("work") / "steps").glob("*/tiny"))
    home = tmp_path / "home"
    (home / "toolchains").mkdir(parents=True)
    (home / "toolchains" / toolchain.id).symlink_to(toolchain.root)
    (home / "toolchains" / "current").symlink_to(toolchain.id)
    monkeypatch.setenv("FOUNDRY_HOME", str(home))
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    text = "\n".join(f"  - {name}" for name in TYPES)
    path = tmp_path / "many.yaml"
    path.write_text(
        f"name: many\nmodel: {{path: {folder}}}\nquantize:\n{text}\n"
        "evaluate: {corpus: 'builtin:python-docs', n_ctx: 128, chunks: 8}\n"
    )
    return path


def check_final_names(models: Path, reference: Mapping[str, str]) -> int:
    """Every file under a final name has the hash that an undisturbed run gives it, and that a sidecar states."""
    found = 0
    for path in models.glob("*/[!.]*.gguf"):
        assert files.sha256_file(path) == reference[path.name]
        sidecar = path.with_name(path.name + ".json")
        if sidecar.exists():
            assert json.loads(sidecar.read_text())["sha256"] == reference[path.name]
            found += 1
    return found


def test_ten_kills_at_random_moments(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL to the whole process group. The moments come from a printed seed, spread over a full run."""
    models, work, seed = tmp_path / "models", tmp_path / "home" / "work", random.randrange(1 << 30)
    print(f"seed {seed}")
    moments = random.Random(seed)
    started = time.monotonic()
    answer = inv_json("quantize", recipe)
    whole_run_s = time.monotonic() - started
    reference = {Path(a["path"]).name: a["sha256"] for a in answer["artifacts"]}
    killed = 0
    for number in range(KILLS):
        if number % 2 == 0:  # every other run begins anew, the others go on from where the kill came
            shutil.rmtree(models)
            shutil.rmtree(work)
        running = subprocess.Popen(
            inv_argv("quantize", recipe, "--json"),
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # one moment from each tenth of a whole run, so that every stage is hit
        time.sleep(whole_run_s * (number + moments.random()) / KILLS)
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            killed += 1
        running.wait()
        check_final_names(models, reference)
    assert killed >= KILLS // 2
    final = inv_json("quantize", recipe)
    assert check_final_names(models, reference) == len(TYPES)
    assert {Path(a["path"]).name: a["sha256"] for a in final["artifacts"]} == reference
    assert not leftovers(models)


def test_an_interrupt_keeps_what_was_finished(recipe: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    running = subprocess.Popen(
        inv_argv("quantize", recipe), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while running.poll() is None and not list(models.glob("many/*.gguf.json")):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert not leftovers(models)
    kept = len(list(models.glob("many/*.gguf.json")))
    assert kept >= 1
    again = inv_json("quantize", recipe)
    check_final_names(models, {Path(a["path"]).name: a["sha256"] for a in again["artifacts"]})
    assert sum(a["reused"] for a in again["artifacts"]) >= kept


def test_two_runs_at_once_make_each_file_once(recipe: Path) -> None:
    both = [
        subprocess.Popen(
            inv_argv("quantize", recipe, "--json"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    answers: list[dict[str, Any]] = []
    for running in both:
        out, told = running.communicate(timeout=600)
        assert running.returncode == 0, told
        answers.append(json.loads(out))
    made = [a["type"] for answer in answers for a in answer["artifacts"] if not a["reused"]]
    assert sorted(made) == sorted(TYPES)


def test_a_disk_that_fills_up_between_two_types_is_told_and_mended(recipe: Path, tmp_path: Path) -> None:
    """Results go to a real file system that is filled to the brim once the first of them is there."""
    small = tmp_path / "small"
    env = {"FOUNDRY_MODELS": str(small)}
    done, left = on_small_disk("64m", small, inv_argv("quantize", recipe), env=env, fill_after="*.gguf.json")
    assert done.returncode == 3, done.stderr
    assert "the disk is full" in done.stderr
    assert "FOUNDRY_MODELS" in done.stderr
    assert not [name for name in left if ".partial-" in name]
    kept = [name for name in left if name.endswith(".gguf")]
    assert 1 <= len(kept) < len(TYPES)
    reference = {Path(a["path"]).name: a["sha256"] for a in inv_json("quantize", recipe)["artifacts"]}
    assert {Path(name).name: left[name] for name in kept}.items() <= reference.items()

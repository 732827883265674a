"""`inv quantize` killed at any moment: what lies under a final name is whole, and the next run ends well."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.front_door import ROOT, environment, inv, inv_argv, inv_json, leftovers
from toolchain.base import files
from toolchain.build.toolchain import Toolchain

KILLS = 10
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


@pytest.fixture
def recipe(demo_full: Path, toolchain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six types from the demo's conversion, judged briefly, in a home that shares nothing but the toolchain."""
    home = tmp_path / "home"
    (home / "toolchains").mkdir(parents=True)
    (home / "toolchains" / toolchain.id).symlink_to(toolchain.root)
    (home / "toolchains" / "current").symlink_to(toolchain.id)
    monkeypatch.setenv("FOUNDRY_HOME", str(home))
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    text = "\n".join(f"  - {name}" for name in TYPES)
    path = tmp_path / "many.yaml"
    path.write_text(
        f"name: many\nmodel: {{gguf: {demo_full}}}\nquantize:\n{text}\n"
        "evaluate: {corpus: 'builtin:python-docs', n_ctx: 128, chunks: 8}\n"
    )
    return path


def check_final_names(models: Path) -> int:
    """Every file with a sidecar has the hash that it states, and each GGUF is whole; how many there are."""
    found = 0
    for sidecar in models.rglob("[!.]*.gguf.json"):
        if any(part.startswith(".partial-") for part in sidecar.relative_to(models).parts):
            continue
        noted = json.loads(sidecar.read_text())
        assert files.sha256_file(sidecar.with_suffix("")) == noted["sha256"]
        found += 1
    for path in models.glob("*/[!.]*.gguf"):
        files_bytes = path.stat().st_size
        assert files_bytes > 0
        from toolchain.base.gguf import read_header

        read_header(path)
    return found


def test_ten_kills_at_random_moments(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL to the whole process group. The moments come from a printed seed, spread over a full run."""
    models, seed = tmp_path / "models", random.randrange(1 << 30)
    print(f"seed {seed}")
    moments = random.Random(seed)
    started = time.monotonic()
    reference = inv_json("quantize", recipe)
    whole_run_s = time.monotonic() - started
    for path in models.rglob("*"):
        if path.is_file():
            path.unlink()
    files.remove(tmp_path / "home" / "work", within=tmp_path / "home")
    killed = 0
    for _ in range(KILLS):
        running = subprocess.Popen(
            inv_argv("quantize", recipe, "--json"),
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.2, 0.6 * whole_run_s))
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            killed += 1
        running.wait()
        check_final_names(models)
        if moments.random() < 0.5:  # begin anew for some, go on for the others
            for path in models.glob("*/*.gguf.json"):
                path.unlink()
    assert killed >= KILLS // 2
    final = inv_json("quantize", recipe)
    assert check_final_names(models) == len(TYPES)
    assert [a["sha256"] for a in final["artifacts"]] == [a["sha256"] for a in reference["artifacts"]]
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
    kept = check_final_names(models)
    assert kept >= 1
    again = inv_json("quantize", recipe)
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


def test_a_full_disk_in_mid_quantize_is_told_and_mended(recipe: Path, tmp_path: Path) -> None:
    """Results go to a real file system of 6 MB: some types fit, then it is full."""
    small = tmp_path / "models"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"this test mounts a small disk and needs root: {done.stderr}"
    try:
        told = inv("quantize", recipe)
        assert told.returncode == 3, told.stderr
        assert "disk" in told.stderr
        assert "→" in told.stderr
        assert not leftovers(small)
        check_final_names(small)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    assert inv("quantize", recipe).returncode == 0

"""The wrapper `./inv`: a new checkout, a half-made environment, a broken one. The real dependencies are installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.front_door import LONG_S, ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds (a path with a space in it), with a half-made environment as an interrupt leaves it."""
    place = tmp_path_factory.mktemp("new checkout")
    for name in (
        "inv",
        "tasks.py",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "toolchain",
        "runtime",
        "recipes",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, place / name)
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "python").symlink_to(place / "nowhere")
    return place


def run(checkout: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        [checkout / "inv", *arguments],
        cwd=cwd or checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def test_a_half_made_environment_is_made_again_and_then_kept(checkout: Path, tmp_path: Path) -> None:
    first = run(checkout)
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stderr
    assert "quantize" in first.stdout
    stamp = checkout / ".venv" / ".complete"
    made = stamp.stat().st_mtime_ns
    again = run(checkout, "--list", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "making" not in again.stderr
    assert stamp.stat().st_mtime_ns == made


def test_paths_mean_the_callers_folder(checkout: Path) -> None:
    done = run(checkout, "quantize", "demo.yaml", "--dry-run", cwd=checkout / "recipes")
    assert done.returncode == 0, done.stderr
    assert "llama-quantize" in done.stdout


def test_two_first_calls_make_one_environment(checkout: Path) -> None:
    """The second waits for the first; both end well."""
    (checkout / ".venv" / ".complete").unlink(missing_ok=True)
    both = [
        subprocess.Popen([checkout / "inv"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    told = [running.communicate(timeout=LONG_S)[1] for running in both]
    assert [running.returncode for running in both] == [0, 0], told
    assert "".join(told).count("making .venv") == 1
    assert "".join(told).count("waiting for another ./inv") == 1


def test_a_broken_environment_is_noticed_and_an_interrupt_leaves_no_stamp(checkout: Path) -> None:
    if not (checkout / ".venv" / ".complete").exists():
        assert run(checkout).returncode == 0
    for package in checkout.glob(".venv/lib/python3*/site-packages/invoke"):
        shutil.rmtree(package)
    running = subprocess.Popen([checkout / "inv"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    stamp, log = checkout / ".venv" / ".complete", checkout / ".venv" / "setup.log"
    while running.poll() is None and (stamp.exists() or not log.exists()):
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert "making .venv" in told
    assert running.returncode != 0
    assert not stamp.exists()


def test_a_python_that_is_too_old_or_missing_is_told(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv" / ".complete").unlink(missing_ok=True)
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo "Python 3.8.1";; *) exit 1;; esac\n')
    old.chmod(0o755)
    for python, words in ((str(old), "too old"), ("no-such-python", "no no-such-python on PATH")):
        done = subprocess.run(
            [checkout / "inv"], env={**os.environ, "PYTHON": python}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 3
        assert words in done.stderr

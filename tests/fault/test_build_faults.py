"""What goes wrong around a compile, with real cmake, ninja and gcc on a tree that builds in a second.

Each fault ends with its exit code and a hint and leaves no Toolchain; then the same command is run without it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.front_door import ROOT, environment, inv, inv_argv, leftovers
from tests.mini_llama import write_tree
from toolchain.base import files


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FOUNDRY_HOME that borrows the fetched sources of the real one (they are read only)."""
    sources = files.home_dir("sources")
    path = tmp_path / "home"
    path.mkdir()
    (path / "sources").symlink_to(sources)
    monkeypatch.setenv("FOUNDRY_HOME", str(path))
    return path


def finished(home: Path) -> list[Path]:
    """Toolchain folders, whole or not."""
    folder = home / "toolchains"
    return [p for p in folder.glob("[!.]*") if p.is_dir()] if folder.exists() else []


def build_mini(tree: Path, **env: str | None) -> subprocess.CompletedProcess[str]:
    return inv("build", "--no-use", "--source", f"path:{tree}", env=env)


def test_a_compile_error_is_shown_with_its_log(built: object, home: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", broken=True)
    done = build_mini(tree)
    assert done.returncode == 5, done.stderr
    assert "llama.c" in done.stderr
    assert "log: " in done.stderr
    assert done.stdout == ""
    assert not finished(home)
    assert not leftovers(home)


def test_a_library_that_cannot_decode_is_no_toolchain(built: object, home: Path, tmp_path: Path) -> None:
    """The tree compiles, but what it makes is no llama.cpp: the proof refuses it."""
    done = build_mini(write_tree(tmp_path / "tree"))
    assert done.returncode == 6, done.stderr
    assert "the Python bindings do not work" in done.stderr
    assert not finished(home)
    assert not leftovers(home)


def test_a_missing_compiler_says_what_to_install(built: object, home: Path, tmp_path: Path) -> None:
    done = build_mini(write_tree(tmp_path / "tree"), PATH=str(Path(sys.executable).parent), CC=None, CXX=None)
    assert done.returncode == 3, done.stderr
    assert "apt-get install build-essential" in done.stderr
    assert not finished(home)


def test_a_compiler_that_is_named_but_not_there(built: object, home: Path, tmp_path: Path) -> None:
    done = build_mini(write_tree(tmp_path / "tree"), CC="gcc-99")
    assert done.returncode == 3, done.stderr
    assert "CC=gcc-99" in done.stderr


def test_a_wrong_hash_is_a_fetch_error(tmp_path: Path) -> None:
    env = {"FOUNDRY_HOME": str(tmp_path / "home")}
    done = inv("build", "--source", f"sdist:llama-cpp-python==0.3.36#sha256={'0' * 64}", env=env)
    assert done.returncode == 4, done.stderr
    assert "wrong hash" in done.stderr
    assert not list((tmp_path / "home" / "sources").glob("*/source.json"))
    assert not leftovers(tmp_path / "home")


def test_an_unknown_option_and_a_wrong_source_are_usage_errors(built: object, tmp_path: Path) -> None:
    for arguments, words in (
        (("--define", "GGML_CUDAA=ON"), "did you mean GGML_CUDA?"),
        (("--source", "llama.cpp"), "not a source pin"),
        (("--source", f"path:{tmp_path}"), "not a llama.cpp source tree"),
        (("--jobs", "many"), "not a number"),
    ):
        done = inv("build", *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_with_130_and_leaves_no_toolchain(
    built: object, home: Path, tmp_path: Path, how: str
) -> None:
    tree = write_tree(tmp_path / "tree", slow=True)
    argv = inv_argv("build", "--no-use", "--source", f"path:{tree}")
    running = subprocess.Popen(argv, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not list(home.glob("work/build-*/compiling")) and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.Signals[how])
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert "interrupted" in told
    assert not finished(home)
    assert not leftovers(home)
    # the compile goes on where it stopped: the build folder is kept
    assert list(home.glob("work/build-*/build.ninja"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A real file system of 24 MB, mounted for this test (root only) or, failing that, refused loudly."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"this test mounts a small disk and needs root: {done.stderr}"
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_told_before_the_work(built: object, small_disk: Path, tmp_path: Path) -> None:
    done = build_mini(write_tree(tmp_path / "tree"), FOUNDRY_HOME=str(small_disk))
    assert done.returncode == 3, done.stderr
    assert "not enough disk space" in done.stderr
    assert "set FOUNDRY_HOME" in done.stderr
    assert not finished(small_disk)


def test_a_disk_that_fills_up_while_unpacking_is_told(small_disk: Path) -> None:
    """The archive fits, what is in it does not; nothing stays that a rerun could mistake for a source."""
    program = (
        "import sys; from toolchain.base import console, files; from toolchain.base.errors import FoundryError\n"
        "from toolchain.build.source import fetch_source; from toolchain.build.pin import DEFAULT_PIN, parse_pin\n"
        "files.require_free = lambda *_: None\n"
        "try:\n    fetch_source(parse_pin(DEFAULT_PIN))\n"
        "except FoundryError as error:\n    console.failure(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment({"FOUNDRY_HOME": str(small_disk)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "the disk is full" in done.stderr
    assert not list(small_disk.glob("sources/*/source.json"))
    assert not leftovers(small_disk)


def test_use_of_an_unknown_toolchain_lists_those_there_are(built: dict[str, str]) -> None:
    done = inv("use", "zzz")
    assert done.returncode == 2
    assert built["toolchain_id"] in done.stderr


def test_a_damaged_toolchain_note_is_not_taken_for_a_toolchain(toolchain: object, home: Path, tmp_path: Path) -> None:
    root = home / "toolchains" / "0000000-aaaa"
    root.mkdir(parents=True)
    (root / "toolchain.json").write_text(json.dumps({"id": "0000000-aaaa"})[:-3])
    done = inv("use", "0000000")
    assert done.returncode == 2
    shutil.rmtree(root)
    assert os.listdir(home / "toolchains") is not None

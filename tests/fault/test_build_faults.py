"""What goes wrong around a compile, with real cmake, ninja and gcc on a tree that builds in a second.

Each fault ends with its exit code and a hint and leaves no Toolchain; then the same command is run without it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.front_door import ROOT, environment, inv, inv_argv, leftovers, on_small_disk
from tests.mini_llama import write_tree
from toolchain.build.toolchain import Toolchain


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
    assert "the Python bindings cannot be imported" in done.stderr
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


def test_a_full_disk_is_told_before_the_work(built: object, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    home = tmp_path / "small"
    argv = inv_argv("build", "--no-use", "--source", f"path:{tree}")
    done, left = on_small_disk("24m", home, argv, env={"FOUNDRY_HOME": str(home)})
    assert done.returncode == 3, done.stderr
    assert "not enough disk space" in done.stderr
    assert "set FOUNDRY_HOME" in done.stderr
    assert not [name for name in left if name.endswith("toolchain.json")]


def test_a_disk_that_fills_up_while_unpacking_is_told(tmp_path: Path) -> None:
    """The archive fits, what is in it does not; nothing stays that a rerun could mistake for a source."""
    program = (
        "import sys; from toolchain.base import console, files; from toolchain.base.errors import FoundryError\n"
        "from toolchain.build.source import fetch_source; from toolchain.build.pin import DEFAULT_PIN, parse_pin\n"
        "files.require_free = lambda *_: None\n"
        "try:\n    fetch_source(parse_pin(DEFAULT_PIN))\n"
        "except FoundryError as error:\n    console.failure(error); sys.exit(error.exit_code)\n"
    )
    home = tmp_path / "small"
    done, left = on_small_disk("100m", home, [sys.executable, "-c", program], env={"FOUNDRY_HOME": str(home)})
    assert done.returncode == 3, done.stderr
    assert "the disk is full" in done.stderr
    assert not [name for name in left if name.endswith("source.json") or ".partial-" in name]


def test_bindings_that_fail_their_proof_are_not_kept(toolchain: Toolchain, tmp_path: Path) -> None:
    """In an environment of its own: a wheel whose library is damaged is refused, taken out, and refused again."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", venv], check=True)
    (next(venv.glob("lib/python3*/site-packages")) / "ours.pth").write_text(
        "\n".join([str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))])
    )
    wheel = tmp_path / toolchain.wheel.name
    with zipfile.ZipFile(toolchain.wheel) as good, zipfile.ZipFile(wheel, "w") as bad:
        for member in good.infolist():
            body = good.read(member)
            bad.writestr(member, body[: len(body) // 2] if member.filename.endswith("libllama.so") else body)
    program = (
        "import sys; from pathlib import Path; from toolchain.build import bindings\n"
        "from toolchain.base.errors import FoundryError\n"
        f"try: bindings.ensure_installed(Path(sys.argv[1]), version={toolchain.wheel_version!r}, "
        f"commit={toolchain.short_commit!r})\n"
        "except FoundryError as error: print(error); sys.exit(error.exit_code)\n"
    )

    def install(chosen: Path) -> subprocess.CompletedProcess[str]:
        argv = [venv / "bin" / "python", "-c", program, chosen]
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)

    for _ in range(2):
        refused = install(wheel)
        assert refused.returncode == 6, refused.stderr
        assert not list(venv.glob("lib/python3*/site-packages/llama_cpp"))
    assert install(toolchain.wheel).returncode == 0
    assert list(venv.glob("lib/python3*/site-packages/llama_cpp/lib/libllama.so"))


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
    assert "no toolchain with the id 0000000" in done.stderr

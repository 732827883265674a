"""Bindings that were changed after their proof: the runtime refuses them by name before it calls the library."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.front_door import ROOT, environment
from toolchain.base import files
from toolchain.build.toolchain import Toolchain


@pytest.fixture
def package(toolchain: Toolchain, tmp_path: Path) -> Path:
    """A copy of the installed package, first on the path of what ``complete`` starts."""
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.submodule_search_locations
    return Path(shutil.copytree(found.submodule_search_locations[0], tmp_path / "llama_cpp"))


def complete(package: Path, model: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "runtime", "complete", str(model), "-p", "The", "-n", "4", "--seed", "1"]
    env = environment({"PYTHONPATH": str(package.parent)})
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def edit(package: Path, old: str, new: str) -> None:
    source = package / "llama_cpp.py"
    text, count = re.subn(old, new, source.read_text(), count=1)
    assert count == 1, f"{old} does not stand in llama_cpp.py"
    source.write_text(text)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        pytest.param(
            r'\("n_threads", ctypes.c_int32\),\s*\("n_threads_batch", ctypes.c_int32\),',
            '("n_threads_batch", ctypes.c_int32), ("n_threads", ctypes.c_int32),',
            ("llama_context_params", "n_threads", "n_threads_batch"),
            id="two fields of equal size swapped",
        ),
        pytest.param(
            r'\("n_gpu_layers", ctypes.c_int32\),',
            '("invented", ctypes.c_int64), ("n_gpu_layers", ctypes.c_int32),',
            ("llama_model_params", "invented"),
            id="a field inserted",
        ),
        pytest.param(
            r"(?m)^LLAMA_POOLING_TYPE_MEAN = 1",
            "LLAMA_POOLING_TYPE_MEAN = 2",
            ("LLAMA_POOLING_TYPE_MEAN",),
            id="an enum value",
        ),
    ],
)
def test_changed_bindings_are_refused_by_name(
    package: Path, demo_gguf: Path, old: str, new: str, named: tuple[str, ...]
) -> None:
    good = complete(package, demo_gguf)
    assert good.returncode == 0, good.stderr
    edit(package, old, new)
    for _ in range(2):
        refused = complete(package, demo_gguf)
        assert refused.returncode == 6, refused.stderr
        assert all(word in refused.stderr for word in named)
        assert "./inv doctor" in refused.stderr
    assert refused.stdout == ""


def test_the_verdict_is_remembered(package: Path, demo_gguf: Path) -> None:
    notes = files.home_dir("work") / "abi"
    before = set(notes.glob("*.json")) if notes.is_dir() else set()
    assert complete(package, demo_gguf).returncode == 0
    (fresh,) = set(notes.glob("*.json")) - before
    written = fresh.stat().st_mtime_ns
    assert complete(package, demo_gguf).returncode == 0
    assert fresh.stat().st_mtime_ns == written


def test_bindings_that_were_not_built_here_are_said_to_be_unproven(package: Path, demo_gguf: Path) -> None:
    (package / "abi.json").unlink()
    done = complete(package, demo_gguf)
    assert done.returncode == 0, done.stderr
    assert "was not built here" in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["libllama.so", "libggml-base.so"])
def test_another_library_than_the_proven_one_is_said(package: Path, demo_gguf: Path, name: str) -> None:
    library = package / "lib" / name
    library.write_bytes(library.read_bytes() + b"\0")  # loads as before, and is another file
    done = complete(package, demo_gguf)
    assert done.returncode == 0, done.stderr
    assert "is not the one that it was proven with" in " ".join(done.stderr.split())

"""The command line itself: what `inv` says to a slip of the fingers, and that help costs no heavy import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.front_door import ROOT, inv

HEAVY = ("torch", "transformers", "llama_cpp", "huggingface_hub", "unearth", "sentencepiece", "numpy")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("bild", "did you mean build?"),
        ("build --sourc x", "did you mean --source?"),
        ("quantize", "./inv --help quantize"),
        ("--nope", "`./inv` lists the tasks"),
        ("test --tier all", "unit, build, e2e, fault, gpu"),
        ("quantize recipes/dmo.yaml", "did you mean recipes/demo.yaml?"),
        ("quantize nowhere/x.yaml", "recipes"),
        ("verify nothing.gguf", "nothing.gguf"),
    ],
)
def test_a_slip_is_a_usage_error_with_a_hint(typed: str, words: str) -> None:
    done = inv(*typed.split())
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_tasks_are_listed() -> None:
    listed = inv("--list").stdout
    for name in ("build", "check", "clean", "demo", "quantize", "test", "use", "verify"):
        assert f"  {name} " in listed


@pytest.mark.parametrize("typed", ["quantize --help", "--help quantize", "quantize -h"])
def test_help_of_a_task_is_found_from_both_sides(typed: str) -> None:
    done = inv(*typed.split())
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_the_runtime_outside_the_environment_says_how_to_enter_it() -> None:
    bare = ["-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from runtime.__main__ import main; "
            "sys.exit(main(['chat', 'demo']))"]  # fmt: skip
    done = subprocess.run([sys.executable, *bare], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert ".venv/bin/activate" in done.stderr


@pytest.mark.parametrize("variable", ["FOUNDRY_HOME", "FOUNDRY_MODELS"])
def test_a_place_that_cannot_be_made_is_told(variable: str) -> None:
    done = inv("quantize", "recipes/demo.yaml", "--dry-run", env={variable: "/proc/nowhere"})
    if variable == "FOUNDRY_MODELS":  # a plan alone writes nothing there
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 3, done.stderr
    assert "set FOUNDRY_HOME" in done.stderr


@pytest.mark.parametrize(
    "argv", [["tasks.py", "--list"], ["-m", "runtime", "--help"], ["-m", "runtime", "chat", "--help"]]
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & set(HEAVY)

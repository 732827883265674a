"""What goes wrong before the first word: each a sentence, evidence, and a next step; never a traceback."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.front_door import runtime
from tests.generated_models import write_model
from tests.loopback_hub import serve_hub
from tests.tiny_bert import write_bert
from toolchain.base import files
from toolchain.base.files import PROJECT_ROOT
from toolchain.build.toolchain import Toolchain

N_CTX = 512
VERBS = {"chat": (), "complete": ("-p", "x", "-n", "2")}


@pytest.fixture
def environment(toolchain: Toolchain, tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FOUNDRY_", "HF_"))}
    own = {"FOUNDRY_HOME": str(tmp_path / "home"), "FOUNDRY_NO_TUNE": "1", "TERM": "dumb", "GOMP_SPINCOUNT": "100"}
    return {**clean, **own, "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def run(environment: dict[str, str], verb: str, model: object, *options: object) -> subprocess.CompletedProcess[str]:
    return runtime(environment, verb, model, *VERBS[verb], *options, given="hello\n", cwd=PROJECT_ROOT)


def small(path: Path, template: str = "") -> Path:
    extents: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "head": 16, "n_ff": 96, "n_ctx_train": N_CTX}
    return write_model(path, "llama", random=True, template=template, **extents)


def adapter(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(path: Path) -> Path:
    small(path)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def vocabulary(path: Path) -> Path:
    """One of the pinned tree's own."""
    tree = next(files.home_dir("sources").glob("sdist-*/vendor/llama.cpp/models/ggml-vocab-qwen2.gguf"))
    path.symlink_to(tree)
    return path


def original(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def several(path: Path) -> Path:
    path.mkdir()
    small(path / "one.gguf")
    return path


Makes = Callable[[Path], Path]
WRONG: list[tuple[str, Makes, int, str, str]] = [
    (
        "gone.gguf",
        lambda path: small(path.with_name("gone-Q8.gguf")) and path,
        2,
        "no file",
        "did you mean gone-Q8.gguf?",
    ),
    ("far.gguf", lambda path: small(path.with_name("other.gguf")) and path, 2, "no file", "name a .gguf file"),
    ("vocab.gguf", vocabulary, 2, "vocab.gguf holds a vocabulary and no weights", "name the model's own file"),
    ("lora.gguf", adapter, 2, "lora.gguf is a LoRA adapter, not a model", "--lora"),
    ("bert.gguf", write_bert, 2, "bert.gguf is an embedding model: it writes no text", "python -m runtime embed"),
    ("cut.gguf", cut, 6, "cut.gguf: the file ends inside its tensor data", "fetch or convert the file again"),
    ("folder", several, 2, "is a directory", "name the file: "),
    ("hf", original, 2, "is a model folder of original weights", "`./inv quantize recipes/mine.yaml`"),
]


def check(done: subprocess.CompletedProcess[str], code: int, message: str, hint: str) -> None:
    """One line that says what failed, one that says what to do, and nothing on stdout."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    failed = [line for line in lines if line.startswith("✗ ")]
    assert len(failed) == 1
    assert message in failed[0]
    assert lines[-1].startswith("  → ")
    assert hint in lines[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("name", "make", "code", "message", "hint"), WRONG, ids=[each[0] for each in WRONG])
def test_what_is_no_model_to_write_with_is_named_with_a_way_out(
    environment: dict[str, str], folder: Path, verb: str, name: str, make: Makes, code: int, message: str, hint: str
) -> None:
    check(run(environment, verb, make(folder / name)), code, message, hint)


@pytest.mark.parametrize("typed", ["recipes/smollm2-135m.yaml", "smollm2-135m:Q8_0"])
def test_a_recipe_without_a_result_names_the_command_that_makes_it(
    environment: dict[str, str], tmp_path: Path, typed: str
) -> None:
    done = run({**environment, "FOUNDRY_MODELS": str(tmp_path)}, "chat", typed)
    check(done, 2, "the recipe smollm2-135m has no result yet", "`./inv quantize recipes/smollm2-135m.yaml`")


@pytest.mark.parametrize("verb", VERBS)
def test_a_context_larger_than_the_models_is_refused_with_the_most_there_is(
    environment: dict[str, str], folder: Path, verb: str
) -> None:
    """Whoever asked for it is named: the option, the environment or the recipe."""
    model = small(folder / "small.gguf")
    done = run(environment, verb, model, "--n-ctx", N_CTX + 1)
    check(done, 2, f"n_ctx 513 is more than the model has: it was trained with {N_CTX}", "--n-ctx 512 is the most")
    done = run({**environment, "FOUNDRY_N_CTX": "4096"}, verb, model)
    check(done, 2, "n_ctx 4096 is more than the model has", "is the most")
    assert "FOUNDRY_N_CTX" in done.stderr


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if messages %}{{", "TemplateSyntaxError, line 1"),
        ("{{ messages[0].nothing.at.all }}", "UndefinedError"),
        ("{% for i in range(99999999) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_to_render_is_told_in_its_own_words(
    environment: dict[str, str], folder: Path, template: str, why: str
) -> None:
    broken = small(folder / "broken.gguf", template=template)
    done = run(environment, "chat", broken)
    check(done, 6, "chat template cannot be used", "python -m runtime complete")
    assert why in done.stderr
    assert run(environment, "complete", broken).returncode == 0


def test_a_quant_that_a_repository_lacks_is_answered_with_those_there_are(
    environment: dict[str, str], folder: Path
) -> None:
    for quant in ("Q4_K_M", "Q8_0"):
        small(folder / f"tiny-{quant}.gguf")
    with serve_hub({"acme/tiny-GGUF": folder}) as hub:
        there = {**environment, "HF_ENDPOINT": hub.url}
        done = run(there, "chat", "acme/tiny-GGUF:Q5_K_M")
        check(done, 2, "acme/tiny-GGUF has no Q5_K_M", "acme/tiny-GGUF:")
        assert "there are: Q4_K_M, Q8_0" in done.stderr
        gone = run(there, "chat", "acme/nowhere-GGUF")
        check(gone, 4, "acme/nowhere-GGUF", "")


def test_a_repository_without_gguf_is_answered_with_the_recipe_to_write(
    environment: dict[str, str], tmp_path: Path
) -> None:
    held = tmp_path / "original"
    original(held)
    with serve_hub({"acme/original": held}) as hub:
        done = run({**environment, "HF_ENDPOINT": hub.url}, "chat", "acme/original")
    check(done, 2, "acme/original holds no GGUF", "`./inv quantize recipes/original.yaml`")

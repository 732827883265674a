"""``python -m runtime plan``: other machines, embedding models, and repositories with a file that is no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from runtime import library
from runtime.memory.footprint import Demand, Placement
from runtime.memory.here import library_sizes
from runtime.memory.library_devices import library_gpus
from tests.generated_models import write_model
from tests.loopback_hub import serve_hub
from tests.tiny_bert import write_bert
from toolchain.base.errors import MissingError
from toolchain.base.files import PROJECT_ROOT


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FOUNDRY_", "HF_"))}
    return {**clean, "FOUNDRY_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PROJECT_ROOT)}


def plan(environment: dict[str, str], *arguments: object) -> dict[str, Any]:
    argv = [sys.executable, "-m", "runtime", "plan", *map(str, arguments), "--json"]
    done = subprocess.run(argv, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


def test_a_described_machine_does_not_take_this_ones_threads_for_its_own(
    environment: dict[str, str], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "small.gguf", "llama", type="q8_0")
    told = {each["name"]: each for each in plan(environment, path, "--ram", "16GiB", "--vram", "0")["settings"]}
    assert (told["n_gpu_layers"]["value"], told["n_gpu_layers"]["reason"]) == (0, "no GPU is described")
    assert told["n_threads"]["reason"].startswith("of this machine")


def test_an_embedding_model_is_planned_for(environment: dict[str, str], tmp_path: Path) -> None:
    told = plan(environment, write_bert(tmp_path / "bert.gguf"))
    assert told["fits"] is True
    assert told["devices"][0]["weights_bytes"] > 0


def test_a_quant_that_is_no_model_is_a_row_that_says_why(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    write_model(folder / "model-Q8_0.gguf", "llama", type="q8_0")
    whole = write_model(folder / "model-Q4_0.gguf", "llama", type="q4_0")
    renamed = whole.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modex")
    whole.write_bytes(renamed)
    with serve_hub({"acme/model": folder}) as hub:
        told = plan({**environment, "HF_ENDPOINT": hub.url}, "acme/model", "--all-quants", "--vram", "0")
    rows = {row["quant"]: row for row in told["quants"]}
    assert rows["Q8_0"]["best"] is True
    assert (rows["Q4_0"]["fits"], "has no tokenizer" in rows["Q4_0"]["why"]) == (False, True)


def test_asking_the_library_again_and_again_keeps_no_log_alive(tmp_path: Path) -> None:
    path = write_model(tmp_path / "small.gguf", "llama", type="q8_0")
    ask = library_sizes(path, 1)
    lib = library.import_library()
    library.route_log(lib, verbose=False)
    kept = []
    for n_ctx in (512, 1024, 2048):
        with suppress(MissingError):  # where the library does not tell, it was still asked
            ask(Demand(n_ctx=n_ctx), Placement(n_gpu_layers=0))
        kept.append(len(library._routes))
    assert len(set(kept)) == 1
    assert isinstance(library_gpus(), tuple)

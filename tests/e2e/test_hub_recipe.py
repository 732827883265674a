"""A hub on loopback: a recipe with `model: {hub: ...}` through `inv quantize`, and a GGUF through the runtime."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.front_door import inv, inv_json, run
from tests.loopback_hub import GOOD_TOKEN, Faults, LoopbackHub, serve_hub
from toolchain.base import files

RECIPE = "name: from-hub\nmodel: {hub: acme/tiny, revision: main}\nquantize: [Q4_K_M]\n"


@pytest.fixture(scope="module")
def hub(demo: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """The demo's folder served as acme/tiny and, at a commit that is new each time, as acme/gated behind a licence."""
    folder = next((files.home_dir("work") / "steps").glob("*/tiny"))
    gated = tmp_path_factory.mktemp("hub") / "gated"
    shutil.copytree(folder, gated)
    (gated / "README.md").write_text(str(uuid.uuid4()))
    with serve_hub({"acme/tiny": folder, "acme/gated": gated}, {"acme/gated": Faults(gated=True)}) as served:
        yield served


@pytest.fixture
def recipe(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe, with results of the test's own and no token from outside."""
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    path = tmp_path / "from-hub.yaml"
    path.write_text(RECIPE)
    return path


def test_a_hub_model_is_pinned_fetched_and_quantized(
    recipe: Path, hub: LoopbackHub, demo_gguf: Path, tmp_path: Path
) -> None:
    plan = inv_json("quantize", recipe, "--dry-run")
    commit = plan["source"]["commit"]
    assert len(commit) == 40
    made = Path(inv_json("quantize", recipe)["artifacts"][0]["path"])
    same = [t.data.tobytes() for t in gguf.GGUFReader(demo_gguf).tensors]
    assert [t.data.tobytes() for t in gguf.GGUFReader(made).tensors] == same
    assert files.read_json(made.with_name("source.json"))["commit"] == commit  # type: ignore[index]
    before = len(hub.log)
    again = inv_json("quantize", recipe)
    assert all(step["reused"] for step in again["steps"])
    assert len(hub.log) == before, "the recorded commit is used without asking the hub"
    inv_json("quantize", recipe, "--update")
    assert len(hub.log) > before


def test_a_gated_model_says_how_to_get_a_token_and_then_works(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("acme/tiny", "acme/gated"))
    done = inv("quantize", recipe)
    assert done.returncode == 4, done.stderr
    assert "gated" in done.stderr
    assert "settings/tokens" in done.stderr
    assert "HF_TOKEN" in done.stderr
    opened = inv("quantize", recipe, env={"HF_TOKEN": GOOD_TOKEN})
    assert opened.returncode == 0, opened.stderr
    assert GOOD_TOKEN not in opened.stderr + opened.stdout


def test_no_hub_at_all_is_a_fetch_error(recipe: Path) -> None:
    done = inv("quantize", recipe, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 4, done.stderr
    assert "cannot reach" in done.stderr


def test_a_gguf_on_the_hub_is_downloaded_once_and_then_runs_without_a_hub(demo_gguf: Path, tmp_path: Path) -> None:
    held = tmp_path / "acme"
    held.mkdir()
    shutil.copy(demo_gguf, held / "demo-Q4_K_M.gguf")
    own = {"FOUNDRY_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": None}
    words = ("-p", "The import statement", "-n", "8", "--seed", "1", "--temp", "0")
    local = run([sys.executable, "-m", "runtime", "complete", str(demo_gguf), *words], env=own)
    with serve_hub({"acme/gguf": held}) as hub:
        argv = [sys.executable, "-m", "runtime", "complete", "acme/gguf:q4_k_m", *words]
        first = run(argv, env={**own, "HF_ENDPOINT": hub.url})
    assert first.returncode == 0, first.stderr
    assert "fetch acme/gguf Q4_K_M" in first.stderr
    gone = run(argv, env={**own, "HF_ENDPOINT": hub.url})
    assert gone.returncode == 0, gone.stderr
    assert "fetch" not in gone.stderr
    assert first.stdout == gone.stdout == local.stdout != ""

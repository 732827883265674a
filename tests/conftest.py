"""Fixtures of all tiers: real things, made once per session and reused by fingerprint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.front_door import ROOT, inv, inv_json
from toolchain.base import files
from toolchain.build.toolchain import Toolchain, current, load

# A shell starts background jobs deaf to SIGINT, and children inherit that; the tests interrupt theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def built() -> Iterator[dict[str, Any]]:
    """What `inv build --json` answers for the default pin; it compiles llama.cpp when that is not done.

    A toolchain that was in use before the tests is in use again after them.
    """
    before = current()
    answer = inv_json("build")
    yield answer
    if before and before.id != answer["toolchain_id"]:
        inv("use", before.id)


@pytest.fixture(scope="session")
def toolchain(built: dict[str, Any]) -> Toolchain:
    found = load(built["toolchain_id"])
    assert found is not None
    return found


@pytest.fixture(scope="session")
def trainer() -> Toolchain:
    """The trainer of 2023; it is compiled when that is not done."""
    found = load(inv_json("build", "--legacy-finetune")["toolchain_id"])
    assert found is not None
    return found


@pytest.fixture(scope="session")
def demo(toolchain: Toolchain) -> dict[str, Any]:
    """What `inv quantize recipes/demo.yaml --json` answers; it makes the demo model when that is not done."""
    return inv_json("quantize", "recipes/demo.yaml")


@pytest.fixture(scope="session")
def demo_gguf(demo: dict[str, Any]) -> Path:
    """The demo model as Q4_K_M."""
    return next(Path(artifact["path"]) for artifact in demo["artifacts"] if artifact["type"] == "Q4_K_M")


@pytest.fixture(scope="session")
def demo_full(demo: dict[str, Any], toolchain: Toolchain) -> Path:
    """The demo model's 16-bit conversion, where the pipeline keeps it."""
    from toolchain.pipeline.plan import describe_source, make_plan
    from toolchain.pipeline.recipe import load_recipe

    path = ROOT / "recipes" / "demo.yaml"
    recipe = load_recipe(path)
    plan = make_plan(recipe, recipe_path=path, source=describe_source(recipe, path.parent), toolchain=toolchain)
    return plan.step("convert").output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FOUNDRY_HOME that borrows the fetched sources of the real one (they are read only)."""
    sources = files.home_dir("sources")
    path = tmp_path / "home"
    path.mkdir()
    (path / "sources").symlink_to(sources)
    monkeypatch.setenv("FOUNDRY_HOME", str(path))
    return path


@pytest.fixture(scope="session", autouse=True)
def _same_home_for_children() -> None:
    """Children run in the project's folder: a relative FOUNDRY_HOME means the same place to all."""
    if home := os.environ.get("FOUNDRY_HOME"):
        os.environ["FOUNDRY_HOME"] = str(Path(home).absolute())

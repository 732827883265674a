"""The preset file of llama-server's router, and what a folder of recipes stands for."""

from __future__ import annotations

import configparser
import json
from pathlib import Path

import pytest

from runtime.resolve import Resolved
from runtime.serve.models import name_of
from runtime.serve.presets import distinct, expand, preset_ini, spelled_name, written
from tests.unit.test_serve_command import served
from toolchain.base import files
from toolchain.base.errors import UsageError


def read(text: str) -> configparser.ConfigParser:
    """As llama-server reads it where it matters here: sections, `key = value`."""
    found = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    found.read_string("[before]\n" + text)
    return found


def test_each_model_has_its_own_settings() -> None:
    small, large = served(name="small", flags={"n_ctx": 512}), served(name="large", flags={"n_ctx": 4096}, parallel=2)
    found = read(preset_ini((small, large), at_start=1))
    assert found.sections() == ["before", "small", "large"]
    assert (found["small"]["ctx-size"], found["large"]["ctx-size"]) == ("2048", "8192")
    assert (found["small"]["parallel"], found["large"]["parallel"]) == ("4", "2")
    assert found["small"]["no-kv-unified"] == "true"
    assert found["small"]["load-on-startup"] == "true"
    assert "load-on-startup" not in found["large"]


def test_name_as_typed_is_an_alias_of_the_name_as_the_router_spells_it() -> None:
    found = read(preset_ini((served(name="demo:q4_k_m", aliases=("recipes/demo.yaml:q4_k_m",)),), at_start=0))
    assert found["demo:Q4_K_M"]["alias"] == "demo:q4_k_m,recipes/demo.yaml:q4_k_m"
    assert spelled_name("owner/repo:UD-q4_K_m") == "owner/repo:Q4_K_M"
    assert spelled_name("owner/repo") == "owner/repo"


@pytest.mark.parametrize("path", ["/models/a;b.gguf", "/models/a #1.gguf", "/models/a\nb.gguf", "/models/a.gguf "])
def test_path_that_the_format_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="cannot stand in a preset"):
        preset_ini((served(path=Path(path)),), at_start=0)


@pytest.mark.parametrize("name", ["a]b", "*", "default", "a,b"])
def test_name_that_the_format_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a model's name"):
        preset_ini((served(name=name),), at_start=0)


def test_two_models_of_one_name_go_by_what_was_typed() -> None:
    one, other = served(name="m", aliases=("a/m.gguf",)), served(name="m", aliases=("b/m.gguf",))
    assert [model.name for model in distinct((one, other))] == ["a/m.gguf", "b/m.gguf"]
    with pytest.raises(UsageError, match="named twice"):
        distinct((one, one))


def test_same_models_give_the_same_file(tmp_path: Path) -> None:
    text = preset_ini((served(name="m"),), at_start=1)
    path = written(text)
    assert written(text) == path
    assert path.read_text() == text
    assert written(preset_ini((served(name="n"),), at_start=1)) != path


def test_folder_of_recipes_stands_for_those_with_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("made", "unmade"):
        (recipes / f"{name}.yaml").write_text(f"name: {name}\n")
    (recipes / "broken.yaml").write_text("name: [\n")
    with pytest.raises(UsageError, match="has a result yet"):
        expand([str(recipes)])
    result = tmp_path / "models" / "made"
    result.mkdir(parents=True)
    (result / "made-Q8_0.gguf").write_bytes(b"x")
    artifacts = [{"type": "Q8_0", "file": "made-Q8_0.gguf", "bytes": 1}]
    (result / "manifest.json").write_text(json.dumps({"artifacts": artifacts}))
    assert expand([str(recipes), "other.gguf"]) == ("made", "other.gguf")
    assert files.models_dir() == tmp_path / "models"


def test_clients_call_a_model_by_its_recipe_its_repository_or_its_file() -> None:
    file = Path("/models/demo/demo-Q8_0.gguf")
    recipe = Resolved(path=file, recipe="demo", type="Q8_0")
    assert name_of("demo", recipe) == name_of("recipes/demo.yaml", recipe) == "demo"
    assert name_of("demo:q8_0", recipe) == "demo:Q8_0"
    assert name_of("owner/repo:Q8_0", Resolved(path=file, repo="owner/repo", type="Q8_0")) == "owner/repo:Q8_0"
    assert name_of("models/demo/demo-Q8_0.gguf", Resolved(path=file)) == "demo-Q8_0"

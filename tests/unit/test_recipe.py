"""Recipes: what is accepted, and that each mistake is named with its line and its mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.front_door import ROOT
from toolchain.base.errors import UsageError
from toolchain.pipeline.recipe import load_recipe, schema_text

GOOD = """\
name: small
model:
  demo: tiny
quantize:
  - Q4_K_M
  - {type: q5_k_m, tensors: {"output.weight": q8_0}, suffix: fine}
evaluate: {corpus: "builtin:python-docs", chunks: 4}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_short_and_long_forms_are_read(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert [entry.label for entry in recipe.quantize] == ["Q4_K_M", "Q5_K_M-fine"]
    assert recipe.convert.outtype == "auto"
    assert recipe.evaluate is not None
    assert recipe.evaluate.n_ctx == 512


@pytest.mark.parametrize(
    ("wrong", "right", "line", "words"),
    [
        ("  demo: tiny", "  dmeo: tiny", 3, "did you mean demo?"),
        ("  demo: tiny", "  demo: huge", 3, "there are tiny"),
        ("  demo: tiny", "  demo: tiny\n  hub: a/b", 2, "exactly one of hub, path, gguf and demo"),
        ("  demo: tiny", "  demo: tiny\n  revision: main", 2, "revision goes with hub only"),
        ("  - Q4_K_M", "  - Q4_K_N", 5, "did you mean Q4_K_S?"),
        ("  - Q4_K_M", "  - IQ2_XXS", 5, "importance matrix"),
        ("  - Q4_K_M", "  - Q4_K_M\n  - q4_k_m", 1, "Q4_K_M twice"),
        ("  - Q4_K_M", "  - IQ3_XS", 5, "importance matrix"),
        ("q8_0}", "q8_1x}", 6, "no tensor type"),
        ('"output.weight"', '"\\\\D"', 6, "lower case"),
        ("  - Q4_K_M", "  - 4", 5, "quantize.0: is made of keys and values"),
        ("  - Q4_K_M", "  - {type: Q4_K_M, mix-in: 1}", 5, "quantize.0: unknown key mix-in"),
        ("name: small", "nmae: small", 1, "did you mean name?"),
        ("name: small", "name: ../../evil", 1, "match pattern"),
        ("name: small", "name: small\nname: other", 2, "name is given twice"),
        ("chunks: 4", "chunks: 0", 7, "greater than or equal to 1"),
        ("chunks: 4", "chunks: four", 7, "valid integer"),
        ("chunks: 4", "chunk: 4", 7, "did you mean chunks?"),
        ('"output.weight"', '"output.(weight"', 6, "no regular expression"),
        ("model:\n  demo: tiny\n", "", 1, "model: is missing"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, wrong: str, right: str, line: int, words: str) -> None:
    assert wrong in GOOD
    with pytest.raises(UsageError) as caught:
        load_recipe(write(tmp_path, GOOD.replace(wrong, right, 1)))
    told = f"{caught.value.message}\n{caught.value.evidence}"
    assert f"recipe.yaml:{line}:" in told
    assert words in told
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "just text\n",
        "name: [unclosed\n",
        "a: &x {b: 1}\nc: *x\n",
        "x: !!python/object:os.system {}\n",
        "name: 2024-13-45\n",
        "x: 0x_\n",
        "[" * 3000,
    ],
)
def test_what_is_no_recipe_is_a_usage_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        load_recipe(write(tmp_path, text))


def test_a_file_that_is_not_text_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"GGUF\x03\x00\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_recipe(path)


def test_a_misspelt_recipe_names_its_neighbour() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(ROOT / "recipes" / "dmeo.yaml")
    assert "recipes/demo.yaml" in caught.value.hint


def test_every_shipped_recipe_is_valid() -> None:
    names = {load_recipe(path).name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {"demo", "llama2-13b-q4", "smollm2-135m"} <= names


def test_the_schema_file_is_generated_from_the_model() -> None:
    assert (ROOT / "recipes" / "recipe.schema.json").read_text() == schema_text()

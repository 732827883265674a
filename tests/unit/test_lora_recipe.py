"""LoRA recipes: what is accepted, and that each mistake is named with its line and its mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.front_door import ROOT
from tests.generated_models import write_header
from toolchain.base.errors import UsageError
from toolchain.base.gguf import read_header
from toolchain.lora import builtin
from toolchain.lora.recipe import LoraRecipe, load_lora_recipe, schema_text
from toolchain.lora.targets import target_suffixes

GOOD = """\
name: small
base: {gguf: base.gguf}
data:
  sources:
    - text: novel.txt
    - {chat: talks.jsonl, repeat: 2}
adapter: {rank: 8, targets: [attn_q, v_proj]}
train: {epochs: 2, learning_rate: 0.001}
evaluate: {prompts: ["Who are you?"], max_drift_kld: 1}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = load_lora_recipe(written(tmp_path, GOOD))
    assert [source.kind for source in recipe.data.sources] == ["text", "chat"]
    assert recipe.adapter.counted_alpha == 2 * 8
    assert recipe.train.epochs == 2.0
    assert recipe.adapter.targets == ("attn_q", "v_proj")
    assert (recipe.engine, recipe.train.device, recipe.data.held_out) == ("torch", "auto", 0.1)


@pytest.mark.parametrize(
    ("wrong", "right", "line", "words"),
    [
        ("rank: 8", "rnak: 8", 7, "did you mean rank?"),
        ("rank: 8", "rank: 0", 7, "greater than or equal to 1"),
        ("rank: 8", "alpha: .inf", 7, "finite"),
        ("targets: [attn_q, v_proj]", "targets: everything", 7, "all-linear"),
        ("targets: [attn_q, v_proj]", "targets: 3", 7, "adapter.targets: is a list"),
        ("gguf: base.gguf", "gguf: base.gguf, hub: a/b", 2, "exactly one of recipe, gguf and hub"),
        ("gguf: base.gguf", "gguf: base.gguf, type: Q8_0", 2, "type goes with recipe only"),
        ("{gguf: base.gguf}", "{}", 2, "none is given"),
        ("- text: novel.txt", "- {text: novel.txt, chat: b}", 5, "text and chat are given"),
        ("- text: novel.txt", "- {txt: novel.txt}", 5, "did you mean text?"),
        ("repeat: 2", "repeat: 0", 6, "greater than or equal to 1"),
        ("epochs: 2", "epochs: .nan", 8, "finite"),
        ("epochs: 2", "epoch: 2", 8, "did you mean epochs?"),
        ("epochs: 2", "held_out: 0.1", 8, "unknown key held_out"),
        ("max_drift_kld: 1", "max_drift_kld: 0", 9, "greater than 0"),
        ("name: small", "name: ../evil", 1, "match pattern"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, wrong: str, right: str, line: int, words: str) -> None:
    assert wrong in GOOD
    with pytest.raises(UsageError) as caught:
        load_lora_recipe(written(tmp_path, GOOD.replace(wrong, right)))
    told = [one for one in caught.value.evidence.splitlines() if words in one]
    assert told, caught.value.evidence
    assert told[0].startswith(f"recipe.yaml:{line}:")
    assert "recipes/lora/lora.schema.json" in caught.value.hint


def test_the_shipped_recipes_and_their_schema_are_right() -> None:
    folder = ROOT / "recipes" / "lora"
    names = {load_lora_recipe(path).name for path in folder.glob("*.yaml")}
    assert {"demo-python", "smollm2-135m-chat"} <= names
    assert (folder / "lora.schema.json").read_text() == schema_text()


def test_no_lora_recipe_writes_into_a_quantization_recipes_folder() -> None:
    from toolchain.pipeline.recipe import load_recipe

    quantized = {load_recipe(path).name for path in (ROOT / "recipes").glob("*.yaml")}
    trained = {load_lora_recipe(path).name for path in (ROOT / "recipes" / "lora").glob("*.yaml")}
    assert not quantized & trained


def test_the_built_in_text_is_new_to_the_demo_model_and_the_same_each_time(tmp_path: Path) -> None:
    from toolchain.stages.corpus import paragraphs, python_docs

    text = builtin.python_source()
    assert text == builtin.python_source()
    assert len(text) > 100_000
    known = paragraphs(python_docs("train"))
    assert sum(len(paragraph) for paragraph in paragraphs(text) & known) < len(text) / 1000


def test_a_built_in_text_becomes_a_file_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    recipe = load_lora_recipe(written(tmp_path, GOOD.replace("novel.txt", "builtin:python-source")))
    source, other = builtin.with_files(recipe.data).sources
    assert Path(source.file).read_text() == builtin.python_source()
    assert other == recipe.data.sources[1]
    wrong = load_lora_recipe(written(tmp_path, GOOD.replace("novel.txt", "builtin:pyton-source")))
    with pytest.raises(UsageError) as caught:
        builtin.with_files(wrong.data)
    assert "did you mean builtin:python-source?" in caught.value.hint


def test_targets_mean_matrices_that_the_base_has(tmp_path: Path) -> None:
    llama = [read_header(write_header(tmp_path / "llama.gguf", "llama"))]
    phi = [read_header(write_header(tmp_path / "phi.gguf", "phi3"))]
    mixtral = [read_header(write_header(tmp_path / "mixtral.gguf", "mixtral"))]
    all_of_llama = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    assert set(target_suffixes(llama, "all-linear")) == all_of_llama
    assert target_suffixes(llama, ("q_proj", "attn_q", "down_proj")) == ("attn_q", "ffn_down")
    assert set(target_suffixes(phi, "attention")) == {"attn_qkv", "attn_output"}
    assert set(target_suffixes(mixtral, "all-linear")) == {"attn_q", "attn_k", "attn_v", "attn_output"}
    with pytest.raises(UsageError) as caught:
        target_suffixes(phi, ("q_proj",))
    assert "attn_qkv" in caught.value.evidence
    with pytest.raises(UsageError) as caught:
        target_suffixes(llama, ("atn_q",))
    assert "did you mean attn_q?" in caught.value.hint
    with pytest.raises(UsageError, match="feed-forward"):
        target_suffixes(mixtral, "feed-forward")


def test_the_smallest_recipe_is_a_name_a_base_and_data() -> None:
    recipe = LoraRecipe.model_validate(
        {"name": "a", "base": {"gguf": "b.gguf"}, "data": {"sources": [{"text": "c.txt"}]}}
    )
    assert recipe.train.steps is None
    assert recipe.adapter.targets == "all-linear"

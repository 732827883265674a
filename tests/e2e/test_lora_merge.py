"""Adapters merged into quantized models: the sums are llama.cpp's own, and the result does what base and adapter do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.front_door import inv, json_without_processes, leftovers, run
from tests.generated_models import Family, write_model
from tests.unit.test_lora_adapter import adapter_for
from toolchain.base import command
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.lora.forms.adapter import AdapterModel, Pair, write_adapter
from toolchain.lora.forms.merge import MERGED_BASE_KEY, MERGED_KEY, judge, merge
from toolchain.lora.forms.merge_gate import Text
from toolchain.lora.forms.requantize import parse_type
from toolchain.lora.judging.evaluate import text_file
from toolchain.pipeline import provenance
from toolchain.pipeline.recipe import BUILTIN_CORPUS

LINEAR = ("attn_", "ffn_")


def small_adapter(base: Path, path: Path, *parts: str, size: float = 0.02, **changes: Any) -> Path:
    """Random pairs about as large as trained ones, of the right base."""
    header = read_header(base)
    adapter = adapter_for(base, *(parts or LINEAR), base_sha256=tensors_sha256(header), base_name=base.name)
    pairs = {target: Pair(a=size * pair.a, b=size * pair.b) for target, pair in adapter.pairs.items()}
    write_adapter(path, replace(adapter, pairs=pairs, alpha=16.0, **changes))
    return path


def values(path: Path) -> dict[str, Any]:
    """Every tensor as float32, by gguf-py."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def raw(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def text() -> Text:
    return Text(path=text_file(BUILTIN_CORPUS, Path()), n_ctx=128, chunks=6)


def test_the_sums_are_those_of_llama_export_lora(
    toolchain: Toolchain, demo_gguf: Path, tmp_path: Path, log: Path
) -> None:
    adapter = small_adapter(demo_gguf, tmp_path / "a.gguf", *LINEAR, "token_embd", "output.weight")
    exported = tmp_path / "exported.gguf"
    command.run(
        (toolchain.tool("export-lora"), "-m", demo_gguf, "--lora", adapter, "-o", exported), what="exporting", log=log
    )
    merge(demo_gguf, [(adapter, 1.0)], tmp_path / "m.gguf", toolchain=toolchain, log=log, asked=parse_type("F32"))
    ours, theirs, base = values(tmp_path / "m.gguf"), values(exported), values(demo_gguf)
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():  # theirs is rounded to 16 bits
        np.testing.assert_allclose(mine, theirs[name], rtol=2**-10, atol=2**-24, err_msg=name)
        assert mine.ndim == 1 or np.abs(mine - base[name]).max() > 0.001, name


def test_in_place_all_but_the_changed_tensors_and_a_note_stays(
    toolchain: Toolchain, demo_gguf: Path, tmp_path: Path, log: Path, text: Text
) -> None:
    adapter = small_adapter(demo_gguf, tmp_path / "a.gguf", "attn_q", "ffn_down")
    merged = tmp_path / "m.gguf"
    assert merge(demo_gguf, [(adapter, 1.0)], merged, toolchain=toolchain, log=log) == ()
    before, after = read_header(demo_gguf), read_header(merged)
    assert [(t.name, t.shape, t.type) for t in after.tensors] == [(t.name, t.shape, t.type) for t in before.tensors]
    assert after.metadata.keys() == {*before.metadata, MERGED_KEY, MERGED_BASE_KEY}
    assert (after.text(MERGED_KEY), after.text(MERGED_BASE_KEY)) == ("a.gguf x 1", demo_gguf.name)
    old, new = raw(demo_gguf), raw(merged)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {t.name for t in before.tensors if "attn_q." in t.name or "ffn_down" in t.name}
    gate = judge(merged, demo_gguf, [(adapter, 1.0)], text, full=None, toolchain=toolchain, log=log)
    unmerged = judge(demo_gguf, demo_gguf, [(adapter, 1.0)], text, full=None, toolchain=toolchain, log=log)
    assert gate.reference == "base and adapter at run time"
    assert gate.mean_kld < unmerged.mean_kld / 10  # quantizing again costs far less than the adapter does


def test_quantizing_in_place_gives_the_bytes_that_llama_quantize_gives(
    toolchain: Toolchain, demo: dict[str, Any], tmp_path: Path, log: Path
) -> None:
    base = next(Path(artifact["path"]) for artifact in demo["artifacts"] if artifact["type"] == "Q8_0")
    adapter = small_adapter(base, tmp_path / "a.gguf")
    asked = parse_type("Q8_0")
    merge(base, [(adapter, 1.0)], tmp_path / "own.gguf", toolchain=toolchain, log=log)
    told = merge(base, [(adapter, 1.0)], tmp_path / "tool.gguf", toolchain=toolchain, log=log, asked=asked)
    assert Path(told[0]).name == "llama-quantize"
    own, tool = (tensors_sha256(read_header(tmp_path / name)) for name in ("own.gguf", "tool.gguf"))
    assert own == tool


@pytest.mark.parametrize("family", ["mixtral", "gemma3", "phi3", "granitehybrid"])
def test_merged_and_applied_at_run_time_are_the_same_function(
    toolchain: Toolchain, family: Family, tmp_path: Path, log: Path, text: Text
) -> None:
    """Stacked experts, joined matrices, and the embedding where it is not the output's too."""
    base = write_model(tmp_path / "base.gguf", family, random=True, n_ctx_train=512)
    separate = ("token_embd",) if "output.weight" in {t.name for t in read_header(base).tensors} else ()
    adapter = small_adapter(base, tmp_path / "a.gguf", *LINEAR, *separate, size=0.05)
    merged, chosen = tmp_path / "m.gguf", [(adapter, 1.0)]
    merge(base, chosen, merged, toolchain=toolchain, log=log, asked=parse_type("F32"))
    gate = judge(merged, base, chosen, text, full=None, toolchain=toolchain, log=log)
    unmerged = judge(base, base, chosen, text, full=None, toolchain=toolchain, log=log)
    assert gate.reference == "base and adapter at run time"
    assert unmerged.mean_kld > 0.001
    assert abs(gate.mean_kld) < unmerged.mean_kld / 100  # a near tie of two experts may fall differently


def test_scales_and_several_adapters_add_up(toolchain: Toolchain, tmp_path: Path, log: Path) -> None:
    base = write_model(tmp_path / "base.gguf", "llama", random=True, type="f32", n_layer=1)
    one = small_adapter(base, tmp_path / "one.gguf", "attn_q")
    two = small_adapter(base, tmp_path / "two.gguf", "attn_q", "ffn_up")
    merge(base, [(one, 0.5), (two, -2.0)], tmp_path / "m.gguf", toolchain=toolchain, log=log)
    assert read_header(tmp_path / "m.gguf").text(MERGED_KEY) == "one.gguf x 0.5; two.gguf x -2"
    for name, scale in (("one.gguf", 0.5), ("two.gguf", -2.0)):
        merge(base, [(tmp_path / name, scale)], tmp_path / f"m-{name}", toolchain=toolchain, log=log)
    before, both = values(base), values(tmp_path / "m.gguf")
    alone = [values(tmp_path / f"m-{name}") for name in ("one.gguf", "two.gguf")]
    for name in before:
        summed = before[name] + (alone[0][name] - before[name]) + (alone[1][name] - before[name])
        np.testing.assert_allclose(both[name], summed, atol=1e-6)
    assert (alone[0]["blk.0.ffn_up.weight"] == before["blk.0.ffn_up.weight"]).all()


def test_magnitudes_and_norms_are_merged_and_held_against_the_unrounded_sum(
    toolchain: Toolchain, demo_gguf: Path, tmp_path: Path, log: Path, text: Text
) -> None:
    base = values(demo_gguf)
    target, norm = "blk.1.attn_q.weight", "blk.1.ffn_norm.weight"
    plain = adapter_for(demo_gguf, target).pairs[target]
    lengths = np.linalg.norm(base[target], axis=1) * np.float32(1.25)
    adapter = AdapterModel(
        architecture="llama",
        alpha=2.0,
        pairs={target: Pair(a=0.02 * plain.a, b=0.02 * plain.b, magnitude=lengths)},
        norms={norm: np.full(256, 0.125, np.float32)},
    )
    write_adapter(tmp_path / "d.gguf", adapter)
    chosen = [(tmp_path / "d.gguf", 1.0)]
    merge(demo_gguf, chosen, tmp_path / "m.gguf", toolchain=toolchain, log=log, asked=parse_type("F32"))
    merged = values(tmp_path / "m.gguf")
    np.testing.assert_allclose(np.linalg.norm(merged[target], axis=1), lengths, rtol=1e-5)
    direction = base[target] + 0.5 * adapter.pairs[target].b @ adapter.pairs[target].a
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(merged[target], lengths[:, None] * direction, atol=1e-5)
    np.testing.assert_array_equal(merged[norm], base[norm] + np.float32(0.125))
    merge(demo_gguf, chosen, tmp_path / "own.gguf", toolchain=toolchain, log=log)
    gate = judge(tmp_path / "own.gguf", demo_gguf, chosen, text, full=None, toolchain=toolchain, log=log)
    unmerged = judge(demo_gguf, demo_gguf, chosen, text, full=None, toolchain=toolchain, log=log)
    assert gate.reference == "the unrounded sum of base and adapter"
    assert gate.mean_kld < unmerged.mean_kld / 10
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["d.gguf", "m.gguf", "own.gguf"]


def test_shards_are_merged_as_the_whole_file_is(
    toolchain: Toolchain, demo_gguf: Path, tmp_path: Path, log: Path
) -> None:
    split = (toolchain.tool("gguf-split"), "--split", "--split-max-tensors", "16", demo_gguf, tmp_path / "part")
    command.run(split, what="splitting", log=log)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) == 3
    adapter = small_adapter(demo_gguf, tmp_path / "a.gguf")
    for base, name in ((demo_gguf, "whole.gguf"), (parts[0], "parts.gguf")):
        merge(base, [(adapter, 1.0)], tmp_path / name, toolchain=toolchain, log=log)
    whole, joined = (read_header(tmp_path / name) for name in ("whole.gguf", "parts.gguf"))
    assert tensors_sha256(whole) == tensors_sha256(joined)
    assert joined.split is None
    assert joined.metadata.keys() == whole.metadata.keys()


def test_an_adapter_of_another_base_is_refused_unless_it_is_insisted_on(
    toolchain: Toolchain, demo: dict[str, Any], demo_gguf: Path, tmp_path: Path, log: Path
) -> None:
    other = next(Path(artifact["path"]) for artifact in demo["artifacts"] if artifact["type"] == "Q2_K")
    chosen = [(small_adapter(demo_gguf, tmp_path / "a.gguf"), 1.0)]
    with pytest.raises(ArtifactError, match=r"a\.gguf was trained on another base than demo-Q2_K\.gguf") as raised:
        merge(other, chosen, tmp_path / "m.gguf", toolchain=toolchain, log=log)
    assert demo_gguf.name in raised.value.evidence
    assert not (tmp_path / "m.gguf").exists()
    merge(other, chosen, tmp_path / "m.gguf", toolchain=toolchain, log=log, force=True)
    assert read_header(tmp_path / "m.gguf").file_type == "Q2_K"


RECIPE = """
name: merged-demo
base: {recipe: demo.yaml, type: Q4_K_M}
data: {sources: [{text: unused.txt}]}
evaluate: {n_ctx: 128, chunks: 6}
merge: {max_mean_kld: LIMIT}
"""
MERGE = """
import dataclasses, json
from toolchain.build.toolchain import current
from toolchain.lora.base import read_base
from toolchain.lora.judging.evaluate import text_file
from toolchain.lora.forms.merge_files import merge_recipe
from toolchain.lora.recipe import load_lora_recipe

recipes, toolchain = Path("recipes"), current()
base = read_base(Path({base!r}), origin="recipe:demo Q4_K_M", recipe=recipes / "demo.yaml")
text = text_file("builtin:python-docs", recipes)
made = merge_recipe(
    load_lora_recipe(Path({recipe!r})), base, Path({adapter!r}), recipe_dir=recipes, text=text, toolchain=toolchain
)
print(json.dumps({{**dataclasses.asdict(made), "path": str(made.path)}}))
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def merging(tmp_path: Path, base: Path, adapter: Path, *, limit: float = 0.05) -> str:
    """The statements that merge by a recipe."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("LIMIT", f"{limit:.12f}"))
    return MERGE.format(base=str(base), recipe=str(recipe), adapter=str(adapter))


def in_a_child(statements: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", f"from pathlib import Path\n{statements}"])


def test_a_recipe_s_merge_is_made_at_full_precision_judged_noted_and_made_once(
    toolchain: Toolchain, demo_gguf: Path, demo_full: Path, models: Path, tmp_path: Path, log: Path
) -> None:
    adapter = small_adapter(demo_gguf, tmp_path / "merged-demo-lora.gguf")
    statements = merging(tmp_path, demo_gguf, adapter)
    done = in_a_child(statements)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    path = models / "merged-demo" / "merged-demo-Q4_K_M.gguf"
    assert (first["path"], first["type"], first["reused"]) == (str(path), "Q4_K_M", False)
    asked, expected = parse_type("Q4_K_M"), tmp_path / "expected.gguf"
    merge(demo_gguf, [(adapter, 1.0)], expected, toolchain=toolchain, log=log, full=demo_full, asked=asked)
    assert tensors_sha256(read_header(path)) == tensors_sha256(read_header(expected))
    assert provenance.verify(path)["quality"] == first["gate"]
    assert 0 < first["gate"]["mean_kld"] < 0.05
    assert first["gate"]["quantization_kld"] > 0
    assert inv("verify", path).returncode == 0
    assert json_without_processes(statements) == {**first, "reused": True}
    stricter = in_a_child(merging(tmp_path, demo_gguf, adapter, limit=first["gate"]["mean_kld"] / 2))
    assert "is too far from" in stricter.stderr
    assert not [path for path in models.rglob("*") if path.suffix in (".gguf", ".json")]


def test_a_merge_that_is_too_far_off_leaves_no_file(demo_gguf: Path, models: Path, tmp_path: Path) -> None:
    adapter = small_adapter(demo_gguf, tmp_path / "a.gguf")
    done = in_a_child(merging(tmp_path, demo_gguf, adapter, limit=1e-9))
    assert done.returncode != 0
    assert "ArtifactError: merged-demo-Q4_K_M.gguf is too far from base and adapter at run time" in done.stderr
    assert not [path for path in models.rglob("*") if path.suffix in (".gguf", ".json")]
    assert not leftovers(models)


@pytest.mark.parametrize("noted", [True, False])
def test_a_file_of_that_name_that_was_not_merged_is_not_replaced(
    demo_gguf: Path, models: Path, tmp_path: Path, noted: bool
) -> None:
    """Another recipe's artifact, or a file that somebody put there."""
    adapter = small_adapter(demo_gguf, tmp_path / "a.gguf")
    path = models / "merged-demo" / "merged-demo-Q4_K_M.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(demo_gguf.read_bytes())
    if noted:
        provenance.sidecar_path(path).write_bytes(provenance.sidecar_path(demo_gguf).read_bytes())
    done = in_a_child(merging(tmp_path, demo_gguf, adapter))
    assert "UsageError" in done.stderr
    assert "is there and was not merged" in done.stderr
    assert path.read_bytes() == demo_gguf.read_bytes()


def test_a_type_that_needs_an_importance_matrix_is_refused_before_anything_is_made(
    toolchain: Toolchain, tmp_path: Path, log: Path
) -> None:
    base = write_model(tmp_path / "base.gguf", "llama", type="iq2_xxs", n_layer=1)
    adapter = small_adapter(base, tmp_path / "a.gguf")
    with pytest.raises(UsageError, match=r"is IQ2_XXS, which is made with an importance matrix only"):
        merge(base, [(adapter, 1.0)], tmp_path / "m.gguf", toolchain=toolchain, log=log)
    assert not (tmp_path / "m.gguf").exists()
    merge(base, [(adapter, 1.0)], tmp_path / "m.gguf", toolchain=toolchain, log=log, asked=parse_type("Q2_K"))
    assert read_header(tmp_path / "m.gguf").file_type == "Q2_K"

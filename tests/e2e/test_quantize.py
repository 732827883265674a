"""The main job: recipe to quantized, judged, reproducible files, through `inv quantize`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.front_door import ROOT, inv, inv_json, json_without_processes, leftovers
from toolchain.base import files
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain

RECIPE = (ROOT / "recipes" / "demo.yaml").read_text()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder of the test's own; the intermediate files are shared by fingerprint."""
    monkeypatch.setenv("FOUNDRY_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def write_recipe(tmp_path: Path, text: str = RECIPE) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    return path


def test_the_answer_is_one_object_with_every_figure(demo: dict[str, Any]) -> None:
    assert demo["recipe"] == "demo"
    assert [artifact["type"] for artifact in demo["artifacts"]] == ["Q8_0", "Q4_K_M", "Q2_K"]
    for artifact in demo["artifacts"]:
        assert artifact.keys() == {"path", "type", "bytes", "sha256", "bits_per_weight", "perplexity", "reused"}
        path = Path(artifact["path"])
        assert path.stat().st_size == artifact["bytes"]
        assert files.sha256_file(path) == artifact["sha256"]
        assert read_header(path).bits_per_weight == pytest.approx(artifact["bits_per_weight"], abs=1e-3)
    for step in demo["steps"]:
        assert step.keys() == {"id", "seconds", "reused"}
    assert [s["id"] for s in demo["steps"]][:3] == ["fetch", "convert", "corpus"]


def test_quality_falls_with_size(demo: dict[str, Any]) -> None:
    """Q8_0, Q4_K_M, Q2_K: fewer bits, fewer bytes, and Q2_K clearly worse than Q8_0."""
    by_type = {artifact["type"]: artifact for artifact in demo["artifacts"]}
    sizes = [by_type[name]["bits_per_weight"] for name in ("Q8_0", "Q4_K_M", "Q2_K")]
    assert sizes == sorted(sizes, reverse=True)
    assert by_type["Q2_K"]["perplexity"] > by_type["Q8_0"]["perplexity"]
    assert by_type["Q8_0"]["perplexity"] < 200, "the demo model learned something"


def test_a_second_run_starts_no_process(demo: dict[str, Any]) -> None:
    again = json_without_processes(
        "from toolchain.pipeline import verbs\nverbs.quantize(Path('recipes/demo.yaml'), as_json=True)"
    )
    assert all(step["reused"] for step in again["steps"])
    assert all(artifact["reused"] for artifact in again["artifacts"])


def test_one_more_type_runs_one_quantize_and_one_evaluate(demo: dict[str, Any], models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    first = inv_json("quantize", recipe)
    assert {s["id"] for s in first["steps"] if s["reused"]} == {"fetch", "convert", "corpus"} | {
        f"evaluate {a['type']}" for a in first["artifacts"]
    }
    write_recipe(tmp_path, RECIPE.replace("  - Q2_K\n", "  - Q2_K\n  - Q6_K\n"))
    second = inv_json("quantize", recipe)
    done = [s["id"] for s in second["steps"] if not s["reused"]]
    assert done in (["quantize Q6_K", "evaluate Q6_K"], ["quantize Q6_K"])  # judged already where this ran before
    assert [a["type"] for a in second["artifacts"] if not a["reused"]] == ["Q6_K"]


def test_tensor_data_equals_what_llama_quantize_makes_by_hand(
    demo: dict[str, Any], demo_full: Path, toolchain: Toolchain, tmp_path: Path
) -> None:
    for artifact in demo["artifacts"]:
        by_hand = tmp_path / f"{artifact['type']}.gguf"
        argv = [toolchain.tool("quantize"), demo_full, by_hand, artifact["type"]]
        subprocess.run(argv, check=True, capture_output=True)
        ours, theirs = gguf.GGUFReader(artifact["path"]), gguf.GGUFReader(by_hand)
        assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
        for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
            assert mine.tensor_type == other.tensor_type
            assert mine.data.tobytes() == other.data.tobytes(), mine.name


def test_provenance_tells_the_whole_way(demo: dict[str, Any], toolchain: Toolchain) -> None:
    artifact = demo["artifacts"][1]
    sidecar = json.loads(Path(artifact["path"] + ".json").read_text())
    assert sidecar["sha256"] == artifact["sha256"]
    assert sidecar["quality"]["perplexity"] == artifact["perplexity"]
    assert sidecar["toolchain"]["id"] == toolchain.id
    assert sidecar["source"]["kind"] == "demo"
    assert len(sidecar["commands"]) == 3
    metadata = read_header(Path(artifact["path"])).metadata
    assert metadata["foundry.recipe"] == "demo"
    assert metadata["foundry.source"] == "demo:tiny"
    assert metadata["foundry.llama_cpp"] == toolchain.commit


def test_a_damaged_artifact_fails_verify_and_is_made_again(demo: dict[str, Any], models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    path = Path(inv_json("quantize", recipe)["artifacts"][1]["path"])
    assert inv("verify", path).returncode == 0
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    told = inv("verify", path)
    assert told.returncode == 6
    assert "expected sha256" in told.stderr
    again = inv_json("quantize", recipe)
    assert [s["id"] for s in again["steps"] if not s["reused"]] == ["quantize Q4_K_M"]
    assert path.read_bytes() == original


def test_dry_run_shows_every_step_and_makes_nothing(demo: dict[str, Any], models: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("  - Q2_K\n", "  - Q2_K\n  - Q3_K_M\n")
    done = inv("quantize", write_recipe(tmp_path, text), "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in ("convert_hf_to_gguf.py", "llama-quantize", "llama-perplexity", "Q3_K_M", "peak disk: about"):
        assert words in done.stdout
    assert not list(models.rglob("*.gguf"))
    plan = inv_json("quantize", write_recipe(tmp_path, text), "--dry-run")
    todo = [step for step in plan["steps"] if not step["reused"]]
    assert plan["peak_disk_bytes"] == sum(step["bytes"] for step in todo) > 0


def test_estimated_bytes_are_near_the_real_ones(demo: dict[str, Any]) -> None:
    """The estimate is for models of billions; even this one, with its large vocabulary, stays within a third."""
    estimated = {s["id"]: s["bytes"] for s in inv_json("quantize", "recipes/demo.yaml", "--dry-run")["steps"]}
    for artifact in demo["artifacts"]:
        assert estimated[f"quantize {artifact['type']}"] == pytest.approx(artifact["bytes"], rel=0.34)


def test_a_local_folder_and_a_gguf_are_sources_too(
    demo: dict[str, Any], demo_full: Path, models: Path, tmp_path: Path
) -> None:
    """The demo's own Hugging Face folder by path, and its conversion as a GGUF, give the same tensors."""
    folder = next((files.home_dir("work") / "steps").glob("*/tiny"))
    results = []
    for kind, place in (("path", folder), ("gguf", demo_full)):
        text = f"name: by-{kind}\nmodel: {{{kind}: {place}}}\nquantize: [Q4_K_M]\n"
        recipe = tmp_path / f"by-{kind}.yaml"
        recipe.write_text(text)
        answer = inv_json("quantize", recipe)
        assert answer["artifacts"][0]["perplexity"] is None
        results.append([t.data.tobytes() for t in gguf.GGUFReader(answer["artifacts"][0]["path"]).tensors])
    assert results[0] == results[1]
    assert not leftovers(models)


def test_tensors_of_their_own_type(demo: dict[str, Any], demo_full: Path, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        f"name: mixed\nmodel: {{gguf: {demo_full}}}\n"
        "quantize:\n  - {type: Q4_K_M, suffix: v8, tensors: {'attn_v': q8_0}}\n"
    )
    path = Path(inv_json("quantize", recipe)["artifacts"][0]["path"])
    assert path.name == "mixed-Q4_K_M-v8.gguf"
    types = {t.type for t in read_header(path).tensors if re.fullmatch(r"blk\.\d+\.attn_v\.weight", t.name)}
    assert types == {"Q8_0"}


def test_a_quantized_source_is_refused(demo_gguf: Path, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(f"name: twice\nmodel: {{gguf: {demo_gguf}}}\nquantize: [Q2_K]\n")
    done = inv("quantize", recipe)
    assert done.returncode == 2
    assert "quantized already" in done.stderr
    assert not models.exists()


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("name: x\nmodel: {path: nowhere}\nquantize: [Q4_0]\n", 2, "no such model folder"),
        ("name: x\nmodel: {path: .}\nquantize: [Q4_0]\n", 2, "not a Hugging Face model folder"),
        ("name: x\nmodel: {gguf: missing.gguf}\nquantize: [Q4_0]\n", 2, "missing.gguf"),
        ("name: x\nmodel: {gguf: x.yaml}\nquantize: [Q4_0]\n", 6, "x.yaml"),
        ("name: x\nmodel: {demo: tiny}\nquantize: [Q4_0]\nevaluate: {corpus: no.txt}\n", 2, "no such corpus"),
    ],
)
def test_a_source_that_is_not_there_is_told(
    toolchain: Toolchain, models: Path, tmp_path: Path, text: str, code: int, words: str
) -> None:
    recipe = tmp_path / "x.yaml"
    recipe.write_text(text)
    done = inv("quantize", recipe)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "→" in done.stderr


def test_a_model_that_the_converter_does_not_know_fails_with_its_log(
    toolchain: Toolchain, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["StrangeForCausalLM"], "model_type": "strange"}')
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    recipe = tmp_path / "strange.yaml"
    recipe.write_text("name: strange\nmodel: {path: strange}\nquantize: [Q4_0]\n")
    done = inv("quantize", recipe)
    assert done.returncode == 5, done.stderr
    assert "StrangeForCausalLM" in done.stderr
    assert "log: " in done.stderr
    assert not list(models.rglob("*.gguf"))


def test_a_corpus_that_is_too_short_says_so(demo_full: Path, models: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short to judge anything\n")
    recipe = tmp_path / "short.yaml"
    recipe.write_text(f"name: short\nmodel: {{gguf: {demo_full}}}\nquantize: [Q8_0]\nevaluate: {{corpus: short.txt}}\n")
    done = inv("quantize", recipe)
    assert done.returncode == 2, done.stderr
    assert "too short" in done.stderr
    assert len(list(models.rglob("*.gguf"))) == 1, "the quantized file is kept"


@pytest.mark.parametrize(
    ("named", "trusted"), [("own", True), ("own", False), ("code/own", False), ("FOLDER--own", False)]
)
def test_code_in_a_model_folder_runs_only_when_trusted(
    toolchain: Toolchain, models: Path, tmp_path: Path, named: str, trusted: bool
) -> None:
    """A model of 2023's Qwen architecture, whose tokenizer is code in its folder, which leaves a mark when run."""
    folder, mark = tmp_path / "with-code", tmp_path / "mark"
    folder.mkdir()
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 4, "intermediate_size": 8, "seq_length": 8}
    more = {"num_attention_heads": 1, "layer_norm_epsilon": 1e-5, "rotary_emb_base": 1e4}
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["QWenLMHeadModel"], "model_type": "qwen", **sizes, **more})
    )
    module = named.replace("FOLDER", str(folder))
    owned = {"auto_map": {"AutoTokenizer": [f"{module}.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(owned))
    save_file({"transformer.wte.weight": np.zeros((4, 8), np.float32)}, folder / "model.safetensors")
    (folder / "code").mkdir()
    for place in (folder, folder / "code"):
        (place / "own.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\nclass Own: pass\n")
    recipe = tmp_path / "code.yaml"
    trust = ", trust_remote_code: true" if trusted else ""
    recipe.write_text(f"name: code\nmodel: {{path: with-code{trust}}}\nquantize: [Q8_0]\n")
    done = inv("quantize", recipe)
    assert done.returncode == 5, done.stderr
    assert mark.exists() is trusted
    assert ("trust_remote_code: true" in done.stderr) is not trusted


def test_two_recipes_on_one_model_share_its_conversion(demo: dict[str, Any], models: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"name: {name}\nmodel: {{demo: tiny}}\nquantize: [Q4_0]\n")
        answer = inv_json("quantize", recipe)
        assert [s["id"] for s in answer["steps"] if not s["reused"]] == ["quantize Q4_0"]


def test_a_recipe_of_the_same_name_for_another_model_is_refused(
    demo: dict[str, Any], demo_full: Path, models: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("name: mine\nmodel: {demo: tiny}\nquantize: [Q8_0]\n")
    inv_json("quantize", first)
    second = tmp_path / "second.yaml"
    second.write_text(f"name: mine\nmodel: {{gguf: {demo_full}}}\nquantize: [Q8_0]\n")
    done = inv("quantize", second)
    assert done.returncode == 2
    assert "another model" in done.stderr
    assert all(step["reused"] for step in inv_json("quantize", first)["steps"])


def test_a_model_path_may_be_the_recipes_own_folder(demo: dict[str, Any], models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with space é"
    shutil.copytree(next((files.home_dir("work") / "steps").glob("*/tiny")), folder)
    (folder / "here.yaml").write_text("name: here\nmodel: {path: .}\nquantize: [Q4_0]\n")
    answer = inv_json("quantize", os.path.relpath(folder / "here.yaml", ROOT))
    metadata = read_header(Path(answer["artifacts"][0]["path"])).metadata
    assert metadata["foundry.source"] == "path:with space é"


def test_the_demo_task_ends_with_text_and_its_second_run_runs_no_step(demo: dict[str, Any]) -> None:
    for _ in range(2):
        done = inv("demo")
        assert done.returncode == 0, done.stderr
        assert "demo-Q4_K_M.gguf" in done.stdout
        assert len(done.stdout.splitlines()) > 5, "the table, then text"
    assert "all steps were done already" in done.stderr

"""`inv lora` as its users meet it: a recipe, what it leaves, and what a second, a changed and a stopped run do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.front_door import PATIENCE_S, ROOT, environment, inv, inv_argv, inv_json, json_without_processes, leftovers
from tests.front_door import runtime as run_runtime
from tests.ggla_files import write_ggla
from tests.loopback_hub import serve_hub
from toolchain.base import files
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import BASE_SHA256_KEY, tensors_sha256

RECIPE = """\
name: {name}
base: {{gguf: {base}}}
data:
  sources:
    - text: builtin:python-source
adapter: {{rank: 4, targets: attention}}
train: {{n_ctx: 64, batch: 4, steps: {steps}, checkpoint_steps: 2, learning_rate: 0.002, seed: {seed}}}
evaluate: {{n_ctx: 64, chunks: {chunks}, prompts: ["The import statement"], reply_tokens: 8{bound}}}
"""


class Ground:
    """A folder of results of its own, and recipes in it; work is shared by fingerprint, so ``seed`` sets them apart."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.models = folder, base, folder / "models"
        self.env = {"FOUNDRY_MODELS": str(self.models)}

    def recipe(
        self, name: str, *, steps: int = 4, chunks: int = 2, seed: int = 1, bound: str = "", base: str = ""
    ) -> Path:
        path = self.folder / f"{name}.yaml"
        told = {"name": name, "base": base or self.base, "steps": steps, "chunks": chunks, "seed": seed}
        path.write_text(RECIPE.format(**told, bound=bound))
        return path

    def adapter(self, name: str) -> Path:
        return self.models / name / f"{name}-lora.gguf"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, demo_gguf: Path) -> Ground:
    return Ground(tmp_path_factory.mktemp("lora"), demo_gguf)


@pytest.fixture(scope="module")
def trained(ground: Ground) -> dict[str, Any]:
    """What `inv lora --fresh --json` answers for a recipe of a few steps."""
    return inv_json("lora", ground.recipe("small"), "--fresh", env=ground.env)


def test_a_training_ends_with_all_that_is_promised(trained: dict[str, Any], ground: Ground) -> None:
    adapter = Path(trained["adapter"])
    assert adapter == ground.adapter("small")
    header = read_header(adapter)
    assert header.kind == "adapter"
    assert header.metadata[BASE_SHA256_KEY] == trained["base_sha256"] == tensors_sha256(read_header(ground.base))
    assert header.metadata["foundry.recipe"] == "small"
    made = {key: Path(path) for key, path in trained["files"].items()}
    assert made["curve"].read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line)["step"] for line in made["metrics"].read_text().splitlines()] == [1, 2, 3, 4]
    assert "The import statement" in made["replies"].read_text()
    assert (made["peft"] / "adapter_model.safetensors").is_file()
    assert 1 < trained["perplexity_after"] < trained["perplexity_before"]
    assert trained["held_out_after"] < trained["held_out_before"]
    assert trained["drift_kld"] > 0
    assert trained["tokens_per_second"] > 0
    assert not leftovers(ground.models)


def test_the_runtime_takes_the_adapter_and_verify_finds_it_sound(trained: dict[str, Any], ground: Ground) -> None:
    sound = inv("verify", trained["adapter"])
    assert sound.returncode == 0, sound.stderr
    assert trained["sha256"] in sound.stdout
    asked = ("complete", ground.base, "-p", "def", "-n", "4", "--temp", "0", "--no-tune", "--lora", trained["adapter"])
    said = run_runtime(environment(), *asked, cwd=ROOT)
    assert said.returncode == 0, said.stderr


def test_a_second_run_starts_no_process_and_tells_the_same(trained: dict[str, Any], ground: Ground) -> None:
    again = json_without_processes(
        f"import os\nos.environ['FOUNDRY_MODELS'] = {str(ground.models)!r}\n"
        "from toolchain.lora import verbs\n"
        f"verbs.lora(Path({str(ground.folder / 'small.yaml')!r}), dry_run=False, fresh=False, as_json=True)\n"
        "assert not {'torch', 'transformers', 'peft', 'llama_cpp'} & set(sys.modules)"
    )
    assert again == {**trained, "reused": True}


def test_a_changed_judgement_trains_nothing_even_after_clean(trained: dict[str, Any], ground: Ground) -> None:
    files.remove(_run_dir(trained), within=_run_dir(trained).parent)  # as `inv clean` does
    judged = inv("lora", ground.recipe("small", chunks=3), "--json", env=ground.env)
    assert judged.returncode == 0, judged.stderr
    told = json.loads(judged.stdout)
    assert "train small" not in judged.stderr
    assert (told["sha256"], told["fingerprint"]) == (trained["sha256"], trained["fingerprint"])
    assert told["perplexity_after"] != trained["perplexity_after"]
    assert inv("lora", ground.recipe("small"), env=ground.env).returncode == 0


def test_a_stopped_training_goes_on_and_ends_as_an_unstopped_one(ground: Ground) -> None:
    recipe = ground.recipe("stopped", steps=6, seed=2)
    whole = inv_json("lora", recipe, "--fresh", env=ground.env)
    curve, adapter = Path(whole["files"]["metrics"]).read_bytes(), ground.adapter("stopped").read_bytes()
    folder = _run_dir(whole) / "checkpoints"
    child = subprocess.Popen(
        inv_argv("lora", recipe, "--fresh"),
        cwd=ROOT,
        env=environment(ground.env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert _appears(folder / "step-00000002" / "done.json", child), child.communicate()[0]
        child.send_signal(signal.SIGINT)
        said, _ = child.communicate(timeout=PATIENCE_S)
    finally:
        child.kill()
    assert child.returncode == 130, said
    assert "the same command goes on" in said
    resumed = inv("lora", recipe, "--json", env=ground.env)
    assert resumed.returncode == 0, resumed.stderr
    assert "goes on at step" in resumed.stderr
    assert "try 2 steps" not in resumed.stderr
    assert Path(json.loads(resumed.stdout)["files"]["metrics"]).read_bytes() == curve
    assert ground.adapter("stopped").read_bytes() == adapter


def test_a_dry_run_tells_the_plan_and_makes_no_result(ground: Ground) -> None:
    recipe = ground.recipe("planned", seed=3)
    plan = inv_json("lora", recipe, "--dry-run", env=ground.env)
    assert plan["steps"] == 4
    assert plan["tokens_per_step"] == 4 * 64
    assert plan["estimated_bytes"]["total"] == sum(
        count for name, count in plan["estimated_bytes"].items() if name != "total"
    )
    assert 0 < plan["measured_bytes"] < plan["free_bytes"]
    assert plan["trained_parameters"] == _parameters(ground.base, ("attn_q", "attn_k", "attn_v", "attn_output"), 4)
    assert plan["seconds"] == plan["seconds_per_step"] * plan["steps"]
    assert not list((ground.models / "planned").glob("*"))
    words = inv("lora", recipe, "--dry-run", env=ground.env)
    assert "try 2 steps" not in words.stderr
    assert "base      demo-Q4_K_M.gguf" in words.stdout


def test_an_adapter_that_drifts_too_far_is_kept_apart(ground: Ground) -> None:
    refused = inv("lora", ground.recipe("far", seed=4, bound=", max_drift_kld: 1.0e-9"), "--json", env=ground.env)
    assert refused.returncode == 6, refused.stderr
    assert "drift" in refused.stderr
    assert refused.stdout == ""
    assert [path.name for path in (ground.models / "far").glob("[!.]*")] == ["refused"]
    assert (ground.models / "far" / "refused" / "far-lora.gguf").is_file()
    allowed = inv("lora", ground.recipe("far", seed=4, bound=", max_drift_kld: 100"), "--json", env=ground.env)
    assert allowed.returncode == 0, allowed.stderr
    assert "train far" not in allowed.stderr
    assert ground.adapter("far").is_file()
    assert not (ground.models / "far" / "refused").exists()
    again = inv("lora", ground.recipe("far", seed=4, bound=", max_drift_kld: 1.0e-9"), env=ground.env)
    assert again.returncode == 6
    assert [path.name for path in (ground.models / "far").glob("[!.]*")] == ["refused"]


def test_a_refused_dora_takes_its_merged_model_with_it_and_a_lost_one_is_made_again(ground: Ground) -> None:
    recipe = ground.recipe("magnitudes", steps=1, seed=7, bound=", max_drift_kld: 1.0e-12")
    recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 4, dora: true"))
    folder = ground.models / "magnitudes"
    refused = inv("lora", recipe, env=ground.env)
    assert refused.returncode == 6, refused.stderr
    assert [path.name for path in folder.glob("[!.]*")] == ["refused"]
    assert inv("verify", folder / "refused" / "magnitudes-Q4_K_M.gguf").returncode == 0
    recipe.write_text(recipe.read_text().replace("1.0e-12", "100"))
    merged = Path(inv_json("lora", recipe, env=ground.env)["merged"])
    assert merged == folder / "magnitudes-Q4_K_M.gguf"
    whole = merged.read_bytes()
    merged.unlink()
    again = inv_json("lora", recipe, env=ground.env)
    assert not again["reused"]
    assert merged.read_bytes() == whole


HOSTILE = {
    "nothing": (b"", "holds nothing to learn"),
    "a line of 10 MB": (b'{"messages": "' + b"x" * (10 << 20) + b'"}\n', "bad.jsonl:1: a line of 10485777 bytes"),
    "broken JSON": (b'{"messages": [}\n', "bad.jsonl:1: broken JSON"),
    "no roles": (b'{"messages": [{"content": "Hi."}]}\n', "bad.jsonl:1: messages[0] has no role"),
    "only system turns": (b'{"messages": [{"role": "system", "content": "Be."}]}\n', "only system turns"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data_is_told_before_the_base_is_made(kind: str, ground: Ground, tmp_path: Path) -> None:
    data, words = HOSTILE[kind]
    (tmp_path / "bad.jsonl").write_bytes(data)
    recipe = ground.recipe("hostile")
    told = recipe.read_text().replace("text: builtin:python-source", f"chat: {tmp_path}/bad.jsonl")
    recipe.write_text(told.replace(f"gguf: {ground.base}", f"recipe: {ROOT}/recipes/demo.yaml"))
    models = tmp_path / "models"
    refused = inv("lora", recipe, env={"FOUNDRY_MODELS": str(models)})
    assert refused.returncode == 2, refused.stderr
    assert words in refused.stderr
    assert not list(models.rglob("*.gguf"))


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("text: builtin:python-source", "text: {folder}/novl.txt", "did you mean {folder}/novel.txt?"),
        ("text: builtin:python-source", "text: {folder}", "{folder} is a folder"),
        ("gguf: {base}", "gguf: {folder}/bas.gguf", "did you mean {folder}/base.gguf?"),
    ],
)
def test_a_file_that_is_not_there_is_named_with_its_neighbour(
    right: str, wrong: str, words: str, ground: Ground, tmp_path: Path
) -> None:
    for name in ("novel.txt", "base.gguf"):
        (tmp_path / name).touch()
    recipe = ground.recipe("lost")
    told = recipe.read_text().replace(right.format(base=ground.base), wrong.format(folder=tmp_path))
    recipe.write_text(told)
    refused = inv("lora", recipe, env=ground.env)
    assert refused.returncode == 2
    assert words.format(folder=tmp_path) in refused.stderr


def test_a_base_on_the_hub_is_fetched_once_and_then_found_without_asking(ground: Ground, tmp_path: Path) -> None:
    repo = f"acme/tiny-{uuid.uuid4().hex[:12]}"  # new to what was recorded
    served = tmp_path / "served"
    served.mkdir()
    shutil.copyfile(ground.base, served / "tiny-Q4_K_M.gguf")
    recipe = ground.recipe("from-hub", seed=8)
    recipe.write_text(recipe.read_text().replace(f"gguf: {ground.base}", f"hub: '{repo}:Q4_K_M'"))
    with serve_hub({repo: served}) as hub:
        env = {**ground.env, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": None}
        plan = inv_json("lora", recipe, "--dry-run", env=env)
        asked = len(hub.log)
        assert plan["base_sha256"] == tensors_sha256(read_header(ground.base))
        assert inv_json("lora", recipe, "--dry-run", env=env)["base_sha256"] == plan["base_sha256"]
        assert len(hub.log) == asked > 0
        recipe.write_text(recipe.read_text().replace("Q4_K_M", "Q9_Z"))
        unknown = inv("lora", recipe, env=env)
        assert unknown.returncode == 2
        assert "Q4_K_M" in unknown.stderr


def test_an_adapter_of_2023_becomes_a_gguf_and_its_norms_are_told(ground: Ground, tmp_path: Path) -> None:
    shapes = {tensor.name: tensor.shape for tensor in read_header(ground.base).tensors}
    inputs, outputs = shapes["blk.0.attn_q.weight"]
    numbers = np.random.default_rng(1)
    pair = tuple(numbers.standard_normal((size, 4)).astype(np.float32) for size in (inputs, outputs))
    norm = numbers.standard_normal((shapes["output_norm.weight"][0], 1)).astype(np.float32)
    write_ggla(
        tmp_path / "old.bin",
        {"blk.0.attn_q.weight": (pair[0], pair[1]), "output_norm.weight": (norm, np.ones((1, 1), np.float32))},
    )
    (tmp_path / "base.gguf").symlink_to(ground.base)
    done = inv_in(tmp_path, "lora", "--convert", "old.bin", "--base", "base.gguf")
    assert done.returncode == 0, done.stderr
    assert "1 norms change too" in done.stderr
    made = tmp_path / "old-lora.gguf"
    assert done.stdout.splitlines()[0] == str(made)
    assert read_header(made).kind == "adapter"
    told = inv_json("lora", tmp_path / "old.bin", "--convert", "--base", ground.base, "--output", tmp_path / "b.gguf")
    assert (told["pairs"], told["norms"]) == (["blk.0.attn_q.weight"], ["output_norm.weight"])


def test_an_adapter_of_2023_is_merged_with_its_norms(ground: Ground, tmp_path: Path) -> None:
    width = read_header(ground.base).arch_int("embedding_length")
    assert width
    small = np.random.default_rng(2).standard_normal((width, 1)).astype(np.float32) / 20
    write_ggla(tmp_path / "old.bin", {"output_norm.weight": (small, np.ones((1, 1), np.float32))})
    (tmp_path / "base.gguf").symlink_to(ground.base)
    assert inv_in(tmp_path, "lora", "--convert", "old.bin", "--base", "base.gguf").returncode == 0
    first = inv_in(tmp_path, "merge", "old-lora.gguf", "--base", "base.gguf", "--json")
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout)
    assert Path(made["path"]).name == "old-lora-Q4_K_M.gguf"
    norms = [_vector(path, "output_norm.weight") for path in (ground.base, Path(made["path"]))]
    np.testing.assert_allclose(norms[1] - norms[0], small[:, 0], atol=1e-6)
    again = inv_in(tmp_path, "merge", "old-lora.gguf", "--base", "base.gguf", "--json")
    assert json.loads(again.stdout)["reused"] is True
    bare = inv_in(tmp_path, "merge", "old-lora.gguf")
    assert bare.returncode == 2
    assert "--base" in bare.stderr


def test_what_cannot_fit_is_refused_before_anything_is_tried(ground: Ground) -> None:
    recipe = ground.recipe("large", seed=5)
    recipe.write_text(recipe.read_text() + "budget: {memory_gib: 0.1}\n")
    refused = inv("lora", recipe, env=ground.env)
    assert refused.returncode == 7
    assert "activations" in refused.stderr
    assert "try" not in refused.stderr


def test_a_name_that_is_taken_by_another_base_is_refused(
    trained: dict[str, Any], ground: Ground, demo: dict[str, Any]
) -> None:
    other = next(artifact["path"] for artifact in demo["artifacts"] if artifact["type"] == "Q8_0")
    refused = inv("lora", ground.recipe("small", base=other), env=ground.env)
    ground.recipe("small")
    assert refused.returncode == 2
    assert "adapter of another base" in refused.stderr
    assert files.sha256_file(ground.adapter("small")) == trained["sha256"]


def test_a_recipes_adapter_is_merged_by_its_name_and_before_training_it_is_not(
    trained: dict[str, Any], ground: Ground
) -> None:
    early = inv("merge", ground.recipe("untrained", seed=6), env=ground.env)
    assert early.returncode == 2
    assert "not trained yet" in early.stderr
    merged = inv_json("merge", ground.recipe("small"), env=ground.env)
    assert Path(merged["path"]).parent == ground.models / "small"
    assert read_header(Path(merged["path"])).kind == "model"
    assert inv("verify", merged["path"]).returncode == 0
    assert inv_json("merge", ground.recipe("small"), env=ground.env)["reused"]


def test_an_adapter_goes_to_peft_form_and_comes_back(trained: dict[str, Any], ground: Ground, tmp_path: Path) -> None:
    folder, back = tmp_path / "peft", tmp_path / "back.gguf"
    base = ("--base", ground.base, "--output")
    assert inv("lora", trained["adapter"], "--to-peft", *base, folder).returncode == 0
    told = inv_json("lora", folder, "--from-peft", *base, back)
    assert told["base_sha256"] == trained["base_sha256"]
    assert read_header(back).kind == "adapter"
    there = inv("lora", folder, "--from-peft", *base, back)
    assert there.returncode == 2
    assert "is there already" in there.stderr
    relative = inv_in(folder, "lora", ".", "--from-peft", "--base", os.path.relpath(ground.base, folder))
    assert relative.returncode == 0, relative.stderr
    assert (tmp_path / "peft.gguf").is_file()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("r.yaml", "--base", "b.gguf"), "--base belongs to"),
        (("r.yaml", "--output", "o.gguf"), "--output belongs to"),
        (("old.bin", "--convert"), "needs the base"),
        (("--convert", "old.bin", "--base", "recipes/demo.yaml"), "there is no"),
        (("old.bin", "--convert", "--base", "b.gguf", "--fresh"), "--fresh does not go with --convert"),
        (("old.bin", "--convert", "--to-peft", "--base", "b.gguf"), "exclude each other"),
        (("r.yaml", "--dry-run", "--fresh"), "--dry-run trains nothing"),
        (("no-such.yaml",), "cannot read the recipe"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(typed: tuple[str, ...], words: str) -> None:
    refused = inv("lora", *typed)
    assert refused.returncode == 2
    assert words in refused.stderr


def inv_in(folder: Path, *typed: str) -> subprocess.CompletedProcess[str]:
    """As `./inv` typed in ``folder``, with paths that are relative to it."""
    argv = [sys.executable, str(ROOT / "tasks.py"), "--search-root", str(ROOT), *typed]
    return subprocess.run(argv, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def _vector(path: Path, name: str) -> np.ndarray[Any, Any]:
    header = read_header(path)
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    with path.open("rb") as file:
        file.seek(header.data_offset + tensor.offset)
        return np.frombuffer(file.read(tensor.nbytes), np.float32)


def _run_dir(answer: dict[str, Any]) -> Path:
    return files.home_dir("work") / "lora" / str(answer["fingerprint"])[:20]


def _appears(path: Path, child: subprocess.Popen[str]) -> bool:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and child.poll() is None:
        if path.exists():
            return True
        time.sleep(0.02)
    return path.exists()


def _parameters(base: Path, suffixes: tuple[str, ...], rank: int) -> int:
    tensors = [t for t in read_header(base).tensors if t.name.split(".")[-2] in suffixes]
    return sum(rank * sum(tensor.shape) for tensor in tensors)

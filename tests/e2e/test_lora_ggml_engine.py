"""The trainer of 2023 on a base that this project makes, and its adapters over the bridge into today's runtime.

Old and new runtime are held against each other by their own programs: the old ``perplexity --lora`` writes its
distributions, the new ``llama-perplexity --lora`` tells how far it is from them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.front_door import LONG_S, inv_json
from toolchain.base.errors import ArtifactError, UsageError
from toolchain.base.gguf import read_header
from toolchain.build import ggla, legacy
from toolchain.build.toolchain import Toolchain
from toolchain.lora.forms.adapter import AdapterModel, read_adapter
from toolchain.lora.forms.bridge import convert
from toolchain.lora.ggml_engine.train import ADAPTER_FILE, Trained, train
from toolchain.lora.judging.evaluate import perplexity
from toolchain.lora.recipe import LoraRecipe
from toolchain.lora.spec import METRICS
from toolchain.stages.corpus import python_docs
from toolchain.stages.evaluate import ask

RECIPE = """\
name: demo-mha
model: {demo: tiny-mha}
quantize: [F32, Q8_0]
"""
DOMAIN = "".join(
    f"Order {n}: {n % 7 + 2} boxes of {fruit} for {place}, to be paid by {day}.\n"
    for n in range(100, 180)
    for fruit, place, day in [
        (("apples", "pears", "plums")[n % 3], ("Bremen", "Lyon", "Porto", "Turin")[n % 4], ("Monday", "Friday")[n % 2])
    ]
)
STEPS = 40


@pytest.fixture(scope="session")
def demo_mha(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The demo base with as many KV heads as heads, by type."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "demo-mha.yaml").write_text(RECIPE)
    made = inv_json("quantize", folder / "demo-mha.yaml", env={"FOUNDRY_MODELS": str(folder / "models")})
    return {artifact["type"]: Path(artifact["path"]) for artifact in made["artifacts"]}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What is learned, and unseen text of the same kind."""
    folder = tmp_path_factory.mktemp("texts")
    lines = DOMAIN.splitlines(keepends=True)
    for name, part in (("learned", lines[:60]), ("unseen", lines[60:])):
        (folder / f"{name}.txt").write_text("".join(part))
    return folder / "learned.txt", folder / "unseen.txt"


def recipe_of(**parts: dict[str, Any]) -> LoraRecipe:
    plain = {"name": "x", "base": {"gguf": "x.gguf"}, "data": {"sources": [{"text": "t.txt"}]}, "engine": "ggml"}
    return LoraRecipe.model_validate({**plain, **parts})


@pytest.fixture(scope="session")
def trained(
    trainer: Toolchain,
    demo_mha: Mapping[str, Path],
    texts: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """An adapter of the attention's matrices, learned on the Q8_0 base."""
    recipe = recipe_of(
        adapter={"rank": 4, "targets": "attention"},
        train={"n_ctx": 32, "batch": 4, "micro_batch": 2, "learning_rate": 0.01, "checkpoint_steps": 15},
    )
    folder = tmp_path_factory.mktemp("trained")
    return train(recipe, demo_mha["Q8_0"], texts[0], folder, trainer, steps=STEPS, n_threads=1, log=folder / "log")


@pytest.fixture(scope="session")
def foreign(trainer: Toolchain, demo_mha: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainer does when it is left to itself: every tensor learned, norms too, in several ranks."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "text.txt").write_text(DOMAIN)
    argv: list[str | Path] = [trainer.tool("finetune"), "--model-base", demo_mha["F32"], "--train-data", "text.txt"]
    argv += ["--lora-out", "a.bin", "--checkpoint-in", "none", "--checkpoint-out", "", "--save-every", "0"]
    argv += ["--lora-r", "4", "--lora-alpha", "6", "--rank-wq", "8", "--rank-wk", "3", "--rank-out", "2"]
    argv += ["--adam-iter", "20", "--adam-alpha", "0.02", "--warmup", "0", "--seed", "1"]
    argv += ["--ctx", "32", "--batch", "2", "--threads", "1"]
    subprocess.run(argv, cwd=folder, check=True, capture_output=True, timeout=LONG_S)
    return folder / "a.bin"


def test_the_loss_falls_and_the_curve_has_every_step(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained.ggla.parent / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
    assert {line["learned_tokens"] for line in lines} == {4 * 32}
    assert trained.outcome.tokens_per_second > 0
    assert trained.outcome.trained_parameters == 4 * 4 * 4 * (256 + 256)


def test_the_trainer_s_own_rates_are_those_of_the_curve(trained: Trained) -> None:
    """It prints the share of the rate that the next step will have."""
    told = (trained.ggla.parent / "log").read_text()
    shares = [float(share) for share in re.findall(r"iter=.*?\bsched=(\S+)", told)][:STEPS]
    lines = [json.loads(line) for line in (trained.ggla.parent / METRICS).read_text().splitlines()]
    np.testing.assert_allclose([line["learning_rate"] / 0.01 for line in lines], shares, atol=1e-6)


def test_only_what_was_asked_for_has_learned(trained: Trained) -> None:
    moved = {a.name for a, b in ggla.read_adapter(trained.ggla).pairs() if a.values.any() or b.values.any()}
    asked = ("attn_k", "attn_output", "attn_q", "attn_v")
    assert moved == {f"blk.{layer}.{name}.weight.loraA" for layer in range(4) for name in asked}


def test_a_finished_training_starts_no_process(
    trained: Trained, demo_mha: Mapping[str, Path], texts: tuple[Path, Path], trainer: Toolchain
) -> None:
    log = trained.ggla.parent / "log"
    before = log.read_bytes()
    recipe = recipe_of(adapter={"rank": 4, "targets": "attention"})
    again = train(recipe, demo_mha["Q8_0"], texts[0], log.parent, trainer, steps=STEPS, n_threads=1, log=log)
    assert again == trained
    assert log.read_bytes() == before


def test_unseen_text_is_known_better_in_today_s_runtime(
    trained: Trained, demo_mha: Mapping[str, Path], texts: tuple[Path, Path], toolchain: Toolchain, tmp_path: Path
) -> None:
    convert(trained.ggla, demo_mha["Q8_0"], tmp_path / "a.gguf")
    before, after = (
        perplexity(demo_mha["Q8_0"], texts[1], n_ctx=64, toolchain=toolchain, log=tmp_path / "log", adapter=adapter)
        for adapter in (None, tmp_path / "a.gguf")
    )
    assert after.value < 0.75 * before.value


def mean_kld(base: Path, old: Path, new: Path, trainer: Toolchain, toolchain: Toolchain, folder: Path) -> float:
    """Of today's runtime with ``new`` from that of 2023 with ``old``, nats a token.

    The file between the two has 16 bits for a token of the vocabulary, which shows as about 1e-6.
    """
    text = folder / "docs.txt"
    text.write_text(python_docs("heldout")[:12000])
    common = f"-m {base} -f {text} -c 128 -b 128 --chunks 12 -t 1 --kl-divergence-base {folder / 'old.logits'}".split()
    written = (str(trainer.tool("perplexity")), *common, "--lora", str(old), "--lora-base", str(base), "--log-disable")
    read = (str(toolchain.tool("perplexity")), *common, "--lora", str(new), "--kl-divergence")
    for argv, wanted in ((written, r"PPL = (\S+)"), (read, r"Mean\s+KLD:\s*(\S+)")):
        told = ask(argv, re.compile(wanted), label="x", log=folder / "log", on_progress=lambda *_: None)
    found = re.search(r"Mean\s+KLD:\s*(\S+)", told)
    assert found
    return float(found[1])


def test_old_and_new_runtime_compute_the_same(
    trained: Trained, demo_mha: Mapping[str, Path], trainer: Toolchain, toolchain: Toolchain, tmp_path: Path
) -> None:
    """At full precision, where the old runtime, which adds the adapter to the weights, loses nothing by it."""
    base = demo_mha["F32"]
    convert(trained.ggla, base, tmp_path / "a.gguf")
    assert abs(mean_kld(base, trained.ggla, tmp_path / "a.gguf", trainer, toolchain, tmp_path)) < 5e-6


def test_on_a_quantized_base_only_the_old_runtime_s_rounding_is_between_them(
    trained: Trained, demo_mha: Mapping[str, Path], trainer: Toolchain, toolchain: Toolchain, tmp_path: Path
) -> None:
    """It quantizes the sum again; Q8_0 makes little of that."""
    base = demo_mha["Q8_0"]
    convert(trained.ggla, base, tmp_path / "a.gguf")
    assert abs(mean_kld(base, trained.ggla, tmp_path / "a.gguf", trainer, toolchain, tmp_path)) < 5e-4


def test_the_bridge_says_what_the_merge_of_2023_does(
    foreign: Path, demo_mha: Mapping[str, Path], trainer: Toolchain, tmp_path: Path
) -> None:
    """``export-lora`` adds the old file to the base: every tensor, norms and embedding too, in the ranks they have."""
    base, merged = demo_mha["F32"], tmp_path / "merged.gguf"
    argv = [str(part) for part in (trainer.tool("export-lora"), "-m", base, "-l", foreign, "-o", merged, "-t", 1)]
    subprocess.run(argv, check=True, capture_output=True, timeout=LONG_S)
    report = convert(foreign, base, tmp_path / "a.gguf")
    adapter = read_adapter(tmp_path / "a.gguf")
    before, after = tensors(base), tensors(merged)
    assert {*report.pairs, *report.norms} == {*before}
    assert len(report.norms) == 9
    assert len(report.rescaled) == 9
    for name, weight in before.items():
        added = delta(adapter, name)
        assert np.abs(added).max() > 0
        np.testing.assert_allclose(weight + added, after[name], atol=2e-6)


def test_norms_that_the_runtime_leaves_out_are_all_that_is_missing(
    foreign: Path, demo_mha: Mapping[str, Path], trainer: Toolchain, toolchain: Toolchain, tmp_path: Path
) -> None:
    """The distance between the runtimes is that of the norms, and goes with them."""
    base = demo_mha["F32"]
    convert(foreign, base, tmp_path / "whole.gguf")
    without = tmp_path / "without.bin"
    without.write_bytes(with_still_norms(foreign))
    distance = mean_kld(base, foreign, tmp_path / "whole.gguf", trainer, toolchain, tmp_path)
    same = mean_kld(base, without, tmp_path / "whole.gguf", trainer, toolchain, tmp_path)
    assert abs(same) < 1e-5
    assert distance > 10 * abs(same)


def with_still_norms(path: Path) -> bytes:
    """The file with zeros in the pairs of its norms."""
    data = bytearray(path.read_bytes())
    for tensor in ggla.read_adapter(path).tensors:
        if "_norm." in tensor.name:
            size = 4 * int(np.prod(tensor.shape))
            data[tensor.offset : tensor.offset + size] = bytes(size)
    return bytes(data)


def tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """All of an F32 model, rows first."""
    header = read_header(path)
    raw = path.read_bytes()
    found = {}
    for tensor in header.tensors:
        assert tensor.type == "F32"
        start = header.data_offset + tensor.offset
        found[tensor.name] = np.frombuffer(raw, np.float32, tensor.n_elements, start).reshape(tensor.shape[::-1])
    return found


def delta(adapter: AdapterModel, name: str) -> NDArray[np.float32]:
    if name in adapter.norms:
        return adapter.norms[name]
    pair = adapter.pairs[name]
    return np.asarray(adapter.factor(name) * (pair.b @ pair.a), dtype=np.float32)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the trainer is proven with: 434 KB, milliseconds a step."""
    path = tmp_path_factory.mktemp("tiny") / "base.gguf"
    subprocess.run([sys.executable, Path(legacy.__file__).with_name("trainer_model.py"), path], check=True)
    return path


def test_a_text_of_less_than_a_row_is_refused(tiny_base: Path, trainer: Toolchain, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(UsageError, match=r"has 10 tokens, and a row has 64 \(train\.n_ctx\)"):
        run_tiny(tiny_base, trainer, tmp_path, n_ctx=64)


def test_a_training_that_goes_astray_is_told(tiny_base: Path, trainer: Toolchain, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(legacy.TEXT)
    with pytest.raises(ArtifactError, match="has gone astray"):
        run_tiny(tiny_base, trainer, tmp_path, n_ctx=32, learning_rate=1e30)


def run_tiny(base: Path, trainer: Toolchain, folder: Path, **options: Any) -> Trained:
    recipe = recipe_of(adapter={"rank": 2}, train={"batch": 2, "warmup": 0.0, **options})
    text, run_dir = folder / "text.txt", folder / "run"
    made = train(recipe, base, text, run_dir, trainer, steps=6, n_threads=1, log=folder / "log")
    assert made.ggla == run_dir / ADAPTER_FILE
    return made

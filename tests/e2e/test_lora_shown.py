"""What `inv lora` is for: a quantized model learns a new domain, and knows it wherever the result is loaded.

The demo model has read Python's documentation. What it learns here is Python's source code, other modules of which are
held out; perplexity on them is computed by llama-perplexity, as `inv lora` tells it, and by the runtime itself.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.engine import Engine
from runtime.engine.sampling import SamplingOptions
from runtime.interrupts import Interrupt
from runtime.prepare import Request, load_engine, prepare
from tests.front_door import inv_json
from tests.generated_models import Family, write_model
from toolchain.build.toolchain import Toolchain
from toolchain.lora.builtin import python_source

FALL = 0.75
"""A perplexity that is at most this share of what it was has fallen by at least 25 %."""
WINDOW, WINDOWS = 128, 24
"""Tokens of a window, the second half of which is judged, and how many of them."""
SENTENCE = "The quick brown fox jumps over the lazy dog while the band plays on. "


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A training by `inv lora`, what it told, and the text that it never saw."""

    recipe: Path
    told: dict[str, Any]
    held: Path
    env: dict[str, str]

    @property
    def base(self) -> Path:
        return Path(self.told["base"])

    @property
    def adapter(self) -> Path:
        return Path(self.told["adapter"])


def runtime_perplexity(model: Path, text: str, adapter: Path | None = None) -> float:
    """As the runtime computes it: made to draw the text's own tokens, it tells their probabilities.

    The windows are llama-perplexity's: each begins with a BOS in place of its first token.
    """
    lora = (str(adapter),) if adapter else ()
    request = Request(model=str(model), lora=lora, tune=False, flags={"n_ctx": 2 * WINDOW})
    logprobs: list[float] = []
    with load_engine(prepare(request), request, Interrupt()) as engine:
        tokens = engine.tokenize(text)
        for first in range(0, min(len(tokens), WINDOW * WINDOWS) - WINDOW + 1, WINDOW):
            window = [tokens[0], *tokens[first + 1 : first + WINDOW]]
            logprobs += forced(engine, window[: WINDOW // 2 + 1], window[WINDOW // 2 + 1 :])
    assert logprobs
    return math.exp(-sum(logprobs) / len(logprobs))


def forced(engine: Engine, prompt: list[int], following: list[int]) -> Iterator[float]:
    """The log-probability of each token of ``following`` behind those before it."""
    wanted = iter(following)

    def only_the_next(logits: NDArray[np.float32]) -> None:
        logits[np.arange(len(logits)) != next(wanted)] = -np.inf

    greedy = SamplingOptions(temp=0)
    stream = engine.stream(prompt, greedy, max_tokens=len(following), top_logprobs=0, adjust=only_the_next)
    drawn = [chunk.token for chunk in stream if chunk.token]
    assert [each.token for each in drawn] == following
    return (each.logprob for each in drawn)


def train(folder: Path, recipe: dict[str, Any], held: Path) -> Shown:
    """`inv lora` on ``recipe``, anew; JSON is YAML."""
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(json.dumps(recipe))
    env = {"FOUNDRY_MODELS": str(folder / "models")}
    return Shown(recipe=path, told=inv_json("lora", path, "--fresh", env=env), held=held, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def new_domain(folder: Path) -> dict[str, Any]:
    """The ``data`` of a recipe: source code to learn, and source code of other modules."""
    text = python_source()
    (folder / "source.txt").write_text(text[: len(text) * 4 // 5])
    (folder / "held.txt").write_text(text[len(text) * 4 // 5 :][:30_000])
    return {"sources": [{"text": "source.txt"}], "held_out_file": {"text": "held.txt"}}


@pytest.fixture(scope="module")
def by_torch(folder: Path, new_domain: dict[str, Any], demo_gguf: Path) -> Shown:
    recipe = {
        "name": "by-torch",
        "base": {"gguf": str(demo_gguf)},
        "data": new_domain,
        "adapter": {"rank": 16},
        "train": {"n_ctx": 128, "batch": 8, "steps": 20, "learning_rate": 3e-3},
        "evaluate": {"n_ctx": WINDOW, "chunks": WINDOWS, "prompts": ["def "], "reply_tokens": 24},
    }
    return train(folder, recipe, folder / "held.txt")


@pytest.fixture(scope="module")
def by_ggml(folder: Path, new_domain: dict[str, Any], toolchain: Toolchain) -> Shown:
    """On a base with as many KV heads as heads, which the trainer of 2023 wants."""
    inv_json("build", "--legacy-finetune")
    (folder / "mha.yaml").write_text("name: mha\nmodel: {demo: tiny-mha}\nquantize: [Q8_0]\n")
    recipe = {
        "name": "by-ggml",
        "engine": "ggml",
        "base": {"recipe": "mha.yaml"},
        "data": new_domain,
        "adapter": {"rank": 16, "targets": "attention"},
        "train": {"n_ctx": 64, "batch": 4, "steps": 40, "learning_rate": 5e-3},
        "evaluate": {"n_ctx": WINDOW, "chunks": WINDOWS},
    }
    return train(folder, recipe, folder / "held.txt")


@pytest.fixture(params=["by_torch", "by_ggml"])
def shown(request: pytest.FixtureRequest) -> Shown:
    found: Shown = request.getfixturevalue(request.param)
    return found


def test_perplexity_on_a_new_domain_falls_by_a_quarter_as_told(shown: Shown) -> None:
    assert shown.told["perplexity_after"] <= FALL * shown.told["perplexity_before"]
    assert shown.adapter.is_file()


def test_it_falls_by_a_quarter_in_the_runtime_through_the_adapter_and_through_the_merged_file(shown: Shown) -> None:
    held = shown.held.read_text()
    merged = inv_json("merge", shown.recipe, env=shown.env)
    before = runtime_perplexity(shown.base, held)
    applied = runtime_perplexity(shown.base, held, shown.adapter)
    within = runtime_perplexity(Path(merged["path"]), held)
    print(f"perplexity {before:.1f}, with the adapter {applied:.1f}, merged {within:.1f}; told: {shown.told}")
    assert applied <= FALL * before
    assert within <= FALL * before
    assert abs(math.log(within / applied)) < 0.05  # merging costs a quantization, and nothing else


def test_the_runtime_and_llama_perplexity_find_the_same_figures(by_torch: Shown) -> None:
    """Over the same windows; a batch of tokens is summed in another order than one after the other."""
    held = by_torch.held.read_text()
    for told, adapter in (("perplexity_before", None), ("perplexity_after", by_torch.adapter)):
        assert runtime_perplexity(by_torch.base, held, adapter) == pytest.approx(by_torch.told[told], rel=0.01)


def test_replies_stand_side_by_side(by_torch: Shown) -> None:
    text = Path(by_torch.told["files"]["replies"]).read_text()
    before, after = text.partition("Before:")[2].split("After:")
    assert before.strip() != after.strip()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_small_bases_of_other_architectures_learn_a_sentence(
    family: Family, toolchain: Toolchain, folder: Path
) -> None:
    """Random weights, quantized: they know nothing, and with the adapter the runtime knows the sentence."""
    full = write_model(folder / f"{family}-f16.gguf", family, type="f16", random=True, n_layer=2, n_ctx_train=512)
    base = folder / f"{family}.gguf"
    subprocess.run([toolchain.tool("quantize"), full, base, "Q8_0"], check=True, capture_output=True)
    (folder / "sentence.txt").write_text(SENTENCE * 60)
    recipe = {
        "name": f"learns-{family}",
        "base": {"gguf": str(base)},
        "data": {"sources": [{"text": "sentence.txt"}]},
        "adapter": {"rank": 16},
        "train": {"n_ctx": 64, "batch": 4, "steps": 30, "learning_rate": 1e-2},
        "evaluate": {"n_ctx": 64, "chunks": 4},
    }
    shown = train(folder, recipe, folder / "sentence.txt")
    curve = [json.loads(line)["loss"] for line in Path(shown.told["files"]["metrics"]).read_text().splitlines()]
    assert curve[-1] < curve[0] - 1
    before, after = (runtime_perplexity(base, SENTENCE * 20, adapter) for adapter in (None, shown.adapter))
    print(f"{family}: loss {curve[0]:.2f} to {curve[-1]:.2f}, perplexity {before:.1f} to {after:.1f}")
    assert after < before / 2

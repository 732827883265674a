"""Prompt-lookup speculation against plain decoding: on text that repeats, on prose, and where drafts go wrong.

    .venv/bin/python tests/benchmarks/speculation.py models/demo/demo-Q4_K_M.gguf --rounds 7
    .venv/bin/python tests/benchmarks/speculation.py --generate 100 --rounds 5

``copy``: the prompt holds a passage of 160 tokens, and the reply is that passage again, as when a document is edited
or quoted. No model this small copies by itself, so the tokens are forced through the logits (``adjust``), the same
way in both runs: what is measured is the speed of a reply that repeats, not a model's skill. ``prose``: the model's
own text at temperature 0.8, over several seeds. ``loop``: the model's own greedy text, which tends to repeat itself.
Figures are tokens per second after the prompt; pairs are interleaved. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from runtime.engine import Engine
from runtime.engine.sampling import SamplingOptions
from tests.benchmarks.engine_overhead import generated
from tests.benchmarks.loaded import answer, engine_on, interleaved, medians, ratio

PASSAGE = 160
PROMPT = "The import statement"
SEEDS = (1, 2, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare replies with lookup speculation and without.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--generate", type=int, metavar="M", help="millions of parameters of a random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a prose reply")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = generated(Path(folder), asked.generate) if asked.generate else asked.model
        return measure(model, asked)


def measure(model: Path, asked: argparse.Namespace) -> int:
    engine = engine_on(model, n_ctx=2048)
    tasks = {
        "copy": lambda lookup: copied(engine, lookup),
        "prose": lambda lookup: written(engine, lookup, asked.tokens, [SamplingOptions(seed=n) for n in SEEDS]),
        "loop": lambda lookup: written(engine, lookup, asked.tokens, [SamplingOptions(temp=0)]),
    }
    found = interleaved(
        {
            f"{task}_{name}": lambda run=run, lookup=lookup: run(lookup)
            for task, run in tasks.items()
            for name, lookup in (("plain", False), ("lookup", True))
        },
        asked.rounds,
    )
    return answer(
        {
            "model": model.name,
            "tokens_per_second": medians(found),
            **{f"{task}_speedup": ratio(found, f"{task}_lookup", f"{task}_plain") for task in tasks},
        }
    )


def copied(engine: Engine, lookup: bool) -> float:
    """A passage without repetitions in itself, and then that passage again as the reply."""
    passage = np.random.default_rng(0).permutation(np.arange(300, 300 + 2 * PASSAGE))[:PASSAGE].tolist()
    n_vocab = engine.model.n_vocab
    assert n_vocab > 300 + 2 * PASSAGE
    expected = iter(())

    def force(logits: Any) -> None:
        """The next token of the passage is certain, whichever row of whichever batch this is."""
        logits[next(expected)] = 1000

    expected = iter(passage)
    chunks = list(engine.stream(passage, SamplingOptions(temp=0), max_tokens=len(passage), lookup=lookup, adjust=force))
    stats = chunks[-1].stats
    assert stats is not None
    assert stats.completion_tokens == len(passage)
    return stats.generation_tps


def written(engine: Engine, lookup: bool, tokens: int, ways: list[SamplingOptions]) -> float:
    """The model's own text, all its replies together."""
    steps, seconds = 0, 0.0
    for sampling in ways:
        chunks = list(engine.stream(engine.tokenize(PROMPT), sampling, max_tokens=tokens, lookup=lookup))
        stats = chunks[-1].stats
        assert stats is not None
        steps, seconds = steps + stats.generation_steps, seconds + stats.generation_seconds
    return steps / seconds


if __name__ == "__main__":
    sys.exit(main())

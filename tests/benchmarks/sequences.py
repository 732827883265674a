"""Replies decoded together against one alone: tokens per second of all, for 2, 4 and 8 of them.

    .venv/bin/python tests/benchmarks/sequences.py models/demo/demo-Q4_K_M.gguf --rounds 5
    .venv/bin/python tests/benchmarks/sequences.py --generate 100 --rounds 5

Each reply has a prompt of its own behind a common beginning, and a seed of its own. ``roof`` is llama-batched-bench,
which decodes as many sequences in C, without drawing or text: what the machine gains by a batch at all. Figures count
the tokens of the replies over the time from the first to the last of them. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.engine import Engine
from runtime.engine.sampling import SamplingOptions
from tests.benchmarks.engine_overhead import generated, prompt_of
from tests.benchmarks.loaded import THREADS, answer, engine_on, interleaved, medians, ratio, toolchain_folder

COUNTS = (2, 4, 8)
SHARED, OWN = 32, 8


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare replies decoded together with one alone.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--generate", type=int, metavar="M", help="millions of parameters of a random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each reply")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = generated(Path(folder), asked.generate) if asked.generate else asked.model
        engine = engine_on(model, n_ctx=max(COUNTS) * (SHARED + OWN + asked.tokens), sequences=max(COUNTS))
        found = interleaved(
            {
                "alone": lambda: together(engine, 1, asked.tokens),
                **{f"of_{n}": lambda n=n: together(engine, n, asked.tokens) for n in COUNTS},
                **{f"roof_{n}": lambda n=n: roof(model, n, asked.tokens) for n in (1, *COUNTS)},
            },
            asked.rounds,
        )
    return answer(
        {
            "model": model.name,
            "tokens_per_second": medians(found),
            "gain": {str(n): ratio(found, f"of_{n}", "alone") for n in COUNTS},
            "roof_gain": {str(n): ratio(found, f"roof_{n}", "roof_1") for n in COUNTS},
        }
    )


def together(engine: Engine, count: int, tokens: int) -> float:
    """Tokens per second from the first token to the last, all replies together; one alone goes by ``stream``."""
    prompts = [[*prompt_of(SHARED), *(400 + 8 * n + each for each in range(OWN))] for n in range(count)]
    ways = [SamplingOptions(seed=n + 1) for n in range(count)]
    if count == 1:
        chunks = ((0, chunk) for chunk in engine.stream(prompts[0], ways[0], max_tokens=tokens))
    else:
        chunks = engine.stream_many(prompts, ways, max_tokens=tokens)
    first, total = 0.0, 0
    for _, chunk in chunks:
        first = first or time.perf_counter()
        if chunk.stats:
            total += chunk.stats.generation_steps
    return total / (time.perf_counter() - first)


def roof(model: Path, count: int, tokens: int) -> float:
    program = toolchain_folder() / "bin" / "llama-batched-bench"
    sizes = ["-npp", str(SHARED + OWN), "-ntg", str(tokens), "-npl", str(count), "-c", "4096", "-kvu"]
    argv = [program, "-m", model, *sizes, "-t", str(THREADS), "--output-format", "jsonl"]
    while True:  # its logger does not wait for the last lines to be written
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        if lines := [line for line in done.stdout.splitlines() if line.startswith("{") and line.endswith("}")]:
            return float(json.loads(lines[-1])["speed_tg"])


if __name__ == "__main__":
    sys.exit(main())

"""Time per token of the engine on top of the same loop in C, and beside llama-bench and llama-cpp-python.

    .venv/bin/python tests/benchmarks/engine_overhead.py models/demo/demo-Q4_K_M.gguf --rounds 7
    .venv/bin/python tests/benchmarks/engine_overhead.py --generate 100 --rounds 5

All on the same library, in turns: ``bare`` is bare_loop.c (draw, end test, piece, decode), ``collected`` is
``Engine.stream`` joined at the end, ``streamed`` is the same with each chunk written as ``runtime complete`` does,
into a pipe that ``cat`` reads, ``greedy`` draws the likeliest, ``llama_bench`` only decodes, ``create_completion`` is
llama-cpp-python's own, in a process of its own: two models in one process share OpenMP's threads and slow each
other. Figures are tokens per second after the prompt. Then the cost of a token behind 2,000 others
over that behind 256. ``--generate M`` makes a model of about M million random parameters (Q4_K_M) instead. Nothing
else should run on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.engine import Engine
from runtime.engine.sampling import SamplingOptions
from runtime.engine.shown import Shown
from tests.benchmarks.loaded import (
    THREADS,
    answer,
    bare_loop,
    engine_on,
    interleaved,
    llama_bench,
    medians,
    ratio,
    steady,
    toolchain_folder,
)

DEPTHS = (256, 2000)
SAMPLING = SamplingOptions(seed=1)
GREEDY = SamplingOptions(temp=0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the engine's loop with the same loop in C.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--generate", type=int, metavar="M", help="millions of parameters of a random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = generated(Path(folder), asked.generate) if asked.generate else asked.model
        return measure(model, asked)


def measure(model: Path, asked: argparse.Namespace) -> int:
    n, prompt = asked.tokens, prompt_of(asked.prompt)
    engine = engine_on(model, n_ctx=max(DEPTHS) + n + 64)
    peer = multiprocessing.get_context("spawn").Pool(1, load_peer, (model, max(DEPTHS) + n + 64))
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert reader.stdin is not None
    sink = reader.stdin
    speeds = interleaved(
        {
            "bare": lambda: bare_loop(model, n_prompt=len(prompt), n_tokens=n),
            "collected": lambda: steady(lambda: ours(engine, prompt, n)),
            "streamed": lambda: steady(lambda: ours(engine, prompt, n, sink)),
            "greedy": lambda: steady(lambda: ours(engine, prompt, n, sampling=GREEDY)),
            "llama_bench": lambda: llama_bench(model, n_tokens=n),
            "create_completion": lambda: peer.apply(steady_peer, (prompt, n)),
        },
        asked.rounds,
    )
    peer.terminate()
    sink.close()
    reader.wait()
    costs = interleaved(
        {
            **{
                f"ours_{depth}": lambda depth=depth: 1e6 / steady(lambda: ours(engine, prompt_of(depth), 64))
                for depth in DEPTHS
            },
            **{f"bench_{d}": lambda d=d: 1e6 / llama_bench(model, n_tokens=64, depth=d) for d in DEPTHS},
        },
        asked.rounds,
    )
    over = [1e6 / a - 1e6 / b for a, b in zip(speeds["collected"], speeds["bare"], strict=True)]
    theirs_over = [1e6 / a - 1e6 / b for a, b in zip(speeds["create_completion"], speeds["bare"], strict=True)]
    deeper = {who: ratio(costs, f"{who}_{DEPTHS[1]}", f"{who}_{DEPTHS[0]}") for who in ("ours", "bench")}
    return answer(
        {
            "model": model.name,
            "threads": THREADS,
            "tokens": n,
            "tokens_per_second": medians(speeds),
            "overhead_us_per_token": round(sorted(over)[len(over) // 2], 1),
            "create_completion_overhead_us_per_token": round(sorted(theirs_over)[len(over) // 2], 1),
            "of_llama_bench": ratio(speeds, "collected", "llama_bench"),
            "greedy_of_llama_bench": ratio(speeds, "greedy", "llama_bench"),
            "bare_of_llama_bench": ratio(speeds, "bare", "llama_bench"),
            "streamed_of_collected": ratio(speeds, "streamed", "collected"),
            "us_per_token_at_depth": medians(costs),
            "cost_2000_over_256": deeper,
            "beyond_llama_bench": round(deeper["ours"] / deeper["bench"], 4),
        }
    )


def prompt_of(length: int) -> list[int]:
    """The prompt of bare_loop.c."""
    return [100 + i * 7 % 200 for i in range(length)]


def ours(engine: Engine, prompt: list[int], n: int, sink: Any = None, sampling: SamplingOptions = SAMPLING) -> float:
    pieces: list[str] = []
    shown = Shown(sink) if sink else None
    for chunk in engine.stream(prompt, sampling, max_tokens=n):
        if shown:
            shown.write(chunk.text)
        else:
            pieces.append(chunk.text)
        stats = chunk.stats
    assert stats is not None
    whole = stats.completion_tokens == n or sampling is GREEDY
    assert whole, "the model ended its reply early: choose another prompt length"
    return stats.generation_tps


_peer: list[Any] = []


def load_peer(model: Path, n_ctx: int) -> None:
    """llama-cpp-python's model in its own process."""
    import llama_cpp

    _peer.append(llama_cpp.Llama(str(model), n_ctx=n_ctx, n_threads=THREADS, n_threads_batch=THREADS, verbose=False))


def steady_peer(prompt: list[int], n: int) -> float:
    return steady(lambda: theirs(prompt, n))


def theirs(prompt: list[int], n: int) -> float:
    """Its prompt is in its cache but for the last token, whose decode counts as one more."""
    peer = _peer[0]
    peer.eval(prompt[:1])
    started = time.perf_counter()
    done = peer.create_completion(
        prompt, max_tokens=n, temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.0, seed=1
    )
    seconds = time.perf_counter() - started
    return float(done["usage"]["completion_tokens"] / seconds)


def generated(folder: Path, millions: int) -> Path:
    """A Llama of random weights with 32,000 tokens, its layers chosen for about so many million parameters."""
    from tests.generated_models import write_model

    width = 768
    layers = max(1, round((millions * 1e6 - 2 * 32_000 * width) / (2.5 * width * width + 3 * width * 4 * width)))
    extents = {"n_layer": layers, "n_embd": width, "n_vocab": 32_000, "n_head": 12, "n_head_kv": 3, "n_ff": 4 * width}
    full = write_model(folder / "full.gguf", "llama", type="f16", random=True, **extents)
    small = folder / f"random-{millions}M-Q4_K_M.gguf"
    program = toolchain_folder() / "bin" / "llama-quantize"
    subprocess.run([program, full, small, "Q4_K_M", str(os.cpu_count())], check=True, capture_output=True)
    full.unlink()
    return small


if __name__ == "__main__":
    sys.exit(main())

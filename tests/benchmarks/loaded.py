"""What the engine's benchmarks share: an engine on a file, the toolchain's programs, interleaved runs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runtime.engine import Engine, load  # noqa: E402
from runtime.settings import settle  # noqa: E402
from toolchain.base import machine  # noqa: E402
from toolchain.build.toolchain import current  # noqa: E402

RUNS = 3
"""Runs in a row of each program in each round, of which the median counts."""

THREADS = machine.probe().compute_threads


def engine_on(model: Path, *, n_ctx: int, sequences: int = 1) -> Engine:
    """The model in memory on all cores; the context may be longer than it was trained with."""
    flags: dict[str, int | str] = {"n_ctx": n_ctx, "n_threads": THREADS, "n_threads_batch": THREADS}
    settings = settle(machine=machine.probe(), n_ctx_train=None, flags=flags)
    return load(model, settings, sequences=sequences)


def toolchain_folder() -> Path:
    """The current build: its ``bin``, ``lib`` and ``include``."""
    toolchain = current()
    assert toolchain is not None, "run `./inv build`"
    return Path(os.path.realpath(toolchain.bin_dir)).parent


def bare_loop(model: Path, *, n_prompt: int, n_tokens: int, runs: int = RUNS, temp: float = 0.8) -> float:
    """Tokens per second of ``bare_loop.c``, compiled here on first use; the median of ``runs``."""
    program = _compiled()
    argv = [program, model, str(n_prompt), str(n_tokens), str(runs), str(THREADS), str(temp)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return statistics.median(float(line.split()[0]) for line in done.stdout.splitlines())


def llama_bench(model: Path, *, n_tokens: int, depth: int = 0) -> float:
    """Tokens per second of llama-bench: decodes alone, without drawing and without text."""
    program = toolchain_folder() / "bin" / "llama-bench"
    argv = [program, "-m", model, "-p", "0", "-n", str(n_tokens), "-d", str(depth), "-t", str(THREADS), "-r", str(RUNS)]
    done = subprocess.run([*argv, "-o", "json"], check=True, capture_output=True, text=True)
    return statistics.median(map(float, json.loads(done.stdout)[0]["samples_ts"]))


def steady(run: Callable[[], float], times: int = RUNS) -> float:
    """Median of some runs in a row: the first one finds the caches and clocks as another program left them."""
    return statistics.median(run() for _ in range(times))


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each run gave in each round; the order within a round turns, and round 0 warms up and is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            figure = runs[name]()
            if number:
                found[name].append(figure)
        print(f"round {number}: " + ", ".join(f"{n} {v[-1]:.4g}" for n, v in found.items() if v), file=sys.stderr)
    return found


def ratio(found: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds of one figure over another of the same round."""
    return round(statistics.median(a / b for a, b in zip(found[above], found[below], strict=True)), 4)


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def answer(figures: Mapping[str, Any]) -> int:
    """The last line of a benchmark."""
    print(json.dumps(figures))
    return 0


_program: list[Path] = []


def _compiled() -> Path:
    if not _program:
        folder, source = toolchain_folder(), Path(__file__).with_name("bare_loop.c")
        program = Path(tempfile.mkdtemp()) / "bare_loop"
        libraries = ["-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{folder / 'lib'}"]
        argv = ["cc", "-O2", f"-I{folder / 'include'}", source, "-o", program, f"-L{folder / 'lib'}", *libraries]
        subprocess.run(argv, check=True)
        _program.append(program)
    return _program[0]

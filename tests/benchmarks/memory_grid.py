"""The memory arithmetic against the library, as a Markdown table for docs/performance.md; the last line is JSON.

    .venv/bin/python -m tests.benchmarks.memory_grid

Generated models x context x micro-batch x cache type x rows of logits, on the host; computed over actual bytes, and the
time that one footprint takes.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from runtime.memory.footprint import Demand, Placement, footprint
from tests.build.ask_child import ask_in_child
from tests.generated_models import FAMILIES, write_header
from toolchain.base.gguf import read_header

GRID = [
    Demand(n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=kind, type_v=kind, n_outputs_max=rows)
    for n_ctx, n_ubatch, kind, rows in itertools.product((512, 4096, 32768), (64, 512), ("f16", "q8_0", "q4_0"), (1, 0))
]
ON_HOST = Placement(n_gpu_layers=0)


def main() -> None:
    print("| model | points | weights | cache | compute, least | compute, most | exact to the byte | ms, median |")
    print("|---|---|---|---|---|---|---|---|")
    ratios, exact, times = list[float](), 0, list[float]()
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            path = write_header(Path(folder) / "model.gguf", family, n_layer=16, n_vocab=32000)
            header = read_header(path)
            asked = ask_in_child(path, [(demand, ON_HOST) for demand in GRID])
        found, spent, same = [], [], 0
        for demand, [(weights, kv, compute)] in zip(GRID, asked, strict=True):
            began = time.perf_counter()
            ours = footprint(header, demand, ON_HOST, 0)[0]
            spent.append(1000 * (time.perf_counter() - began))
            found.append((ours.weights / weights, ours.kv / kv, ours.compute / compute))
            same += (ours.weights, ours.kv, ours.compute) == (weights, kv, compute)
        weight_ratios, kv_ratios, compute_ratios = zip(*found, strict=True)
        cells = [_span(weight_ratios), _span(kv_ratios), f"{min(compute_ratios):.3f}", f"{max(compute_ratios):.3f}"]
        print(f"| {family} | {len(GRID)} | {' | '.join(cells)} | {same} | {statistics.median(spent):.1f} |")
        ratios += compute_ratios
        times += spent
        exact += same
    print(
        json.dumps(
            {
                "points": len(ratios),
                "exact": exact,
                "compute_ratio_min": min(ratios),
                "compute_ratio_max": max(ratios),
                "footprint_ms_median": statistics.median(times),
                "footprint_ms_max": max(times),
            }
        )
    )


def _span(ratios: tuple[float, ...]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"


if __name__ == "__main__":
    main()

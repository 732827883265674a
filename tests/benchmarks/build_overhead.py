"""How much longer `inv build` takes than bare cmake with the same options: interleaved, whole processes.

    .venv/bin/python tests/benchmarks/build_overhead.py --pairs 2

Each pair compiles llama.cpp twice: once with `cmake` and `cmake --build` on an unpacked tree, once with
`inv build` into an empty FOUNDRY_HOME, which also fetches, unpacks, packages and proves. ccache is kept out of
both. The order within a pair alternates. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare inv build with bare cmake.")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="where to build (default: a temporary directory)")
    asked = parser.parse_args()
    rows: list[dict[str, tuple[float, float]]] = []
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        place = Path(scratch)
        source, options, jobs = resolved(place / "reference")
        for number in range(asked.pairs):
            runs = {
                "bare": lambda: bare(source, options, jobs, place / "bare"),
                "inv": lambda: ours(place / "home", jobs),
            }
            order = list(runs) if number % 2 == 0 else list(reversed(runs))
            rows.append({name: runs[name]() for name in order})
            print(f"pair {number + 1}: {rows[-1]}", file=sys.stderr, flush=True)
    wall = [row["inv"][0] / row["bare"][0] for row in rows]
    cpu = [row["inv"][1] / row["bare"][1] for row in rows]
    answer = {
        "pairs": asked.pairs,
        "bare_wall_s": statistics.median(row["bare"][0] for row in rows),
        "inv_wall_s": statistics.median(row["inv"][0] for row in rows),
        "wall_ratios": [round(x, 4) for x in wall],
        "wall_ratio_median": round(statistics.median(wall), 4),
        "cpu_ratio_median": round(statistics.median(cpu), 4),
    }
    print(json.dumps(answer, indent=2))
    return 0


def resolved(home: Path) -> tuple[Path, tuple[str, ...], int]:
    """The source, the cmake command line's options and the jobs that `inv build` would choose."""
    os.environ["FOUNDRY_HOME"] = str(home)
    from toolchain.build.compile import BuildRequest, configure

    configuration = configure(BuildRequest())
    compilers = (
        f"-DCMAKE_C_COMPILER={configuration.c.path}",
        f"-DCMAKE_CXX_COMPILER={configuration.cxx.path}",
        "-DGGML_CCACHE=OFF",
    )
    return configuration.tree.llama, (*configuration.options.argv(), *compilers), configuration.jobs.count


def bare(source: Path, options: Sequence[str], jobs: int, build: Path) -> tuple[float, float]:
    def run() -> None:
        subprocess.run(["cmake", "-G", "Ninja", "-S", source, "-B", build, *options], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", build, "--parallel", str(jobs)], check=True, capture_output=True)

    figures = timed(run)
    shutil.rmtree(build)
    return figures


def ours(home: Path, jobs: int) -> tuple[float, float]:
    argv = [sys.executable, "-m", "invoke", "build", "--no-use", "--jobs", str(jobs), "--define", "GGML_CCACHE=OFF"]
    environment = {**os.environ, "FOUNDRY_HOME": str(home)}
    figures = timed(lambda: subprocess.run(argv, cwd=ROOT, env=environment, check=True, capture_output=True))
    shutil.rmtree(home)
    return figures


def timed(run: object) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all children) of calling ``run``."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    assert callable(run)
    run()
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())

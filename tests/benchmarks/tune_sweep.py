"""How good the tuned threads are: their speed against the best of a full sweep, where CPUs are scarce and where not.

    .venv/bin/python tests/benchmarks/tune_sweep.py                    # the demo model and a 92M one made here
    .venv/bin/python tests/benchmarks/tune_sweep.py MODEL.gguf ...

In each place (one CPU by affinity, a quota of one CPU, of one and a half, all CPUs) a child tunes with an empty
FOUNDRY_HOME, and then measures every number of threads from 1 to twice the CPUs, interleaved, in bursts of its own. The
ratio is the tuned number's median over the best median; 0.95 is the goal. The quota is a real cgroup where one can be
made (root, and a cpu controller), else only told to the tuner, and the row says so. Nothing else should run meanwhile:
a place in which other work was seen is measured again, ``--tries`` times, and the quietest run counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "models" / "demo" / "demo-Q4_K_M.gguf"
PERIOD_US = 100_000
QUIET_CPUS = 0.2  # of other work, while tuning or sweeping
BURST_S = 0.6  # six periods of a quota
N_CTX, DEPTH = 512, 256


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the tuned threads with a full sweep.")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=5, help="bursts of each number of threads")
    parser.add_argument("--tries", type=int, default=3, help="runs of a place until one is quiet")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quota", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(tuned_and_swept(asked.models[0], asked.rounds, asked.quota)))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in asked.models or [DEMO, written_model(Path(scratch) / "random-92M-Q8_0.gguf")]:
            for place, affinity, quota in (
                ("one CPU (affinity)", 1, None),
                ("quota of 1 CPU", None, 1.0),
                ("quota of 1.5 CPUs", None, 1.5),
                ("all CPUs", None, None),
            ):
                with quota_group(quota) if quota else nullcontext() as group:
                    runs: list[dict[str, Any]] = []
                    while len(runs) < asked.tries and min((run["others"] for run in runs), default=1.0) > QUIET_CPUS:
                        runs.append(in_place(model, asked.rounds, affinity, quota, group))
                    figures = min(runs, key=lambda run: run["others"])
                told = quota is not None and group is None
                rows.append({"model": model.name, "place": place + (" (only told)" if told else ""), **figures})
                print(f"{model.name}, {rows[-1]['place']}: {figures}", file=sys.stderr, flush=True)
    print("| model | place | for | tuned | t/s | best of the sweep | ratio | tuned in | other work |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        for what in ("generation", "prompt"):
            at = row[what]
            print(
                f"| {row['model']} | {row['place']} | {what} | {at['tuned']} | {at['tuned_tps']:.0f} "
                f"| {at['best']} ({at['best_tps']:.0f}) | {at['ratio']:.3f} | {row['tune_s']:.1f} s "
                f"| {row['others']:.2f} CPUs |"
            )
    least = min(row[what]["ratio"] for row in rows for what in ("generation", "prompt"))
    print(json.dumps({"least_ratio": least, "rows": rows}))
    return 0


def in_place(model: Path, rounds: int, cpus: int | None, quota: float | None, group: Path | None) -> dict[str, Any]:
    """What a child measures on so many CPUs, or within the cgroup, or with the quota only told to it."""
    argv = [sys.executable, __file__, "--child", str(model), "--rounds", str(rounds)]
    if quota is not None and group is None:
        argv += ["--quota", str(quota)]

    def enter() -> None:
        if cpus is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "FOUNDRY_HOME": home}
        done = subprocess.run(argv, preexec_fn=enter, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


@contextmanager
def quota_group(quota: float) -> Iterator[Path | None]:
    """A cgroup of our own with that many CPUs' worth of time, version 1 or 2; None where none can be made."""
    top = Path("/sys/fs/cgroup")
    for place, limit in (
        (top / "cpu", {"cpu.cfs_period_us": PERIOD_US, "cpu.cfs_quota_us": round(quota * PERIOD_US)}),
        (top, {"cpu.max": f"{round(quota * PERIOD_US)} {PERIOD_US}"}),
    ):
        group = place / f"foundry-tune-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in limit.items():
                (group / name).write_text(str(value))  # a controller that is off has no such file
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def tuned_and_swept(path: Path, rounds: int, told_quota: float | None) -> dict[str, Any]:
    """Tune as ``python -m runtime tune`` does, then measure every number of threads."""
    from runtime.engine.load import load_model, make_context
    from runtime.model_file import open_model
    from runtime.settings import settle
    from runtime.tune.measure import measure
    from runtime.tune.neighbours import Neighbours
    from runtime.tune.threads import apply
    from toolchain.base.machine import probe

    here = probe()
    if told_quota is not None:
        here = replace(here, quota=told_quota)
    header = open_model(path)
    settings = apply(settle(machine=here, n_ctx_train=header.n_ctx_train), None, here)
    model = load_model(path, settings)
    began = time.perf_counter()
    tuning = measure(model, settings, here)
    tune_s = time.perf_counter() - began
    chosen = apply(settings, tuning, here)
    small = {"n_ctx": N_CTX, "n_batch": N_CTX, "n_ubatch": N_CTX}
    entries = tuple(replace(each, value=small.get(each.name, each.value)) for each in chosen.entries)
    context = make_context(model, replace(chosen, entries=entries))
    threads = range(1, 2 * here.cpus + 1)
    neighbours = Neighbours()
    swept = sweep(model.lib, context.handle, model.n_vocab, threads, rounds, waits=here.quota is not None)
    others = max(tuning.others, neighbours.cpus())
    answer: dict[str, Any] = {"tune_s": round(tune_s, 2), "others": round(others, 2), "settled": tuning.settled}
    for what, name in (("generation", "n_threads"), ("prompt", "n_threads_batch")):
        rates, mine = swept[what], chosen.number(name)
        best = max(rates, key=lambda count: rates[count])
        answer[what] = {
            "tuned": mine,
            "tuned_tps": round(rates[mine], 1),
            "best": best,
            "best_tps": round(rates[best], 1),
            "ratio": round(rates[mine] / rates[best], 4),
            "sweep": {count: round(rate, 1) for count, rate in rates.items()},
        }
    return answer


def sweep(
    lib: Any, handle: Any, n_vocab: int, threads: range, rounds: int, *, waits: bool
) -> dict[str, dict[int, float]]:
    """Median tokens/s of each number of threads, for generation behind 256 tokens and for prompts of 512."""
    memory = lib.llama_get_memory(handle)
    tokens = (ctypes.c_int32 * N_CTX)(*((7 + 31 * i) % n_vocab for i in range(N_CTX)))

    def decode(at: int, count: int) -> None:
        part = ctypes.cast(ctypes.addressof(tokens) + 4 * at, ctypes.POINTER(ctypes.c_int32))
        assert lib.llama_decode(handle, lib.llama_batch_get_one(part, count)) == 0
        lib.llama_synchronize(handle)

    def prompt() -> int:
        lib.llama_memory_clear(memory, False)
        decode(0, N_CTX)
        return N_CTX

    def generation() -> int:
        lib.llama_memory_seq_rm(memory, 0, DEPTH, -1)
        for at in range(DEPTH, DEPTH + 16):
            decode(at, 1)
        return 16

    rates: dict[str, dict[int, list[float]]] = {"prompt": {}, "generation": {}}
    for number in range(rounds):
        for count in threads if number % 2 == 0 else reversed(threads):
            lib.llama_set_n_threads(handle, count, count)
            rates["prompt"].setdefault(count, []).append(burst(prompt, waits))
            lib.llama_memory_clear(memory, False)
            decode(0, DEPTH)
            rates["generation"].setdefault(count, []).append(burst(generation, waits))
    return {what: {count: statistics.median(each) for count, each in of.items()} for what, of in rates.items()}


def burst(step: Callable[[], int], waits: bool) -> float:
    """Tokens/s of ``step`` for ``BURST_S``; ``waits`` lets a quota fill up before."""
    step()
    if waits:
        time.sleep(PERIOD_US / 1e6)
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < BURST_S:
        done += step()
    return done / elapsed


def written_model(path: Path, *, n_embd: int = 768, n_ff: int = 2048, n_layer: int = 12, n_head: int = 12) -> Path:
    """A Llama of 92M random weights in Q8_0 with the demo model's vocabulary."""
    import gguf
    import numpy as np

    from toolchain.base.gguf import read_header

    demo = read_header(DEMO)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_context_length(2048)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    vocabulary: dict[str, Any] = {name: demo.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores")}
    writer.add_token_list(list(vocabulary["tokens"]))
    writer.add_token_scores(list(vocabulary["scores"]))
    writer.add_token_types([int(kind) for kind in demo.metadata["tokenizer.ggml.token_type"]])  # type: ignore[union-attr]
    random, n_vocab = np.random.default_rng(1), len(vocabulary["tokens"])

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            return
        values = random.standard_normal(shape, np.float32) * np.float32(0.02)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd", n_vocab, n_embd)
    add("output", n_vocab, n_embd)
    add("output_norm", n_embd)
    for layer in range(n_layer):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", n_embd, n_embd)
        add(f"blk.{layer}.ffn_gate", n_ff, n_embd)
        add(f"blk.{layer}.ffn_up", n_ff, n_embd)
        add(f"blk.{layer}.ffn_down", n_embd, n_ff)
        add(f"blk.{layer}.attn_norm", n_embd)
        add(f"blk.{layer}.ffn_norm", n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    sys.exit(main())

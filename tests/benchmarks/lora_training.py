"""LoRA training on packed weights: memory, speed and gradients beside other ways to train the same adapter.

    .venv/bin/python tests/benchmarks/lora_training.py --rounds 5 --steps 6

A Llama of about 100 million random parameters, 32,000 tokens of vocabulary; rank 16 on all linear layers, 8 rows of 128
tokens a step, float32. Each run is a process of its own, in turns:

``packed``    our engine on the Q4_K_M base, ``packed_q8`` on the Q8_0 base with as many KV heads as heads
``unpacked``  our engine on the Q4_K_M base, unpacked while it is loaded; ``unpacked_f16`` the same on the F16 base
``plain``     transformers' from_pretrained(gguf_file=F16), peft, the model's own loss, AdamW
``packed_16`` and ``plain_16``: those two computing, and the latter keeping its base, in bfloat16
``ggml``      the trainer of 2023 on the Q8_0 base, by ``engine: ggml``

Memory is the most that was in use beyond what the process had after its imports. The first step of a run is not timed.
Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.loaded import THREADS, answer, interleaved, medians, ratio
from toolchain.base import console
from toolchain.base.gguf import read_header
from toolchain.build.toolchain import Toolchain, current
from toolchain.lora.data.prepare import DataRequest, Prepared, prepare_data
from toolchain.lora.data.records import DataFile
from toolchain.lora.engines import run_torch
from toolchain.lora.spec import TrainSpec
from toolchain.lora.targets import target_suffixes

RANK, ALPHA, RATE = 16, 32.0, 1e-4
WIDTH, VOCABULARY, HEADS = 768, 32_000, 12


@dataclass(frozen=True, kw_only=True)
class Bases:
    """Files of one size. ``q8`` has as many KV heads as heads, which the trainer of 2023 wants."""

    f16: Path
    q4: Path
    q8: Path


class Bench:
    """The runs, each of which gives tokens per second and leaves its memory in ``peaks``."""

    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        self.asked, self.folder = asked, folder
        self.toolchain = toolchain_of("llama")
        self.bases = bases(folder, asked.millions, self.toolchain)
        self.data = {base: self._data(base) for base in (self.bases.q4, self.bases.f16, self.bases.q8)}
        self.peaks: dict[str, list[int]] = {}
        self.weights: dict[str, int] = {}

    def spec(self, base: Path, *, packed: bool, dtype: Literal["float32", "bfloat16"] = "float32") -> TrainSpec:
        run_dir = self.folder / "run"
        run_dir.mkdir(exist_ok=True)
        return TrainSpec(
            base=(str(base),),
            dataset=str(self.data[base].dataset),
            run_dir=str(run_dir),
            lib_dir=str(self.toolchain.lib_dir),
            rank=RANK,
            alpha=ALPHA,
            dropout=0.0,
            targets=target_suffixes([read_header(base)], "all-linear"),
            rslora=False,
            dora=False,
            n_ctx=self.asked.n_ctx,
            rows=self.asked.rows,
            micro_rows=self.asked.micro_rows or self.asked.rows,
            steps=self.asked.steps + 1,
            learning_rate=RATE,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=1,
            checkpoint_steps=1000,
            gradient_checkpointing=self.asked.checkpointing,
            device="cpu",
            dtype=dtype,
            n_threads=THREADS,
            packed=packed,
            probe_steps=self.asked.steps + 1,
        )

    def ours(
        self, name: str, base: Path, *, packed: bool = True, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> float:
        spec = self.spec(base, packed=packed, dtype=dtype)
        done = run_torch(spec, processes=1, what=name, log=self.folder / "log", on_line=lambda _: None)
        self.peaks.setdefault(name, []).append(done.peak_bytes)
        self.weights[name] = done.weight_bytes
        return done.tokens_per_second

    def plain(self, name: str, dtype: Literal["float32", "bfloat16"]) -> float:
        done = self.child("plain", self.spec(self.bases.f16, packed=False, dtype=dtype))
        self.peaks.setdefault(name, []).append(int(done["peak_bytes"]))
        return float(done["tokens_per_second"])

    def ggml(self) -> float:
        from toolchain.lora.ggml_engine.train import train
        from toolchain.lora.recipe import LoraRecipe

        recipe = LoraRecipe.model_validate(
            {
                "name": "bench",
                "engine": "ggml",
                "base": {"gguf": str(self.bases.q8)},
                "data": {"sources": [{"text": "text.txt"}]},
                "adapter": {"rank": RANK},
                "train": {"n_ctx": self.asked.n_ctx, "batch": self.asked.rows, "learning_rate": RATE, "warmup": 0.0},
            }
        )
        text, log = self.data[self.bases.q8].train_text, self.folder / "log"
        means: dict[str, Any] = {"steps": self.asked.steps + 1, "n_threads": THREADS, "log": log}
        with tempfile.TemporaryDirectory(dir=self.folder) as run_dir:
            done = train(recipe, self.bases.q8, text, Path(run_dir), toolchain_of("trainer"), **means).outcome
        self.peaks.setdefault("ggml", []).append(done.peak_bytes)
        return done.tokens_per_second

    def gradients(self) -> float:
        """The largest difference of a gradient, packed from unpacked, over the largest value of that gradient."""
        return float(self.child("gradients", self.spec(self.bases.q4, packed=True))["largest_difference"])

    def child(self, kind: str, spec: TrainSpec) -> Any:
        path = self.folder / "spec.json"
        spec.write(path)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
        argv: list[str | Path] = [sys.executable, __file__, "--child", kind, path]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    def _data(self, base: Path) -> Prepared:
        text = self.folder / "text.txt"
        if not text.exists():
            from toolchain.stages.corpus import python_docs

            text.write_text(python_docs("train")[: 4 * self.asked.rows * self.asked.n_ctx * (self.asked.steps + 1)])
        request = DataRequest(
            base=str(base),
            sources=(DataFile(path=str(text), kind="text", repeat=1),),
            held_out=0.0,
            held_out_file=None,
            n_ctx=self.asked.n_ctx,
            packing=True,
            learn_prompts=False,
            seed=1,
            n_threads=THREADS,
        )
        return prepare_data(request, self.folder / f"data-{base.stem}", log=self.folder / "log")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare ways to train a LoRA adapter.")
    parser.add_argument("--folder", type=Path, help="keep base models and data here (default: a temporary folder)")
    parser.add_argument("--millions", type=int, default=100, metavar="M", help="parameters of the base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--n-ctx", type=int, default=128, help="tokens of a row")
    parser.add_argument("--micro-rows", type=int, help="rows computed at once (default: all)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--without-ggml", action="store_true", help="leave the trainer of 2023 out")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        kind, path = asked.child
        spec = TrainSpec.from_json(json.loads(Path(path).read_text()))
        return {"plain": plain_child, "gradients": gradients_child}[kind](spec)
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return measure(Bench(asked, folder.absolute()))


def measure(bench: Bench) -> int:
    made = bench.bases
    runs: dict[str, Callable[[], float]] = {
        "packed": lambda: bench.ours("packed", made.q4),
        "unpacked": lambda: bench.ours("unpacked", made.q4, packed=False),
        "unpacked_f16": lambda: bench.ours("unpacked_f16", made.f16, packed=False),
        "plain": lambda: bench.plain("plain", "float32"),
        "packed_16": lambda: bench.ours("packed_16", made.q4, dtype="bfloat16"),
        "plain_16": lambda: bench.plain("plain_16", "bfloat16"),
    }
    if not bench.asked.without_ggml:
        runs |= {"packed_q8": lambda: bench.ours("packed_q8", made.q8), "ggml": bench.ggml}
    speeds = interleaved(runs, bench.asked.rounds)
    peaks = {name: statistics.median(found) for name, found in bench.peaks.items()}
    q4_bytes = made.q4.stat().st_size
    figures: dict[str, Any] = {
        "base": made.q4.name,
        "base_bytes": q4_bytes,
        "threads": THREADS,
        "tokens_per_step": bench.asked.rows * bench.asked.n_ctx,
        "tokens_per_second": medians(speeds),
        "weights_of_file": {name: round(bench.weights[name] / q4_bytes, 4) for name in ("packed", "unpacked")},
        "peak_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "peak_of_plain": round(peaks["packed"] / peaks["plain"], 4),
        "peak_16_of_plain_16": round(peaks["packed_16"] / peaks["plain_16"], 4),
        "peak_of_unpacked_f16": round(peaks["packed"] / peaks["unpacked_f16"], 4),
        "speed_of_unpacked": ratio(speeds, "packed", "unpacked"),
        "speed_of_plain": ratio(speeds, "packed", "plain"),
        "speed_16_of_plain_16": ratio(speeds, "packed_16", "plain_16"),
        "largest_gradient_difference": bench.gradients(),
    }
    if "ggml" in speeds:
        figures["speed_of_ggml"] = ratio(speeds, "packed_q8", "ggml")
    show(figures)
    return answer(figures)


def show(figures: Mapping[str, Any]) -> None:
    rows = [
        ("weights in memory / file", figures["weights_of_file"]["packed"], "<= 1.15"),
        ("unpacked, the same", figures["weights_of_file"]["unpacked"], "about 7"),
        ("peak / transformers and peft on F16", figures["peak_of_plain"], "<= 0.6"),
        ("the same, both in bfloat16", figures["peak_16_of_plain_16"], ""),
        ("peak / unpacked F16 in our engine", figures["peak_of_unpacked_f16"], ""),
        ("tokens/s / unpacked", figures["speed_of_unpacked"], ">= 0.85"),
        ("tokens/s / transformers and peft on F16", figures["speed_of_plain"], ""),
        ("the same, both in bfloat16", figures["speed_16_of_plain_16"], ""),
        ("tokens/s / the trainer of 2023, Q8_0", figures.get("speed_of_ggml", "not run"), ">= 3"),
        ("largest relative gradient difference", figures["largest_gradient_difference"], "<= 1e-5"),
    ]
    console.answer_table(["", "measured", "goal"], [[what, str(value), goal] for what, value, goal in rows])


def bases(folder: Path, millions: int, toolchain: Toolchain) -> Bases:
    """The models of ``engine_overhead.generated``, grouped-query and not."""
    from tests.generated_models import write_model

    layers = max(1, round((millions * 1e6 - 2 * VOCABULARY * WIDTH) / (2.5 * WIDTH**2 + 3 * WIDTH * 4 * WIDTH)))
    extents: dict[str, Any] = {
        "n_layer": layers,
        "n_embd": WIDTH,
        "n_vocab": VOCABULARY,
        "n_head": HEADS,
        "n_ff": 4 * WIDTH,
    }

    def full(name: str, n_head_kv: int) -> Path:
        path = folder / f"{name}-{millions}M-F16.gguf"
        if path.exists():
            return path
        return write_model(path, "llama", type="f16", random=True, n_head_kv=n_head_kv, **extents)

    def packed(source: Path, kind: str) -> Path:
        path = source.with_name(source.name.replace("F16", kind))
        if not path.exists():
            argv: list[str | Path] = [toolchain.tool("quantize"), source, path, kind, str(os.cpu_count())]
            subprocess.run(argv, check=True, capture_output=True)
        return path

    f16 = full("random", 3)
    return Bases(f16=f16, q4=packed(f16, "Q4_K_M"), q8=packed(full("random-mha", HEADS), "Q8_0"))


def plain_child(spec: TrainSpec) -> int:
    """What one writes by hand: the base unpacked by transformers, an adapter by peft, the model's own loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from toolchain.lora.dataset_file import read_dataset
    from toolchain.lora.torch_engine.memory import MemoryWatch

    torch.set_num_threads(spec.n_threads)
    watch, base = MemoryWatch("cpu"), Path(spec.base[0])
    rows = torch.from_numpy(read_dataset(Path(spec.dataset)).train.ids).long()
    model = AutoModelForCausalLM.from_pretrained(
        str(base.parent), gguf_file=base.name, dtype=getattr(torch, spec.dtype)
    )
    model = get_peft_model(model, LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules="all-linear"))
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0)
    model.train()
    started = 0.0
    for step in range(spec.steps):
        started = started if step > 1 else time.perf_counter()
        some = rows[torch.arange(step * spec.rows, (step + 1) * spec.rows) % len(rows)]
        for part in some.split(spec.micro_rows):
            (model(input_ids=part, labels=part).loss * len(part) / spec.rows).backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    tokens = (spec.steps - 1) * spec.rows * spec.n_ctx
    return answer({"tokens_per_second": tokens / seconds, "peak_bytes": watch.peak_bytes()})


def gradients_child(spec: TrainSpec) -> int:
    """The same rows through the packed and the unpacked base, with the same adapter, B of which is not zero."""
    import torch

    from toolchain.lora.dataset_file import read_dataset

    rows = read_dataset(Path(spec.dataset)).train
    ids, labels = (torch.from_numpy(part[: spec.rows]).long() for part in (rows.ids, rows.labels))
    packed, unpacked = (gradients(replace(spec, packed=way), ids, labels) for way in (True, False))
    assert packed.keys() == unpacked.keys()
    found = {name: float((packed[name] - unpacked[name]).abs().max() / unpacked[name].abs().max()) for name in unpacked}
    return answer({"largest_difference": max(found.values()), "parameters": len(found)})


def gradients(spec: TrainSpec, ids: Any, labels: Any) -> dict[str, Any]:
    import torch

    from toolchain.lora.torch_engine.adapt import adapt
    from toolchain.lora.torch_engine.load import load_base
    from toolchain.lora.torch_engine.loss import summed_loss

    paths = [Path(shard) for shard in spec.base]
    loaded = load_base(paths, lib_dir=Path(spec.lib_dir), packed=spec.packed, n_threads=spec.n_threads)
    adapted = adapt(loaded.model, spec)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=numbers) * 0.02)
    summed_loss(adapted.base, ids, labels, None).backward()
    return {name: parameter.grad for name, parameter in adapted.parameters.items()}


def toolchain_of(kind: Any) -> Toolchain:
    found = current(kind)
    assert found is not None, "run `./inv build`, and `./inv build --legacy-finetune`"
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Trainings as the run starts them: a small dataset with the library's own logits, and the child's command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.front_door import LONG_S, ROOT, environment
from toolchain.lora.dataset_file import IGNORED, PROBE_TOKENS, Dataset, Rows, Tokens, write_dataset
from toolchain.lora.spec import TrainSpec

LOGITS = """
import sys
import llama_cpp
import numpy as np

model, adapter, rows, out = sys.argv[1:]
rows = np.load(rows)
n = rows.shape[1]
llm = llama_cpp.Llama(
    model, lora_path=adapter or None, n_ctx=n, n_batch=n, logits_all=True, verbose=False, n_threads=1
)
logits = []
for row in rows:
    llm.reset()
    llm.eval(row.tolist())
    logits.append(llm.scores[:n].astype(np.float32))
np.save(out, logits)
"""


def library_logits(base: Path, ids: Tokens, work: Path, *, adapter: Path | None = None) -> NDArray[np.float32]:
    """The logits (rows, n, n_vocab) of the library, in a process of its own, on ``ids`` (rows, n), with ``adapter``."""
    given, found = work / "ids.npy", work / "logits.npy"
    np.save(given, ids)
    argv = [sys.executable, "-c", LOGITS, str(base), str(adapter or ""), str(given), str(found)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=LONG_S, check=False)
    assert done.returncode == 0, done.stderr
    logits: NDArray[np.float32] = np.load(found)
    return logits


def library_loss(base: Path, rows: Rows, work: Path, *, adapter: Path | None = None) -> float:
    """The mean cross entropy (nats a learned token) that the library finds on ``rows``, each one example."""
    logits = library_logits(base, rows.ids, work, adapter=adapter)[:, :-1].astype(np.float64)
    wanted = rows.labels[:, 1:]
    learned = wanted != IGNORED
    chosen = np.take_along_axis(logits, np.maximum(wanted, 0)[..., None], -1)[..., 0]
    return float((np.logaddexp.reduce(logits, axis=-1) - chosen)[learned].mean())


def counting_rows(n_rows: int, n_ctx: int, *, n_vocab: int, seed: int, lengths: Sequence[int] = ()) -> Rows:
    """Rows that can be learned: each example counts up from a random token by a step of 1 to 3.

    ``lengths`` are those of the examples packed in each row, and the rest of it is not learned; one whole example
    when left out.
    """
    numbers = np.random.default_rng(seed)
    ids = numbers.integers(3, n_vocab, (n_rows, n_ctx)).astype(np.int32)
    labels = np.full((n_rows, n_ctx), IGNORED, np.int32)
    positions = np.zeros((n_rows, n_ctx), np.int32)
    for row in range(n_rows):
        begin = 0
        for length in lengths or (n_ctx,):
            places = np.arange(length)
            start, step = numbers.integers(3, n_vocab), numbers.integers(1, 4)
            ids[row, begin : begin + length] = 3 + (start + step * places) % (n_vocab - 3)
            labels[row, begin + 1 : begin + length] = ids[row, begin + 1 : begin + length]
            positions[row, begin : begin + length] = places
            begin += length
    return Rows(ids=ids, labels=labels, positions=positions)


def make_dataset(path: Path, base: Path, train: Rows, held: Rows) -> Path:
    """A dataset with the library's answer on the first tokens of ``train``."""
    probe = train.ids[0][:PROBE_TOKENS]
    logits = library_logits(base, probe[None], path.parent)[0]
    write_dataset(path, Dataset(train=train, held=held, probe_ids=probe, probe_logits=logits))
    return path


ALL_LINEAR = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
"""Of Llama and those that are built like it."""


def train_spec(base: Path, dataset: Path, run_dir: Path, lib_dir: Path, **changes: Any) -> TrainSpec:
    """Eight small steps with dropout, a checkpoint after every third."""
    spec = TrainSpec(
        base=(str(base),),
        dataset=str(dataset),
        run_dir=str(run_dir),
        lib_dir=str(lib_dir),
        rank=4,
        alpha=8.0,
        dropout=0.1,
        targets=ALL_LINEAR,
        rslora=False,
        dora=False,
        n_ctx=24,
        rows=4,
        micro_rows=2,
        steps=8,
        learning_rate=1e-2,
        schedule="cosine",
        warmup_steps=2,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=1,
        checkpoint_steps=3,
        gradient_checkpointing=False,
        device="cpu",
        dtype="float32",
        n_threads=1,
    )
    return replace(spec, **changes)


def child_argv(spec: TrainSpec, *, processes: int = 1, rendezvous: Sequence[str] = ("--standalone",)) -> list[str]:
    """The command line that trains as ``spec`` says; the spec is written beside its run folder.

    ``rendezvous``: torchrun's options that tell how the processes find each other.
    """
    path = Path(spec.run_dir + ".spec.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(spec)))
    module = ["-m", "toolchain.lora.torch_engine.child", str(path)]
    if processes == 1 and "--standalone" in rendezvous:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={processes}", *module]


def train_child(
    spec: TrainSpec, *, processes: int = 1, env: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        child_argv(spec, processes=processes),
        cwd=ROOT,
        env=environment({"OMP_NUM_THREADS": "1", **(env or {})}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )

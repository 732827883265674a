"""The children that train: how each is started, and what it leaves in its folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from toolchain.base import command, console, files
from toolchain.base.errors import ArtifactError, CommandError, MissingError, UsageError
from toolchain.lora.child_errors import raise_failure
from toolchain.lora.data.prepare import Prepared
from toolchain.lora.spec import ADAPTER, OUTCOME, StepLine, TrainOutcome, TrainSpec
from toolchain.lora.training import Training

SPEC: Final = "spec.json"
ADAPTER_GGUF: Final = "adapter.gguf"
"""The trained adapter as GGUF, beside its PEFT form."""
CHILD: Final = "toolchain.lora.torch_engine.child"
CHECKPOINT_GRACE_S: Final = 120.0
"""For a step to end and its checkpoint to be written, after an interrupt."""
ALLOCATOR: Final = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""For glibc (malloc's tunables): a freed matrix leaves no crumbs that keep its neighbours from becoming one piece.
torch asks for aligned memory, and glibc 2.36 keeps what it cuts off in front. On a base of 100M parameters, 1,024
tokens a step, the peak was 960 MiB without them and is 830 with them, in the same time."""
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": None}


def run_torch(spec: TrainSpec, *, processes: int, what: str, log: Path, on_line: Callable[[str], None]) -> TrainOutcome:
    """Train, or probe, as ``spec`` says; it goes on from the last checkpoint in its folder.

    Raises what the child raised: ArtifactError where transformers computes another function than the library,
    MemoryFitError, MissingError for a full disk, CommandError for anything else.
    """
    folder = Path(spec.run_dir)
    spec.write(folder / SPEC)
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    launcher = several if processes > 1 else ()
    try:
        command.run(
            (sys.executable, *launcher, "-m", CHILD, folder / SPEC),
            what=what,
            cwd=files.PROJECT_ROOT,
            env={
                **OFFLINE,
                "OMP_NUM_THREADS": str(spec.n_threads),
                "OMP_WAIT_POLICY": "PASSIVE",  # idle threads would spin on the cores that unpack weights
                "GLIBC_TUNABLES": ALLOCATOR,
            },
            log=log,
            on_line=on_line,
            grace_s=CHECKPOINT_GRACE_S,
            hint="the same command goes on from the last checkpoint",
        )
    except (CommandError, MissingError) as error:
        raise_failure(folder, error)
    if outcome := read_outcome(folder):
        return outcome
    raise ArtifactError(f"{what}: the child left no outcome in {folder}", evidence=f"log: {log}", hint="run it again")


def read_outcome(folder: Path) -> TrainOutcome | None:
    """What a finished training or probe found; None before its end."""
    told = files.read_json(folder / OUTCOME)
    return TrainOutcome.from_json(told) if isinstance(told, dict) else None


def run_ggml(training: Training, data: Prepared, *, steps: int, on_step: Callable[[StepLine], None]) -> TrainOutcome:
    """Train by the trainer of 2023, bring its result over the bridge, and leave the same files as the other engine."""
    from toolchain.lora.forms.bridge import convert
    from toolchain.lora.forms.peft_form import to_peft
    from toolchain.lora.ggml_engine.train import train

    folder, base = Path(training.run_dir), training.base.path
    made = train(
        training.recipe,
        base,
        data.train_text,
        folder,
        training.engine,
        steps=steps,
        n_threads=training.machine.compute_threads,
        log=training.log,
        on_step=on_step,
    )
    for line in convert(made.ggla, base, folder / ADAPTER_GGUF).lines():
        console.say(f"  {line}")
    try:
        to_peft(folder / ADAPTER_GGUF, base, folder / ADAPTER, log=training.log)
    except UsageError as error:
        console.say(f"  no PEFT form of it: {error.message}")
    return made.outcome


def finished(folder: Path) -> TrainOutcome | None:
    """What a training found whose adapter lies in ``folder``; None before its end."""
    return read_outcome(folder) if (folder / ADAPTER_GGUF).is_file() else None

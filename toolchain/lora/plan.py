"""What a training is going to be, settled before it starts: pure, of a recipe, a base's shape and a machine."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from toolchain.base.console import format_bytes
from toolchain.base.errors import MemoryFitError, MissingError, UsageError
from toolchain.base.machine import Machine
from toolchain.build.toolchain import Toolchain
from toolchain.lora.base import BaseModel
from toolchain.lora.estimate import Form, Need, Work, choose_work, needed, shape_of
from toolchain.lora.recipe import LoraRecipe
from toolchain.lora.spec import TrainOutcome, TrainSpec
from toolchain.lora.targets import target_suffixes

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2}
PROBE_STEPS: Final = 2

DeviceName = Literal["cpu", "cuda"]
DtypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Means:
    """Where and how it is computed. ``free_bytes`` are one process's, within budget.memory_gib."""

    device: DeviceName
    dtype: DtypeName
    processes: int
    threads: int
    free_bytes: int
    work: Work
    need: Need
    targets: tuple[str, ...]
    trained_parameters: int


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long it takes. ``epochs`` is how often the data is seen; ``cut``: the budget made it shorter."""

    steps: int
    epochs: float
    cut: bool = False


def settle_means(recipe: LoraRecipe, base: BaseModel, machine: Machine, *, work: Work | None = None) -> Means:
    """Device, dtype, targets, and the work that fits with the least recomputation; or ``work``, fit or not.

    Raises UsageError for what the recipe asks and cannot be, MissingError for a GPU that is not there, MemoryFitError
    when nothing fits. torch is not imported.
    """
    train = recipe.train
    if train.batch % train.processes:
        raise UsageError(
            f"train.batch {train.batch} cannot be shared by {train.processes} processes",
            hint=f"a multiple of {train.processes} can",
        )
    rows = train.batch // train.processes
    if train.micro_batch and rows % train.micro_batch:
        raise UsageError(
            f"train.micro_batch {train.micro_batch} does not divide the {rows} rows of a process's step",
            hint="leave it out: it is chosen by memory",
        )
    if base.header.n_ctx_train and train.n_ctx > base.header.n_ctx_train:
        raise UsageError(
            f"train.n_ctx {train.n_ctx} is more than {base.name} was made for",
            evidence=f"its context length is {base.header.n_ctx_train}",
            hint=f"set train.n_ctx to at most {base.header.n_ctx_train}",
        )
    device = choose_device(recipe, machine)
    dtype: DtypeName = train.dtype if train.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    targets = target_suffixes(base.headers, recipe.adapter.targets)
    shape = shape_of(base.headers, targets)
    free = free_bytes(recipe, machine, device)
    form = Form(rank=recipe.adapter.rank, dora=recipe.adapter.dora, dtype_bytes=DTYPE_BYTES[dtype], device=device)
    if work is None:
        work = choose_work(
            shape,
            form,
            n_ctx=train.n_ctx,
            rows=rows,
            free_bytes=free,
            micro_rows=train.micro_batch,
            checkpointing=None if train.gradient_checkpointing == "auto" else train.gradient_checkpointing,
        )
    return Means(
        device=device,
        dtype=dtype,
        processes=train.processes,
        threads=max(1, machine.compute_threads // train.processes),
        free_bytes=free,
        work=work,
        need=needed(shape, form, work),
        targets=targets,
        trained_parameters=shape.trained_parameters(form),
    )


def choose_device(recipe: LoraRecipe, machine: Machine) -> DeviceName:
    """``auto``: a GPU where there is one that the installed torch can use."""
    asked, cuda = recipe.train.device, torch_cuda()
    if asked == "cpu" or (asked == "auto" and not (machine.gpus and cuda)):
        return "cpu"
    if not machine.gpus:
        raise MissingError(
            "train.device is cuda, and no GPU is visible", hint="`./inv doctor` tells why; or device: cpu"
        )
    if not cuda:
        raise MissingError(
            "train.device is cuda, and the installed torch computes on CPUs only",
            evidence=f"GPUs here: {', '.join(map(str, machine.gpus))}",
            hint="install a torch with CUDA into .venv, or set train.device to cpu",
        )
    return "cuda"


def free_bytes(recipe: LoraRecipe, machine: Machine, device: DeviceName) -> int:
    """What one process may take: of a GPU of its own, or its share of the machine's memory."""
    processes = recipe.train.processes
    known = [gpu.free_bytes for gpu in machine.gpus[:processes] if gpu.memory_bytes]
    if device == "cuda" and processes > len(machine.gpus):
        raise UsageError(
            f"train.processes is {processes}, and {len(machine.gpus)} GPUs are visible", hint="one process a GPU"
        )
    free = min(known) if device == "cuda" and known else machine.available_bytes // processes
    most = recipe.budget.memory_gib
    return free if most is None else min(free, int(most * 2**30) // processes)


def settle_length(recipe: LoraRecipe, *, rows: int, seconds_per_step: float | None = None) -> Length:
    """Steps by ``steps`` or ``epochs`` over ``rows`` rows; fewer where ``budget.minutes`` asks for it."""
    train = recipe.train
    wanted = train.steps or max(1, math.ceil(train.epochs * rows / train.batch))
    steps = wanted
    if recipe.budget.minutes is not None and seconds_per_step:
        steps = min(wanted, int(recipe.budget.minutes * 60 / seconds_per_step))
        if steps < 1:
            raise UsageError(
                f"budget.minutes {recipe.budget.minutes:g} is less than one step takes ({seconds_per_step:.0f} s)",
                hint="raise it, or lower train.batch or train.n_ctx",
            )
    return Length(steps=steps, epochs=steps * train.batch / max(1, rows), cut=steps < wanted)


def require_measured_fit(outcome: TrainOutcome, means: Means) -> None:
    """Raise MemoryFitError when what the probe used is more than is free."""
    taken = outcome.import_bytes + outcome.peak_bytes
    if taken > means.free_bytes:
        raise MemoryFitError(
            f"the probe took {format_bytes(taken)}, and {format_bytes(means.free_bytes)} may be used",
            evidence="\n".join(means.need.lines()),
            hint="lower train.micro_batch or train.n_ctx, or set train.gradient_checkpointing to true",
        )


def train_spec(
    recipe: LoraRecipe,
    base: BaseModel,
    means: Means,
    *,
    dataset: Path,
    run_dir: Path,
    toolchain: Toolchain,
    steps: int,
    probe: bool = False,
) -> TrainSpec:
    """What the training child is told; with ``probe``, to take PROBE_STEPS and to tell what they cost."""
    train, adapter = recipe.train, recipe.adapter
    return TrainSpec(
        base=tuple(str(shard) for shard in base.shards),
        dataset=str(dataset),
        run_dir=str(run_dir),
        lib_dir=str(toolchain.lib_dir),
        rank=adapter.rank,
        alpha=adapter.counted_alpha,
        dropout=adapter.dropout,
        targets=means.targets,
        rslora=adapter.rslora,
        dora=adapter.dora,
        n_ctx=train.n_ctx,
        rows=train.batch,
        micro_rows=means.work.micro_rows,
        steps=steps,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup_steps=round(train.warmup * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        checkpoint_steps=train.checkpoint_steps,
        gradient_checkpointing=means.work.checkpointing,
        device=means.device,
        dtype=means.dtype,
        n_threads=means.threads,
        probe_steps=PROBE_STEPS if probe else 0,
    )


def torch_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise MissingError("torch is not installed", hint="run `./inv` to mend the environment")
    version = Path(next(iter(found.submodule_search_locations))) / "version.py"
    text = version.read_text() if version.is_file() else ""
    return re.search(r"^cuda[^=]*=\s*['\"]", text, re.MULTILINE) is not None

"""Run the trainer of 2023: from the newest whole checkpoint to the last step, then its adapter as a ggla file.

With the same number of threads a run that was cut anywhere ends in the same bytes, loss curve and adapter, as one that
was not: a checkpoint holds the place in the shuffled data, and is written before the next rows are drawn.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

import psutil

from toolchain.base import command, files
from toolchain.base.errors import ArtifactError, CommandError, UsageError
from toolchain.base.gguf import GgufHeader, read_header
from toolchain.build.ggla import read_adapter
from toolchain.build.toolchain import Toolchain
from toolchain.lora.ggml_engine.checkpoints import KEPT, keep, look_at, resume
from toolchain.lora.ggml_engine.flags import finetune_argv, rate_at, settle_targets, write_lora_argv
from toolchain.lora.ggml_engine.progress import parse_iteration, parse_start, parse_tokens, tells_other_data
from toolchain.lora.ggml_engine.refuse import check_base, check_recipe
from toolchain.lora.ggml_engine.start import write_start
from toolchain.lora.recipe import LoraRecipe
from toolchain.lora.spec import CHECKPOINTS, METRICS, OUTCOME, StepLine, TrainOutcome

ADAPTER_FILE: Final = "adapter.bin"
_WHAT: Final = "training with the trainer of 2023"
_AGAIN: Final = "begin anew with --fresh"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The adapter as ggla, and what the run cost; ``outcome`` knows no held-out losses: the trainer has none."""

    ggla: Path
    outcome: TrainOutcome


def train(
    recipe: LoraRecipe,
    base: Path,
    text: Path,
    run_dir: Path,
    trainer: Toolchain,
    on_step: Callable[[StepLine], None] = lambda _: None,
    *,
    steps: int,
    n_threads: int,
    log: Path,
) -> Trained:
    """Learn ``text`` in ``steps`` optimizer steps, going on from what ``run_dir`` holds. The loss curve and, last, the
    outcome are left in it as by the other engine. ``on_step`` gets each step. What is finished starts no process.

    Raises UsageError for what the trainer cannot do (``refuse``) and for a text of less than a row, ArtifactError when
    the loss is no number, MissingError for a full disk, CommandError for what else the trainer ends with.
    """
    base, text, run_dir = (path.absolute() for path in (base, text, run_dir))  # the trainer runs in another folder
    header = read_header(base)
    check_recipe(recipe)
    check_base(header, trainer)
    targets = settle_targets(header, recipe.adapter.targets)
    folder, ggla = run_dir / CHECKPOINTS, run_dir / ADAPTER_FILE
    if (done := _read_outcome(run_dir)) and done.steps == steps and ggla.is_file():
        return Trained(ggla=ggla, outcome=done)
    outcome = _outcome(recipe, header, targets, steps=steps)
    with files.disk_errors(run_dir):
        folder.mkdir(parents=True, exist_ok=True)
        start = resume(run_dir, steps)
        if start == 0:
            write_start(folder / "0", header, rank=recipe.adapter.rank, targets=targets, seed=recipe.train.seed)
            files.require_free(folder, KEPT * (folder / "0").stat().st_size, "the trainer's checkpoints")
        if start < steps:
            with (run_dir / METRICS).open("a") as metrics:
                run = _Run(recipe, folder, metrics, start=start, steps=steps, on_step=on_step)
                argv = finetune_argv(
                    trainer.tool("finetune"),
                    recipe,
                    base=base,
                    text=os.path.relpath(text, folder),
                    targets=targets,
                    n_vocab=header.n_vocab or 0,
                    start=start,
                    steps=steps,
                    n_threads=n_threads,
                )
                _finetune(argv, folder, log=log, on_line=run.on_line)
                run.finish()
            outcome = _outcome(recipe, header, targets, steps=steps, run=run)
        with files.staged(ggla) as partial:
            argv = write_lora_argv(
                trainer.tool("finetune"),
                recipe,
                base=base,
                targets=targets,
                checkpoint=steps,
                output=partial,
                n_threads=n_threads,
            )
            _finetune(argv, folder, log=log)
            look_at(lambda: read_adapter(partial).pairs(), partial)
        files.write_json(run_dir / OUTCOME, asdict(outcome))
    return Trained(ggla=ggla, outcome=outcome)


def trained_parameters(base: GgufHeader, rank: int, targets: tuple[str, ...]) -> int:
    """Numbers in the pairs of ``targets``; a norm's is a column of its width and one number."""
    found = 0
    for tensor in base.tensors:
        name = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if name in targets:
            found += sum((*tensor.shape, 1)[:2]) * (1 if name.endswith("_norm") else rank)
    return found


class _Run:
    """One start of the trainer, line by line: the loss curve grows, checkpoints are looked at, old ones go."""

    def __init__(
        self,
        recipe: LoraRecipe,
        folder: Path,
        metrics: IO[str],
        *,
        start: int,
        steps: int,
        on_step: Callable[[StepLine], None],
    ) -> None:
        self.recipe, self.folder, self.metrics, self.on_step = recipe, folder, metrics, on_step
        self.start, self.steps, self.last = start, steps, -1
        self.began = self.ended = 0.0
        self.peak_bytes = 0

    def on_line(self, line: str) -> None:
        train = self.recipe.train
        if (tokens := parse_tokens(line)) is not None and tokens < train.n_ctx:
            raise UsageError(
                f"the text has {tokens} tokens, and a row has {train.n_ctx} (train.n_ctx)",
                hint="lower train.n_ctx, or give more text",
            )
        if (start := parse_start(line)) is not None and start != self.start:
            raise ArtifactError(f"the trainer did not take its checkpoint {self.start}", evidence=line, hint=_AGAIN)
        if self.start and tells_other_data(line):
            raise ArtifactError(f"checkpoint {self.start} was trained on another text", evidence=line, hint=_AGAIN)
        if found := parse_iteration(line):
            if found.step > max(self.last, self.start):
                self._step(found.step, found.loss)
            self.last, self.ended = found.step, time.monotonic()
            self.began = self.began or self.ended

    def finish(self) -> None:
        """What the trainer writes after its last line."""
        if self.last != self.steps:
            raise ArtifactError(f"the trainer took {max(self.last, 0)} of {self.steps} steps", hint="run it again")
        keep(self.folder, self.steps, curve=self.metrics)

    @property
    def seconds_per_step(self) -> float:
        return (self.ended - self.began) / max(1, self.last - self.start)

    def _step(self, step: int, loss: float) -> None:
        train = self.recipe.train
        if not math.isfinite(loss):
            raise ArtifactError(
                f"the training has gone astray: the loss of step {step} is {loss}",
                hint="lower train.learning_rate, or raise train.warmup",
            )
        told = StepLine(
            step=step,
            loss=loss,
            learning_rate=rate_at(train, self.steps, step),
            grad_norm=None,
            learned_tokens=train.batch * train.n_ctx,
        )
        self.metrics.write(json.dumps(asdict(told)) + "\n")
        self.metrics.flush()
        self.peak_bytes = max(self.peak_bytes, _trainer_bytes())
        if (self.folder / str(step)).exists():
            keep(self.folder, step, curve=self.metrics)
        self.on_step(told)


def _finetune(argv: tuple[str, ...], folder: Path, *, log: Path, on_line: Callable[[str], None] | None = None) -> None:
    """Run it in ``folder``. It prints 4 KiB at a time; coreutils' stdbuf, where there is one, makes it print lines."""
    stdbuf = shutil.which("stdbuf")
    started = (stdbuf, "-oL", *argv) if stdbuf and on_line else argv
    again = "the same command goes on from the last checkpoint"
    try:
        command.run(started, what=_WHAT, cwd=folder, log=log, on_line=on_line, hint=again)
    except CommandError as error:
        if files.is_full(folder):
            raise files.disk_full(folder, error.evidence) from error
        raise CommandError(
            error.message.replace("stdbuf", "finetune"), evidence=error.evidence, hint=error.hint
        ) from error


def _trainer_bytes() -> int:
    """What the trainer has in memory now: its buffers are of one size from the first step on."""
    with suppress(psutil.Error):
        return max((child.memory_info().rss for child in psutil.Process().children()), default=0)
    return 0


def _outcome(
    recipe: LoraRecipe, base: GgufHeader, targets: tuple[str, ...], *, steps: int, run: _Run | None = None
) -> TrainOutcome:
    """Of a run that had nothing left to train, times and memory are 0."""
    each = run.seconds_per_step if run else 0.0
    return TrainOutcome(
        steps=steps,
        tokens_per_second=recipe.train.batch * recipe.train.n_ctx / each if each else 0.0,
        seconds_per_step=each,
        weight_bytes=base.tensor_bytes,
        import_bytes=0,
        peak_bytes=run.peak_bytes if run else 0,
        trained_parameters=trained_parameters(base, recipe.adapter.rank, targets),
        held_out_before=None,
        held_out_after=None,
    )


def _read_outcome(run_dir: Path) -> TrainOutcome | None:
    told = files.read_json(run_dir / OUTCOME)
    return TrainOutcome.from_json(told) if isinstance(told, dict) else None

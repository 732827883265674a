"""The training itself: which rows a step learns, at what rate, over how many processes, and what its gradient is.

Every process holds the whole base, mapped from one file, and an adapter that is the same in all: the same start, the
same summed gradient, the same update. torch's DistributedDataParallel would broadcast the base at its making and keep
buckets for its hooks; all that has to travel is one flat gradient of the adapter, once a step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray

from toolchain.base.errors import CommandError
from toolchain.lora.dataset_file import IGNORED, Rows
from toolchain.lora.spec import StepLine, TrainSpec
from toolchain.lora.torch_engine.adapt import Adapted, set_training
from toolchain.lora.torch_engine.loss import summed_loss

_SEED_BITS = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A step that was taken: its line of the loss curve, its seconds and the tokens that went through the model."""

    line: StepLine
    seconds: float
    tokens: int


@dataclass(kw_only=True)
class Interrupt:
    """Whether somebody asked to stop."""

    asked: bool = False


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The means of a training; each process has one."""

    spec: TrainSpec
    adapted: Adapted
    rows: Rows
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    packs: bool
    """Whether examples packed in one row do not see each other; else they are computed one by one."""
    interrupt: Interrupt = field(default_factory=Interrupt)

    def steps(self, done: int, last: int) -> Iterator[Timed]:
        """Take steps ``done`` + 1 to ``last``, one for each that is asked for; ends early when interrupted.

        CommandError when a loss is not finite; the adapter is then as it was after the step before.
        """
        set_training(self.adapted.base, checkpointing=self.spec.gradient_checkpointing)
        for step in range(done + 1, last + 1):
            started = time.perf_counter()
            taken = self._take(step)
            if taken is None:
                return
            line, tokens = taken
            yield Timed(line=line, seconds=time.perf_counter() - started, tokens=tokens)

    def mean_loss(self, rows: Rows) -> float | None:
        """The mean cross entropy (nats a learned token) on ``rows``; None where there is nothing to learn in them."""
        learned = count_learned(rows.labels)
        if not learned:
            return None
        self.adapted.base.eval()
        with torch.no_grad():
            numbers = np.arange(len(rows.ids))[self.accelerator.process_index :: self.accelerator.num_processes]
            total = sum((self._summed_loss(piece).item() for piece in self._pieces(rows, numbers)), 0.0)
        return self._over_all([total])[0] / learned

    def _take(self, step: int) -> tuple[StepLine, int] | None:
        """One optimizer step, its line and its tokens; None where a process was interrupted before its end."""
        numbers = step_rows(len(self.rows.ids), self.spec.rows, self.spec.seed, step)
        learned = count_learned(self.rows.labels[numbers])
        rank = self.accelerator.process_index
        set_seed(mixed_seed(self.spec.seed, step, rank))
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for piece in self._pieces(self.rows, numbers[rank :: self.accelerator.num_processes]):
            if self.interrupt.asked:
                break
            loss = self._summed_loss(piece)
            # by the learned tokens of the whole step: rows count by what is learned in them, however they are grouped
            (loss / max(1, learned)).backward()
            total += loss.item()
        total, asked = self._over_all([total, float(self.interrupt.asked)])
        if asked:
            return None
        norm = self._summed_gradient()
        mean, rate = total / max(1, learned), learning_rate(self.spec, step)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise CommandError(
                f"the training diverged in step {step}",
                evidence=f"loss {mean:g}, length of the gradient {norm:g}, learning rate {rate:g}",
                hint="lower train.learning_rate, or raise train.warmup; the last checkpoint is kept",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        line = StepLine(
            step=step,
            loss=mean,
            learning_rate=rate,
            grad_norm=norm,
            learned_tokens=learned,
        )
        return line, int(_used(self.rows.labels[numbers]).sum())

    def _summed_loss(self, piece: Rows) -> torch.Tensor:
        ids, labels, positions = (
            torch.from_numpy(array.astype(np.int64)).to(self.accelerator.device)
            for array in (piece.ids, piece.labels, piece.positions)
        )
        with self.accelerator.autocast():
            return summed_loss(self.adapted.base, ids, labels, positions)

    def _pieces(self, rows: Rows, numbers: NDArray[np.int64]) -> Iterator[Rows]:
        """What is computed at once of the rows ``numbers``: a few, or one example where packed ones mix."""
        n_ctx = rows.ids.shape[1]
        for first in range(0, len(numbers), self.spec.micro_rows):
            some = numbers[first : first + self.spec.micro_rows].tolist()
            whole = [(some, 0, n_ctx)]
            cuts = whole if self.packs else [([row], *span) for row in some for span in examples(rows, row)]
            for held, begin, end in cuts:
                piece = _cut(rows, held, begin, end)
                if count_learned(piece.labels):
                    yield piece

    def _summed_gradient(self) -> float:
        """Sum the gradients over all processes and clip them; the norm that they had."""
        parameters = list(self.adapted.parameters.values())
        if self.accelerator.num_processes > 1:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.spec.max_grad_norm))

    def _over_all(self, values: list[float]) -> list[float]:
        """The sum of each value over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        held = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        summed: list[float] = self.accelerator.reduce(held, "sum").tolist()
        return summed


def step_rows(n_rows: int, count: int, seed: int, step: int) -> NDArray[np.int64]:
    """The rows of ``step`` (from 1): the next ``count`` of an endless line of epochs, each in an order of its own."""
    places = np.arange((step - 1) * count, step * count)
    epochs, within = np.divmod(places, n_rows)
    orders = {epoch: np.random.default_rng([seed & _SEED_BITS, epoch]).permutation(n_rows) for epoch in set(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, within, strict=True)], dtype=np.int64)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """The rate of ``step`` (from 1): a rise over the warmup, then the schedule's way to zero just after the last."""
    if step <= spec.warmup_steps:
        return spec.learning_rate * step / spec.warmup_steps
    done = (step - 1 - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    match spec.schedule:
        case "cosine":
            return spec.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return spec.learning_rate * (1.0 - done)
        case "constant":
            return spec.learning_rate


def mixed_seed(seed: int, step: int, rank: int) -> int:
    """A seed of 32 bits for the dropout of one step in one process."""
    return int(np.random.SeedSequence([seed & _SEED_BITS, step, rank]).generate_state(1)[0])


def count_learned(labels: NDArray[np.int32]) -> int:
    """The tokens that count in the loss: a row's first is predicted from nothing."""
    return int((labels[:, 1:] != IGNORED).sum())


@contextmanager
def stopping_between_steps(interrupt: Interrupt) -> Iterator[None]:
    """SIGINT and SIGTERM only leave word in ``interrupt``.

    A terminal's Ctrl-C arrives twice, from the terminal and from the process that started us; once is enough.
    """

    def note(*_: Any) -> None:
        interrupt.asked = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def examples(rows: Rows, row: int) -> list[tuple[int, int]]:
    """Where each example of a row begins and ends, and its unused end, if it has one."""
    begins = np.flatnonzero(rows.positions[row] == 0).tolist()
    return list(zip(begins, [*begins[1:], rows.ids.shape[1]], strict=True))


def is_packed(rows: Rows) -> bool:
    """Whether any row holds more than one example."""
    return any(
        begin and (rows.labels[row, begin:] != IGNORED).any()
        for row in range(len(rows.ids))
        for begin, _ in examples(rows, row)
    )


def _cut(rows: Rows, numbers: Sequence[int], begin: int, end: int) -> Rows:
    """Columns of some rows, up to the last token that is learned in any: what follows changes nothing before it."""
    used = int(_used(rows.labels[numbers, begin:end]).max())
    parts = (array[numbers, begin : begin + used] for array in (rows.ids, rows.labels, rows.positions))
    return Rows(**dict(zip(("ids", "labels", "positions"), parts, strict=True)))


def _used(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """For each row the number of tokens up to the last that is learned."""
    last: NDArray[np.int64] = labels.shape[1] - np.argmax(labels[:, ::-1] != IGNORED, axis=1)
    return np.where((labels != IGNORED).any(axis=1), last, 0)

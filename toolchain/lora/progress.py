"""What a training tells while it runs -> the live line: loss, tokens a second, time left."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from toolchain.base import console
from toolchain.lora.spec import StepLine

_WINDOW: Final = 20
"""Steps over which the speed is taken: it follows the machine's load, and no single step."""


class Progress:
    """Moves a console step on by the lines of a training. ``tokens`` are those that one optimizer step sees."""

    def __init__(
        self,
        shown: console.Step,
        *,
        steps: int,
        tokens: int,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shown, self._steps, self._tokens, self._clock = shown, steps, tokens, clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        shown.advance(done, steps)

    def on_line(self, line: str) -> None:
        """A line of the child's output: a step of the loss curve, a warning, or something to pass over."""
        if step := parse_step(line):
            self.on_step(step)
        elif warning := parse_warning(line):
            console.warn(warning)

    def on_step(self, step: StepLine) -> None:
        self._seen.append((step.step, self._clock()))
        (first, began), (last, now) = self._seen[0], self._seen[-1]
        each = (now - began) / max(1, last - first)  # the time before the first step went into imports and checks
        speed = f", {self._tokens / each:,.0f} tokens/s, {duration((self._steps - last) * each)} left" if each else ""
        self._shown.note = f"loss {step.loss:.3f}{speed}"
        self._shown.advance(step.step, self._steps)


def parse_step(line: str) -> StepLine | None:
    """The step of the loss curve that a line is, as JSON; None for any other line."""
    if not line.startswith('{"step"'):
        return None
    try:
        return StepLine(**json.loads(line))
    except (ValueError, TypeError):
        return None


def parse_warning(line: str) -> str | None:
    """What a child warns of, as ``{"warning": ...}``; None for any other line."""
    if not line.startswith('{"warning"'):
        return None
    try:
        return str(json.loads(line)["warning"])
    except ValueError:
        return None


def duration(seconds: float) -> str:
    """Two figures that matter: ``41 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"

"""The loss curve as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toolchain.base import files
from toolchain.lora.spec import StepLine, TrainOutcome

_SMOOTHED: Final = 20
"""At most so many steps behind each point of the smooth line."""


def read_curve(metrics: Path) -> list[StepLine]:
    """The steps in a JSONL of them."""
    return [StepLine(**json.loads(line)) for line in metrics.read_text().splitlines() if line.strip()]


def draw_curve(curve: Sequence[StepLine], outcome: TrainOutcome, path: Path, *, title: str) -> None:
    """A PNG at ``path``: the loss of each step, its mean over the last ones, and the held-out loss before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [line.step for line in curve]
    axes.plot(steps, [line.loss for line in curve], color="0.75", linewidth=1, label="each step")
    axes.plot(steps, _smooth([line.loss for line in curve]), color="C0", linewidth=2, label="mean of the last steps")
    held = [(0, outcome.held_out_before), (outcome.steps, outcome.held_out_after)]
    marks = [(step, loss) for step, loss in held if loss is not None]
    if marks:
        axes.plot(*zip(*marks, strict=True), "o--", color="C3", linewidth=1, label="held out, before and after")
        for step, loss in marks:
            axes.annotate(f"{loss:.2f}", (step, loss), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with files.disk_errors(path), files.staged(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def _smooth(losses: Sequence[float]) -> list[float]:
    window = max(1, min(_SMOOTHED, len(losses) // 10))
    return [sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))]

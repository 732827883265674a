"""The picture of a bench: bars are medians, points the runs, a line what memory allows.

The only importer of matplotlib, and that only to draw.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from runtime.bench.measure import Measured
from runtime.bench.report import Result, generations, prompts
from runtime.bench.roof import case_bytes_per_token
from runtime.bench.summary import Summary
from toolchain.base.errors import MissingError, UsageError
from toolchain.base.files import staged

_COLORS: Final = {"ours": "#2166ac", "llama-bench": "#b2b2b2", "llama-cpp-python": "#e08214"}
_ROOF: Final = "#b2182b"
_FAR: Final = 2.5  # times the tallest bar
_OTHER: Final = "#67a9cf"  # the model that is compared


def require_plot(path: Path) -> None:
    """Refuse before anything is measured: MissingError without matplotlib, UsageError if ``path`` cannot be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError(
            "--plot needs matplotlib", hint="python -m pip install matplotlib (the extra `plot` of this project)"
        )
    if path.suffix != ".png":
        raise UsageError(f"--plot writes a PNG, not {path.name!r}", hint=f"name it {path.name}.png")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="name a file")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written", evidence=str(error), hint="name a file in a folder of yours"
        ) from error


def draw(result: Result, path: Path) -> None:
    """Write the picture to ``path``, over what is there: prompt on the left, generation on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [*result.depths, *result.others]
    bars = sum(len(each.samples) for each in groups)
    figure = Figure(figsize=(max(8.0, 2.4 + 1.5 * bars), 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    first = result.depths[0]
    lengths = first.case.lengths
    _bars(left, groups, result, prompts)
    left.set_title(f"prompt, {lengths.prompt} tokens")
    _bars(right, groups, result, generations, roof=True)
    right.set_title(f"generation, {lengths.gen} tokens")
    number = first.case.settings.number
    names = ", ".join(dict.fromkeys(each.case.model.name for each in groups))
    figure.suptitle(
        f"{names}:\nmedians (bars, figures) of {result.runs} interleaved runs (points); "
        f"{number('n_threads')} threads, {number('n_threads_batch')} for the prompt",
        fontsize=11,
    )
    with staged(path.absolute()) as partial:
        figure.savefig(partial, format="png")


def _bars(
    axes: Any,
    groups: list[Measured],
    result: Result,
    summary_of: Callable[[Measured, str], Summary],
    *,
    roof: bool = False,
) -> None:
    labels: list[str] = []
    roofs: list[tuple[float, float, float]] = []
    for each in groups:
        begin = len(labels)
        for name in each.samples:
            at, summary = len(labels), summary_of(each, name)
            color = _OTHER if each in result.others else _COLORS.get(name, "#999999")
            axes.bar(at, summary.median, width=0.7, color=color, zorder=2)
            spread = [at + 0.25 * (number / max(1, len(summary.runs) - 1) - 0.5) for number in range(len(summary.runs))]
            axes.scatter(spread, summary.runs, s=14, color="black", alpha=0.6, linewidths=0, zorder=3)
            labels.append(f"{_number(summary.median)}\n{_label(each, name, groups, result)}")
        if roof and result.roof.bytes_per_s:
            limit = result.roof.bytes_per_s / case_bytes_per_token(each.subject.headers, each.case)
            roofs.append((limit, begin - 0.45, len(labels) - 0.55))
    top = _roofs(axes, roofs)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("tokens per second")
    axes.set_ylim(0, top)
    axes.grid(axis="y", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _roofs(axes: Any, roofs: list[tuple[float, float, float]]) -> float:
    """A line over the bars that each limit holds for; far above them all, words instead, which flatten nothing.

    Where the axis should end.
    """
    tallest = axes.dataLim.y1
    far = [_number(limit) for limit, _, _ in roofs if limit > _FAR * tallest]
    for limit, begin, end in roofs:
        if limit <= _FAR * tallest:
            axes.hlines(limit, begin, end, colors=_ROOF, linestyles="dashed", zorder=4)
            text = f"memory's roof {_number(limit)}"
            axes.annotate(text, (begin, limit), (0, 3), textcoords="offset points", color=_ROOF, fontsize=8)
    if far:
        text = f"memory's roof lies beyond: {', '.join(far)}"
        axes.annotate(text, (0.01, 0.99), xycoords="axes fraction", va="top", color=_ROOF, fontsize=8)
    highest: float = max(tallest, *(limit for limit, _, _ in roofs if limit <= _FAR * tallest), 0.0)
    return highest * (1.18 if far else 1.1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _label(measured: Measured, name: str, groups: list[Measured], result: Result) -> str:
    lines = [name.replace("-python", "-\npython")]
    if result.others and name == "ours":
        types = {each.subject.headers[0].file_type for each in groups}
        lines += [(measured.subject.headers[0].file_type or "") if len(types) > 1 else measured.case.model.stem]
    if len({each.case.lengths.depth for each in groups}) > 1:
        lines.append(f"depth {measured.case.lengths.depth}")
    return "\n".join(lines)

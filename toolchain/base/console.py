"""The only place that prints: the answer to stdout, the story to stderr, where a stranger's words are made harmless.

Quiet while all goes well: one line a step. A terminal sees a live bar; elsewhere a heartbeat every 30 s
tells that work goes on.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from toolchain.base.errors import FoundryError
from toolchain.base.harmless import harmless

HEARTBEAT_S = 30.0


class Step:
    """One line of the story while it runs; ``advance`` moves its bar, ``note`` stands beside it and at its end."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.done = 0
        self.total = 0
        self.note = ""

    def advance(self, done: int, total: int) -> None:
        self.done, self.total = done, total


def story() -> Console:
    """The stderr console, made anew so that redirected streams are honoured."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(text: str) -> None:
    """One plain line of the story."""
    story().print(harmless(text), markup=False)


def warn(text: str) -> None:
    story().print(f"[yellow]![/yellow] {escape(harmless(text))}")


def answer(text: str) -> None:
    """One line of the answer, on stdout, untouched."""
    print(text, flush=True)


def answer_json(value: object) -> None:
    """Exactly one JSON object on stdout."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
    sys.stdout.flush()


def answer_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; every column but the first is a figure and stands to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False, emoji=False)
    console.width = max(console.width, 120)  # a narrow terminal wraps the line, which loses no figure
    console.print(table)


def answer_finding(state: str, subject: str, text: str, mend: str) -> None:
    """One finding of an examination on stdout: mark, subject, what was found, and below it how it is mended."""
    mark = {"ok": "[green]✓[/green]", "note": "[yellow]![/yellow]", "bad": "[red]✗[/red]"}[state]
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    first, *rest = text.splitlines() or [""]
    console.print(f"{mark} {escape(subject):<10} {escape(first)}")
    for line in rest:
        console.print(f"  {'':<10} {escape(line)}")
    if mend:
        console.print(f"  {'':<10} [bold]→[/bold] {escape(mend)}")


@contextmanager
def step(title: str, *, quiet_s: float = 0.0) -> Iterator[Step]:
    """Show ``title`` as running; end with its mark and seconds, also when the body raises.

    A success within ``quiet_s`` seconds leaves no line: it had nothing to do.
    """
    current = Step(title)
    console = story()
    started = time.monotonic()
    try:
        with _live(console, current) if console.is_terminal else _heartbeat(console, current, started):
            yield current
    except BaseException:
        _close(console, "[red]✗[/red]", current, started)
        raise
    if time.monotonic() - started >= quiet_s:
        _close(console, "[green]✓[/green]", current, started)


def failure(error: FoundryError) -> None:
    """What failed, its evidence, and what to do next."""
    console = story()
    console.print(f"[red bold]✗[/red bold] {escape(harmless(error.message))}")
    if error.evidence:
        for line in harmless(error.evidence).splitlines():
            console.print(f"  [dim]{escape(line)}[/dim]")
    if error.hint:
        console.print(f"  [cyan]→[/cyan] {escape(harmless(error.hint))}")


def format_bytes(count: float) -> str:
    """Binary units, three significant figures: ``4.88 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    digits = 0 if unit == "B" or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{digits}f} {unit}"


@contextmanager
def _live(console: Console, current: Step) -> Iterator[None]:
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}[/dim]"),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(escape(current.title), total=None, count="", note="")
        stop = threading.Event()

        def refresh() -> None:
            while not stop.wait(0.1):
                total = current.total or None
                count, note = _count(current), escape(current.note)
                bar.update(task, completed=current.done, total=total, count=count, note=note)

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def _heartbeat(console: Console, current: Step, started: float) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            seconds = time.monotonic() - started
            console.print(f"… {escape(current.title)}  {_count(current)}  {seconds:.0f}s{_noted(current)}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _count(current: Step) -> str:
    if not current.total:
        return ""
    if current.total > 1_000_000:
        return f"{format_bytes(current.done)} of {format_bytes(current.total)}"
    return f"{current.done}/{current.total}"


def _close(console: Console, mark: str, current: Step, started: float) -> None:
    seconds = time.monotonic() - started
    console.print(f"{mark} {escape(current.title)}  {seconds:.1f}s{_noted(current)}")


def _noted(current: Step) -> str:
    return f"  [dim]{escape(current.note)}[/dim]" if current.note else ""

"""The end of a terminal's output that is drawn anew while a reply comes; what stands above it is never touched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, TextIO

from rich.color import ColorSystem
from rich.console import Console
from rich.text import Text

_COLORS: Final = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
    "windows": ColorSystem.WINDOWS,
}
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
"""Synchronized output: a terminal that knows it shows all between the two at once; others take no notice."""
_CLIP, _WRAP = "\x1b[?7l", "\x1b[?7h"
"""A terminal that takes a character for wider than we do must not wrap the line: the rows are counted."""
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"
_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"


class Region:
    """Lines that are printed for good, and below them lines that the next ``draw`` replaces.

    Only what differs is written. The cursor stands behind the last line that is open, or on an empty line where none
    is. After a change of the width the rows of the open lines are no longer known: as few as possible are replaced,
    since a row too many would be text that was printed for good.
    """

    def __init__(self, stream: TextIO, *, styled: bool = True) -> None:
        self._stream = stream
        self._styled = styled
        self._console = Console(file=stream, force_terminal=True, highlight=False, emoji=False, legacy_windows=False)
        self._colors = _COLORS.get(self._console.color_system or "")
        self._open: list[str] = []
        self._columns = 0

    def size(self) -> tuple[int, int]:
        """(columns, rows) of the terminal now."""
        return terminal_size(self._stream)

    def draw(self, done: Sequence[Text], still_open: Sequence[Text]) -> None:
        """Print ``done`` for good in place of the open lines, and ``still_open`` below."""
        columns, rows = self.size()
        lines = [self._coded(line) for line in (*done, *still_open)]
        kept = 0
        if columns == self._columns:
            while kept < min(len(lines), len(self._open)) and lines[kept] == self._open[kept]:
                kept += 1
        self._columns = columns
        if kept == len(lines) == len(self._open) and not done:
            return
        out = [_BEGIN, self._to_line(kept, rows)]
        for number in range(kept, len(lines)):
            if number > kept:
                out.append("\n")
            out.append(_CLIP if number >= len(done) else "")
            out += [lines[number], _CLEAR_LINE, _WRAP]
        out.append("" if kept == len(lines) else _CLEAR_BELOW)
        self._open = lines[len(done) :]
        out.append("" if self._open or not lines else "\n")
        self._write("".join((*out, _END)))

    def status(self, text: str) -> None:
        """A line that goes away; the cursor stays at its head, so that whatever else is printed takes its place."""
        columns, _ = self.size()
        line = Text(text, style="dim", no_wrap=True)
        line.truncate(columns - 1)
        self._write(f"{_HIDE}\r{self._coded(line)}{_CLEAR_LINE}\r")

    def end_status(self) -> None:
        self._write(f"\r{_CLEAR_LINE}{_SHOW}")

    def print(self, text: str, style: str = "") -> None:
        """Text as it comes, which nothing replaces; only where no line is open."""
        self._write(self._coded(Text(text, style=style)))

    def _to_line(self, number: int, rows: int) -> str:
        """From behind the last open line to the head of the given one, at most to the top of the screen."""
        if not self._open:
            return ""
        if number == len(self._open):
            return "\n"
        up = min(len(self._open) - 1 - number, rows - 1)
        return f"\r\x1b[{up}A" if up else "\r"

    def _coded(self, line: Text) -> str:
        if not self._styled:
            return line.plain
        return "".join(
            part.style.render(part.text, color_system=self._colors) if part.style else part.text
            for part in Text().append_text(line).render(self._console)
        )

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """(columns, rows) of the terminal now; 80 by 24 where it does not tell."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        columns, rows = 0, 0
    return columns or 80, rows or 24

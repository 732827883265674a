"""A reply as it is shown: a sign of life, what the model thinks in one line, its answer, its figures."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from queue import SimpleQueue
from typing import Final, Protocol, TextIO

from runtime.chat.backend import Figures, Piece, figures_line
from runtime.chat.region import Region
from runtime.engine.shown import Shown
from toolchain.base import console
from toolchain.base.harmless import Harmless, harmless

FRAME_S: Final = 0.04
DRAWING_SHARE: Final = 0.2
"""Of the time at most: what is slow to draw is drawn less often, and the model has the rest."""
SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Screen:
    """Shows replies. On a terminal that can, they are rendered as Markdown; ``plain`` or NO_COLOR shows them as they
    are, control characters aside. Where stdout is no terminal, the reply goes there untouched and all else to stderr.
    """

    def __init__(self, *, shows_stats: bool = True, shows_reasoning: bool = False, plain: bool = False) -> None:
        self.shows_stats = shows_stats
        self.shows_reasoning = shows_reasoning
        self.plain = plain

    def show(self, pieces: Iterator[Piece]) -> Figures:
        """Show a reply while it comes; its figures.

        What came is shown to its last character also when ``pieces`` raises, which it does through here.
        """
        figures = Figures(finish_reason="cancelled")  # of a reply that tells nothing of itself
        drawing = _Drawing(self._answer, self._aside())
        with closing(pieces) if isinstance(pieces, Generator) else nullcontext(), _drawn_in_time(drawing) as take:
            for piece in pieces:
                take(piece)
                figures = piece.figures or figures
        if self.shows_stats and (line := figures_line(figures)):
            story = console.story()
            story.print(harmless(line), style="dim", markup=False, soft_wrap=not story.is_terminal)
        return figures

    def _answer(self) -> _Answer:
        if not sys.stdout.isatty():
            return _Text(sys.stdout)
        if self.plain or os.environ.get("NO_COLOR") or not can_draw(sys.stdout):
            return _Text(sys.stdout, Harmless())
        return _Page(Region(sys.stdout))

    def _aside(self) -> _Aside:
        stream = sys.stdout if sys.stdout.isatty() else sys.stderr
        able = can_draw(stream)
        return _Aside(Region(stream, styled=able), moves=able, whole=self.shows_reasoning)


def can_draw(stream: TextIO) -> bool:
    """Whether the stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class _Answer(Protocol):
    """Where the text of the answer goes."""

    def add(self, text: str) -> None: ...

    def draw(self) -> None: ...

    def end(self) -> None: ...


class _Text:
    """As it comes."""

    def __init__(self, stream: TextIO, filtered: Harmless | None = None) -> None:
        self._out = Shown(stream)
        self._filtered = filtered
        self._last = ""

    def add(self, text: str) -> None:
        self._last = text
        self._out.write(self._filtered.feed(text) if self._filtered else text)

    def draw(self) -> None:
        self._out.end()

    def end(self) -> None:
        self._out.write("" if self._last.endswith(("\n", "\r")) else "\n")
        self._out.end()


class _Page:
    """Rendered, what is open in it drawn anew."""

    def __init__(self, region: Region) -> None:
        from runtime.chat.flow import Flow

        self._region = region
        self._filtered = Harmless()
        self._flow = Flow()
        self._size = (0, 0)
        self._changed = False

    def add(self, text: str) -> None:
        self._flow.feed(self._filtered.feed(text))
        self._changed = True

    def draw(self) -> None:
        size = self._region.size()
        if self._changed or size != self._size:
            self._size, self._changed = size, False
            columns, rows = size
            self._region.draw(*self._flow.take(columns - 1, rows - 1))

    def end(self) -> None:
        self._region.draw(self._flow.end(self._region.size()[0] - 1), ())


class _Aside:
    """What is no answer: the sign of life, and what the model thinks; ``moves`` where a line can be taken back."""

    def __init__(self, region: Region, *, moves: bool, whole: bool) -> None:
        self._region = region
        self._moves = moves
        self._whole = whole
        self._filtered = Harmless()
        self._words = 0
        self._last = ""
        self._frame = 0
        self._status_shown = False

    def think(self, text: str) -> None:
        """Some of what the model thinks."""
        self._words += len(text.split()) - (self._last[-1:].strip() != "" and text[:1].strip() != "")
        self._last = text or self._last
        if self._whole:
            self._end_status()
            self._region.print(self._filtered.feed(text), "dim")

    def draw(self) -> None:
        """The next picture of the line that goes away."""
        if self._moves and not (self._whole and self._words):
            self._frame = (self._frame + 1) % len(SPINNER)
            thinking = f" thinking… {_words(self._words)}" if self._words else ""
            self._region.status(f"{SPINNER[self._frame]}{thinking}")
            self._status_shown = True

    def end(self) -> None:
        """Before the answer, and when there is none."""
        self._end_status()
        if self._words and self._whole:
            self._region.print("\n" if self._last.endswith("\n") else "\n\n")
        elif self._words:
            self._region.print(f"thought for {_words(self._words)}\n", "dim")
        self._words, self._last = 0, ""

    def _end_status(self) -> None:
        if self._status_shown:
            self._region.end_status()
            self._status_shown = False


class _Drawing:
    """One reply: what is thought goes aside, text to the answer; a model may think again behind its answer."""

    def __init__(self, new_answer: Callable[[], _Answer], aside: _Aside) -> None:
        self._new_answer = new_answer
        self._aside = aside
        self._answer: _Answer | None = None

    def take(self, piece: Piece) -> None:
        if piece.reasoning:
            if self._answer:
                self._answer.end()
                self._answer = None
            self._aside.think(piece.reasoning)
        text = piece.text if self._answer else piece.text.lstrip()
        if text and not self._answer:
            self._aside.end()
            self._answer = self._new_answer()
        if text and self._answer:
            self._answer.add(text)

    def draw(self) -> None:
        (self._answer or self._aside).draw()

    def end(self) -> None:
        (self._answer or self._aside).end()


@contextmanager
def _drawn_in_time(drawing: _Drawing) -> Iterator[Callable[[Piece], None]]:
    """Takes pieces at once; a thread draws them, also while none comes. An error of drawing is raised by the next."""
    pieces: SimpleQueue[Piece] = SimpleQueue()
    ended = threading.Event()
    failures: list[BaseException] = []

    def drain() -> None:
        for _ in range(pieces.qsize()):
            drawing.take(pieces.get())

    def draw() -> None:
        pause_s = 0.0
        try:
            while not ended.wait(pause_s):
                started = time.monotonic()
                drain()
                drawing.draw()
                pause_s = max(FRAME_S, (time.monotonic() - started) / DRAWING_SHARE)
        except BaseException as error:
            failures.append(error)

    def take(piece: Piece) -> None:
        if failures:
            raise failures[0]
        pieces.put(piece)

    thread = threading.Thread(target=draw, name="drawing a reply", daemon=True)
    thread.start()
    try:
        yield take
    finally:
        ended.set()
        thread.join()
        if failures:
            raise failures[0]
        drain()
        drawing.end()


def _words(count: int) -> str:
    return "1 word" if count == 1 else f"{count:,} words"

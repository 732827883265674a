"""Replies on a screen: a real pseudo-terminal of this process, read by a terminal emulator."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import pyte
import pytest
from rich.text import Text

from runtime.chat.backend import Figures, Piece
from runtime.chat.markdown import markdown_lines
from runtime.chat.region import Region
from runtime.chat.screen import Screen
from toolchain.base.errors import FetchError

ENDED = Piece(figures=Figures(finish_reason="stop", completion_tokens=3, generation_tps=20.0))
REPLY = """\
# Two ways

A *first* paragraph that is longer than a narrow page is wide.

- one
- two

```python
print("hello")
```
"""


class Watched:
    """A terminal that is written to; what it shows, once everything that was written has been read."""

    def __init__(self, columns: int, rows: int) -> None:
        self._reader, writer = os.openpty()
        self.writer: TextIO = os.fdopen(writer, "w", encoding="utf-8")
        self.resize(columns, rows)
        self.raw = b""
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._reader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def lines(self) -> list[str]:
        """All rows, those above the screen first, without blanks at their ends; nothing can be written any more."""
        self.writer.close()
        self._thread.join()
        above = ["".join(row[at].data for at in range(self.screen.columns)) for row in self.screen.history.top]
        return "\n".join(row.rstrip() for row in (*above, *self.screen.display)).rstrip().split("\n")

    def close(self) -> None:
        self.writer.close()
        self._thread.join()
        os.close(self._reader)

    def _read(self) -> None:
        while True:
            try:
                raw = os.read(self._reader, 1 << 16)
            except OSError:  # Linux: the other end was closed
                return
            if not raw:
                return
            self.raw += raw
            self._stream.feed(raw)


@contextmanager
def watched(columns: int = 80, rows: int = 24) -> Iterator[Watched]:
    terminal = Watched(columns, rows)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watched]]:
    """Puts stdout and stderr on a terminal of the size that is asked for."""
    opened: list[Watched] = []
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLORTERM", "COLUMNS", "LINES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def open_one(columns: int = 80, rows: int = 24) -> Watched:
        opened.append(Watched(columns, rows))
        monkeypatch.setattr(sys, "stdout", opened[-1].writer)
        monkeypatch.setattr(sys, "stderr", opened[-1].writer)
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.close()


def in_pieces(text: str, size: int = 3) -> Iterator[Piece]:
    for at in range(0, len(text), size):
        yield Piece(text=text[at : at + size])
    yield ENDED


def plain(text: str, width: int) -> list[str]:
    return [line.plain for line in markdown_lines(text, width)]


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (30, 5)])
def test_reply_at_a_terminal_is_rendered_whole(at_terminal: Callable[..., Watched], columns: int, rows: int) -> None:
    terminal = at_terminal(columns, rows)
    figures = Screen().show(in_pieces(REPLY))
    assert figures == ENDED.figures
    assert terminal.lines() == [*plain(REPLY, columns - 1), "3 tokens, 20 t/s generation"]
    assert not terminal.screen.cursor.hidden


def test_thinking_is_one_line_that_tells_its_words(at_terminal: Callable[..., Watched]) -> None:
    terminal = at_terminal()
    thoughts = iter(
        [Piece(reasoning="let me "), Piece(reasoning="th"), Piece(reasoning="ink\n"), Piece(text="\n\nIt is 42.")]
    )
    Screen(shows_stats=False).show(thoughts)
    assert terminal.lines() == ["thought for 3 words", "It is 42."]


def test_thinking_is_shown_whole_when_asked_for(at_terminal: Callable[..., Watched]) -> None:
    terminal = at_terminal()
    Screen(shows_stats=False, shows_reasoning=True).show(
        iter([Piece(reasoning="let me\nthi\x1b[2J"), Piece(reasoning="nk"), Piece(text="It is 42.")])
    )
    assert terminal.lines() == ["let me", "thi␛[2Jnk", "", "It is 42."]
    assert b"\x1b[2mlet me" in terminal.raw  # dimmed


def test_model_that_thinks_again_has_all_its_answers_shown(at_terminal: Callable[..., Watched]) -> None:
    terminal = at_terminal()
    Screen(shows_stats=False).show(
        iter([Piece(reasoning="one"), Piece(text="**A**"), Piece(reasoning="two words"), Piece(text="B")])
    )
    assert terminal.lines() == ["thought for 1 word", "A", "thought for 2 words", "B"]


@pytest.mark.parametrize("way", ["option", "NO_COLOR", "dumb"])
def test_plain_reply_is_the_text_itself_without_its_control_characters(
    at_terminal: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    terminal = at_terminal()
    if way != "option":
        monkeypatch.setenv(*(("NO_COLOR", "1") if way == "NO_COLOR" else ("TERM", "dumb")))
    Screen(shows_stats=False, plain=way == "option").show(in_pieces("# A *b*\n\x1b]0;title\x07\n- c", 1))
    assert terminal.lines() == ["# A *b*", "␛]0;title␇", "- c"]
    assert terminal.screen.title == ""


def test_rendered_reply_cannot_command_the_terminal(at_terminal: Callable[..., Watched]) -> None:
    terminal = at_terminal()
    sys.stdout.write("above\n")
    Screen(shows_stats=False).show(in_pieces("\x1b]0;title\x07\x1b[2J\x1b[H`\x1b]52;c;aGk=\x07`\x9b2J end", 1))
    assert terminal.lines() == ["above", "␛]0;title␇␛[2J␛[H␛]52;c;aGk=␇\ufffd2J end"]
    assert b"]52" not in terminal.raw.replace("␛]52".encode(), b"")


def test_reply_that_breaks_off_is_shown_to_its_last_character(at_terminal: Callable[..., Watched]) -> None:
    def broken() -> Iterator[Piece]:
        yield Piece(text="So far, *so")
        raise FetchError("the server has left")

    terminal = at_terminal()
    with pytest.raises(FetchError, match="has left"):
        Screen().show(broken())
    assert terminal.lines() == ["So far, *so"]


def test_error_before_the_first_word_leaves_an_empty_line_to_write_on(at_terminal: Callable[..., Watched]) -> None:
    def refused() -> Iterator[Piece]:
        raise FetchError("no")
        yield

    terminal = at_terminal()
    with pytest.raises(FetchError):
        Screen().show(refused())
    assert terminal.lines() == [""]
    assert not terminal.screen.cursor.hidden


def test_reply_that_goes_elsewhere_is_untouched_and_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [Piece(reasoning="a b c"), Piece(text="# \x1b[1mraw\r"), Piece(text="\n*text*"), ENDED]
    Screen().show(iter(pieces))
    assert capsys.readouterr() == ("# \x1b[1mraw\r\n*text*\n", "thought for 3 words\n3 tokens, 20 t/s generation\n")
    Screen(shows_stats=False, shows_reasoning=True).show(iter(pieces))
    assert capsys.readouterr() == ("# \x1b[1mraw\r\n*text*\n", "a b c\n\n")


def test_figures_that_nobody_told_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures(finish_reason="length", completion_tokens=1)
    assert Screen().show(iter([Piece(text="x"), Piece(figures=figures)])) == figures
    assert capsys.readouterr().err == "1 token; cut at the token limit or the end of the context\n"
    Screen().show(iter([Piece(text="x"), Piece(figures=Figures(finish_reason="stop"))]))
    assert capsys.readouterr() == ("x\n", "")
    Screen().show(iter([Piece(text="x"), Piece(figures=Figures(finish_reason="\x1b[2J"))]))
    assert capsys.readouterr() == ("x\n", "ended: ␛[2J\n")


def test_pieces_are_closed_when_the_reader_of_stdout_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    def endless() -> Iterator[Piece]:
        try:
            while True:
                yield Piece(text="more and more ")
        finally:
            closed.set()

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(BrokenPipeError):
            Screen().show(endless())
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is buffered has somewhere to go
    assert closed.is_set()


def lines_of(*texts: str) -> list[Text]:
    return [Text(text) for text in texts]


def test_region_replaces_its_open_lines_and_nothing_above() -> None:
    with watched(20, 4) as terminal:
        region = Region(terminal.writer)
        terminal.writer.write("above\n")
        for number in range(30):
            done = lines_of(f"done {number}") if number % 3 == 0 else []
            region.draw(done, lines_of(*(f"open {number} {row}" for row in range(number % 4))))
        region.draw(lines_of("end"), ())
        assert terminal.lines() == ["above", *(f"done {number}" for number in range(0, 30, 3)), "end"]


def test_region_writes_only_what_differs() -> None:
    with watched() as terminal:
        region = Region(terminal.writer)
        rows = [f"row {number} of the open block" for number in range(20)]
        region.draw((), lines_of(*rows))
        region.draw((), lines_of(*rows[:-1], rows[-1] + "!"))
        assert terminal.lines() == [*rows[:-1], rows[-1] + "!"]
        assert terminal.raw.count(b"row 3 of") == 1


def test_narrower_terminal_loses_nothing_that_was_printed() -> None:
    with watched(60, 8) as terminal:
        region = Region(terminal.writer)
        region.draw(lines_of(*"abcdefgh"), lines_of("open one", "open two"))
        terminal.resize(20, 8)
        region.draw((), lines_of("open", "one", "open", "two"))
        region.draw(lines_of("open", "one", "open", "two"), ())
        assert terminal.lines() == [*"abcdefgh", "open", "one", "open", "two"]

"""The chat on a pipe: each line is a turn, replies go to stdout and everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing

from runtime.chat.backend import Figures, Piece, figures_line
from runtime.chat.commands import Quit, is_command, run_command, unescaped
from runtime.chat.talk import Talk
from runtime.conversation.reasoning import CLOSE, OPEN
from runtime.engine.shown import Shown
from toolchain.base import console
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, FoundryError, UsageError


def on_pipe(talk: Talk, *, shows_stats: bool = True, shows_reasoning: bool = False) -> int:
    """Answer every line; the first turn or command that failed gives the exit code, and Ctrl-C ends it with 130."""
    status = 0
    lines = (raw.decode("utf-8", "replace").rstrip("\r\n") for raw in sys.stdin.buffer)
    try:
        for text in joined_lines(lines):
            if not text.strip():
                continue
            try:
                asked = run_command(talk, text, PipeShell()) if is_command(text) else talk.ask(unescaped(text))
                figures = _show(asked, shows_reasoning=shows_reasoning) if asked else None
            except FoundryError as error:
                console.failure(error)
                status = status or error.exit_code
                continue
            if figures and shows_stats and (line := figures_line(figures)):
                console.say(line)
            if figures and figures.finish_reason == "cancelled":
                return INTERRUPTED_EXIT_CODE
    except Quit:
        pass
    return status


def joined_lines(lines: Iterator[str]) -> Iterator[str]:
    """Lines with those that end in a backslash joined to the next."""
    parts: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []
    if parts:
        yield "\n".join(parts)


class PipeShell:
    """Nobody can be asked; what a command answers is part of the story, since stdout belongs to the replies."""

    def edit_text(self, initial: str) -> str | None:
        raise UsageError("there is no editor on a pipe", hint="/edit TEXT")

    def show(self, text: str) -> None:
        console.say(text)

    def confirm(self, question: str) -> bool:
        return False


def _show(pieces: Generator[Piece, None, None], *, shows_reasoning: bool) -> Figures | None:
    """Write a reply to stdout as it comes; its figures."""
    out, figures = Shown(sys.stdout), None
    thinking, last = False, ""

    def write(text: str) -> None:
        nonlocal last
        out.write(text)
        last = text or last

    try:
        with closing(pieces):
            for piece in pieces:
                if piece.reasoning and shows_reasoning:
                    write(piece.reasoning if thinking else f"{OPEN}{piece.reasoning}")
                    thinking = True
                if piece.text:
                    write(f"{_closing(last)}{piece.text}" if thinking else piece.text)
                    thinking = False
                figures = piece.figures or figures
        if thinking:
            write(_closing(last))
        last = last or " "  # a reply without a text has its line
    finally:
        out.write("\n" if last and not last.endswith("\n") else "")
        out.end()
    return figures


def _closing(last: str) -> str:
    return f"{CLOSE}\n" if last.endswith("\n") else f"\n{CLOSE}\n"

"""Markdown that comes in pieces: lines that are final and are printed once, lines that are still open.

A block is final when the next one has begun. A block that is higher than the screen gives up its first lines, those
that nothing can change any more, so that they can be read back while the rest comes. All lines given, in their order,
are those of the whole text rendered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.text import Text

from runtime.chat.markdown import QUOTE, Block, blocks, render, view_of

_MARKS: Final = ("*", "_", "~", "`")


class Flow:
    """A reply in the making: ``feed`` it text, ``take`` lines as often as they can be drawn, ``end`` it."""

    def __init__(self) -> None:
        self._rest = ""  # the text from the first block or list on that is not given in full
        self._looked_at = 0  # characters of it in which final blocks were looked for
        self._before = ""  # the kind of the block in front of it
        self._items = 0  # how many items of the list that it begins with are given
        self._open = _Given()  # of the block after those

    def feed(self, text: str) -> None:
        self._rest += text

    def take(self, width: int, height: int) -> tuple[list[Text], list[Text]]:
        """(lines that are final, the end of the open ones: at most ``height``), none wider than ``width`` cells."""
        done = self._final(width)
        view = view_of(self._rest, width)
        lines: list[Text] = []
        givable = 0
        for number, block in enumerate(self._blocks(self._rest)):
            here = render(block, view)
            if number:
                lines += _with_gap(block, here.lines)
                continue
            lines = self._open.left_of(block, here.lines, width)
            givable = len(lines) - (len(here.lines) - here.stable) if here.stable else 0
        if self._rest[-1:] in _MARKS:
            givable = 0  # with the next character it may be another mark, which ends nothing
        if lines and (over := min(len(lines) - height, givable)) > 0:
            self._open.give(lines[:over])
            done += lines[:over]
            lines = lines[over:]
        return done, lines[max(0, len(lines) - height) :]

    def end(self, width: int) -> list[Text]:
        """All lines that are left: the text has ended."""
        done = self._final(width)
        view = view_of(self._rest, width, ended=True)
        for block in self._blocks(self._rest):
            done += self._open.left_of(block, render(block, view).lines, width)
            self._open = _Given()
        self._rest = ""
        return done

    def _blocks(self, text: str) -> list[Block]:
        return blocks(text, before=self._before)[self._items :]

    def _final(self, width: int) -> list[Text]:
        """Lines of the blocks that are followed by another one in the complete lines; the rest begins after them."""
        complete = self._rest.rfind("\n") + 1
        if complete <= self._looked_at:
            return []
        self._looked_at = complete
        view = view_of(self._rest[:complete], width)
        found = self._blocks(self._rest[:complete])
        done: list[Text] = []
        for block in found[:-1]:
            done += self._open.left_of(block, render(block, view).lines, width)
            self._open = _Given()
        if len(found) > 1:
            self._cut(found, view.source)
        return done

    def _cut(self, found: Sequence[Block], source: Sequence[str]) -> None:
        """Drop the text in front of the last block, or of the list that it is an item of, but no blank lines."""
        last = found[-1]
        self._items = last.index
        if len(found) > last.index + 1:
            self._before = found[-2 - last.index].kind
        start = last.list_start
        while start and not source[start - 1].strip():
            start -= 1
        cut = sum(len(line) + 1 for line in source[:start])
        self._rest = self._rest[cut:]
        self._looked_at -= cut


class _Given:
    """How much of the open block was given: whole lines, and some of the next one after a change of the width."""

    def __init__(self) -> None:
        self._width = 0
        self._lines = 0
        self._within = 0
        self._inked = 0  # characters that are no space: they are the same at any width

    def give(self, lines: Sequence[Text]) -> None:
        """These lines, the first of those that ``left_of`` told, are given now."""
        self._inked += sum(_ink(line.plain) for line in lines)
        self._lines, self._within = self._lines + len(lines), 0

    def left_of(self, block: Block, lines: Sequence[Text], width: int) -> list[Text]:
        """The lines of the block, its gap before them, that were not given yet."""
        lines = _with_gap(block, lines)
        if width != self._width:
            self._width = width
            self._lines, self._within = _place(lines, self._inked)
        left = lines[self._lines :]
        return [left[0][self._within :], *left[1:]] if self._within and left else left


def _with_gap(block: Block, lines: Sequence[Text]) -> list[Text]:
    return [Text(), *lines] if block.gap else list(lines)


def _place(lines: Sequence[Text], inked: int) -> tuple[int, int]:
    """(line, position in it) behind the first ``inked`` characters that are no space."""
    if not inked:
        return 0, 0
    for number, line in enumerate(lines):
        for at, character in enumerate(line.plain):
            inked -= _ink(character)
            if not inked:
                return (number, at + 1) if line.plain[at + 1 :].strip() else (number + 1, 0)
    return len(lines), 0


def _ink(text: str) -> int:
    """Characters that are no space and do not stand at the head of every line of a quote."""
    return sum(not character.isspace() and character != QUOTE.strip() for character in text)

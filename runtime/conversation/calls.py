"""Calls of known functions in what a model writes: ``name(literals)`` in its text, not in code that it quotes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from runtime.conversation.literals import MAX_CHARS, parse_arguments, scan_arguments

MAX_NAME_CHARS: Final = 64

_MARK: Final = re.compile(
    r"(?<!\\)(?P<ticks>`++)|^[ \t>]*+(?P<tildes>~~~++)|(?<!\w)(?P<name>[A-Za-z_]\w*+)\(", re.MULTILINE
)
_FENCE_END: Final = re.compile(r"^[ \t>]*+(`{3,}+|~{3,}+)[ \t\r]*$", re.MULTILINE)
_TICKS: Final = re.compile(r"`++")
_TICKS_OR_BLANK: Final = re.compile(r"(`++)|\n[ \t\r]*+\n")
_BRACKETS: Final = re.compile(r"(\(++)|(\)++)|\n")
_LAST_WORD: Final = re.compile(r"(?<!\w)[A-Za-z_]\w*\Z")
_NO_CALL_AFTER: Final = re.compile(r"(?:[.@\\$]|::|->|(?<!\w)def[ \t]+)\Z")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call as it was written; ``start`` and ``end`` are its place in the text."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    start: int = 0
    end: int = 0


class Found(NamedTuple):
    """The first complete call, or the place where the end of the text may be the beginning of one.

    What stands before ``settled`` need not be looked at again when the text goes on.
    """

    call: Call | None = None
    begins_at: int | None = None
    settled: int = 0


class CallWatch:
    """Looks for a call in a text that streams: each piece costs what it brings, not what was before it."""

    __slots__ = ("_names", "_settled", "_shown", "_text", "call")

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._text = ""
        self._settled = self._shown = 0
        self.call: Call | None = None
        """The call, once it is complete; its places are those in the whole text."""

    def feed(self, text: str) -> str:
        """The text up to what may be a call: neither a call nor its beginning nor what follows it is in it."""
        if self.call is not None:
            return ""
        self._text += text
        found = find_call(self._text, self._names, settled=self._settled)
        self.call, self._settled = found.call, found.settled
        if found.call is not None:
            return self._show(found.call.start)
        return self._show(len(self._text) if found.begins_at is None else found.begins_at)

    def flush(self) -> str:
        """The rest of a text that has ended without a call; empty after one."""
        return "" if self.call is not None else self._show(len(self._text))

    def _show(self, end: int) -> str:
        shown, self._shown = self._text[self._shown : end], max(self._shown, end)
        return shown


def find_call(text: str, names: Collection[str], *, settled: int = 0) -> Found:
    """Look for a call of one of ``names`` with literal arguments, from ``settled`` on.

    Code between backticks or tildes is passed over, finished or not, and so is what stands between the brackets of
    another call. What is found does not change when the text goes on. Takes time in proportion to the text.
    """
    budget = 2 * len(text) + MAX_CHARS  # of characters read in vain: texts can be made to be hostile
    position = settled
    while budget > 0 and (mark := _MARK.search(text, position)):
        if mark["name"] is None:
            position = _code_end(text, mark)
        else:
            bracket, position = mark.end() - 1, mark.end()
            if mark["name"] in names and not _NO_CALL_AFTER.search(text, max(mark.start() - 8, 0), mark.start()):
                scan = scan_arguments(text, bracket)
                if scan.unfinished:
                    return Found(begins_at=mark.start(), settled=settled)
                if scan.end is not None and (call := _call(text, mark, scan.end)):
                    return Found(call=call, settled=settled)
                budget -= scan.reached - bracket
            position = _other_call_end(text, position)
        if position < len(text):  # at the end a closing mark may still grow into another one
            settled = position
    if budget <= 0:
        return Found(settled=settled)
    if position <= settled:
        settled = max(settled, text.rfind("\n", settled) + 1)
    return Found(begins_at=_half_name(text, position, names), settled=settled)


def _call(text: str, mark: re.Match[str], end: int) -> Call | None:
    start, found = mark.start(), parse_arguments(text[mark.end() - 1 : end])
    if found is None:
        return None
    return Call(name=mark["name"], args=found.args, kwargs=found.kwargs, text=text[start:end], start=start, end=end)


def _half_name(text: str, position: int, names: Iterable[str]) -> int | None:
    """Where a word at the end of ``text`` begins that may become a call of one of ``names``."""
    word = _LAST_WORD.search(text, max(position, len(text) - MAX_NAME_CHARS - 1))
    if word is None or _NO_CALL_AFTER.search(text, max(word.start() - 8, 0), word.start()):
        return None
    return word.start() if any(name.startswith(word[0]) for name in names) else None


def _code_end(text: str, mark: re.Match[str]) -> int:
    """Behind the code that ``mark`` begins; the end of the text when it goes on.

    As in CommonMark, but that a backtick without another one makes code of the rest of its paragraph: whether the
    other one comes is not known while the text streams.
    """
    start = mark.end()
    if mark["tildes"]:
        return _fence_end(text, start, mark["tildes"])
    ticks = mark["ticks"]
    if len(ticks) >= 3:
        line_end = text.find("\n", start)
        for match in _TICKS.finditer(text, start, line_end if line_end >= 0 else len(text)):
            if match[0] == ticks:
                return match.end()
        return len(text) if line_end < 0 else _fence_end(text, start, ticks)
    for match in _TICKS_OR_BLANK.finditer(text, start):
        if match[1] is None or match[1] == ticks:
            return match.end()
    return len(text)


def _fence_end(text: str, start: int, fence: str) -> int:
    for match in _FENCE_END.finditer(text, start):
        if match[1].startswith(fence):
            return match.end()
    return len(text)


def _other_call_end(text: str, position: int) -> int:
    """Behind the bracket that closes one opened just before ``position``, or behind the line if none does."""
    depth = 1
    for match in _BRACKETS.finditer(text, position):
        opened, closed = match.groups()
        if opened:
            depth += len(opened)
        elif closed and len(closed) < depth:
            depth -= len(closed)
        else:
            return match.end()
    return len(text)

"""Calls of known functions in what a model writes: ``name(literals)`` in its text, not in code that it quotes."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
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
    """The first complete call, and the place before which nothing need be looked at again when the text goes on."""

    call: Call | None
    settled: int


def find_call(text: str, names: Container[str], *, settled: int = 0) -> Found:
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
                    return Found(None, settled)
                if scan.end is not None and (call := _call(text, mark, scan.end)):
                    return Found(call, settled)
                budget -= scan.reached - bracket
            position = _other_call_end(text, position)
        if position < len(text):  # at the end a closing mark may still grow into another one
            settled = position
    if budget > 0 and position <= settled:
        settled = max(settled, text.rfind("\n", settled) + 1)
    return Found(None, settled)


def _call(text: str, mark: re.Match[str], end: int) -> Call | None:
    start, found = mark.start(), parse_arguments(text[mark.end() - 1 : end])
    if found is None:
        return None
    return Call(name=mark["name"], args=found.args, kwargs=found.kwargs, text=text[start:end], start=start, end=end)


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

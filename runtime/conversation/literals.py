"""Arguments of a call in running text: Python literals, read without running anything and in bounded time."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

MAX_CHARS: Final = 1 << 16
MAX_DEPTH: Final = 16

_TOKEN: Final = re.compile(
    r"""
    (?P<space>\s++)
    | (?P<string>\"\"\"(?:[^\\"]++|\\.|"(?!""))*+\"\"\" | '''(?:[^\\']++|\\.|'(?!''))*+'''
        | "(?!"")(?:[^\\"]++|\\.)*+" | '(?!'')(?:[^\\']++|\\.)*+')
    | (?P<number>[-+]?(?:0[xX][0-9a-fA-F_]++|0[bB][01_]++|0[oO][0-7_]++
        |(?:[0-9][0-9_]*+(?:\.[0-9_]*+)?+|\.[0-9][0-9_]*+)(?:[eE][-+]?[0-9]++)?+)(?![\w.]))
    | (?P<keyword>[A-Za-z_]\w*+\s*+=(?!=))
    | (?P<word>(?:True|False|None|true|false|null)\b)
    | (?P<open>[(\[{])
    | (?P<close>[)\]}])
    | (?P<comma>,)
    | (?P<colon>:)
    """,
    re.VERBOSE | re.DOTALL,
)
_HALF: Final = re.compile(r"[-+\w.]*+\s*+\Z")
"""What the text ends with may become a number or a word; one that begins with a quote may become a text."""

_IN_TEXT: Final = re.compile(r"\\.|[\n\r\0]", re.DOTALL)
_PYTHON_WORDS: Final[Mapping[str, str]] = {"true": "True", "false": "False", "null": "None"}
_CLOSES: Final = {"(": ")", "[": "]", "{": "}"}
_KNOWN_ESCAPES: Final = frozenset("\n\\'\"abfnrtvxNuU01234567")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What stood between the brackets of a call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]


class Scan(NamedTuple):
    """How far arguments reach: ``end`` is the position behind their bracket, None when there is none.

    ``unfinished``: the text ends before they do. ``reached`` is the last position that was looked at.
    """

    end: int | None
    unfinished: bool
    reached: int


def scan_arguments(text: str, start: int, *, max_chars: int = MAX_CHARS) -> Scan:
    """Follow the literal arguments whose opening bracket is at ``start``, brackets in brackets and texts included.

    Neither names nor calls nor operators are among them, nor more than MAX_DEPTH brackets in one another.
    """
    limit = min(len(text), start + max_chars)
    stack: list[str] = []
    position, before, wants = start, "", True  # wants: a value may come
    while position < limit:
        match = _TOKEN.match(text, position, limit)
        if match is None:
            half = text[position] in "\"'" or _HALF.match(text, position, limit) is not None
            return Scan(None, half and limit == len(text), limit if half else position)
        kind, token, position = str(match.lastgroup), match[0], match.end()
        if kind == "space":
            continue
        if kind == "close":
            if _CLOSES[stack.pop()] != token:
                return Scan(None, False, position)
            if not stack:
                return Scan(position, False, position)
        elif not _may_follow(kind, before, wants, stack) or len(stack) > MAX_DEPTH:
            return Scan(None, False, position)
        if kind == "open":
            stack.append(token)
        wants = kind in ("open", "comma", "colon", "keyword")
        before = kind
    return Scan(None, limit == len(text), limit)


def _may_follow(kind: str, before: str, wants: bool, stack: list[str]) -> bool:
    """Whether a token can come where it does; what is let through otherwise, ``ast`` refuses."""
    match kind:
        case "comma":
            return not wants
        case "colon":
            return not wants and stack[-1] == "{"
        case "keyword":
            return wants and len(stack) == 1 and before != "keyword"
        case "string" if before == "string":
            return True
    return wants


def parse_arguments(text: str) -> Arguments | None:
    """The values of ``(...)`` as ``scan_arguments`` found it; None when they are no arguments after all.

    ``true``, ``false`` and ``null`` are read as Python's words, and a text may hold line breaks as they are.
    """
    source = "".join(_as_python(match) for match in _TOKEN.finditer(text))
    try:
        call = ast.parse(f"f{source}", mode="eval").body
        if not isinstance(call, ast.Call):
            return None
        args = tuple(ast.literal_eval(value) for value in call.args)
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    if len(kwargs) < len(call.keywords):
        return None  # a keyword twice
    return Arguments(args=args, kwargs=kwargs)


def _as_python(match: re.Match[str]) -> str:
    token = match[0]
    match match.lastgroup:
        case "space":
            return " "
        case "string":
            return _IN_TEXT.sub(_in_text, token)
    return _PYTHON_WORDS.get(token, token)


def _in_text(match: re.Match[str]) -> str:
    """Characters that a source line cannot hold, and backslashes that escape nothing."""
    found = match[0]
    if found[0] != "\\":
        return repr(found)[1:-1]
    return found if found[1] in _KNOWN_ESCAPES else f"\\{found}"

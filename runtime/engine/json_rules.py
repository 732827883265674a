"""GBNF for the parts of JSON that need no schema: its values, the formats, literals and ranges of integers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

BASE_RULES: Final = {
    "ws": r'(" " | "\n" [ \t]{0,20})?',
    "hex": "[0-9a-fA-F]",
    "char": r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] hex | [dD] [0-7]) hex hex)',
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "amount": '("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "number": '"-"? amount',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (string ws ":" ws value ("," ws string ws ":" ws value)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "date": '[0-9]{4} "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
    ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?'
    ' ("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])',
    "date-time": 'date "T" time',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}
FORMATS: Final = ("date", "time", "date-time", "uuid")

EMPTY: Final = '""'
LARGEST_INTEGER: Final = 10**16 - 1
"""What ``integer`` can write."""


def json_literal(value: object) -> str:
    """GBNF for exactly this value; half a surrogate pair, which UTF-8 cannot hold, stays escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        text = json.dumps(value)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def either(items: Iterable[str]) -> str:
    """One of them, as one item of a sequence."""
    found = list(dict.fromkeys(items))
    return found[0] if len(found) == 1 and found[0].isidentifier() else f"({' | '.join(found)})"


def times(least: int, most: int | None) -> str:
    """The quantifier."""
    if most is None:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    return f"{{{least},{most}}}"


def integer_range(low: int, high: int) -> str:
    """The integers from ``low`` to ``high``, without leading zeros."""
    below = [f'"-" ({_between(max(1, -high), -low)})'] if low < 0 else []
    above = [_between(max(low, 0), high)] if high >= 0 else []
    return either([*below, *above])


def _between(low: int, high: int) -> str:
    """GBNF for the numbers from ``low`` to ``high``, neither below 0."""
    found = []
    for length in range(len(str(low)), len(str(high)) + 1):
        start = max(low, 10 ** (length - 1) if length > 1 else 0)
        found.append(_same_length(str(start), str(min(high, 10**length - 1))))
    return " | ".join(found)


def _same_length(low: str, high: str) -> str:
    if len(set(low)) == 1 and low[0] == "0" and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    if low == high:
        return f'"{low}"'
    if len(low) == 1:
        return f"[{low}-{high}]"
    size = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_length(low[1:], high[1:])})'
    parts, first, last = [], int(low[0]), int(high[0])
    if low[1:] != "0" * size:
        parts.append(f'"{low[0]}" ({_same_length(low[1:], "9" * size)})')
        first += 1
    tail = [f'"{high[0]}" ({_same_length("0" * size, high[1:])})'] if high[1:] != "9" * size else []
    last -= len(tail)
    middle = [f"[{first}-{last}] [0-9]{{{size}}}"] if first <= last else []
    return " | ".join([*parts, *middle, *tail])

"""A regular expression -> GBNF for a JSON string that matches it: the ``pattern`` of a JSON schema.

What is understood: characters, classes, ``.``, ``\\d \\w \\s``, groups, alternatives, quantifiers, and anchors at the
two ends. Anything else raises UsageError.
"""

from __future__ import annotations

import re
from typing import Final, NoReturn

from toolchain.base.errors import UsageError

Ranges = list[tuple[int, int]]

_LAST: Final = 0x10FFFF
_CLASSES: Final[dict[str, Ranges]] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0)],
}
_ESCAPED: Final = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B}
_JSON_ESCAPES: Final = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
_NOTHING: Final = r"[^\U00000000-\U0010FFFF]"
_QUANTIFIER: Final = re.compile(r"[*+?]|\{(\d+)(,(\d*))?\}")


def pattern_rule(pattern: str, *, any_char: str) -> str:
    """GBNF for the inside of the JSON string; ``any_char`` is the rule of one character, for where no anchor stands."""
    body, before, after = pattern, f"{any_char}*", f"{any_char}*"
    if body.startswith("^"):
        body, before = body[1:], ""
    if re.search(r"(?<!\\)(\\\\)*\$$", body):
        body, after = body[:-1], ""
    reader = _Reader(pattern, body)
    inner = reader.alternatives()
    if reader.rest:
        reader.refuse(f"`{reader.rest[0]}`")
    if (not before or not after) and reader.branches:
        reader.refuse("an alternative beside an anchor: put it in a group")
    return " ".join(filter(None, (before, f"({inner})", after)))


class _Reader:
    """Reads the expression from left to right; ``rest`` is what is not read yet."""

    def __init__(self, whole: str, rest: str) -> None:
        self._whole = whole
        self._depth = 0
        self.rest = rest
        self.branches = False

    def refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"the pattern /{self._whole}/ cannot be followed: {what} is not understood",
            hint="leave `pattern` away, or write the grammar yourself (--grammar)",
        )

    def alternatives(self) -> str:
        """Up to the end or a closing parenthesis."""
        found = [self._sequence()]
        while self.rest.startswith("|"):
            self.branches = self.branches or self._depth == 0
            self._take(1)
            found.append(self._sequence())
        return " | ".join(found)

    def _sequence(self) -> str:
        items = []
        while self.rest and self.rest[0] not in "|)":
            items.append(self._item() + self._quantifier())
        return " ".join(items) or '""'

    def _item(self) -> str:
        char = self._take(1)
        if char == "(":
            if self.rest.startswith("?:"):
                self._take(2)
            elif self.rest.startswith("?"):
                self.refuse(f"`({self.rest[:2]}`")
            self._depth += 1
            inner = self.alternatives()
            self._depth -= 1
            if self._take(1) != ")":
                self.refuse("a group without an end")
            return f"({inner})"
        if char == "[":
            return _one_of(self._char_class())
        if char == ".":
            return _one_of(_without([(0x0A, 0x0A), (0x0D, 0x0D)]))
        if char == "\\":
            return _one_of(self._escape())
        if char in "^$*+?{":
            self.refuse(f"`{char}` in this place")
        return _one_of([(ord(char), ord(char))])

    def _quantifier(self) -> str:
        found = _QUANTIFIER.match(self.rest)
        if not found:
            return ""
        self._take(len(found[0]))
        if self.rest[:1] in ("?", "+", "*", "{") and self.rest:
            self.refuse(f"`{self.rest[0]}` behind a quantifier")
        return found[0]

    def _escape(self) -> Ranges:
        char = self._take(1)
        if char in _CLASSES:
            return _CLASSES[char]
        if char and char.lower() in _CLASSES:
            return _without(_CLASSES[char.lower()])
        if char in _ESCAPED:
            return [(_ESCAPED[char], _ESCAPED[char])]
        if char in ("x", "u"):
            digits = self._take(2 if char == "x" else 4)
            if not re.fullmatch(r"[0-9a-fA-F]{2}|[0-9a-fA-F]{4}", digits):
                self.refuse(f"`\\{char}{digits}`")
            return [(int(digits, 16), int(digits, 16))]
        if not char or char.isalnum():
            self.refuse(f"`\\{char}`")
        return [(ord(char), ord(char))]

    def _char_class(self) -> Ranges:
        negated = self.rest.startswith("^")
        if negated:
            self._take(1)
        ranges: Ranges = []
        while not self.rest.startswith("]"):
            first = self._class_part()
            if self.rest.startswith("-") and not self.rest.startswith("-]"):
                self._take(1)
                last = self._class_part()
                if len(first) != 1 or len(last) != 1 or first[0][0] > last[0][1]:
                    self.refuse("a range that has no two ends")
                first = [(first[0][0], last[0][1])]
            ranges.extend(first)
        self._take(1)
        return _without(ranges) if negated else ranges

    def _class_part(self) -> Ranges:
        char = self._take(1)
        if not char:
            self.refuse("a class without an end")
        return self._escape() if char == "\\" else [(ord(char), ord(char))]

    def _take(self, count: int) -> str:
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken


def _without(ranges: Ranges) -> Ranges:
    """All characters but those."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, _LAST)] if start <= _LAST else found


def _one_of(ranges: Ranges) -> str:
    """GBNF for one of these characters as JSON writes it inside a string."""
    plain, escaped = [], []
    for low, high in _plain_parts(sorted(ranges)):
        plain.append(f"\\U{low:08X}-\\U{high:08X}" if low < high else f"\\U{low:08X}")
    for code, short in _JSON_ESCAPES.items():
        if any(low <= code <= high for low, high in ranges):
            escaped.append('"\\\\' + ("\\" + short if short in '"\\' else short) + '"')
    choices = [f"[{''.join(plain)}]", *escaped] if plain else escaped
    return f"({' | '.join(choices or [_NOTHING])})"


def _plain_parts(ranges: Ranges) -> Ranges:
    """The parts of the ranges that JSON writes as they are: no control character, quote, backslash or surrogate."""
    parts: Ranges = []
    for low, high in ranges:
        start = max(low, 0x20)
        for first, last in ((0x22, 0x22), (0x5C, 0x5C), (0xD800, 0xDFFF)):
            if start <= min(high, first - 1):
                parts.append((start, min(high, first - 1)))
            start = max(start, last + 1)
        if start <= high:
            parts.append((start, high))
    return parts

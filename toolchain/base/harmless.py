"""A stranger's text made harmless for a terminal: nothing in it moves the cursor, sets a title, writes a clipboard."""

from __future__ import annotations

from typing import Final

_LINE_ENDS: Final = ("\x85", "\u2028", "\u2029")
_REORDERING: Final = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Bidirectional embeddings, overrides and isolates: they show a line in another order than it is read and copied."""

_SHOWN: Final = str.maketrans(
    {
        **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
        0x7F: "\u2421",
        **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
        **dict.fromkeys(_REORDERING, "\ufffd"),
        **{ord(character): "\n" for character in _LINE_ENDS},
    }
)
"""Control characters become the pictures that Unicode has for them: they are seen, and do nothing."""


class Harmless:
    """Text in pieces; a carriage return ends a line, alone or with the line feed that follows."""

    def __init__(self) -> None:
        self._after_return = False

    def feed(self, text: str) -> str:
        if self._after_return and text.startswith("\n"):
            text = text[1:]
            self._after_return = False
        if text:
            self._after_return = text.endswith("\r")
        return text.replace("\r\n", "\n").replace("\r", "\n").translate(_SHOWN)


def harmless(text: str) -> str:
    """The whole of ``text``."""
    return Harmless().feed(text)

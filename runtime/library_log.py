"""The library's log: silent unless asked for, its last lines kept as evidence of a failure."""

from __future__ import annotations

import sys
from collections import deque
from typing import Final

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level in ggml.h
_KEPT_LINES: Final = 2000  # a load tells of each layer
_EVIDENCE_LINES: Final = 12


class LibraryLog:
    """The library's last lines, kept as evidence; shown only when asked for."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self._lines: deque[tuple[int, str]] = deque(maxlen=_KEPT_LINES)
        self._open = ""
        self._level = 0

    def write(self, level: int, raw: bytes | None, _data: object = None) -> None:
        """One message; level 5 continues the line before."""
        text = (raw or b"").decode("utf-8", "replace")
        if self.shown:
            sys.stderr.write(text)
        if level != _CONTINUED:
            self._level = level
        *whole, self._open = (self._open + text).split("\n")
        self._lines.extend((self._level, line) for line in whole if line.strip())

    def lines(self) -> list[str]:
        """The lines that are kept, oldest first."""
        return [line for _, line in self._lines]

    def tail(self) -> str:
        """The last warnings and errors; of a library that gave none, its last lines."""
        bad = [line for level, line in self._lines if level in (_WARN, _ERROR)]
        return "\n".join((bad or [line for _, line in self._lines])[-_EVIDENCE_LINES:])

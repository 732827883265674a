"""The library's log: silent unless asked for, its last lines kept as evidence of a failure."""

from __future__ import annotations

import re
import sys
from collections import deque
from typing import Final

OUT_OF_MEMORY: Final = re.compile(r"failed to allocate|unable to allocate|out of memory|cudaMalloc", re.IGNORECASE)
"""How the log of the library, and of its programs, says that memory ran out."""

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level in ggml.h
_KEPT_LINES: Final = 2000  # a load tells of each layer
_EVIDENCE_LINES: Final = 12


class LibraryLog:
    """The library's last lines, kept as evidence; shown only when asked for."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self._lines: deque[tuple[int, str]] = deque(maxlen=_KEPT_LINES)
        self._written = 0
        self._begun = 0
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
        for line in filter(str.strip, whole):
            self._lines.append((self._level, line))
            self._written += 1

    def begin(self) -> None:
        """What comes from now on is of another operation: only that is told, and evidence of its failure."""
        self._begun = self._written

    def lines(self) -> list[str]:
        """The lines of this operation that are kept, oldest first."""
        return [line for _, line in self._of_this_operation()]

    def tail(self) -> str:
        """The last warnings and errors; of a library that gave none, its last lines."""
        found = self._of_this_operation()
        bad = [line for level, line in found if level in (_WARN, _ERROR)]
        return "\n".join((bad or [line for _, line in found])[-_EVIDENCE_LINES:])

    def _of_this_operation(self) -> list[tuple[int, str]]:
        count = min(self._written - self._begun, len(self._lines))
        return list(self._lines)[len(self._lines) - count :]

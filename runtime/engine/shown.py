"""Text onto a stream as it comes, flushed no more often than an eye can follow."""

from __future__ import annotations

import time
from typing import Final, TextIO

from toolchain.base.harmless import Harmless

FLUSH_S: Final = 0.005
"""A flush costs 10 microseconds and more where a reader is woken by it: at 4,000 tokens a second one in twenty-five."""


class Shown:
    """Writes at once, flushes when the last flush is ``FLUSH_S`` ago, and at ``end``.

    Tokens that come slower than that are each flushed; of faster ones the last waits for the next, or for the end.
    A terminal gets the text made harmless, anything else as it is.
    """

    __slots__ = ("_flushed", "_harmless", "_stream")

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._flushed = 0.0
        self._harmless = Harmless() if stream.isatty() else None

    def write(self, text: str) -> None:
        if text:
            self._stream.write(self._harmless.feed(text) if self._harmless else text)
            now = time.perf_counter()
            if now - self._flushed > FLUSH_S:
                self._stream.flush()
                self._flushed = now

    def end(self) -> None:
        """Flush what is left."""
        self._stream.flush()

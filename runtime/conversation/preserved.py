"""A stream in which whatever stands between two markers, a formula for instance, comes in one piece."""

from __future__ import annotations

from typing import Final

from toolchain.base.errors import UsageError

MARKER: Final = "$$"
MAX_CHARS: Final = 1 << 16
"""After so much text without a second marker the first was none: what follows streams."""


class PreservedSplitter:
    """Cuts a stream anew. The pieces together are the text that was fed, to the character.

    Text outside comes at once, but for an end that may be the beginning of a marker. From a marker to the next
    one, both included, the text comes whole; longer than ``limit`` characters it streams.
    """

    __slots__ = ("_held", "_limit", "_marker", "_seen", "_state")

    def __init__(self, marker: str = MARKER, *, limit: int = MAX_CHARS) -> None:
        if not marker:
            raise UsageError("the marker of preserved sequences is empty", hint=f"the usual one is {MARKER}")
        self._marker, self._limit = marker, limit
        self._held = ""
        self._seen = 0  # characters of _held that hold no end of a closing marker
        self._state = "outside"  # or inside, or long: inside beyond the limit

    def feed(self, text: str) -> list[str]:
        """The pieces that are complete with ``text``; none is empty."""
        self._held += text
        pieces: list[str] = []
        position = 0
        while (end := self._piece_end(position)) is not None:
            if end > position:
                pieces.append(self._held[position:end])
            position = end
        self._held, self._seen = self._held[position:], max(self._seen - position, 0)
        return pieces

    def flush(self) -> list[str]:
        """What still waits, as it is; the stream may begin anew."""
        held, self._held, self._seen, self._state = self._held, "", 0, "outside"
        return [held] if held else []

    def _piece_end(self, start: int) -> int | None:
        """The end of the piece that begins at ``start``, perhaps an empty one; None when more text is needed."""
        size, body = len(self._marker), start
        if self._state == "inside":
            body = start + size
            end = self._held.find(self._marker, max(self._seen, body))
            if end >= 0:
                self._state = "outside"
                return end + size
            self._seen = max(len(self._held) - size + 1, body)
            if len(self._held) - start <= self._limit:
                return None
            self._state = "long"
        at = self._held.find(self._marker, body)
        if at < 0:
            tail = self._held[max(body, len(self._held) - size + 1) :]
            ready = len(self._held) - half_marker(tail, self._marker)
            return ready if ready > start else None
        if self._state == "long":
            self._state = "outside"
            return at + size
        self._state, self._seen = "inside", 0
        return at


def half_marker(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``marker`` and not all of it."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0

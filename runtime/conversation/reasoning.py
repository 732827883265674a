"""What a model thinks before it answers, kept apart from the answer while both stream."""

from __future__ import annotations

from typing import Final

from runtime.conversation.preserved import half_marker
from toolchain.base.errors import UsageError

OPEN: Final = "<think>"
CLOSE: Final = "</think>"
_LINE_BREAKS: Final = "\r\n"


class ReasoningSplitter:
    """Splits a stream into reasoning (between ``open`` and ``close``, any number of times) and answer.

    ``inside`` says that the prompt ended within a block, as templates do that open it for the model. The markers
    belong to neither; the line breaks after a ``close`` are dropped, all other text stays as it is. An end that may
    be the beginning of a marker waits for the rest of it.
    """

    __slots__ = ("_close", "_held", "_inside", "_open", "_trims")

    def __init__(self, open: str = OPEN, close: str = CLOSE, inside: bool = False) -> None:
        if not open or not close:
            raise UsageError("a marker of reasoning is empty", hint=f"the usual ones are {OPEN} and {CLOSE}")
        self._open, self._close, self._inside = open, close, inside
        self._held = ""
        self._trims = False

    @property
    def inside(self) -> bool:
        """Whether the text so far ends within a block."""
        return self._inside

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and answer that ``text`` completes; either may be empty."""
        self._held += text
        reasoning: list[str] = []
        answer: list[str] = []
        position = 0
        while True:
            marker = self._close if self._inside else self._open
            at = self._held.find(marker, position)
            if at < 0:
                ready = len(self._held) - half_marker(self._held[position:], marker)
                self._sort(self._held[position:ready], reasoning, answer)
                self._held = self._held[ready:]
                return "".join(reasoning), "".join(answer)
            self._sort(self._held[position:at], reasoning, answer)
            position = at + len(marker)
            self._trims = self._inside
            self._inside = not self._inside

    def flush(self) -> tuple[str, str]:
        """What waits for the rest of a marker that does not come, as text of the part that it stands in."""
        held, self._held = self._held, ""
        reasoning: list[str] = []
        answer: list[str] = []
        self._sort(held, reasoning, answer)
        return "".join(reasoning), "".join(answer)

    def _sort(self, text: str, reasoning: list[str], answer: list[str]) -> None:
        if self._inside:
            reasoning.append(text)
            return
        if self._trims:
            text = text.lstrip(_LINE_BREAKS)
            self._trims = not text
        answer.append(text)

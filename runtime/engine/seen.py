"""A prompt with images between its words."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.engine.context import Context
from runtime.engine.generate import SingleSteps
from runtime.interrupts import Interrupt

if TYPE_CHECKING:
    from runtime.engine.vision import Vision


@dataclass(frozen=True, kw_only=True)
class Part:
    """One piece of what the library makes of an image: words that stand around it, or a picture to be encoded.

    ``tokens`` are the words' or, below 0, one for each position of the picture; ``cells`` of the cache hold it. The
    library's ``chunk`` of a picture lives as long as its ``owner``.
    """

    tokens: tuple[int, ...]
    cells: int
    chunk: Any = None
    owner: object = None


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where a picture stands among the positions of a prompt."""

    start: int
    end: int
    part: Part


class Seen:
    """A prompt with images, ready to be decoded: ``tokens`` has one number for each position.

    ``spans`` tells which of them are pictures. Made by ``Vision.see``, and of a prompt without images by no ``vision``.
    """

    def __init__(self, vision: Vision | None, parts: Iterable[Part]) -> None:
        self.tokens: list[int] = []
        self.spans: list[Span] = []
        self._vision = vision
        for part in parts:
            start = len(self.tokens)
            self.tokens += part.tokens
            if part.chunk:
                self.spans.append(Span(start=start, end=len(self.tokens), part=part))

    @property
    def n_tokens(self) -> int:
        """Cells of the cache that it takes; a model of M-RoPE counts fewer positions for an image."""
        return self.cells(len(self.tokens))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(span.start, span.end) for span in self.spans]

    @property
    def text_tokens(self) -> list[int]:
        return [token for token in self.tokens if token >= 0]

    def cells(self, positions: int) -> int:
        """Cells that its first ``positions`` take."""
        return positions + sum(span.part.cells - len(span.part.tokens) for span in self.spans if span.end <= positions)

    def decode(self, context: Context, interrupt: Interrupt | None) -> bool:
        """Decode what is not cached; False when interrupted (the cache stays right), which no image's encoding is."""
        for span in self.spans:
            if span.end <= len(context.cached):
                continue
            if not context.decode_prompt(self.tokens[: span.start], interrupt):
                return False
            if interrupt and interrupt.raised:
                return False
            assert self._vision is not None
            self._vision.look(context, span, len(self.tokens))
        return context.decode_prompt(self.tokens, interrupt)


def words(tokens: Sequence[int]) -> Part:
    """A stretch of words alone."""
    return Part(tokens=tuple(tokens), cells=len(tokens))


class PlacedSteps(SingleSteps):
    """Single tokens behind images of a model that counts fewer positions for them than they have cells."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._cached = context.cached
        self._at = (ctypes.c_int32 * 1)()
        self._batch.pos = self._at

    def advance(self, token: int) -> int:
        """Decode it where the positions have come to."""
        self._at[0] = len(self._cached)
        return super().advance(token)

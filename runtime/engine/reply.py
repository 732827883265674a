"""What a reply consists of: pieces of text, then figures; and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from runtime.engine.text import Pieces, TextStream

if TYPE_CHECKING:
    from runtime.engine.logprobs import TokenLogprob

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
"""``stop``: the model ended or a stop string came; ``length``: the limit or the context; ``cancelled``: Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class ReplyStats:
    """Figures of one reply.

    ``prompt_tokens`` counts all of the prompt, ``cached_tokens`` those that were in the cache already and
    ``processed_tokens`` those that ``prompt_seconds`` timed (fewer than the rest only after Ctrl-C);
    ``generation_steps`` counts the tokens that were decoded after the prompt, which ``generation_seconds`` timed;
    ``drafted_tokens`` those that were guessed ahead, ``accepted_tokens`` the guesses that were right.
    """

    prompt_tokens: int
    cached_tokens: int
    processed_tokens: int
    completion_tokens: int
    generation_steps: int
    prompt_seconds: float
    generation_seconds: float
    ttft_ms: float
    finish_reason: FinishReason
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second, of those that were processed."""
        return _rate(self.processed_tokens, self.prompt_seconds)

    @property
    def generation_tps(self) -> float:
        return _rate(self.generation_steps, self.generation_seconds)


class Chunk(NamedTuple):
    """A piece of the reply; the last one carries the figures (and often no text).

    ``token`` is there when log-probabilities were asked for: then each token has a chunk of its own, without text
    while a character or a possible stop string is unfinished.
    """

    text: str
    stats: ReplyStats | None = None
    token: TokenLogprob | None = None


class Reply:
    """One reply in the making: its tokens counted and turned into text, until ``finish`` says why it ended."""

    __slots__ = ("_limit", "_pieces", "_splitter", "_text", "finish", "tokens")

    def __init__(self, pieces: Pieces, limit: int, stops: Sequence[str]) -> None:
        self._pieces = pieces
        self._limit = limit
        self._text = TextStream()
        self._splitter = StopSplitter(stops) if any(stops) else None
        self.tokens = 0
        self.finish: FinishReason | None = None if limit > 0 else "length"

    def take(self, token: int) -> str:
        """The text that ``token`` completes, maybe none; sets ``finish`` at the end, a stop string or the limit."""
        piece = self._pieces[token]
        if piece is None:
            self.finish = "stop"
            return ""
        self.tokens += 1
        if self.tokens == self._limit:
            self.finish = "length"
        text = self._text.feed(piece)
        if self._splitter:
            text, found = self._splitter.feed(text)
            if found:
                self.finish = "stop"
                self._text = TextStream()
        return text

    def rest(self) -> str:
        """What was held back when the reply ended, and is no part of a stop string."""
        end = self._text.flush()
        if not self._splitter:
            return end
        text, found = self._splitter.feed(end)
        return text if found else text + self._splitter.flush()


def stats_line(stats: ReplyStats, *, threads: int) -> str:
    """The one line of figures after a reply."""
    parts = [
        f"{_counted(stats.completion_tokens, 'token')}, {stats.generation_tps:.0f} t/s generation",
        f"{_counted(stats.prompt_tokens, 'prompt token')} ({stats.cached_tokens} cached), {stats.prompt_tps:.0f} t/s",
        _counted(threads, "thread"),
    ]
    if stats.finish_reason == "length":
        parts.append("cut at the token limit or the end of the context")
    elif stats.finish_reason == "cancelled":
        parts.append("stopped")
    return "; ".join(parts)


class StopSplitter:
    """Finds stop strings in text that comes in pieces; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(filter(None, stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string ended it). The stop string itself is dropped."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = self._suspect(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and turned out to be harmless."""
        held, self._held = self._held, ""
        return held

    def _suspect(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

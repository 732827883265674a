"""A reply out of what a server streams: its pieces, and its figures when it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from runtime.chat.backend import Figures, Piece
from runtime.chat.endpoint.ask import not_an_answer, read_json
from runtime.chat.endpoint.chunk import Halves, Told, count, error_words, rate, read_chunk
from runtime.chat.endpoint.errors import Refusal, is_context_full, refused
from runtime.chat.endpoint.sse import DONE, EventReader, FloodError
from runtime.chat.endpoint.wire import Answer
from runtime.conversation.reasoning import ReasoningSplitter
from toolchain.base import console
from toolchain.base.errors import FetchError

ENDED_EARLY: Final = "ended early"
_LAST_WORDS_S: Final = 10.0
"""For the figures, once the reply has ended: some servers never close a stream."""
_HEARTBEATS: Final = 10
"""Silences that heartbeats may bridge before the first and between two chunks; then nobody works behind them."""

_GARBAGE: Final = 1000
"""Parts that make no sense, until none is expected to."""
_NOTHING: Final = Told()


class Reply:
    """One reply being read. ``pieces`` yields it; ``figures`` holds from then on, and after a cancellation too."""

    def __init__(self, *, asked_at: float, silence_s: float) -> None:
        self._asked_at = asked_at
        self._silence_s = silence_s
        self._first_at = self._last_at = 0.0
        self._told_at = asked_at
        self._finish = ""
        self._done = False
        self._tool = ""
        self._usage: dict[str, Any] = {}
        self._timings: Mapping[str, Any] = {}
        self._garbage = 0
        self._garbage_shown = ""
        self._splitter = ReasoningSplitter()
        self._halves = Halves()

    def pieces(self, answer: Answer) -> Iterator[Piece]:
        """FetchError when it fails; Cancelled after an interrupt. An end without a word is told, what came stays."""
        kind = answer.head.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in ("application/json", "text/html"):
            yield from self._whole(answer)
        else:
            yield from self._stream(answer)
        yield from self.rest()
        if not self._finish and not self._done:
            self._tell_early_end(answer)
        if self._garbage:
            shown = answer.server.safe(self._garbage_shown, limit=80)
            console.warn(f"{self._garbage} parts of the reply made no sense and are left out, such as {shown!r}")
        if self._tool:
            console.warn(f"the model called a tool, {answer.server.safe(self._tool, limit=80)}, which is not there")

    def rest(self) -> Iterator[Piece]:
        """What waited for more."""
        reasoning, text = self._splitter.feed(self._halves.flush())
        more_reasoning, more_text = self._splitter.flush()
        yield from self._piece(reasoning + more_reasoning, text + more_text)

    def figures(self, finish_reason: str) -> Figures:
        """What the server tells, and by our clock what it does not; ``finish_reason`` is ours where it has none."""
        usage, timings = self._usage, self._timings
        details = usage.get("prompt_tokens_details")
        cached = count(details.get("cached_tokens") if isinstance(details, dict) else timings.get("cache_n"))
        processed = count(timings.get("prompt_n"))
        prompt = count(usage.get("prompt_tokens"))
        if prompt is None and processed is not None:
            prompt = processed + (cached or 0)
        tokens = count(usage.get("completion_tokens", timings.get("predicted_n")))
        took_s = self._last_at - self._first_at
        measured = (tokens - 1) / took_s if tokens and tokens > 1 and took_s > 0 else None
        return Figures(
            finish_reason=finish_reason,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=tokens,
            prompt_tps=rate(timings.get("prompt_per_second")),
            generation_tps=rate(timings.get("predicted_per_second")) or measured,
            ttft_ms=(self._first_at - self._asked_at) * 1000 if self._first_at else None,
        )

    @property
    def finish_reason(self) -> str:
        return self._finish or ("stop" if self._done else ENDED_EARLY)

    def _stream(self, answer: Answer) -> Iterator[Piece]:
        reader = EventReader()
        self._told_at = time.monotonic()
        try:
            for data in answer.chunks():
                for event in reader.feed(data):
                    yield from self._take(event, answer)
                    answer.check()
                    if self._done:
                        return
                self._watch_clock(answer)
            for event in reader.end():
                yield from self._take(event, answer)
        except FloodError:
            raise FetchError(
                f"{answer.server} sends more than a reply can be",
                evidence="a flood of bytes with no part of the reply in it",
                hint="check that the address is an OpenAI-compatible API",
            ) from None
        except FetchError:
            if not self._finish:  # once the reply has ended, nothing is lost by what fails
                raise

    def _watch_clock(self, answer: Answer) -> None:
        bound_s = _HEARTBEATS * self._silence_s
        if time.monotonic() - self._told_at > bound_s:
            raise FetchError(
                f"{answer.server} sends signs of life, and nothing else",
                evidence=f"no part of the reply for {bound_s:g} s",
                hint="see whether the server still works, then send the message again",
            )

    def _whole(self, answer: Answer) -> Iterator[Piece]:
        """The reply of a server that does not stream."""
        value = read_json(answer, within_s=self._silence_s)
        if not isinstance(value, dict):
            raise not_an_answer(answer.server, str(value)[:2000])
        yield from self._take(value, answer)
        self._done = self._done or bool(value.get("choices"))

    def _take(self, event: Mapping[str, Any] | str, answer: Answer) -> Iterator[Piece]:
        if event == DONE:
            self._done = answer.ended = True
            return
        if isinstance(event, str):
            self._garbage += 1
            if self._garbage > _GARBAGE:
                raise FloodError
            self._garbage_shown = self._garbage_shown or event
            return
        told = read_chunk(event)
        if told.error is not None:
            raise _error_within(told.error, answer)
        yield from self._said(told)
        if told != _NOTHING:
            self._told_at = time.monotonic()
        self._usage.update(told.usage)
        self._timings = told.timings or self._timings
        self._tool = self._tool or told.tool
        if told.finish and not self._finish:
            self._finish = answer.server.safe(told.finish, limit=40)
            answer.allow(_LAST_WORDS_S)

    def _said(self, told: Told) -> Iterator[Piece]:
        if not (told.text or told.reasoning):
            return
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at
        reasoning, text = self._splitter.feed(self._halves.feed(told.text)) if told.text else ("", "")
        yield from self._piece(told.reasoning + reasoning, text)

    def _piece(self, reasoning: str, text: str) -> Iterator[Piece]:
        if reasoning or text:
            yield Piece(text=text, reasoning=reasoning)

    def _tell_early_end(self, answer: Answer) -> None:
        if self._first_at:
            console.warn(f"{answer.server} ended the reply early: its end is missing")
            return
        if self._garbage_shown:
            raise not_an_answer(answer.server, self._garbage_shown)
        raise FetchError(
            f"{answer.server} ended without a reply",
            evidence="the stream has neither text nor an end",
            hint="see the server's log, then send the message again",
        )


def _error_within(error: object, answer: Answer) -> FetchError:
    """The error that a server tells within a reply, after it has promised one."""
    server = answer.server
    words, code = error_words(error)
    said = server.safe(words or str(error))
    refusal = Refusal(status=400, words=said, code=server.safe(code), url=str(answer.request.url))
    if is_context_full(refusal):
        return refused(refusal, server)
    return server.failed(
        f"{server} broke off the reply", evidence=said, hint="see the server's log, then send the message again"
    )

"""The loop per token: draw, take its text, decode it; on buffers and objects made once."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from runtime.engine.context import Context
from runtime.engine.reply import Chunk, FinishReason, Reply
from runtime.interrupts import Interrupt

if TYPE_CHECKING:
    from runtime.engine.logprobs import Adjust, Logprobs, Rows, TokenLogprob


class Outcome(NamedTuple):
    """How a generation went; ``first_at`` is when its first token was drawn, ``steps`` the tokens decoded."""

    finish: FinishReason
    tokens: int
    steps: int
    first_at: float


class Steps(Protocol):
    """Brings about the logits that follow a token; they are then in row ``row`` of the last batch."""

    row: int

    def advance(self, token: int) -> int:
        """Go on behind ``token``; what ``llama_decode`` returns."""
        ...

    def finish(self) -> None:
        """Leave in the cache what was advanced over and nothing else."""
        ...


class SingleSteps:
    """One token, one decode."""

    row = -1

    def __init__(self, context: Context) -> None:
        lib = context.model.lib
        self._handle = context.handle
        self._decode = lib.llama_decode
        self._one = (ctypes.c_int32 * 1)()
        self._batch = lib.llama_batch_get_one(self._one, 1)
        self._remember = context.cached.append

    def advance(self, token: int) -> int:
        """Decode it."""
        self._one[0] = token
        status: int = self._decode(self._handle, self._batch)
        if not status:
            self._remember(token)
        return status

    def finish(self) -> None:
        """Nothing is ever decoded ahead."""


class Watch:
    """Looks at a row of logits before a token is drawn from it: keeps its probabilities, lets a hook change it."""

    def __init__(self, rows: Rows, logprobs: Logprobs | None, adjust: Adjust | None) -> None:
        self._rows = rows
        self._logprobs = logprobs
        self._adjust = adjust

    def before(self, row: int) -> None:
        if self._logprobs:
            self._logprobs.look(row)
        if self._adjust:
            self._adjust(self._rows[row])

    def after(self, token: int) -> TokenLogprob | None:
        return self._logprobs.of(token) if self._logprobs else None


def generate(
    context: Context,
    reply: Reply,
    draw: Callable[[int], int],
    steps: Steps,
    interrupt: Interrupt,
    watch: Watch | None = None,
) -> Generator[Chunk, None, Outcome]:
    """The reply as text, never cut inside a character; how it went is the generator's value.

    When the consumer leaves early, the cache holds the tokens that were decoded and says so.
    """
    take, advance = reply.take, steps.advance
    before = len(context.cached)
    info: TokenLogprob | None = None
    count = 0
    first_at = 0.0
    try:
        while reply.finish is None:
            if watch:
                watch.before(steps.row)
            token = draw(steps.row)
            if not first_at:
                first_at = time.perf_counter()
            text, counted = take(token), reply.tokens
            if watch:
                info = watch.after(token) if counted > count else None
                count = counted
            if text or info:
                yield Chunk(text, None, info)
            if reply.finish:
                break
            if interrupt.raised:
                reply.finish = "cancelled"
            elif status := advance(token):
                reply.finish = context.stopped(status)
        done = len(context.cached) - before
        if rest := reply.rest():
            yield Chunk(rest)
    finally:
        steps.finish()
    return Outcome(reply.finish or "stop", reply.tokens, done, first_at or time.perf_counter())

"""Several replies decoded in one batch: a decode that reads the weights once for all of them.

Each reply has a sampler chain, a limit and stop strings of its own, and a sequence of the cache. What the prompts
begin with in common is decoded once, in sequence 0, and shared. A reply that ends makes place for one that waits.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from runtime.engine.context import Context
from runtime.engine.draw import Sampler
from runtime.engine.logprobs import Rows
from runtime.engine.prefix import common_prefix
from runtime.engine.reply import Chunk, FinishReason, Reply, ReplyStats
from runtime.engine.sampling import SamplingOptions
from runtime.engine.text import Pieces
from runtime.interrupts import Interrupt
from runtime.settings import MOST_SEQUENCES


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, how its reply is drawn, and where it ends; ``limit`` is in tokens and leaves room in the context."""

    index: int
    prompt: list[int]
    sampling: SamplingOptions
    limit: int
    stops: Sequence[str]

    @property
    def room(self) -> int:
        """Places of the cache that it may take: its last token is never decoded."""
        return len(self.prompt) + max(self.limit, 1) - 1


@dataclass(kw_only=True)
class Lane:
    """A reply in the making: the sequence of the cache it has, what is to be decoded next, and the row it ended in."""

    request: Request
    sequence: int
    reply: Reply
    sampler: Sampler
    todo: list[int]
    at: int
    cached: int
    admitted: float
    row: int | None = None
    prompt_done: float = 0.0
    first_at: float = 0.0
    steps: int = 0


@dataclass(kw_only=True)
class Together:
    """Requests decoded together on ``context``; ``run`` gives their chunks as they come."""

    context: Context
    pieces: Pieces
    interrupt: Interrupt
    waiting: list[Request]
    rows: Rows = field(init=False)
    lanes: list[Lane] = field(default_factory=list)
    shared: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        lib = self.context.model.lib
        self._lib = lib
        self._memory = lib.llama_get_memory(self.context.handle)
        self.rows = Rows(self.context.model, self.context.handle)
        self._batch = _Batch(lib, self.context.n_batch)
        self._most = min(lib.llama_n_seq_max(self.context.handle) - 1, MOST_SEQUENCES)

    def run(self) -> Iterator[tuple[int, Chunk]]:
        """(index of the request, chunk) as they come; the last chunk of each carries its figures."""
        try:
            self._share_prefix()
            while self.waiting or self.lanes:
                if self.interrupt.raised:
                    yield from self._cancel()
                    return
                self._admit()
                status = self._decode()
                for lane in list(self.lanes):
                    if status:
                        lane.reply.finish = self.context.stopped(status)
                    elif lane.row is None:
                        continue
                    else:
                        yield from self._draw(lane)
                    if lane.reply.finish:
                        if rest := lane.reply.rest():
                            yield lane.request.index, Chunk(rest)
                        yield lane.request.index, Chunk("", self._stats(lane))
                        self._leave(lane)
        finally:
            for lane in list(self.lanes):
                self._leave(lane)

    def _share_prefix(self) -> None:
        """What all prompts begin with goes into sequence 0; the last token of each is left to its own sequence."""
        prompts = [request.prompt for request in self.waiting]
        first, *others = prompts
        shared = min([len(prompt) - 1 for prompt in prompts] + [common_prefix(first, other) for other in others])
        prefix = first[:shared]
        if not prefix:
            self.context.clear()
            return
        self.context.reuse([*prefix, first[shared]])
        if self.context.decode_prompt(prefix, self.interrupt):
            self.shared = shared

    def _admit(self) -> None:
        """Let in those who wait, in order, while there is a sequence and room for all that they may become."""
        taken = {lane.sequence for lane in self.lanes}
        while self.waiting and len(self.lanes) < self._most:
            used = self.shared + sum(lane.request.room - self.shared for lane in self.lanes)
            request = self.waiting[0]
            if self.lanes and used + request.room - self.shared > self.context.n_ctx:
                return
            sequence = next(each for each in count(1) if each not in taken)
            taken.add(sequence)
            sampler = Sampler(
                self.context.model,
                self.context.handle,
                request.sampling,
                rows=self.rows,
                pieces=self.pieces,
                prompt=request.prompt,
            )
            del self.waiting[0]
            if self.shared:
                self._lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            self.lanes.append(
                Lane(
                    request=request,
                    sequence=sequence,
                    reply=Reply(self.pieces, request.limit, request.stops),
                    sampler=sampler,
                    todo=request.prompt[self.shared :],
                    at=self.shared,
                    cached=self.shared,
                    admitted=time.perf_counter(),
                )
            )

    def _decode(self) -> int:
        """One batch: the next token of each reply, and as much of new prompts as there is place for."""
        batch = self._batch
        batch.size = 0
        for lane in sorted(self.lanes, key=lambda lane: len(lane.todo)):
            lane.row = None
            part = lane.todo[: batch.places - batch.size]
            if part:
                lane.todo = lane.todo[len(part) :]
                lane.row = batch.add(part, lane.at, lane.sequence, wanted=not lane.todo)
                lane.at += len(part)
        status: int = self._lib.llama_decode(self.context.handle, batch.filled())
        return status

    def _draw(self, lane: Lane) -> Iterator[tuple[int, Chunk]]:
        assert lane.row is not None
        if lane.reply.finish:  # no token is wanted
            self._lib.llama_synchronize(self.context.handle)
            lane.prompt_done = time.perf_counter()
            return
        if lane.prompt_done:
            lane.steps += 1
        token = lane.sampler.draw(lane.row)
        if not lane.prompt_done:
            lane.prompt_done = lane.first_at = time.perf_counter()
        if text := lane.reply.take(token):
            yield lane.request.index, Chunk(text)
        lane.todo = [token]

    def _leave(self, lane: Lane) -> None:
        self.context.forget(lane.sequence)
        lane.sampler.close()
        self.lanes.remove(lane)

    def _cancel(self) -> Iterator[tuple[int, Chunk]]:
        for lane in list(self.lanes):
            lane.reply.finish = "cancelled"
            if rest := lane.reply.rest():
                yield lane.request.index, Chunk(rest)
            yield lane.request.index, Chunk("", self._stats(lane))
        for request in self.waiting:
            yield request.index, Chunk("", _no_stats(request, "cancelled"))

    def _stats(self, lane: Lane) -> ReplyStats:
        now = time.perf_counter()
        prompt_done = lane.prompt_done or now
        prompt = len(lane.request.prompt)
        return ReplyStats(
            prompt_tokens=prompt,
            cached_tokens=lane.cached,
            processed_tokens=prompt - lane.cached if lane.prompt_done else lane.at - lane.cached,
            completion_tokens=lane.reply.tokens,
            generation_steps=lane.steps,
            prompt_seconds=prompt_done - lane.admitted,
            generation_seconds=now - prompt_done,
            ttft_ms=((lane.first_at or now) - self.started) * 1000,
            finish_reason=lane.reply.finish or "stop",
        )


class _Batch:
    """A ``llama_batch`` for tokens of several sequences, on buffers made once."""

    def __init__(self, lib: Any, places: int) -> None:
        self.places = places
        self.size = 0
        self._token = (ctypes.c_int32 * places)()
        self._pos = (ctypes.c_int32 * places)()
        self._counts = (ctypes.c_int32 * places)(*([1] * places))
        self._wanted = (ctypes.c_int8 * places)()
        self._sequence = (ctypes.c_int32 * places)()
        pointer, first = ctypes.POINTER(ctypes.c_int32), ctypes.addressof(self._sequence)
        at = (ctypes.cast(first + 4 * place, pointer) for place in range(places))
        self._sequences = (pointer * places)(*at)
        self._struct = lib.llama_batch_get_one(self._token, 0)
        self._struct.pos = self._pos
        self._struct.n_seq_id = self._counts
        self._struct.seq_id = self._sequences
        self._struct.logits = self._wanted

    def add(self, tokens: Sequence[int], at: int, sequence: int, *, wanted: bool) -> int | None:
        """Put ``tokens`` of a sequence in, from position ``at`` on; the row of the last one's logits if wanted."""
        start, end = self.size, self.size + len(tokens)
        self._token[start:end] = list(tokens)
        self._pos[start:end] = list(range(at, at + len(tokens)))
        self._sequence[start:end] = [sequence] * len(tokens)
        self._wanted[start:end] = [0] * len(tokens)
        self._wanted[end - 1] = wanted
        self.size = end
        return end - 1 if wanted else None

    def filled(self) -> Any:
        """The library's struct of what was added."""
        self._struct.n_tokens = self.size
        return self._struct


def _no_stats(request: Request, finish: FinishReason) -> ReplyStats:
    """Of a reply that never began."""
    return ReplyStats(
        prompt_tokens=len(request.prompt),
        cached_tokens=0,
        processed_tokens=0,
        completion_tokens=0,
        generation_steps=0,
        prompt_seconds=0,
        generation_seconds=0,
        ttft_ms=0,
        finish_reason=finish,
    )

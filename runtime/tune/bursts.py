"""Bursts of work on a small context: what a number of threads, or a size of micro-batch, is worth in tokens/s.

Numbers of threads switch by ``llama_set_n_threads`` without a reload; a batch of fewer tokens than the context's
``n_ubatch`` is computed as one micro-batch of that size, so one context serves every candidate.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, Final

from runtime.engine.context import Context
from runtime.interrupts import Interrupt
from toolchain.base.errors import FoundryError

_BURST_S: Final = 0.1
_PERIOD_S: Final = 0.1  # cpu.max and cpu.cfs_period_us unless someone changed it (kernel: sched-bwc.rst)
_QUOTA_BURST_S: Final = 2.5 * _PERIOD_S
_DEPTH: Final = 256  # tokens in the cache while generation is measured: a question and half an answer
_PROMPT: Final = 512
_LEAST_PROMPT: Final = 16


class Bench:
    """Bursts on one context; each method takes a candidate and returns tokens/s."""

    def __init__(self, context: Context, quota: float | None, interrupt: Interrupt) -> None:
        self._context = context
        self._lib = context.model.lib
        self._handle = context.handle
        self._memory = self._lib.llama_get_memory(context.handle)
        self._quota = quota
        self._interrupt = interrupt
        self._threads = [1, 1]
        self._token_s = self._prompt_tps = 0.0
        self._at = 0
        self.n_ubatch: int = self._lib.llama_n_ubatch(context.handle)
        self.batch = self.depth = self.whole = 0
        # Many different tokens, since a mixture of experts reads what they are routed to.
        count = context.model.n_vocab
        self._tokens = (ctypes.c_int32 * context.n_ctx)(*((7919 * i + 101) % count for i in range(context.n_ctx)))

    def warm_up(self, generation: int, batch: int, budget_s: float) -> None:
        """Bring the weights into memory with so many threads each, learn about how fast the model is, and choose the
        batch and the depth.
        """
        self.set_threads(generation, batch)
        self._decode(1)
        began = time.perf_counter()
        self._decode(1)
        self._token_s = time.perf_counter() - began
        size = min(_LEAST_PROMPT, self._context.n_ctx // 2)
        if size * self._token_s > budget_s:
            return  # a prompt's token costs no more than a generated one: not even this much is sure to end in time
        self._cut(0)
        self._decode(size)
        began = time.perf_counter()
        self._decode(size)
        self._prompt_tps = size / (time.perf_counter() - began)
        room = min(_PROMPT, self._context.n_ctx, self.n_ubatch)
        self.batch = max(min(size, room), min(room, _power_of_two(self._prompt_tps * 2 * self._burst_s())))
        self.depth = min(_DEPTH, self._context.n_ctx // 2, _power_of_two(self._prompt_tps * 0.5))
        self._refill()

    def can(self, name: str, budget_s: float) -> bool:
        """Whether the setting can be measured at all in ``budget_s`` seconds."""
        if name == "n_threads_batch":
            return self.batch > 0
        if name == "n_ubatch":
            # Two sizes, twice each.
            fitting = (n for n in (self._context.n_ctx, _PROMPT) if 4 * n < budget_s * self._prompt_tps)
            self.whole = min(next(fitting, 0), self._context.n_ctx)
            return self.whole > 0
        return True

    def set_threads(self, generation: int | None = None, batch: int | None = None) -> None:
        self._threads = [generation or self._threads[0], batch or self._threads[1]]
        self._lib.llama_set_n_threads(self._handle, *self._threads)

    def generation(self, threads: int) -> float:
        """Single tokens behind ``depth`` tokens of cache."""
        self.set_threads(generation=threads)
        self._refill()

        def one() -> int:
            if self._at >= self._context.n_ctx:
                self._refill()
            self._decode(1)
            return 1

        if self._token_s < _BURST_S / 4:
            one()  # the team of threads is made anew when its number changes
        return self._burst(one)

    def prompt(self, threads: int) -> float:
        """A batch of tokens into an empty cache."""
        self.set_threads(batch=threads)

        def batch() -> int:
            self._cut(0)
            self._decode(self.batch)
            return self.batch

        if self.batch / self._prompt_tps < _BURST_S / 4:
            batch()
        rate = self._burst(batch)
        self._prompt_tps = max(rate, self._prompt_tps)
        return rate

    def micro_batch(self, size: int) -> float:
        """A prompt of ``whole`` tokens in batches of ``size``."""

        def whole() -> int:
            self._cut(0)
            while self._at < self.whole:
                self._decode(min(size, self.whole - self._at))
            return self.whole

        return self._burst(whole)

    def _burst_s(self) -> float:
        return _BURST_S if self._quota is None else _QUOTA_BURST_S

    def _burst(self, step: Callable[[], int]) -> float:
        """Tokens/s of ``step`` repeated for a burst's time.

        A quota lets threads run at full speed until it is used up, and then stops them all until its period ends. So a
        burst begins with a fresh period, lasts several, and can be no faster than its CPU time can be paid for.
        """
        if self._quota is not None:
            time.sleep(_PERIOD_S)
        done, least = 0, self._burst_s()
        cpu, began = time.process_time(), time.perf_counter()
        while (elapsed := time.perf_counter() - began) < least:
            done += step()
        paid = (time.process_time() - cpu) / self._quota if self._quota else 0.0
        return done / max(elapsed, paid)

    def _refill(self) -> None:
        """``depth`` tokens in the cache; those of a model that cannot take back a part are decoded again."""
        if self._at != self.depth and not self._cut(self.depth):
            self._cut(0)
            if self.depth:
                self._decode(self.depth)

    def _cut(self, count: int) -> bool:
        """Leave the first ``count`` tokens in the cache, if it has so many and can."""
        if count == 0:
            self._lib.llama_memory_clear(self._memory, False)
        elif self._at < count or not self._lib.llama_memory_seq_rm(self._memory, 0, count, -1):
            return False
        self._at = count
        return True

    def _decode(self, count: int) -> None:
        if self._interrupt.raised:
            raise KeyboardInterrupt
        at: Any = ctypes.cast(ctypes.addressof(self._tokens) + 4 * self._at, ctypes.POINTER(ctypes.c_int32))
        if status := self._lib.llama_decode(self._handle, self._lib.llama_batch_get_one(at, count)):
            raise FoundryError(
                f"the library failed to decode while tuning (status {status})",
                evidence=self._context.model.log.tail(),
                hint="--no-tune goes without measuring",
            )
        self._lib.llama_synchronize(self._handle)
        self._at += count


def _power_of_two(most: float) -> int:
    """The largest power of two that is not more; 0 below 1."""
    return 1 << (int(most).bit_length() - 1) if most >= 1 else 0

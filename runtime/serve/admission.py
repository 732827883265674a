"""At most so many requests generate at once, at most so many wait, in the order they came."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

MAX_RETRY_AFTER_S = 300
_RECENT = 32  # replies whose durations tell how long the next ones take


class QueueFullError(Exception):
    """Nobody else may wait. ``retry_after_s``: when those who wait now will have had their turn."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """No new work is begun any more."""


class Admission:
    def __init__(self, *, parallel: int, max_queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._parallel = parallel
        self._max_queue = max_queue
        self._clock = clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._recent_s: deque[float] = deque(maxlen=_RECENT)
        self._closed = False
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Inside, one of the ``parallel`` places is held. Whoever is cancelled while waiting gives the place in the
        queue up. Raises QueueFullError and ClosedError."""
        await self._enter()
        began = self._clock()
        try:
            yield
        except BaseException:
            self._leave()
            raise
        self._recent_s.append(self._clock() - began)  # whole replies only: a broken one tells nothing
        self._leave()

    def retry_after_s(self) -> int:
        """Whole seconds until those who wait now will have had their turn, by the mean of the latest replies."""
        mean_s = sum(self._recent_s) / len(self._recent_s) if self._recent_s else 1.0
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(mean_s * (self.waiting + 1) / self._parallel)))

    def close(self) -> None:
        """Those who wait are sent away, those who generate go on, nobody else enters."""
        self._closed = True
        for ahead in self._waiting:
            if not ahead.done():
                ahead.set_exception(ClosedError())
        self._waiting.clear()

    async def _enter(self) -> None:
        if self._closed:
            raise ClosedError
        if self.in_flight < self._parallel and not self._waiting:
            self.in_flight += 1
            return
        if self.waiting >= self._max_queue:
            raise QueueFullError(self.retry_after_s())
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self._leave()  # the place came at the moment the client left: it goes on to the next
            elif mine in self._waiting:
                self._waiting.remove(mine)
            raise

    def _leave(self) -> None:
        """Hand the place to the first who still waits."""
        while self._waiting:
            following = self._waiting.popleft()
            if not following.done():
                following.set_result(None)
                return
        self.in_flight -= 1

"""Who generates, who waits, who is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from runtime.serve.admission import MAX_RETRY_AFTER_S, Admission, ClosedError, QueueFullError


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Guest:
    """A request that stays until it is let go."""

    def __init__(self, admission: Admission, log: list[str], name: str) -> None:
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._stay(admission, log, name))

    async def _stay(self, admission: Admission, log: list[str], name: str) -> None:
        async with admission.turn():
            log.append(name)
            await self.go.wait()


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scene

    asyncio.run(bounded())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_turns_come_in_the_order_of_arrival_and_never_too_many() -> None:
    async def scene() -> None:
        admission, log = Admission(parallel=2, max_queue=10), list[str]()
        guests = [Guest(admission, log, name) for name in "abcde"]
        await settle()
        assert (log, admission.in_flight, admission.waiting) == (["a", "b"], 2, 3)
        guests[1].go.set()
        await settle()
        assert (log, admission.in_flight, admission.waiting) == (["a", "b", "c"], 2, 2)
        for guest in guests:
            guest.go.set()
        await settle()
        assert (log, admission.in_flight, admission.waiting) == (list("abcde"), 0, 0)

    play(scene())


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    async def scene() -> None:
        admission, log = Admission(parallel=1, max_queue=10), list[str]()
        first, second = Guest(admission, log, "a"), Guest(admission, log, "b")
        await settle()
        first.go.set()
        third = Guest(admission, log, "c")
        await settle()
        assert log == ["a", "b"]
        second.go.set()
        third.go.set()
        await settle()
        assert log == ["a", "b", "c"]

    play(scene())


def test_beyond_the_queue_one_is_sent_away_with_a_time_from_recent_replies() -> None:
    async def scene() -> None:
        clock = Clock()
        admission, log = Admission(parallel=2, max_queue=1, clock=clock), list[str]()
        past = Guest(admission, log, "past")
        await settle()
        clock.now_s = 8.0
        past.go.set()
        await settle()
        guests = [Guest(admission, log, name) for name in "abc"]
        await settle()
        with pytest.raises(QueueFullError) as full:
            async with admission.turn():
                pass
        assert full.value.retry_after_s == 8  # two turns of 8 s, two at a time
        for guest in guests:
            guest.task.cancel()
        await settle()
        assert (admission.in_flight, admission.waiting) == (0, 0)

    play(scene())


def test_the_time_to_come_back_is_bounded() -> None:
    async def scene() -> None:
        clock = Clock()
        admission = Admission(parallel=1, max_queue=1, clock=clock)
        assert admission.retry_after_s() == 1
        async with admission.turn():
            clock.now_s = 1e6
        assert admission.retry_after_s() == MAX_RETRY_AFTER_S

    play(scene())


def test_one_who_leaves_the_queue_gives_the_place_up() -> None:
    async def scene() -> None:
        admission, log = Admission(parallel=1, max_queue=1), list[str]()
        first, second = Guest(admission, log, "a"), Guest(admission, log, "b")
        await settle()
        second.task.cancel()
        await settle()
        third = Guest(admission, log, "c")
        await settle()
        assert admission.waiting == 1
        first.go.set()
        third.go.set()
        await settle()
        assert (log, admission.in_flight) == (["a", "c"], 0)

    play(scene())


def test_a_turn_given_to_one_who_leaves_that_moment_goes_to_the_next() -> None:
    async def scene() -> None:
        admission, log = Admission(parallel=1, max_queue=5), list[str]()
        first, second, third = (Guest(admission, log, name) for name in "abc")
        await settle()
        first.go.set()
        while not first.task.done():  # the turn is b's now, and b has not run yet
            await asyncio.sleep(0)
        second.task.cancel()
        await settle()
        assert "c" in log
        third.go.set()
        await settle()
        assert (admission.in_flight, admission.waiting) == (0, 0)

    play(scene())


def test_closed_it_sends_those_who_wait_away_and_lets_the_rest_end() -> None:
    async def scene() -> None:
        admission, log = Admission(parallel=1, max_queue=5), list[str]()
        first, second = Guest(admission, log, "a"), Guest(admission, log, "b")
        await settle()
        admission.close()
        await settle()
        assert isinstance(second.task.exception(), ClosedError)
        assert not first.task.done()
        with pytest.raises(ClosedError):
            async with admission.turn():
                pass
        first.go.set()
        await settle()
        assert first.task.exception() is None
        assert admission.in_flight == 0

    play(scene())

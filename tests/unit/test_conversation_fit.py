"""What of a conversation fits: the fewest of the oldest turns are dropped, whole, with few counts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from runtime.conversation.fit import Fitted, fit
from runtime.conversation.messages import Message, turns_of
from toolchain.base.errors import UsageError


def tokens_of(messages: Sequence[Message]) -> int:
    return sum(3 + len(message["content"]) for message in messages)


def naive(messages: Sequence[Message], n_ctx: int, reserve: int) -> Fitted | None:
    """The same by trying one turn after the other."""
    turns = turns_of(messages)
    head = [message for message in messages[:1] if message["role"] == "system"]
    for dropped in range(len(turns)):
        kept = tuple(head + [message for turn in turns[dropped:] for message in turn])
        tokens = tokens_of(kept)
        if tokens < n_ctx and (tokens + reserve <= n_ctx or dropped == len(turns) - 1):
            return Fitted(messages=kept, tokens=tokens, dropped_turns=dropped)
    return None


def random_talk(rng: random.Random) -> list[Message]:
    roles = ["system"] * rng.randrange(2) + ["assistant"] * rng.randrange(2) + ["user"]
    roles += rng.choices(["user", "assistant", "tool"], k=rng.randrange(20))
    return [{"role": role, "content": "x" * rng.randrange(12)} for role in roles]


def test_it_drops_what_dropping_one_turn_after_the_other_drops() -> None:
    rng = random.Random(3)
    refused = 0
    for _ in range(1500):
        messages, n_ctx, reserve = random_talk(rng), rng.randrange(1, 160), rng.randrange(0, 60)
        expected = naive(messages, n_ctx, reserve)
        if expected is None:
            refused += 1
            with pytest.raises(UsageError):
                fit(messages, count=tokens_of, n_ctx=n_ctx, reserve=reserve)
        else:
            assert fit(messages, count=tokens_of, n_ctx=n_ctx, reserve=reserve) == expected
    assert 0 < refused < 1500


def test_a_long_conversation_is_counted_a_few_times() -> None:
    messages: list[Message] = [{"role": "system", "content": "s"}]
    messages += [{"role": role, "content": "x" * 20} for _ in range(1024) for role in ("user", "assistant")]
    counts: list[int] = []

    def count(kept: Sequence[Message]) -> int:
        counts.append(len(kept))
        return tokens_of(kept)

    fitted = fit(messages, count=count, n_ctx=2000, reserve=500)
    assert fitted == naive(messages, 2000, 500)
    assert len(counts) <= 12
    counts.clear()
    fit(messages[:9], count=count, n_ctx=2000, reserve=500)
    assert len(counts) == 1


def test_turns_dropped_before_stay_dropped() -> None:
    messages: list[Message] = [{"role": "user", "content": "x"} for _ in range(5)]
    assert fit(messages, count=tokens_of, n_ctx=1000, reserve=0, dropped=2).dropped_turns == 2
    assert fit(messages, count=tokens_of, n_ctx=1000, reserve=0, dropped=99).dropped_turns == 4
    assert fit(messages, count=tokens_of, n_ctx=9, reserve=0, dropped=2).dropped_turns == 3


def test_the_last_turn_may_take_the_reserve_but_not_all() -> None:
    messages: list[Message] = [{"role": "user", "content": "x" * 10}, {"role": "user", "content": "x" * 96}]
    assert fit(messages, count=tokens_of, n_ctx=100, reserve=25).tokens == 99
    with pytest.raises(UsageError, match="99 tokens; the context holds 99"):
        fit(messages, count=tokens_of, n_ctx=99, reserve=0)


def test_a_system_message_alone_is_counted_too() -> None:
    assert fit([], count=tokens_of, n_ctx=8, reserve=4) == Fitted(messages=(), tokens=0, dropped_turns=0)
    with pytest.raises(UsageError, match="system"):
        fit([{"role": "system", "content": "x" * 20}], count=tokens_of, n_ctx=8, reserve=4)


def test_a_failing_count_is_heard() -> None:
    def count(_: Sequence[Message]) -> int:
        raise UsageError("the template failed")

    with pytest.raises(UsageError, match="template"):
        fit([{"role": "user", "content": "x"}], count=count, n_ctx=8, reserve=4)

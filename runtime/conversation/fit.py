"""What of a conversation goes into the prompt: the oldest turns are dropped whole until the rest has room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.conversation.messages import Message, turns_of
from toolchain.base.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The messages that stay, the tokens of their prompt, and how many of the oldest turns are not among them."""

    messages: tuple[Message, ...]
    tokens: int
    dropped_turns: int


def fit(
    messages: Sequence[Message],
    *,
    count: Callable[[Sequence[Message]], int],
    n_ctx: int,
    reserve: int,
    dropped: int = 0,
) -> Fitted:
    """``messages`` with as few of the oldest turns dropped as leaves ``reserve`` of ``n_ctx`` tokens free.

    System messages at the head and the last turn always stay. When all others are dropped and ``reserve`` is
    still not free, one free token is enough. ``dropped`` turns are left out from the start: who drops the same
    turns as before keeps the prompt's beginning, which the cache holds. ``count`` tells the tokens of a prompt; it
    is asked once when everything fits, else about log2(turns) times, since fewer turns have fewer tokens.

    Raises UsageError when the last turn alone has no room.
    """
    turns = turns_of(messages)
    head = tuple(messages[: len(messages) - sum(map(len, turns))])
    most = max(len(turns) - 1, 0)

    def without(dropped_turns: int) -> Fitted:
        kept = head + tuple(message for turn in turns[dropped_turns:] for message in turn)
        return Fitted(messages=kept, tokens=count(kept), dropped_turns=dropped_turns)

    def has_room(fitted: Fitted) -> bool:
        return fitted.tokens + reserve <= n_ctx and fitted.tokens < n_ctx

    least = min(max(dropped, 0), most)
    best = without(least)
    if has_room(best):
        return best
    too_few, enough = least, most + 1  # enough: most + 1 is not reached, it stands for "the last turn as it is"
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        tried = without(middle)
        if has_room(tried):
            best, enough = tried, middle
        else:
            too_few = middle
            if middle == most:
                best = tried
    if best.tokens >= n_ctx:
        raise _no_room(best, n_ctx, bool(head))
    return best


def _no_room(last: Fitted, n_ctx: int, has_system: bool) -> UsageError:
    with_system = " with the system message" if has_system else ""
    shorter = ", shorten the system message" if has_system else ""
    return UsageError(
        f"this message{with_system} makes a prompt of {last.tokens} tokens; the context holds {n_ctx}",
        hint=f"send it in parts{shorter}, or start with a larger --n-ctx if the model has it",
    )

"""The search for the fastest of a few values: paired rounds, successive halving, fewer inside the noise.

Pure: what a value is worth is asked of a function. A rate that was measured beside a busy neighbour says little,
but the neighbour disturbs all values of one round alike; so values are compared round by round, never across.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

MOST_ROUNDS: Final = 9
SAME: Final = 0.02
"""Rates this close are alike: medians of a few bursts do not tell more on a quiet machine."""
UBATCH_SAME: Final = 0.05
"""The same for micro-batches: a smaller gain is not worth leaving the size that everybody uses."""
_HOPELESS: Final = 0.5  # of the best: values further out than such a one are not tried
_DROPPED: Final = ((2, 0.7), (3, 0.90), (5, 0.96))  # (rounds, of the leader): slower ones are out after so many rounds
_LEAST_ROUNDS: Final = 3
_FEW: Final = 2  # rounds that a comparison needs at least


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a value reached: the median rate in tokens/s, of how many bursts."""

    value: int
    rate: float
    bursts: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """The chosen value, every point that was measured, by value, and how unsteady the chosen one was.

    ``noise`` is the median deviation of the chosen value's bursts from their median, as a share of it; 0.0 where
    fewer than three bursts were taken.
    """

    value: int
    points: tuple[Point, ...]
    noise: float

    def rate(self, value: int) -> float:
        """The median rate of a measured value."""
        return next(point.rate for point in self.points if point.value == value)


def search(
    candidates: Iterable[int],
    start: int,
    sample: Callable[[int], float],
    *,
    budget_s: float,
    margin: float = SAME,
    fewest: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """The candidate with the highest rate; ``start`` unless another one beats it by ``margin`` in paired rounds.

    ``sample`` measures one burst and returns its rate. Rounds walk outwards from ``start`` and leave out what lies
    beyond a value that is far slower; what is clearly slower is dropped. Ends when one is left, after
    ``MOST_ROUNDS``, or when the next burst would pass ``budget_s``; ``start`` is measured in any case. With
    ``fewest`` the smallest value that is as fast as the best is taken.
    """
    deadline = clock() + budget_s
    values = sorted(set(candidates) | {start})
    untried = {"below": [v for v in values if v < start], "above": [v for v in reversed(values) if v > start]}
    edge = {"below": start, "above": start}
    alive = [start]
    rounds: list[dict[int, float]] = []
    longest = 0.0
    while len(rounds) < MOST_ROUNDS and (len(alive) > 1 or len(rounds) < _LEAST_ROUNDS):
        turn = len(rounds) % len(alive)
        todo = alive[turn:] + alive[:turn]
        rounds.append({})
        while todo:
            began = clock()
            if len(rounds) + len(rounds[-1]) > 1 and began + longest > deadline:
                return _decide(values, start, rounds, margin=margin, fewest=fewest)
            value = todo.pop(0)
            rounds[-1][value] = sample(value)
            longest = max(longest, clock() - began)
            for side, left in untried.items():
                if not todo and left and _median(edge[side], rounds) >= _HOPELESS * _best(rounds):
                    edge[side] = left.pop()
                    todo.append(edge[side])
                    alive.append(edge[side])
        alive = _still_in(alive, rounds)
    return _decide(values, start, rounds, margin=margin, fewest=fewest)


def _still_in(alive: Sequence[int], rounds: Sequence[dict[int, float]]) -> list[int]:
    least = max((share for after, share in _DROPPED if len(rounds) >= after), default=0.0)
    leader = max(alive, key=lambda value: _median(value, rounds))
    return [value for value in alive if value == leader or _ratio(value, leader, rounds) >= least]


def _decide(
    values: Sequence[int], start: int, rounds: Sequence[dict[int, float]], *, margin: float, fewest: bool
) -> Found:
    measured = [value for value in values if any(value in each for each in rounds)]
    chosen = start
    for value in sorted(measured, key=lambda value: _median(value, rounds), reverse=True):
        if value != start and _beats(value, start, rounds, margin):
            chosen = value
            break
    if fewest:
        alike = (v for v in measured if v < chosen and _ratio(v, chosen, rounds) >= 1 - SAME)
        chosen = next(alike, chosen)
    rates = [each[chosen] for each in rounds if chosen in each]
    middle = statistics.median(rates)
    noise = statistics.median(abs(rate - middle) for rate in rates) / middle if len(rates) > _FEW else 0.0
    return Found(
        value=chosen,
        points=tuple(
            Point(value=v, rate=_median(v, rounds), bursts=sum(v in each for each in rounds)) for v in measured
        ),
        noise=noise,
    )


def _beats(value: int, other: int, rounds: Sequence[dict[int, float]], margin: float) -> bool:
    """Faster by more than ``margin`` in the middle, and faster in two of three rounds."""
    pairs = [each[value] / each[other] for each in rounds if value in each and other in each]
    wins = sum(pair > 1 for pair in pairs)
    return len(pairs) >= _FEW and statistics.median(pairs) > 1 + margin and 3 * wins >= 2 * len(pairs)


def _ratio(value: int, other: int, rounds: Sequence[dict[int, float]]) -> float:
    """The middle of the two values' ratios, round by round; 0.0 where they did not meet often enough."""
    pairs = [each[value] / each[other] for each in rounds if value in each and other in each]
    return statistics.median(pairs) if len(pairs) >= _FEW else 0.0


def _best(rounds: Sequence[dict[int, float]]) -> float:
    return max(_median(value, rounds) for value in {value for each in rounds for value in each})


def _median(value: int, rounds: Sequence[dict[int, float]]) -> float:
    rates = [each[value] for each in rounds if value in each]
    return statistics.median(rates) if rates else 0.0

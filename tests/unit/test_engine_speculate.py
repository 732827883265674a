"""Prompt lookup: what is guessed, and when a guess is worth a batch."""

from __future__ import annotations

import random

import pytest

from runtime.engine.speculate import Matcher, Purse

SECOND = 1.0


def test_draft_is_what_followed_the_last_earlier_place() -> None:
    matcher = Matcher([1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 1, 2, 3])
    assert (matcher.matched, matcher.draft(3)) == (3, [6, 7, 8])


def test_two_tokens_will_do_and_one_will_not() -> None:
    assert Matcher([1, 2, 3, 9, 1, 2]).draft(1) == [3]
    assert Matcher([1, 2, 3, 9, 1]).draft(1) == []


def test_match_grows_while_the_text_follows_it_and_ends_where_it_leaves() -> None:
    matcher = Matcher([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3])
    matcher.add(4)
    assert (matcher.matched, matcher.draft(2)) == (4, [5, 6])
    matcher.add(8)
    assert (matcher.matched, matcher.draft(2)) == (0, [])


def test_repetition_that_reaches_the_end_goes_round() -> None:
    assert Matcher([1, 2, 3, 1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]


def test_every_draft_stood_in_the_text_behind_the_same_ending() -> None:
    dice = random.Random(0)
    matcher, text = Matcher([]), []
    for _ in range(2000):
        text.append(dice.randrange(5))
        matcher.add(text[-1])
        if matcher.matched:
            ending = text[-matcher.matched :]
            after = matcher.draft(1)
            places = range(len(text) - matcher.matched)
            assert any(text[at : at + matcher.matched + 1] == ending + after for at in places)


def gained(*, row_cost: float, right: bool, tokens: int) -> float:
    """Single decodes saved over a text of so many tokens that always matches, where drafts are right or wrong.

    A row more in a batch costs ``row_cost`` of a single decode.
    """
    purse, saved, made = Purse(), 0.0, 0
    while made < tokens:
        drafted = next((length for length in (15, 7, 3, 1) if purse.affords(length, 15)), 0)
        cost, brought = 1 + row_cost * drafted, 1 + drafted * right
        if drafted:
            purse.batch(drafted, drafted * right, cost * SECOND)
        else:
            purse.single(SECOND)
        saved, made = saved + brought - cost, made + brought
    return saved


@pytest.mark.parametrize("row_cost", [0.03, 0.3, 0.9])
def test_drafts_that_are_wrong_lose_less_than_two_percent(row_cost: float) -> None:
    assert -0.02 * 512 < gained(row_cost=row_cost, right=False, tokens=512) < 0


def test_batches_that_cost_more_than_they_can_bring_are_given_up() -> None:
    assert -0.02 * 512 < gained(row_cost=1.5, right=True, tokens=512) < 0


@pytest.mark.parametrize(("row_cost", "speedup"), [(0.03, 6), (0.3, 2), (0.6, 1.3)])
def test_drafts_that_are_right_go_on(row_cost: float, speedup: float) -> None:
    assert 512 / (512 - gained(row_cost=row_cost, right=True, tokens=512)) > speedup


def test_nothing_is_drafted_before_a_single_decode_was_timed() -> None:
    assert not Purse().affords(1, 100)


def test_a_long_match_is_trusted_with_an_empty_purse() -> None:
    purse = Purse()
    purse.single(SECOND)
    purse.single(SECOND)
    purse.balance = 0.2
    assert not purse.affords(3, 3)
    assert purse.affords(3, 30)

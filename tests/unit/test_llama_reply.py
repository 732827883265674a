"""How a reply of LLaMa is drawn: its named arguments, probabilities set from outside, one caller at a time."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import fields

import numpy as np
import pytest

from runtime.engine.sampling import SamplingOptions
from runtime.llama.gate import Gate
from runtime.llama.options import ReplyArguments, parse_arguments
from runtime.llama.probabilities import set_probabilities
from toolchain.base.errors import UsageError


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted / shifted.sum()


# Arguments


def test_every_sampler_of_the_engine_can_be_asked_for() -> None:
    assert {each.name for each in fields(SamplingOptions)} <= ReplyArguments.__annotations__.keys()
    assert all(f"``{name}``" in (ReplyArguments.__doc__ or "") for name in ReplyArguments.__annotations__)


def test_unknown_argument_is_told_with_what_was_meant() -> None:
    with pytest.raises(UsageError, match="'temperatur'") as caught:
        parse_arguments({"temperatur": 1}, seed=None)
    assert caught.value.hint == "did you mean temperature?"


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1, "temp": 1},
        {"temperature": "hot"},
        {"temperature": -1},
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"logprobs": -2},
        {"json_schema": {"type": "object"}, "grammar": 'root ::= "a"'},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"type": {"object"}}},
        {"grammar": 5},
        {"seed": -2},
        {"seed": 1.5},
        {"stop": 5},
        {"stop": ["a", 5]},
        {"stop": b"ab"},
        {"logit_bias": {"a": 1}},
        {"logit_bias": [1]},
        {"dry_sequence_breakers": [1]},
        {"top_k": 2.5},
    ],
)
def test_wrong_argument_is_refused_at_once(given: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        parse_arguments(given, seed=None)


def test_seed_of_the_call_stands_against_that_of_the_model() -> None:
    assert parse_arguments({"seed": 3}, seed=7).sampling.seed == 3
    assert parse_arguments({}, seed=7).sampling.seed == 7
    drawn = {parse_arguments({"seed": -1}, seed=None).sampling.seed for _ in range(4)}
    assert len(drawn) > 1


def test_numbers_of_numpy_are_numbers() -> None:
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.int32(7), "max_tokens": np.int64(2)}
    drawn = parse_arguments({**given, "logit_bias": {np.int64(5): np.float32(-1)}}, seed=None)
    found = (drawn.sampling.temp, drawn.sampling.top_k, drawn.sampling.seed, drawn.max_tokens)
    assert found == (0.5, 3, 7, 2)
    assert list(map(type, found)) == [float, int, int, int]
    assert drawn.sampling.logit_bias == {5: -1.0}


def test_minus_one_is_no_limit() -> None:
    assert parse_arguments({"max_tokens": -1}, seed=-1).max_tokens is None


def test_stop_is_one_text_or_several() -> None:
    assert parse_arguments({"stop": "ab"}, seed=0).stops == ("ab",)
    assert parse_arguments({"stop": ["a", "b"]}, seed=0).stops == ("a", "b")
    assert parse_arguments({}, seed=0).stops == ()


# Probabilities


def test_named_tokens_get_their_probabilities_and_the_others_keep_their_proportions() -> None:
    logits = np.random.default_rng(1).normal(0, 5, 1000).astype(np.float32)
    before = softmax(logits)
    set_probabilities(logits, {3: 0.25, 4: 0.5, 5: 0.0})
    after = softmax(logits)
    assert after[[3, 4, 5]] == pytest.approx([0.25, 0.5, 0.0], abs=1e-6)
    others = [each for each in range(1000) if each not in (3, 4, 5)]
    assert after[others] / 0.25 == pytest.approx(before[others] / before[others].sum(), abs=1e-6)


def test_probabilities_of_one_together_leave_nothing_for_the_others() -> None:
    logits = np.zeros(10, np.float32)
    set_probabilities(logits, {1: 0.25, 2: 0.75})
    assert softmax(logits)[1:3] == pytest.approx([0.25, 0.75])
    assert np.isinf(logits[[0, *range(3, 10)]]).all()


def test_probability_is_given_where_the_token_was_all_but_certain() -> None:
    logits = np.full(50, -1000.0, np.float32)
    logits[7] = 1000.0
    set_probabilities(logits, {7: 0.1})
    assert softmax(logits)[7] == pytest.approx(0.1, rel=1e-4)  # a float32 of 1000 has six digits


# One at a time


def counted(gate: Gate, limit: int = 3) -> Generator[int, None, None]:
    return gate.streamed(lambda: (number for number in range(limit)), "no second one")


def test_second_generator_is_refused_while_one_is_running_and_works_after_it() -> None:
    gate = Gate()
    first, second = counted(gate), counted(gate)
    assert next(first) == 0
    with pytest.raises(UsageError, match="no second one"):
        next(second)
    assert list(first) == [1, 2]
    assert list(counted(gate)) == [0, 1, 2]


def test_generator_that_is_dropped_lets_the_next_one_in() -> None:
    gate = Gate()
    first = counted(gate)
    next(first)
    del first
    assert list(counted(gate)) == [0, 1, 2]


def test_generator_that_was_never_started_holds_nothing() -> None:
    gate = Gate()
    idle = counted(gate)
    assert list(counted(gate)) == [0, 1, 2]
    assert list(idle) == [0, 1, 2]


def test_end_closes_the_running_generator_as_leaving_it_would() -> None:
    gate, left = Gate(), []

    def body() -> Generator[int, None, None]:
        try:
            yield 1
        finally:
            left.append(True)

    running = gate.streamed(body, "no second one")
    next(running)
    gate.end()
    assert left == [True]
    assert list(running) == []
    gate.end()


def test_end_does_not_wait_for_another_thread() -> None:
    gate, inside, go_on = Gate(), threading.Event(), threading.Event()

    def body() -> Generator[int, None, None]:
        inside.set()
        go_on.wait(30)
        yield 1

    running = gate.streamed(body, "no second one")
    thread = threading.Thread(target=list, args=(running,))
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(UsageError, match="at this moment"):
            gate.end()
    finally:
        go_on.set()
        thread.join()

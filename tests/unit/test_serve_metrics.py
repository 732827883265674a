"""The Prometheus text, read back by the rules of its format."""

from __future__ import annotations

import re

from runtime.serve.metrics import Histogram, Metrics, joined

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ([-+]?(?:[0-9.]+(?:e[-+]?\d+)?|Inf|NaN))")


def parsed(text: str) -> dict[str, float]:
    """Samples by their name with labels. Fails on a line, an order or a repetition that the format does not allow."""
    assert text.endswith("\n")
    found: dict[str, float] = {}
    types: dict[str, str] = {}
    closed: set[str] = set()
    current = ""
    for line in text.splitlines():
        if line.startswith("#"):
            _, what, name, rest = line.split(" ", 3)
            assert what in ("HELP", "TYPE")
            if what == "TYPE":
                assert name not in types
                assert rest in ("counter", "gauge", "histogram", "untyped")
                types[name] = rest
            family = name
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            family = sample[1]
            base = re.sub(r"_(bucket|sum|count)$", "", family)
            family = base if types.get(base) == "histogram" else family
            assert family in types, line
            key = line.rpartition(" ")[0]
            assert key not in found, line
            found[key] = float(sample[3])
        if family != current:
            closed.add(current)
            assert family not in closed, f"{family} is not in one piece"
            current = family
    return found


def text_of(metrics: Metrics) -> str:
    return metrics.text(waiting=3, in_flight=2, ready=True, restarts=4)


def test_our_figures_are_valid_and_there_from_the_start() -> None:
    found = parsed(text_of(Metrics()))
    assert found["foundry_serve_queue_depth"] == 3
    assert found["foundry_serve_upstream_restarts_total"] == 4
    assert found["foundry_serve_cancelled_total"] == 0


def test_buckets_are_cumulative() -> None:
    metrics = Metrics()
    metrics.first_byte_s = Histogram(bounds=(0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        metrics.first_byte_s.observe(value)
    found = parsed(text_of(metrics))
    counts = [found[f'foundry_serve_first_byte_seconds_bucket{{le="{le}"}}'] for le in ("0.1", "1.0", "+Inf")]
    assert counts == [2, 3, 4]
    assert found["foundry_serve_first_byte_seconds_count"] == 4
    assert found["foundry_serve_first_byte_seconds_sum"] == 7.65


def test_several_models_share_a_family() -> None:
    child = '# HELP llamacpp:n Tokens: all\n# TYPE llamacpp:n counter\nllamacpp:n 5\nllamacpp:n{position="0"} 2\n'
    found = parsed(joined(text_of(Metrics()), {'a"b': child, "c": child}))
    assert found['llamacpp:n{model="a\\"b"}'] == 5
    assert found['llamacpp:n{position="0",model="c"}'] == 2


def test_one_model_keeps_its_samples_as_they_are() -> None:
    found = parsed(joined(text_of(Metrics()), {"": "# TYPE llamacpp:n counter\nllamacpp:n 5\n"}))
    assert found["llamacpp:n"] == 5


def test_lines_that_are_no_samples_do_not_come_through() -> None:
    noise = "<html>\nError 500\n# just a remark\nbad-name 3\n"
    assert joined("x 1\n", {"": noise}) == "x 1\n"


def test_tokens_are_read_from_the_end_of_a_reply_in_every_form() -> None:
    ends = {
        b'"usage":{"completion_tokens":8,"prompt_tokens":3},"timings":{"prompt_n":1,"predicted_n":8}}': 8,
        b'{"tokens_predicted":6,"tokens_evaluated":3}': 6,
        b'"usage":{"input_tokens": 3, "output_tokens": 9}': 9,
        b'"predicted_n":1}\n\ndata: {"timings":{"predicted_n":2}},"prompt_tokens":3': 2,
    }
    for tail, tokens in ends.items():
        metrics = Metrics()
        metrics.count_tokens(tail)
        assert (metrics.completion_tokens, metrics.prompt_tokens) == (tokens, 3), tail


def test_a_text_that_speaks_of_tokens_is_not_counted() -> None:
    metrics = Metrics()
    metrics.count_tokens(rb'{"text":"{\"completion_tokens\": 999}"}')
    assert metrics.completion_tokens == 0

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.chat.params import NAMES, changed, shown
from runtime.commands.options import SAMPLERS
from tests.parrot import OPTIONS
from toolchain.base.errors import UsageError

SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}}}'


def test_parameters_are_set_together_and_quoted_as_in_a_shell() -> None:
    options = changed(OPTIONS, 'temp=0.2 --top-k=5 seed=7 stop="###" stop="a b" max_tokens=100')
    assert (options.sampling.temp, options.sampling.top_k, options.sampling.seed) == (0.2, 5, 7)
    assert options.stops == ("###", "a b")
    assert options.max_tokens == 100
    assert OPTIONS.sampling.temp == 0.8


def test_parameter_without_a_value_is_its_default_again() -> None:
    options = changed(OPTIONS, "temp=0.2 stop=x max_tokens=3 min-p=0.3")
    back = changed(options, "temp= stop= max_tokens= min_p=")
    assert back == OPTIONS
    assert changed(options, "max_tokens=-1").max_tokens is None
    assert changed(OPTIONS, "seed=").sampling.seed != OPTIONS.sampling.seed


def test_every_sampler_of_the_command_line_is_a_parameter() -> None:
    assert {name for name, *_ in SAMPLERS} | {"temp", "top_k", "top_p", "min_p", "seed"} <= set(NAMES)


@pytest.mark.parametrize(
    ("typed", "words", "hint"),
    [
        ("tmep=1", "no parameter tmep", "did you mean temp?"),
        ("zzz=1", "no parameter zzz", "parameters: "),
        ("temp", "temp without a value", "temp= puts the default back"),
        ("temp=warm", "a number, not 'warm'", "temp=0.8"),
        ("top_k=1.5", "a whole number, not '1.5'", "top_k=40"),
        ("temp=-1", "--temp cannot be -1", "greedy"),
        ("temp=nan", "--temp cannot be nan", "greedy"),
        ("seed=4294967295", "--seed cannot be", "from 0"),
        ("max_tokens=many", "max_tokens is a whole number", "-1"),
        ("temp=1 temp=2", "temp is named twice", "temp=2"),
        ('stop="x', "a quote is not closed", "stop="),
        ("json_schema={", "no JSON", ""),
        ("grammar=none.gbnf", "there is no file none.gbnf", ""),
        (f"grammar='root ::= \"a\"' json_schema='{SCHEMA}'", "both say", "grammar="),
    ],
)
def test_what_the_command_line_refuses_is_refused(typed: str, words: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        changed(OPTIONS, typed)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_schema_may_be_a_file_and_is_taken_away_by_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA)
    options = changed(OPTIONS, f"json_schema={path}")
    assert options.json_schema == SCHEMA
    assert changed(OPTIONS, f"temp=0 json_schema='{SCHEMA}'").json_schema == SCHEMA
    assert changed(options, "json_schema=") == OPTIONS


def test_schema_may_be_typed_as_it_stands_among_others() -> None:
    options = changed(OPTIONS, f'temp=0 json_schema={SCHEMA} stop="a b"')
    assert (options.json_schema, options.sampling.temp, options.stops) == (SCHEMA, 0, ("a b",))


def test_shown_are_the_usual_ones_and_what_is_not_its_default() -> None:
    lines = dict(line.split(maxsplit=1) for line in shown(OPTIONS).splitlines())
    assert list(lines) == ["temp", "top_k", "top_p", "min_p", "seed", "max_tokens"]
    biased = replace(OPTIONS, sampling=replace(OPTIONS.sampling, logit_bias={5: -1.5}))
    lines = dict(
        line.split(maxsplit=1)
        for line in shown(changed(biased, "temp=0.5 typical=0.9 stop=x max_tokens=9")).splitlines()
    )
    assert lines["temp"] == "0.5  (default 0.8)"
    assert lines["typical"] == "0.9  (default 1)"
    assert (lines["stop"], lines["max_tokens"], lines["logit_bias"]) == ("'x'", "9", "5=-1.5")

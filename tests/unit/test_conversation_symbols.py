"""Symbols: replaced once, visible when something is wrong, and harmless whatever the text."""

from __future__ import annotations

import random
import sys

import pytest

from runtime.conversation.symbols import Symbols
from tests.executed_lines import executed_lines
from toolchain.base.errors import UsageError


def symbols() -> Symbols:
    known = Symbols()
    known.register("USER", "Ada [[X]] [[USER]]")
    known.register("N", 3)
    known.register("add", add)
    known.register("show", lambda *args, **kwargs: f"{args}{kwargs}")
    return known


def add(a: int, b: int = 1) -> int:
    return a + b


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("Hello [[USER]]!", "Hello Ada [[X]] [[USER]]!"),
        ("[[N]][[N]]", "33"),
        ("[[add(1)]] [[add(1, b=-2)]]", "2 -1"),
        ("[[add]]", "[[add: add() missing 1 required positional argument: 'a']]"),
        ("[[add(1, 'x')]]", "[[add: unsupported operand type(s) for +: 'int' and 'str']]"),
        ("[[show(\"]]\", ')', {'a': (None, True)}, k='[[N]]')]]", "(']]', ')', {'a': (None, True)}){'k': '[[N]]'}"),
        ("[[show('a\nb')]]", "('a\\nb',){}"),
        ("[[show()]]", "(){}"),
        ("[[MISSING]] [[missing(1)]]", "[[MISSING: missing]] [[missing: missing]]"),
        ("[[N(1)]]", "[[N: takes no arguments]]"),
        ("[[[N]]] [[[[N]]]] [[N [[N]] ]]", "[3] [[3]] [[N 3 ]]"),
        ("[[add([[N]])]]", "[[add(3)]]"),
    ],
)  # fmt: skip
def test_symbols_are_replaced_once(text: str, expanded: str) -> None:
    assert symbols().expand(text) == expanded


@pytest.mark.parametrize(
    "text",
    [
        "", "[[", "]]", "[[]]", "[[N", "[[N]", "[N]", "[[ N ]]", "[[1]]", "[[N-1]]", "[[a.b]]", "[[ü]]", "[[add(]]",
        "[[add(1]]", "[[add(1)", "[[add(1)]", "[[add(x)]]", "[[add(N)]]", "[[add(1+1)]]", "[[add(__import__('os'))]]",
        "[[add(*[1])]]", "[[add(1,,2)]]", "[[add(b=1, b=2)]]", "[[add('a]]", "[[add({[]: 1})]]", "[[add(007)]]",
        "[[add(1) ]]", "if [[ -f x ]]; then", "[[add(" + "(" * 100 + ")" * 100 + ")]]", "[[add(" + "9" * 5000 + ")]]",
        "[[add(\"\\x\")]]", "[[add(f'{1}')]]", "[[add(b'x')]]",
    ],
)  # fmt: skip
def test_what_is_no_symbol_stays_as_it_is(text: str) -> None:
    assert symbols().expand(text) == text


def test_a_function_is_called_each_time_and_never_raises() -> None:
    known, calls = Symbols(), iter(range(9))
    known.register("NEXT", lambda: next(calls))
    assert known.expand("[[NEXT]] [[NEXT]]") == "0 1"

    def leave() -> str:
        sys.exit(3)

    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def silent() -> str:
        raise Silent

    class NoText:
        def __str__(self) -> str:
            raise ValueError("no text")

    known.register("LEAVE", leave)
    known.register("SILENT", silent)
    known.register("NOTEXT", NoText())
    known.register("RECURSIVE", lambda: known.expand("[[RECURSIVE]]"))
    assert known.expand("[[LEAVE]] [[SILENT]] [[NOTEXT]]") == "[[LEAVE: 3]] [[SILENT: Silent]] [[NOTEXT: no text]]"
    assert "[[RECURSIVE: " in known.expand("[[RECURSIVE]]")


def test_names_are_checked() -> None:
    known = symbols()
    for name in ("", "1a", "a b", "ü", "a]]", "a\n"):
        with pytest.raises(UsageError):
            known.register(name, 1)
    known.register("N", 4)
    assert known.expand("[[N]]") == "4"


@pytest.mark.parametrize(
    "hostile",
    ["[[", "[[N", "[[add(", "[[add('", "[[add((", "[[add(1,", '[[add("a', "[[[[N]]", '[[show(\'x"""\'', "[[N]]]]"],
)
@pytest.mark.parametrize("after", ["", "]]", "'", ")]]"])
def test_hostile_text_takes_time_in_proportion(hostile: str, after: str) -> None:
    known = symbols()
    short, long = (executed_lines(lambda n=n: known.expand(hostile * n + after)) for n in (100, 400))  # type: ignore[misc]
    assert long < 6 * short + 200
    known.expand(hostile * 5_000 + after)


def test_random_text_is_never_harmed() -> None:
    rng = random.Random(17)
    known = symbols()
    pieces = [
        "[[",
        "]]",
        "[",
        "]",
        "(",
        ")",
        "N",
        "add",
        "show",
        "1",
        ",",
        "'",
        '"',
        "\\",
        "\n",
        "=",
        "{",
        "}",
        ":",
        " ",
        "-",
    ]
    for _ in range(4000):
        text = "".join(rng.choices(pieces, k=rng.randrange(20)))
        expanded = known.expand(text)
        if "[[" not in text or "]]" not in text:
            assert expanded == text

"""Functions that a model calls: told to it, found in running text, called with literals, answered with a text."""

from __future__ import annotations

import enum
import functools
import math
import random
import sys
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Optional

import pytest

from runtime.conversation.calls import find_call
from runtime.conversation.functions import Call, Functions
from tests.executed_lines import executed_lines
from toolchain.base.errors import UsageError


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = "k"


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first one
        b (int): the second one,
            which may be left out
    """
    return a + b


def weather(
    city: str,
    unit: Unit = Unit.CELSIUS,
    days: Optional[int] = None,  # noqa: UP045
    *,
    detail: Literal["low", "high"] = "low",
) -> dict[str, Any]:
    """:param city: where"""
    return {"city": city, "unit": unit.name, "days": days, "detail": detail}


def show(*args: Any, **kwargs: Any) -> str:
    return repr((args, kwargs))


def functions() -> Functions:
    known = Functions()
    for function in (add, weather, show):
        known.register(function)
    return known


def answered(text: str) -> str:
    known = functions()
    call = known.find(text)
    assert call is not None
    assert text[call.start : call.end] == call.text
    return known.call(call).text


def test_functions_are_described_to_the_model() -> None:
    text = functions().describe()
    assert "name(arguments)" in text
    assert "\n\nadd(a: int, b: int = 2) -> int\n    Add two numbers.\n\n    Args:\n" in text
    assert (
        "weather(city: str, unit: 'c' | 'k' = 'c', days: int | None = None, *, detail: 'low' | 'high' = 'low')"
        " -> dict[str, Any]"
    ) in text
    assert "show(*args: Any, **kwargs: Any) -> str" in text
    assert Functions().describe() == ""


def test_every_annotation_holds_its_values() -> None:
    known = Functions()
    cases: list[tuple[Any, str, str | None]] = [
        (int, "3.0", "3"),
        (int, "True", None),
        (float, "3", "3.0"),
        (float, "1" + "0" * 400, None),
        (bool, "true", "True"),
        (bool, "1", None),
        (str, "1", None),
        (list, "[1, 'a']", "[1, 'a']"),
        (list[float], "(1, 2)", "[1.0, 2.0]"),
        (list[int], "['a']", None),
        (tuple[int, str], "[1, 'a']", "(1, 'a')"),
        (tuple[int, str], "[1]", None),
        (set[int], "[1, 1]", "{1}"),
        (dict[str, int], "{'a': 1}", "{'a': 1}"),
        (dict[str, int], "{'a': 'b'}", None),
        (dict, "[1]", None),
        (int | str | None, "null", "None"),
        (int | str, "[]", None),
        (float | int, "3", "3"),
        (Annotated[int, "how many"], "4", "4"),
        (Literal[1, "a", Unit.KELVIN], "'k'", "<Unit.KELVIN: 'k'>"),
        (Literal[1], "True", None),
        (Unit, "'KELVIN'", "<Unit.KELVIN: 'k'>"),
        (Unit, "'x'", None),
        (Any, "{1: [None]}", "{1: [None]}"),
        (object, "1", "1"),
        ("no such type", "1", "1"),
        (None, "1", None),
    ]
    for annotation, given, taken in cases:

        def take(x):  # type: ignore[no-untyped-def]
            return repr(x)

        take.__annotations__["x"] = annotation
        known.register(take)
        call = known.find(f"take({given})")
        assert call is not None
        result = known.call(call)
        assert (result.text if result.ok else None) == taken, (annotation, given, result)
        assert result.ok or result.text.startswith("error: argument x: expected ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The sum is add(1, 2).", "3"),
        ("add(40)\n", "42"),
        ("(add(1)) and add(2)", "3"),
        ("**add( a = -1 ,\n b=+2, )**", "1"),
        ("add(x) is what I call: add(1, 1)", "2"),
        ("I `add(1)` then add(2, 2)", "4"),
        ("```py\nadd(1)\n```\nadd(3)", "5"),
        ("~~~\nadd(1)\n~~~\nadd(3)", "5"),
        ("````\n```\nadd(1)\n````\nadd(3)", "5"),
        ("Here: ```add(1)``` add(3)", "5"),
        ("Here: ```py\nadd(1)\n\nadd(2)\n```\nadd(3)", "5"),
        ("``a ` add(1)`` add(3)", "5"),
        ("a lone ` here\n\nadd(3)", "5"),
        ("\\` add(3)", "5"),
        ("item(s add(1)\nadd(3)", "5"),
        ("x.add(1) my_add(1) add_(1) éadd(1) std::add(1) p->add(1) def add(1) @add(1) add (1) add(3)", "5"),
        ("print(add(1), (add(2))) add(3)", "5"),
        ("add(add(1)) add(3)", "5"),
        ("add(007) add(1+1) add(*[1]) add(f'1') add(1 for x) add(1j) add(a=1, a=2) add(1,,2) add(--1) add(3)", "5"),
        ("show('a)b(\"', \"it's `\", '''x\n\"y\"''')", repr((("a)b(\"", "it's `", "x\n\"y\""), {}))),
        ("show('line\r\nbreak\0 \\d \\n \\\\', \"a\" 'b')", repr((("line\r\nbreak\0 \\d \n \\", "ab"), {}))),
        ("show({'a': [1, (2, {3})], 'b': {}}, x=(None, null, True, false))",
         repr((({"a": [1, (2, {3})], "b": {}},), {"x": (None, None, True, False)}))),
        ("show(1e3, .5, 0x1F, 1_000, -7)", repr(((1000.0, 0.5, 31, 1000, -7), {}))),
        ("show()", "((), {})"),
    ],
)  # fmt: skip
def test_the_first_call_in_the_text_is_answered(text: str, expected: str) -> None:
    assert answered(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "add", "add(", "add(1", "add('1)", "`add(1)`", "`add(1)", "```\nadd(1)", "```add(1)", "~~~\nadd(1)", "sub(1)",
     "add(os.getcwd())", "add(__import__('os').system('x'))", "add([x for x in (1,)])", "add({[]: 1})",
     "add(1]", "add('\\x')",
     "add(lambda: 1)", "add(1 if 1 else 2)", "show(" + "[" * 17 + "]" * 17 + ")", "add(" + "9" * 5000 + ")",
     "show('" + "x" * 70_000 + "')", "\\add(1)", "```\nadd(1)\n``` add(2)"],
)  # fmt: skip
def test_what_is_no_call_is_none(text: str) -> None:
    assert functions().find(text) is None


def random_text(rng: random.Random) -> str:
    pieces = [
        "add(1)",
        "add(1",
        "show(",
        " add(",
        "show('a', ",
        "1)",
        "add",
        "weather",
        "print(",
        "(",
        ")",
        "[",
        "]",
        "{",
    ]
    pieces += [
        "}",
        "'",
        '"',
        "'''",
        "`",
        "``",
        "```",
        "~~~",
        "~~",
        "\n",
        "\n\n",
        " ",
        ",",
        ":",
        "=",
        "1",
        "-2",
        "x",
        "a=",
    ]
    pieces += ["True", ".", "\\", "def ", "é"]
    return "".join(rng.choices(pieces, k=rng.randrange(24)))


def test_a_call_that_is_found_stays_when_the_text_goes_on() -> None:
    rng = random.Random(19)
    known = functions()
    found = 0
    for _ in range(1000):
        text = random_text(rng)
        whole = known.find(text)
        for end in range(len(text)):
            part = known.find(text[:end])
            assert part is None or part == whole, text
        if whole is not None:
            found += 1
            assert known.call(whole).text is not None
    assert found > 100


def found_in_pieces(pieces: Iterable[str]) -> Call | None:
    """The call that is found when a text comes in pieces and is looked at as LLaMa looks at it."""
    known, text, settled = functions(), "", 0
    for piece in pieces:
        text += piece
        if ")" in piece:
            call, settled = find_call(text, known, settled=settled)
            if call is not None:
                return call
    return None


def test_the_same_call_is_found_in_a_text_that_streams() -> None:
    rng = random.Random(23)
    for _ in range(1500):
        text = random_text(rng) + random_text(rng)
        ends = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(30)))
        pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
        assert found_in_pieces(pieces) == functions().find(text), text


def test_a_long_stream_is_not_read_again_and_again() -> None:
    def lines(pieces: int) -> int:
        return executed_lines(lambda: found_in_pieces(["Some `code` and print(it),\nword by word. "] * pieces))

    assert lines(400) < 5 * lines(100)


@pytest.mark.parametrize(
    "hostile",
    ["(", "add(", "add('", "add(\"'", "add(1,", "add([", "`", "` ", "```\n", "``` ` ", "a", "a(", ")", "\n", "a\n",
     "\"'''", "add('\n", "add(\n", "~~~\n", "\\", "add(a=", "add(x\n", "add(1)x"],
)  # fmt: skip
def test_hostile_text_takes_time_in_proportion(hostile: str) -> None:
    known = functions()
    for before in ("", "add(", "add('"):
        short, long = (
            executed_lines(lambda n=n: known.find(before + hostile * n))  # type: ignore[misc]  # noqa: B023
            for n in (100, 400)
        )
        assert long < 6 * short + 200
        known.find(before + hostile * (50_000 // len(hostile)))


@pytest.mark.parametrize("run", ["1", "_", "1_", ".", "0x1", "a", " ", "\\", "1.", "e1", "-", "\n", "''", ","])
def test_a_long_run_within_arguments_is_read_in_no_time(run: str) -> None:
    known = functions()
    for before in ("1", "0x", "1.", "a", "'", "'''", ""):
        for after in ("x", "(", "'"):
            known.find(f"add({before}{run * (60_000 // len(run))}{after})")


def test_errors_are_texts_that_the_model_can_read() -> None:
    known = functions()

    @known.register
    def broken(kind: str) -> str:
        if kind == "exit":
            sys.exit(1)
        raise KeyError(kind)

    def told(name: str, *args: Any, **kwargs: Any) -> str:
        result = known.call(Call(name=name, args=args, kwargs=kwargs))
        assert not result.ok
        return result.text

    assert told("ad") == "error: there is no function ad; did you mean add?"
    assert told("add") == ("error: missing a required argument: 'a'. It is called as add(a: int, b: int = 2) -> int")
    assert "too many positional arguments" in told("add", 1, 2, 3)
    assert "unexpected keyword argument 'c'" in told("add", 1, c=3)
    assert "argument b: expected a whole number, got 'x'" in told("add", 1, "x")
    assert "argument unit: expected one of 'c', 'k', got 'f'" in told("weather", "Rome", "f")
    assert "argument days: expected a whole number or None, got 'x'" in told("weather", "Rome", days="x")
    assert len(told("add", "x" * 10_000)) < 300
    assert told("broken", "a") == "error: broken raised KeyError: 'a'"
    assert told("broken", "exit") == "error: broken raised SystemExit: 1"


def test_an_interrupt_gets_through() -> None:
    known = Functions()

    @known.register
    def wait() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        known.call(Call(name="wait"))


def test_results_become_text() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value, text in (
        ("as it is", "as it is"), (None, "null"), ({"ü": [1, True]}, '{"ü": [1, true]}'), (1.5, "1.5"),
        ((1, 2), "[1, 2]"), ({1}, "{1}"), (b"x", "b'x'"), (endless, "[[...]]"), (Unit.KELVIN, "Unit.KELVIN"),
    ):  # fmt: skip
        known = Functions()
        known.register(lambda value=value: value, "f")
        assert known.call(Call(name="f")) == type(known.call(Call(name="f")))(text=text, ok=True)


def test_objects_and_builtins_can_be_registered() -> None:
    known = Functions()

    class Adder:
        def __call__(self, a: int) -> int:
            """Add one."""
            return a + 1

        def method(self, a: int) -> int:
            return a + 2

    known.register(Adder(), "adder", "Adds.")
    known.register(Adder().method)
    known.register(functools.partial(add, b=5), "five")
    known.register(math.sqrt, "root")
    for text, expected in (
        ("adder(1)", "2"),
        ("method(1)", "3"),
        ("five(1)", "6"),
        ("root(4)", "2.0"),
        ("method('x')", "error"),
    ):
        call = known.find(text)
        assert call is not None
        assert known.call(call).text.startswith(expected)
    assert "root(x, /)" in known.describe()
    assert "adder(a: int) -> int\n    Adds." in known.describe()


def test_what_cannot_be_registered_is_refused() -> None:
    known = Functions()

    async def later() -> None: ...

    class Later:
        async def __call__(self) -> None: ...

    for function, name in (
        (add, "a b"),
        (add, ""),
        (add, "x" * 65),
        (lambda: 1, None),
        (later, None),
        (min, None),
        (3, "three"),
    ):
        with pytest.raises(UsageError):
            known.register(function, name)
    assert known.describe() == ""

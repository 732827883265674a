"""``/params``: how replies are drawn, shown and changed while one talks."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from runtime.chat.backend import ReplyOptions
from runtime.engine.sampling import SamplingOptions
from runtime.settings import near_miss
from toolchain.base.errors import UsageError

_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {field.name: field.default for field in dataclasses.fields(SamplingOptions) if type(field.default) in (int, float)}
)
"""The samplers' numbers, with llama.cpp's defaults."""

_BARE_SCHEMA: Final = re.compile(r"(?<!\S)(?:--)?json[_-]schema=(?={)")
"""A schema typed as it stands: its quotes are its own."""

_COMMON: Final = ("temp", "top_k", "top_p", "min_p", "seed")
_OTHERS: Final = ("max_tokens", "stop", "grammar", "json_schema")
NAMES: Final = (*_DEFAULTS, *_OTHERS)


def shown(options: ReplyOptions) -> str:
    """The usual values and every one that is not its default, a line each."""
    return "\n".join(f"{name:<18} {value}{note}" for name, value, note in _rows(options))


def changed(options: ReplyOptions, typed: str) -> ReplyOptions:
    """``options`` with what ``typed`` says: ``name=value`` of each, quoted as in a shell; without a value the default.

    ``stop`` may be named several times. Raises UsageError for an unknown name, with the near one, and for a value that
    the command line would refuse.
    """
    given: dict[str, list[str]] = {}
    for name, value in _pairs(typed):
        given.setdefault(name, []).append(value)
    if twice := next((name for name, values in given.items() if len(values) > 1 and name != "stop"), None):
        raise UsageError(f"{twice} is named twice", hint=f"/params {twice}={given[twice][-1]}")
    numbers: dict[str, Any] = {name: _number(name, values[0]) for name, values in given.items() if name in _DEFAULTS}
    new = replace(options, sampling=replace(options.sampling, **numbers))
    if "stop" in given:
        new = replace(new, stops=tuple(filter(None, given["stop"])))
    if "max_tokens" in given:
        new = replace(new, max_tokens=_max_tokens(given["max_tokens"][0]))
    return _constrained(new, {name: given[name][0] for name in ("grammar", "json_schema") if name in given})


def _pairs(typed: str) -> Iterator[tuple[str, str]]:
    if bare := _BARE_SCHEMA.search(typed):
        with suppress(ValueError):  # what is no JSON is split as the rest is, and refused there
            _, end = json.JSONDecoder().raw_decode(typed, bare.end())
            yield "json_schema", typed[bare.end() : end]
            typed = f"{typed[: bare.start()]} {typed[end:]}"
    try:
        words = shlex.split(typed)
    except ValueError as error:
        raise UsageError("a quote is not closed", evidence=str(error), hint='/params stop="###" temp=0.2') from error
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if name not in NAMES:
            raise UsageError(f"no parameter {name}", hint=near_miss(name, NAMES) or f"parameters: {', '.join(NAMES)}")
        if not equals:
            raise UsageError(f"{name} without a value", hint=f"/params {name}=VALUE; {name}= puts the default back")
        yield name, value


def _number(name: str, value: str) -> int | float:
    default: int | float = _DEFAULTS[name]
    if not value:
        return _fresh_seed() if name == "seed" else default
    kind = type(default)
    try:
        return kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} is {wanted}, not {value!r}", hint=f"/params {name}={default}") from None


def _fresh_seed() -> int:
    from runtime.engine.sampling import random_seed

    return random_seed()


def _max_tokens(value: str) -> int | None:
    if not value:
        return None
    try:
        count = int(value)
    except ValueError:
        raise UsageError(
            f"max_tokens is a whole number, not {value!r}", hint="/params max_tokens=100, or -1 for no limit"
        ) from None
    return None if count < 0 else count


def _constrained(options: ReplyOptions, given: Mapping[str, str]) -> ReplyOptions:
    """With another grammar or schema, each a file or a text; an empty one is none."""
    from runtime.engine.grammar import read_argument
    from runtime.engine.json_schema import json_schema_to_gbnf

    if "grammar" in given:
        grammar = read_argument(given["grammar"]) if given["grammar"] else ""
        options = replace(options, sampling=replace(options.sampling, grammar=grammar))
    if "json_schema" in given:
        schema = read_argument(given["json_schema"]) if given["json_schema"] else None
        if schema is not None:
            json_schema_to_gbnf(schema)
        options = replace(options, json_schema=schema)
    if options.sampling.grammar and options.json_schema is not None:
        raise UsageError("grammar and json_schema both say what the reply is", hint="/params grammar= takes it away")
    return options


def _rows(options: ReplyOptions) -> Iterator[tuple[str, str, str]]:
    for name, default in _DEFAULTS.items():
        value = getattr(options.sampling, name)
        if name in _COMMON or value != default:
            note = "" if name == "seed" or value == default else f"  (default {default:g})"
            yield name, f"{value:g}" if isinstance(value, float) else str(value), note
    if options.sampling.logit_bias:
        yield "logit_bias", " ".join(f"{token}={bias:g}" for token, bias in options.sampling.logit_bias.items()), ""
    yield "max_tokens", "no limit but the context" if options.max_tokens is None else str(options.max_tokens), ""
    if options.stops:
        yield "stop", " ".join(map(repr, options.stops)), ""
    for name, text in (("grammar", options.sampling.grammar), ("json_schema", options.json_schema)):
        if text:
            yield name, " ".join(text.split())[:60], ""

"""The named arguments of a reply, parsed once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, TypedDict, get_type_hints

from runtime.settings import near_miss
from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine.sampling import SamplingOptions

_ANY: Final = -1  # llama.cpp's own word for "no limit" and "drawn anew"
_ALIASES: Final = {"temperature": "temp", "stops": "stop"}


class ReplyArguments(TypedDict, total=False):
    """How a reply is drawn and where it ends; each is optional. A name that is none of these is a UsageError.

    - ``max_tokens``: int, tokens of the reply at most; None (the default) or -1: until the model ends it or the context
      is full.
    - ``stop``: str or a sequence of str; the reply ends before the first of them, also across tokens.
    - ``seed``: int from 0 to 2**32 - 2; without one (None, -1) the constructor's, and without that one that is drawn
      anew each time (``finish_meta.seed`` tells it).
    - ``json_schema``: str or dict; the reply is JSON that this schema accepts. UsageError where a grammar cannot
      promise that.
    - ``grammar``: str, GBNF that the reply has to follow. Not together with ``json_schema``.
    - ``lookup``: bool, guess repetitions of the text so far ahead; faster for copying, off by default.
    - ``logprobs``: int, so many of the likeliest tokens beside each token, in ``finish_meta.logprobs``; 0 is the
      token's own alone.
    - Samplers, with llama.cpp's names and defaults; a value out of its range is a UsageError that tells the range:
      ``temperature`` or ``temp`` (0.8; 0 takes the likeliest token each time), ``top_k`` (40; 0: off), ``top_p``
      (0.95; 1: off), ``min_p`` (0.05; 0: off), ``typical`` (1: off), ``top_nsigma`` (-1: off), ``xtc_probability``
      (0: off) with ``xtc_threshold`` (0.1), ``dynatemp_range`` (0: off) with ``dynatemp_exp`` (1), ``repeat_penalty``
      (1: off), ``frequency_penalty`` and ``presence_penalty`` (0: off) over the last ``repeat_last_n`` (64) tokens,
      ``dry_multiplier`` (0: off) with ``dry_base`` (1.75), ``dry_allowed_length`` (2), ``dry_penalty_last_n`` (64)
      and ``dry_sequence_breakers``, ``mirostat`` (0: off, 1 or 2) with ``mirostat_lr`` (0.1) and ``mirostat_ent``
      (5), ``logit_bias`` (dict of token ids to what is added to their logits; -inf bans).
    """

    max_tokens: int | None
    stop: str | Sequence[str]
    seed: int | None
    json_schema: str | Mapping[str, Any] | None
    grammar: str | None
    lookup: bool
    logprobs: int | None
    temperature: float
    temp: float
    top_k: int
    top_p: float
    min_p: float
    typical: float
    top_nsigma: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exp: float
    repeat_penalty: float
    repeat_last_n: int
    frequency_penalty: float
    presence_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    mirostat: int
    mirostat_lr: float
    mirostat_ent: float
    logit_bias: Mapping[int, float]


_TYPES: Final = get_type_hints(ReplyArguments)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How one reply is drawn; ``sampling`` holds the seed and the grammar."""

    sampling: SamplingOptions
    max_tokens: int | None
    stops: tuple[str, ...]
    lookup: bool
    logprobs: int | None


def parse_arguments(given: Mapping[str, Any], *, seed: int | None) -> Drawn:
    """What ``given`` (as of ReplyArguments) asks for; ``seed`` is taken where it names none, and None draws one."""
    from runtime.engine.sampling import SamplingOptions, random_seed

    known = ReplyArguments.__annotations__
    for name in given:
        if name not in known:
            meant = near_miss(_ALIASES.get(name, name), known)
            raise UsageError(
                f"a reply has no option {name!r}", hint=meant or "docs/llama.md lists them, under ReplyArguments"
            )
    if "temp" in given and "temperature" in given:
        raise UsageError("temp and temperature are the same", hint="give one of them")
    samplers = {each.name for each in fields(SamplingOptions)} - {"seed", "grammar"}
    chosen = {_ALIASES.get(name, name): value for name, value in given.items()}
    sampling = {name: _sampler(name, chosen[name]) for name in samplers & chosen.keys()}
    seeds = (_count(each, "seed", least=0) for each in (chosen.get("seed"), seed))
    sampling["seed"] = next((each for each in seeds if each is not None), None)
    if sampling["seed"] is None:
        sampling["seed"] = random_seed()
    return Drawn(
        sampling=SamplingOptions(**sampling, grammar=_grammar(chosen)),
        max_tokens=_count(chosen.get("max_tokens"), "max_tokens", least=1),
        stops=_texts(chosen.get("stop") or (), "stop"),
        lookup=bool(chosen.get("lookup", False)),
        logprobs=_count(chosen.get("logprobs"), "logprobs", least=0),
    )


def _grammar(chosen: Mapping[str, Any]) -> str:
    schema, grammar = chosen.get("json_schema"), chosen.get("grammar")
    if schema is None:
        if isinstance(grammar, str | None):
            return grammar or ""
        raise _wrong("grammar", grammar, "a text, in GBNF")
    if grammar:
        raise UsageError("grammar and json_schema both say what the reply is", hint="give one of them")
    from runtime.engine.json_schema import json_schema_to_gbnf

    try:
        return json_schema_to_gbnf(schema if isinstance(schema, str) else json.dumps(schema))
    except TypeError as error:
        raise UsageError("the JSON schema is no JSON", evidence=str(error)) from error


def _sampler(name: str, value: Any) -> Any:
    """A sampler's option as its type has it; numbers of numpy are numbers."""
    match name:
        case "dry_sequence_breakers":
            return _texts(value, name)
        case "logit_bias":
            if not isinstance(value, Mapping):
                raise _wrong(name, value, "a dict of token ids to numbers")
            return {_number(name, token, int): _number(name, bias, float) for token, bias in value.items()}
    return _number(name, value, _TYPES[name])


def _number(name: str, value: Any, wanted: type) -> Any:
    if wanted is int and isinstance(value, Integral):
        return int(value)
    if wanted is float and isinstance(value, Real):
        return float(value)
    raise _wrong(name, value, "a whole number" if wanted is int else "a number")


def _texts(value: Any, name: str) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise _wrong(name, value, "a text, or a list of texts")
    return tuple(found)


def _count(value: object, name: str, *, least: int) -> int | None:
    if value in (None, _ANY):
        return None
    if isinstance(value, Integral) and int(value) >= least:
        return int(value)
    raise _wrong(name, value, f"a whole number from {least}, or None")


def _wrong(name: str, value: object, wanted: str) -> UsageError:
    return UsageError(f"{name} cannot be {value!r}", hint=wanted)

"""The named arguments of a reply, parsed once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, TypedDict

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
    sampling = {name: chosen[name] for name in samplers & chosen.keys()}
    wanted = chosen.get("seed")
    for each in (wanted, seed):
        if each not in (None, _ANY):
            sampling["seed"] = each
            break
    else:
        sampling["seed"] = random_seed()
    try:
        options = SamplingOptions(**sampling, grammar=_grammar(chosen))
    except TypeError as error:  # a text where a number belongs
        raise UsageError("a sampling option has a value of the wrong type", evidence=str(error)) from error
    stop = chosen.get("stop") or ()
    return Drawn(
        sampling=options,
        max_tokens=_count(chosen.get("max_tokens"), "max_tokens", least=1),
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
        lookup=bool(chosen.get("lookup", False)),
        logprobs=_count(chosen.get("logprobs"), "logprobs", least=0),
    )


def _grammar(chosen: Mapping[str, Any]) -> str:
    schema, grammar = chosen.get("json_schema"), chosen.get("grammar")
    if schema is None:
        return grammar or ""
    if grammar:
        raise UsageError("grammar and json_schema both say what the reply is", hint="give one of them")
    from runtime.engine.json_schema import json_schema_to_gbnf

    return json_schema_to_gbnf(schema if isinstance(schema, str) else json.dumps(schema))


def _count(value: object, name: str, *, least: int) -> int | None:
    if value in (None, _ANY):
        return None
    if isinstance(value, int) and value >= least:
        return value
    raise UsageError(f"{name} cannot be {value!r}", hint=f"a whole number from {least}, or None")

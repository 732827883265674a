"""What is asked for: a conversation and reply options as the body of a request to /chat/completions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from toolchain.base.errors import UsageError

if TYPE_CHECKING:
    from runtime.chat.backend import ReplyOptions
    from runtime.conversation.messages import Message

_OPENAI_NAMES: Final = {
    "temp": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
}
_LLAMA_NAMES: Final = {
    "typical": "typical_p",
    "top_nsigma": "top_n_sigma",
    "dynatemp_exp": "dynatemp_exponent",
    "mirostat_lr": "mirostat_eta",
    "mirostat_ent": "mirostat_tau",
}
"""Names in llama-server's tools/server/server-schema.cpp; the other options have the same name there."""
_SENT_KEYS: Final = ("role", "content", "name", "tool_calls", "tool_call_id")
_LEAST_BIAS: Final = -100  # bans a token in OpenAI's API
_PLAIN: Final = frozenset({"stream_options", "max_tokens", "logit_bias"})
_NEEDED: Final = frozenset(
    {"model", "messages", "stream", "response_format", "stop", "grammar", "max_completion_tokens"}
)
_UNKNOWN: Final = re.compile(
    r"unknown|unrecogni[sz]ed|unexpected|unsupported|not supported|not support|not permitted|not allowed|extra", re.I
)


def request_body(
    messages: Sequence[Message], options: ReplyOptions, *, model: str, llama: bool, without: frozenset[str]
) -> dict[str, Any]:
    """The body's fields. A llama-server is told all sampling options, so that replies are drawn as here; of another
    server only those are asked that differ from our defaults: it has its own, and some models take none.

    ``without`` names fields that the server refused. UsageError for a grammar, which only llama-server follows.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": sent(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.max_tokens is not None:
        body["max_completion_tokens" if "max_tokens" in without else "max_tokens"] = options.max_tokens
    if options.stops:
        body["stop"] = list(options.stops)
    if options.json_schema is not None:
        schema = {"name": "reply", "strict": True, "schema": _schema(options.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    body |= _sampling(options, llama)
    if llama:
        body["timings_per_token"] = True  # figures of a reply that is stopped, too
    return {name: value for name, value in body.items() if name not in without}


def sent(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with what the API knows of them."""
    return [{key: message[key] for key in _SENT_KEYS if key in message} for message in messages]


def unknown_extras(body: Mapping[str, Any]) -> list[str]:
    """Fields of ``body`` that are llama.cpp's and no part of OpenAI's API."""
    known = {*_PLAIN, *_NEEDED, *_OPENAI_NAMES.values()}
    return [name for name in body if name not in known]


def refused_fields(words: str, body: Mapping[str, Any]) -> frozenset[str]:
    """Fields of ``body`` that a refusal in these words calls unknown and that a reply can do without.

    Where it names none, it is the one that strict servers most often do not know.
    """
    if words and not _UNKNOWN.search(words):
        return frozenset()
    named = {name for name in body if name not in _NEEDED and re.search(rf"\b{name}\b", words)}
    return frozenset(named or {"stream_options"} & body.keys())


def encode(body: Mapping[str, Any]) -> bytes:
    """The body as it is sent; halves of characters, which JSON in UTF-8 cannot hold, become question marks."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def _sampling(options: ReplyOptions, llama: bool) -> dict[str, Any]:
    from runtime.engine.sampling import SamplingOptions

    chosen: dict[str, Any] = {}
    defaults = SamplingOptions()
    for field in fields(SamplingOptions):
        name, value = field.name, getattr(options.sampling, field.name)
        if name in ("logit_bias", "grammar") or (not llama and _same(value, getattr(defaults, name))):
            continue
        chosen[_OPENAI_NAMES.get(name) or _LLAMA_NAMES.get(name, name)] = (
            list(value) if isinstance(value, tuple) else value
        )
    if options.sampling.logit_bias:
        banned = False if llama else _LEAST_BIAS
        biases = options.sampling.logit_bias.items()
        chosen["logit_bias"] = {str(token): banned if bias == -math.inf else bias for token, bias in biases}
    if options.sampling.grammar and options.json_schema is None:  # a schema's grammar was made of the schema
        if not llama:
            raise UsageError(
                "only a llama-server follows a grammar, and this endpoint is another server",
                hint="give the form of the reply with --json-schema",
            )
        chosen["grammar"] = options.sampling.grammar
    return chosen


def _schema(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("the JSON schema is not JSON", evidence=str(error), hint="check it with `jq .`") from error


def _same(value: Any, default: Any) -> bool:
    both_lists = isinstance(value, list | tuple) and isinstance(default, list | tuple)
    return list(value) == list(default) if both_lists else value == default

"""A chunk of a reply, read with care: servers leave out, null and rename what OpenAI's format has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one chunk, or a whole answer, tells; ``error`` is the error object in it, ``tool`` a tool that is called."""

    text: str = ""
    reasoning: str = ""
    finish: str = ""
    tool: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    error: object = None


def read_chunk(value: Mapping[str, Any]) -> Told:
    """The first choice counts. A whole answer (``message``) is read as a chunk (``delta``) is."""
    if value.get("error"):
        return Told(error=value["error"])
    choices = value.get("choices")
    choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
    delta = _object(choice.get("delta")) or _object(choice.get("message"))
    text, thought = _content(delta.get("content"))
    usage = _object(value.get("usage")) or _object(choice.get("usage"))
    if choice.get("index", 0) != 0:
        return Told(usage=usage)
    return Told(
        text=text or _text(delta.get("refusal")) or _text(choice.get("text")),
        reasoning=_text(delta.get("reasoning_content")) or _text(delta.get("reasoning")) or thought,
        finish=_text(choice.get("finish_reason")),
        tool=_tool(delta),
        usage=usage,
        timings=_object(value.get("timings")),
    )


def error_words(error: object) -> tuple[str, str]:
    """The message and the code of an error, in any of the forms that servers give it."""
    if isinstance(error, str):
        return error, ""
    told = _object(error)
    if inner := told.get("error"):
        return error_words(inner)
    detail = told.get("detail")  # FastAPI's: a text, or a list with an entry for each wrong field
    if isinstance(detail, list):
        entries = [_object(entry) for entry in detail[:5]]
        places = [".".join(map(str, loc)) if isinstance(loc := entry.get("loc"), list) else "" for entry in entries]
        detail = "; ".join(f"{place}: {_text(entry.get('msg'))}" for place, entry in zip(places, entries, strict=True))
    words = _text(told.get("message")) or _text(detail)
    code = next((told[key] for key in ("code", "type") if isinstance(told.get(key), str)), "")
    param = _text(told.get("param"))
    return (words if not param or param in words else f"{words} ({param})"), code


def count(value: object) -> int | None:
    """A number of things, if it is one."""
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
    return value if fits and isinstance(value, int) else None


def rate(value: object) -> float | None:
    """A speed or a time, if it is one that can be."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if fits and isinstance(value, int | float) else None


class Halves:
    """Joins the halves of a character beyond U+FFFF that come as two escapes, maybe in two chunks."""

    def __init__(self) -> None:
        self._high = ""

    def feed(self, text: str) -> str:
        """``text`` with the half before it, without the half at its end; a half that stays alone becomes U+FFFD."""
        text = self._high + text
        self._high = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        whole = text[: len(text) - len(self._high)]
        return whole if whole.isascii() else whole.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def flush(self) -> str:
        left, self._high = self._high, ""
        return "\ufffd" if left else ""


def _content(value: object) -> tuple[str, str]:
    """Text and reasoning of a content, which is a text, or a list of parts as Mistral sends it."""
    if not isinstance(value, list):
        return _text(value), ""
    text, thought = "", ""
    for part in map(_object, value):
        inner = part.get("thinking")
        thought += _content(inner)[0] if isinstance(inner, list) else _text(inner)
        text += _text(part.get("text"))
    return text, thought


def _tool(delta: Mapping[str, Any]) -> str:
    calls = delta.get("tool_calls")
    first = _object(calls[0]) if isinstance(calls, list) and calls else {"function": delta.get("function_call")}
    return _text(_object(first.get("function")).get("name"))


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""

"""Values as YAML that people read and edit: texts of several lines as blocks, wherever a block gives them back
unchanged, else quoted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

# What YAML 1.1 prints; of the line breaks only \n, since others are read as \n or not at all.
_NOT_PRINTABLE: Final = re.compile(
    "[^\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_ESCAPED: Final = re.compile(
    '[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|["\\\\]'
)
_PLAIN_KEY: Final = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)[a-z_][a-z0-9_]*")


def as_yaml(document: Mapping[str, Any]) -> str:
    """A YAML document of texts, numbers, truth values, None, and dicts and lists of them; keys are short texts."""
    return _value(document, "")


def _value(value: Any, indent: str) -> str:
    """A value as it stands after ``key:`` or ``-``: a leading space or line break, and a line break at its end.

    A mapping's and a list's lines begin with ``indent``.
    """
    match value:
        case str():
            return f" {_text(value, indent)}\n"
        case Mapping() if value:
            return "".join(f"{indent}{_key(key)}:{_nested(inner, indent)}" for key, inner in value.items())
        case list() if value:
            return "".join(f"{indent}-{_item(inner, indent)}" for inner in value)
    return f" {_scalar(value)}\n"


def _nested(value: Any, indent: str) -> str:
    """What follows ``key:``; lists are not indented, mappings by two."""
    if isinstance(value, Mapping) and value:
        return "\n" + _value(value, f"{indent}  ")
    if isinstance(value, list) and value:
        return "\n" + _value(value, indent)
    return _value(value, f"{indent}  ")


def _item(value: Any, indent: str) -> str:
    """What follows the ``-`` of a list at ``indent``: the first line of a nested value stands on it."""
    deeper = f"{indent}  "
    if isinstance(value, Mapping | list) and value:
        return f" {_value(value, deeper)[len(deeper) :]}"
    return _value(value, deeper)


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else _quoted(key)


def _text(text: str, indent: str) -> str:
    if "\n" not in text.strip("\n") and not (text.endswith("\n") and text.strip("\n")):
        return (
            text if text in ("system", "user", "assistant", "tool", "text", "image_url", "function") else _quoted(text)
        )
    if _NOT_PRINTABLE.search(text):
        return _quoted(text)
    body = text.rstrip("\n")
    ends = len(text) - len(body)
    leads = "2" if body[0] in " \t\n" else ""
    lines = "\n".join(f"{indent}{line}" if line else "" for line in body.split("\n"))
    return f"|{leads}{'-' if not ends else '+' if ends > 1 else ''}\n{lines}{chr(10) * (ends - 1)}"


def _quoted(text: str) -> str:
    return f'"{_ESCAPED.sub(_escape, text)}"'


_SHORT: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    return _SHORT.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return ".nan"
        if math.isinf(value):
            return ".inf" if value > 0 else "-.inf"
        digits = repr(value)
        return digits if "." in digits else digits.replace("e", ".0e")  # YAML 1.1 knows no float without a point
    return json.dumps(value)  # null, true, false, whole numbers, [] and {}

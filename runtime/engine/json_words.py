"""The words of a JSON schema: which are understood, what each may hold, and which types a value may have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeAlias

from toolchain.base.errors import UsageError

ANNOTATIONS: Final = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
        *("$schema", "$id", "$comment", "$defs", "definitions"),
    }
)
KEYWORDS: Final = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": ("minimum",),
    "boolean": (),
    "null": (),
}
"""What is understood of each type."""

MOST_REPETITIONS: Final = 1000
"""Half of what the library's grammar parser takes (``MAX_REPETITION_THRESHOLD``), of items that may be rules."""

Kinds: TypeAlias = tuple[str, ...]
"""Names of types; never both ``integer`` and ``number``, which holds it."""


class NoValueError(UsageError):
    """No value has all the types that are asked of it: an alternative less, or a schema that cannot be followed."""

    def __init__(self, at: str, what: str) -> None:
        super().__init__(_refusal(at, what), hint=_HINT)


def refuse(at: str, what: str) -> NoReturn:
    """UsageError for what stands at the JSON pointer ``at``."""
    raise UsageError(_refusal(at, what), hint=_HINT)


def understood(schema: Mapping[str, Any], at: str) -> dict[str, Any]:
    """``schema`` without its annotations; UsageError for a word that holds what it may not."""
    used = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
    for key, value in used.items():
        if key in _SHAPES and not _SHAPES[key][0](value):
            refuse(at, f"`{key}` is {json.dumps(value)}, not {_SHAPES[key][1]}")
    return used


def only(schema: Mapping[str, Any], at: str, *words: str) -> None:
    """UsageError for the first word beside ``words``."""
    if (alien := next((key for key in schema if key not in words), None)) is not None:
        refuse(at, f"`{alien}` cannot be kept here")


def narrowed(asked: str | list[str], within: Kinds | None, at: str) -> Kinds:
    """The types of ``type`` that are also of those ``within``."""
    kinds = [asked] if isinstance(asked, str) else asked
    if alien := [kind for kind in kinds if kind not in KEYWORDS]:
        refuse(at, f"there is no type {json.dumps(alien[0])}")
    found = list(kinds)
    if within is not None:
        found = [kind for kind in kinds if kind in within or (kind == "integer" and "number" in within)]
        found += ["integer"] if "number" in kinds and "integer" in within else []
    if not found:
        raise NoValueError(at, f"no value is of the type {' or '.join(kinds)} and {' or '.join(within or ())}")
    return tuple(dict.fromkeys(kind for kind in found if kind != "integer" or "number" not in found))


def kind_of(schema: Mapping[str, Any], at: str) -> str:
    """The type that the keywords speak of, where none is named."""
    kinds = [kind for kind, words in KEYWORDS.items() if any(word in schema for word in words)]
    if len(kinds) != 1:
        refuse(at, "`type` is missing")
    return kinds[0]


def is_of(value: object, kind: str) -> bool:
    """Whether a value that JSON gave is of a type."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and float(value).is_integer())
    names: dict[type, str] = {str: "string", dict: "object", list: "array", type(None): "null"}
    return kind == names[type(value)]


def bounds(schema: Mapping[str, Any], least: str, most: str, at: str) -> tuple[int, int | None]:
    """The values of two words that count; the second None where it is not there."""
    low, high = int(schema.get(least, 0)), int(schema[most]) if most in schema else None
    if any(bound is not None and bound > MOST_REPETITIONS for bound in (low, high)):
        refuse(at, f"`{least}` and `{most}` above {MOST_REPETITIONS}")
    if high is not None and high < low:
        refuse(at, f"`{most}` is below `{least}`")
    return low, high


def _refusal(at: str, what: str) -> str:
    return f"the JSON schema cannot be followed at {at}: {what}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_schema(value: object) -> bool:
    return isinstance(value, dict | bool)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_HINT: Final = "leave it away there and check the answer yourself, or write the grammar (--grammar)"
_SHAPES: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "type": (lambda value: _is_text(value) or (_is_list(value) and _are_texts(value)), "a name or a list of names"),
    "$ref": (_is_text, "a text"),
    "pattern": (_is_text, "a text"),
    "format": (_is_text, "a text"),
    "properties": (lambda value: isinstance(value, dict), "an object"),
    "required": (_are_texts, "a list of names"),
    "additionalProperties": (_is_schema, "a schema"),
    "items": (_is_schema, "a schema"),
    "prefixItems": (lambda value: isinstance(value, list), "a list"),
    **dict.fromkeys(("enum", "anyOf", "oneOf", "allOf"), (_is_list, "a list with something in it")),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), (_is_count, "a number of things")),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")),
}

"""A JSON schema -> a GBNF grammar whose every text is JSON that the schema accepts.

What a grammar cannot promise is refused and never left out: an unknown keyword, a range of fractions, unique items.
It may promise less than the schema allows: no properties but the declared ones unless there are none, in their
order; ``oneOf`` is read as ``anyOf``. (The bindings' converter lets raw line breaks into strings and ignores what it
does not know.)
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

from runtime.engine.json_pattern import pattern_rule
from toolchain.base.errors import UsageError

BASE_RULES: Final = {
    "ws": r'(" " | "\n" [ \t]{0,20})?',
    "hex": "[0-9a-fA-F]",
    "char": r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] hex | [dD] [0-7]) hex hex)',
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "amount": '("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "number": '"-"? amount',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (string ws ":" ws value ("," ws string ws ":" ws value)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "date": '[0-9]{4} "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
    ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?'
    ' ("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])',
    "date-time": 'date "T" time',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}
FORMATS: Final = ("date", "time", "date-time", "uuid")
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

_EMPTY: Final = '""'
_DIGITS: Final = 10**16 - 1


def json_schema_to_gbnf(text: str) -> str:
    """The grammar; UsageError, with the place in the schema, for what is no schema or cannot be promised."""
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise UsageError("the JSON schema is no JSON", evidence=str(error)) from error
    converter = _Converter(schema)
    root = converter.visit(schema, "#")
    rules = {"root": root, **converter.rules, **BASE_RULES}
    return "".join(f"{name} ::= {body}\n" for name, body in rules.items())


class _Converter:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._names: dict[str, str] = {}
        self.rules: dict[str, str] = {}

    def visit(self, schema: Any, at: str) -> str:
        """GBNF for ``schema``, one item of a sequence; ``at`` is its place, as a JSON pointer."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            _refuse(at, f"{json.dumps(schema)} is no schema that has values")
        used = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        for key, build in (("$ref", self._reference), ("const", self._const), ("enum", self._enum)):
            if key in used:
                self._only(used, at, key, *(() if key == "$ref" else ("type",)))
                return build(used[key], at)
        for key in ("anyOf", "oneOf"):
            if key in used:
                self._only(used, at, key, "type")
                return _either(self.visit(each, f"{at}/{key}/{i}") for i, each in enumerate(used[key]))
        if "allOf" in used:
            return self.visit(self._merged(used, at), at)
        kinds = used.get("type") or _kind_of(used, at)
        if isinstance(kinds, list):
            return _either(self._typed({**used, "type": kind}, kind, at, kinds) for kind in kinds)
        return self._typed(used, kinds, at, [kinds])

    def _typed(self, schema: dict[str, Any], kind: str, at: str, kinds: list[str]) -> str:
        if kind not in KEYWORDS:
            _refuse(at, f"there is no type {json.dumps(kind)}")
        allowed = {word for each in kinds for word in KEYWORDS.get(each, ())}
        self._only(schema, at, "type", *allowed)
        own = {word: schema[word] for word in KEYWORDS[kind] if word in schema}
        if not own:
            return kind
        match kind:
            case "object":
                return self._object(own, at)
            case "array":
                return self._array(own, at)
            case "string":
                return self._string(own, at)
            case "integer":
                return _integer(own, at)
            case _:
                if own["minimum"] != 0:
                    _refuse(at, "`minimum` of a number: only 0 can be kept")
                return "amount"

    def _reference(self, pointer: str, at: str) -> str:
        if pointer not in self._names:
            self._names[pointer] = name = f"ref{len(self._names)}"
            self.rules[name] = self.visit(self._target(pointer, at), pointer)
        return self._names[pointer]

    def _target(self, pointer: str, at: str) -> Any:
        target = self._schema
        try:
            first, *parts = pointer.split("/")
            if first != "#":
                raise KeyError(pointer)
            for part in parts:
                key = part.replace("~1", "/").replace("~0", "~")
                target = target[int(key)] if isinstance(target, list) else target[key]
        except (KeyError, ValueError, IndexError, TypeError):
            _refuse(at, f"`$ref` {json.dumps(pointer)} names nothing in this schema")
        return target

    def _const(self, value: Any, _at: str) -> str:
        return _literal(json.dumps(value, ensure_ascii=False))

    def _enum(self, values: Any, at: str) -> str:
        return _either(self._const(value, at) for value in values)

    def _object(self, schema: dict[str, Any], at: str) -> str:
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        required = set(schema.get("required", ()))
        if missing := sorted(required - set(properties)):
            _refuse(at, f"`required` names {json.dumps(missing[0])}, which is no property")
        if not properties:
            if more is False:
                return '"{" ws "}"'
            pair = f'string ws ":" ws {self.visit(more, f"{at}/additionalProperties")}'
            return self._rule(f'"{{" ws ({pair} ("," ws {pair})*)? ws "}}"')
        if not isinstance(more, bool):
            _refuse(at, "`additionalProperties` of a type, beside `properties`")
        # From behind: what may follow when nothing stands before it yet, and when something does.
        first, later = "", ""
        for name, schema_of in reversed(properties.items()):
            pair = f'{_literal(json.dumps(name, ensure_ascii=False))} ws ":" ws '
            pair += self.visit(schema_of, f"{at}/properties/{name}")
            alone, behind = f"{pair} {later}", f'"," ws {pair} {later}'
            if name not in required:
                alone, behind = f"({alone} | {first or _EMPTY})", f"({behind} | {later or _EMPTY})"
            first, later = self._rule(alone), self._rule(behind)
        return self._rule(f'"{{" ws {first} ws "}}"')

    def _array(self, schema: dict[str, Any], at: str) -> str:
        items, prefix = schema.get("items", True), schema.get("prefixItems", [])
        least, most = _bounds(schema, "minItems", "maxItems", at)
        fixed = [self.visit(each, f"{at}/prefixItems/{i}") for i, each in enumerate(prefix)]
        if fixed:
            if least > len(fixed) or (most is not None and most < len(fixed)):
                _refuse(at, "`prefixItems` beside another number of items")
            listed = ' "," ws '.join(fixed)
            return self._rule(f'"[" ws {listed} ws "]"')
        if items is False or most == 0:
            return '"[" ws "]"'
        item = self.visit(items, f"{at}/items")
        rest = f'("," ws {item}){_times(max(least - 1, 0), None if most is None else most - 1)}'
        return self._rule(f'"[" ws ({item} {rest}){"?" if least == 0 else ""} ws "]"')

    def _string(self, schema: dict[str, Any], at: str) -> str:
        if len(schema) > 1 and not schema.keys() <= {"minLength", "maxLength"}:
            _refuse(at, f"{' beside '.join(f'`{word}`' for word in schema)}")
        if "pattern" in schema:
            return self._rule(rf'"\"" {pattern_rule(schema["pattern"], any_char="char")} "\""')
        if "format" in schema:
            if schema["format"] not in FORMATS:
                _refuse(at, f"`format` {json.dumps(schema['format'])}; understood are {', '.join(FORMATS)}")
            return self._rule(rf'"\"" {schema["format"]} "\""')
        least, most = _bounds(schema, "minLength", "maxLength", at)
        return self._rule(rf'"\"" char{_times(least, most)} "\""')

    def _merged(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        """``allOf`` of objects, and what stands beside it, as one object."""
        parts = [*schema["allOf"], {key: value for key, value in schema.items() if key != "allOf"}]
        merged: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        for number, given in enumerate(parts):
            part = self._target(given["$ref"], at) if given.keys() - ANNOTATIONS == {"$ref"} else given
            if len(parts) == 2 and number == 0 and not parts[1]:
                return dict(part)
            self._only({key: part[key] for key in part if key not in ANNOTATIONS}, at, "type", *KEYWORDS["object"])
            if part.get("type", "object") != "object" or merged["properties"].keys() & part.get("properties", {}):
                _refuse(at, "`allOf` of anything but objects of different properties")
            merged["properties"].update(part.get("properties", {}))
            merged["required"] += part.get("required", [])
        return merged

    def _rule(self, body: str) -> str:
        name = f"rule{len(self.rules)}"
        self.rules[name] = body
        return name

    def _only(self, schema: dict[str, Any], at: str, *understood: str) -> None:
        if alien := next((key for key in schema if key not in understood), None):
            _refuse(at, f"`{alien}` cannot be kept here")


def _kind_of(schema: dict[str, Any], at: str) -> str:
    """The type that the keywords speak of, where none is named."""
    kinds = [kind for kind, words in KEYWORDS.items() if any(word in schema for word in words)]
    if len(kinds) != 1:
        _refuse(at, "`type` is missing")
    return kinds[0]


def _bounds(schema: dict[str, Any], least: str, most: str, at: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    if any(bound is not None and bound > MOST_REPETITIONS for bound in (low, high)):
        _refuse(at, f"`{least}` and `{most}` above {MOST_REPETITIONS}")
    if high is not None and high < low:
        _refuse(at, f"`{most}` is below `{least}`")
    return low, high


def _times(least: int, most: int | None) -> str:
    if most is None:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    return f"{{{least},{most}}}"


def _integer(schema: dict[str, Any], at: str) -> str:
    """GBNF for the integers of a range, without leading zeros."""
    low = max(math.ceil(schema.get("minimum", -_DIGITS)), math.floor(schema.get("exclusiveMinimum", -_DIGITS - 1)) + 1)
    high = min(math.floor(schema.get("maximum", _DIGITS)), math.ceil(schema.get("exclusiveMaximum", _DIGITS + 1)) - 1)
    if low > high:
        _refuse(at, "no integer is within the bounds")
    below = [f'"-" ({_between(max(1, -high), -low)})'] if low < 0 else []
    above = [_between(max(low, 0), high)] if high >= 0 else []
    return _either([*below, *above])


def _between(low: int, high: int) -> str:
    """GBNF for the numbers from ``low`` to ``high``, neither below 0."""
    found = []
    for length in range(len(str(low)), len(str(high)) + 1):
        start = max(low, 10 ** (length - 1) if length > 1 else 0)
        found.append(_same_length(str(start), str(min(high, 10**length - 1))))
    return " | ".join(found)


def _same_length(low: str, high: str) -> str:
    if len(set(low)) == 1 and low[0] == "0" and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    if low == high:
        return f'"{low}"'
    if len(low) == 1:
        return f"[{low}-{high}]"
    size = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_length(low[1:], high[1:])})'
    parts, first, last = [], int(low[0]), int(high[0])
    if low[1:] != "0" * size:
        parts.append(f'"{low[0]}" ({_same_length(low[1:], "9" * size)})')
        first += 1
    tail = [f'"{high[0]}" ({_same_length("0" * size, high[1:])})'] if high[1:] != "9" * size else []
    last -= len(tail)
    middle = [f"[{first}-{last}] [0-9]{{{size}}}"] if first <= last else []
    return " | ".join([*parts, *middle, *tail])


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _either(items: Any) -> str:
    found = list(dict.fromkeys(items))
    return found[0] if len(found) == 1 and found[0].isidentifier() else f"({' | '.join(found)})"


def _refuse(at: str, what: str) -> NoReturn:
    raise UsageError(
        f"the JSON schema cannot be followed at {at}: {what}",
        hint="leave it away there and check the answer yourself, or write the grammar (--grammar)",
    )

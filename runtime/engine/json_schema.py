"""A JSON schema -> a GBNF grammar whose every text is JSON that the schema accepts.

What a grammar cannot promise is refused and never left out: an unknown keyword, a range of fractions, unique items.
It may promise less than the schema allows: no properties but the declared ones unless there are none, in their
order. One thing is taken on trust: ``oneOf`` is read as ``anyOf``. (The bindings' converter lets raw line breaks into
strings and ignores what it does not know.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Final, NoReturn

from runtime.engine.json_pattern import pattern_rule
from runtime.engine.json_rules import (
    BASE_RULES,
    EMPTY,
    FORMATS,
    LARGEST_INTEGER,
    either,
    integer_range,
    json_literal,
    times,
)
from runtime.engine.json_words import (
    ANNOTATIONS,
    KEYWORDS,
    Kinds,
    NoValueError,
    bounds,
    is_of,
    kind_of,
    narrowed,
    only,
    refuse,
    understood,
)
from toolchain.base.errors import UsageError


def json_schema_to_gbnf(text: str) -> str:
    """The grammar; UsageError, with the place in the schema, for what is no schema or cannot be promised."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
        converter = _Converter(schema)
        root = converter.visit(schema, "#")
    except ValueError as error:
        raise UsageError(
            "the JSON schema is no JSON", evidence=str(error), hint='give a file or a text such as {"type": "object"}'
        ) from error
    except RecursionError as error:
        raise UsageError("the JSON schema is nested too deeply", hint="name its parts under $defs") from error
    converter.check_references()
    rules = {"root": root, **converter.rules, **BASE_RULES}
    return "".join(f"{name} ::= {body}\n" for name, body in rules.items())


class _Converter:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._names: dict[tuple[str, Kinds | None], str] = {}
        self._leads: dict[str, list[str]] = {}  # references that a reference may begin with
        self._place = ""  # the reference whose text begins here
        self.rules: dict[str, str] = {}

    def visit(self, schema: Any, at: str, within: Kinds | None = None) -> str:
        """GBNF for ``schema``, one item of a sequence; ``at`` is its place, as a JSON pointer.

        Only values of the types ``within`` are wanted.
        """
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            refuse(at, f"{json.dumps(schema)} is no schema that has values")
        used = understood(schema, at)
        if "type" in used:
            within = narrowed(used.pop("type"), within, at)
        if not used:
            return either(within) if within else "value"
        for key, build in self._combined.items():
            if key in used:
                only(used, at, key, *(KEYWORDS["object"] if key == "allOf" else ()))
                return build(self, used, at, within)
        kinds = within or (kind_of(used, at),)
        only(used, at, *(word for kind in kinds for word in KEYWORDS[kind]))
        return either(self._typed(used, kind, at) for kind in kinds)

    def check_references(self) -> None:
        """UsageError for a reference that comes back to itself before any text."""
        for (pointer, _), name in self._names.items():
            seen, left = set(), [*self._leads.get(name, ())]
            while left:
                if (one := left.pop()) not in seen:
                    seen.add(one)
                    left += self._leads.get(one, ())
            if name in seen:
                refuse(pointer, "its `$ref` leads back to itself")

    def _typed(self, schema: dict[str, Any], kind: str, at: str) -> str:
        own = {word: schema[word] for word in KEYWORDS[kind] if word in schema}
        if not own:
            return kind
        if kind == "integer":
            return _integer(own, at)
        if kind == "number":
            if own["minimum"] != 0:
                refuse(at, "`minimum` of a number: only 0 can be kept")
            return "amount"
        if kind == "string":
            return self._string(own, at)
        before, self._place = self._place, ""
        try:
            return self._object(own, at) if kind == "object" else self._array(own, at)
        finally:
            self._place = before

    def _reference(self, schema: dict[str, Any], at: str, within: Kinds | None) -> str:
        pointer = schema["$ref"]
        name = self._names.get((pointer, within))
        begun = name is not None
        if name is None:
            name = self._names[pointer, within] = f"ref{len(self._names)}"
        if self._place:
            self._leads.setdefault(self._place, []).append(name)
        if not begun:
            before, self._place = self._place, name
            try:
                self.rules[name] = self.visit(self._target(pointer, at), pointer, within)
            finally:
                self._place = before
        return name

    def _target(self, pointer: str, at: str) -> Any:
        target = self._schema
        try:
            first, *parts = pointer.split("/")
            if first != "#":
                raise KeyError(pointer)
            for part in parts:
                key = part.replace("~1", "/").replace("~0", "~")
                if isinstance(target, list) and not key.isdecimal():
                    raise KeyError(key)
                target = target[int(key)] if isinstance(target, list) else target[key]
        except (KeyError, ValueError, IndexError, TypeError):
            refuse(at, f"`$ref` {json.dumps(pointer)} names nothing in this schema")
        return target

    def _values(self, schema: dict[str, Any], at: str, within: Kinds | None) -> str:
        """``const`` and ``enum``: the values that have one of the types."""
        listed = schema["enum"] if "enum" in schema else [schema["const"]]
        if within:
            listed = [value for value in listed if any(is_of(value, kind) for kind in within)]
        if not listed:
            raise NoValueError(at, f"no value of it is of the type {' or '.join(within or ())}")
        found = [json_literal(value) for value in listed]
        return either(found) if "enum" in schema else found[0]

    def _any(self, schema: dict[str, Any], at: str, within: Kinds | None) -> str:
        ((key, branches),) = schema.items()
        found, last = [], None
        for number, branch in enumerate(branches):
            kept = dict(self.rules), dict(self._names), {name: [*leads] for name, leads in self._leads.items()}
            try:
                found.append(self.visit(branch, f"{at}/{key}/{number}", within))
            except NoValueError as error:
                last = error
                self.rules, self._names, self._leads = kept
        if not found and last:
            raise last
        return either(found)

    def _all(self, schema: dict[str, Any], at: str, within: Kinds | None) -> str:
        """``allOf`` of one schema, or of objects, with what stands beside it, as one object."""
        parts = [(f"{at}/allOf/{number}", part) for number, part in enumerate(schema["allOf"])]
        if len(parts) == len(schema) == 1:
            return self.visit(parts[0][1], parts[0][0], within)
        merged: dict[str, Any] = {"properties": {}, "required": []}
        for place, given in [*parts, (at, {key: value for key, value in schema.items() if key != "allOf"})]:
            part = given
            if isinstance(given, dict) and given.keys() - ANNOTATIONS == {"$ref"} and isinstance(given["$ref"], str):
                part = self._target(given["$ref"], place)
            if not isinstance(part, dict):
                refuse(place, f"{json.dumps(part)} is no object that can be merged")
            part = understood(part, place)
            only(part, place, "type", "properties", "required")  # additionalProperties would speak of the others' too
            if part.get("type", "object") != "object" or merged["properties"].keys() & part.get("properties", {}):
                refuse(place, "`allOf` of anything but objects of different properties")
            merged["properties"].update(part.get("properties", {}))
            merged["required"] += part.get("required", [])
        return self.visit({"type": "object", **merged}, at, within)

    _combined: Final[dict[str, Callable[..., str]]] = {
        "$ref": _reference,
        "const": _values,
        "enum": _values,
        "anyOf": _any,
        "oneOf": _any,
        "allOf": _all,
    }

    def _object(self, schema: dict[str, Any], at: str) -> str:
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        required = set(schema.get("required", ()))
        if missing := sorted(required - set(properties)):
            refuse(at, f"`required` names {json.dumps(missing[0])}, which is no property")
        if not properties:
            if more is False:
                return '"{" ws "}"'
            pair = f'string ws ":" ws {self.visit(more, f"{at}/additionalProperties")}'
            return self._rule(f'"{{" ws ({pair} ("," ws {pair})*)? ws "}}"')
        if not isinstance(more, bool):
            refuse(at, "`additionalProperties` of a type, beside `properties`")
        # From behind: what may follow when nothing stands before it yet, and when something does.
        first, later = "", ""
        for name, schema_of in reversed(properties.items()):
            place = f"{at}/properties/{name.replace('~', '~0').replace('/', '~1')}"
            pair = f'{json_literal(name)} ws ":" ws {self.visit(schema_of, place)}'
            alone, behind = f"{pair} {later}", f'"," ws {pair} {later}'
            if name not in required:
                alone, behind = f"({alone} | {first or EMPTY})", f"({behind} | {later or EMPTY})"
            first, later = self._rule(alone), self._rule(behind)
        return self._rule(f'"{{" ws {first} ws "}}"')

    def _array(self, schema: dict[str, Any], at: str) -> str:
        items, prefix = schema.get("items", True), schema.get("prefixItems", [])
        least, most = bounds(schema, "minItems", "maxItems", at)
        fixed = [self.visit(each, f"{at}/prefixItems/{i}") for i, each in enumerate(prefix)]
        if fixed:
            if least > len(fixed) or (most is not None and most < len(fixed)):
                refuse(at, "`prefixItems` beside another number of items")
            listed = ' "," ws '.join(fixed)
            return self._rule(f'"[" ws {listed} ws "]"')
        if items is False and least:
            refuse(at, "`minItems` of an array that has none")
        if items is False or most == 0:
            return '"[" ws "]"'
        item = self.visit(items, f"{at}/items")
        rest = f'("," ws {item}){times(max(least - 1, 0), None if most is None else most - 1)}'
        return self._rule(f'"[" ws ({item} {rest}){"?" if least == 0 else ""} ws "]"')

    def _string(self, schema: dict[str, Any], at: str) -> str:
        if len(schema) > 1 and not schema.keys() <= {"minLength", "maxLength"}:
            refuse(at, f"{' beside '.join(f'`{word}`' for word in schema)}")
        if "pattern" in schema:
            try:
                return self._rule(rf'"\"" {pattern_rule(schema["pattern"], any_char="char")} "\""')
            except UsageError as error:
                refuse(at, error.message)
        if "format" in schema:
            if schema["format"] not in FORMATS:
                refuse(at, f"`format` {json.dumps(schema['format'])}; understood are {', '.join(FORMATS)}")
            return self._rule(rf'"\"" {schema["format"]} "\""')
        least, most = bounds(schema, "minLength", "maxLength", at)
        return self._rule(rf'"\"" char{times(least, most)} "\""')

    def _rule(self, body: str) -> str:
        name = f"rule{len(self.rules)}"
        self.rules[name] = body
        return name


def _integer(schema: dict[str, Any], at: str) -> str:
    """GBNF for the integers of a range."""
    most = LARGEST_INTEGER
    low = max(math.ceil(schema.get("minimum", -most)), math.floor(schema.get("exclusiveMinimum", -most - 1)) + 1)
    high = min(math.floor(schema.get("maximum", most)), math.ceil(schema.get("exclusiveMaximum", most + 1)) - 1)
    if low > high:
        refuse(at, "no integer is within the bounds")
    return integer_range(low, high)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")

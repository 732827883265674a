"""JSON schema -> GBNF: what is promised, and that nothing is left out in silence."""

from __future__ import annotations

import json
import random
import re

import pytest

from runtime.engine.json_pattern import pattern_rule
from runtime.engine.json_schema import json_schema_to_gbnf
from toolchain.base.errors import UsageError


def rules(schema: object) -> dict[str, str]:
    lines = json_schema_to_gbnf(json.dumps(schema)).splitlines()
    return dict(line.split(" ::= ", 1) for line in lines)


def integers(**bounds: float) -> re.Pattern[str]:
    """The rule of an integer as a regular expression: its GBNF has only literals, classes and groups."""
    return re.compile(rules({"type": "integer", **bounds})["root"].replace('"', "").replace(" ", ""))


@pytest.mark.parametrize("seed", range(40))
def test_integer_range_holds_its_numbers_and_no_others(seed: int) -> None:
    dice = random.Random(seed)
    low = dice.randrange(-(10 ** dice.randrange(1, 6)), 10 ** dice.randrange(1, 6))
    high = low + dice.randrange(10 ** dice.randrange(0, 6))
    rule = integers(minimum=low, maximum=high)
    near = {low - 1, low, low + 1, high - 1, high, high + 1, 0, 9, 10, 99, 100, -1, -10}
    for number in near | {dice.randrange(low - 1000, high + 1000) for _ in range(200)}:
        assert bool(rule.fullmatch(str(number))) == (low <= number <= high), number
    assert not rule.fullmatch("007")


def test_open_and_exclusive_bounds() -> None:
    assert integers(exclusiveMinimum=0).fullmatch("1")
    assert not integers(exclusiveMinimum=0).fullmatch("0")
    assert integers(minimum=1.5).fullmatch("2")
    assert not integers(maximum=-3).fullmatch("-2")


def test_names_and_values_are_escaped_twice() -> None:
    assert rules({"const": 'a"\\\n'})["root"] == r'"\"a\\\"\\\\\\n\""'


def test_strings_hold_no_raw_control_character() -> None:
    assert r"\x00-\x1F" in rules({"type": "string"})["char"]


def test_annotations_are_read_over() -> None:
    plain = {"type": "object", "properties": {"a": {"type": "integer"}}}
    noted = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        **plain,
        "properties": {"a": {"type": "integer", "description": "d", "default": 1}},
    }
    assert rules(plain) == rules(noted)


def test_recursive_definition_becomes_one_rule() -> None:
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    made = rules({"$defs": {"node": node}, "$ref": "#/$defs/node"})
    assert made["root"] == "ref0"
    assert any("ref0" in body for name, body in made.items() if name != "root")


def test_definitions_of_the_same_last_name_are_not_mixed_up() -> None:
    schema = {
        "$defs": {"a": {"x": {"const": 1}}, "b": {"x": {"const": 2}}},
        "anyOf": [{"$ref": "#/$defs/a/x"}, {"$ref": "#/$defs/b/x"}],
    }
    made = rules(schema)
    assert {made["ref0"], made["ref1"]} == {'"1"', '"2"'}


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"type": "number", "maximum": 3}, "`maximum`"),
        ({"type": "number", "minimum": 1}, "only 0"),
        ({"type": "integer", "multipleOf": 2}, "`multipleOf`"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "below"),
        ({"type": "string", "maxLength": 100000}, "above"),
        ({"type": "string", "format": "email"}, '"email"'),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "beside"),
        ({"type": "object", "patternProperties": {}}, "`patternProperties`"),
        ({"type": "object", "properties": {}, "required": ["a"]}, '"a"'),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, "beside"),
        ({"not": {"type": "null"}}, "`type` is missing"),
        ({"type": "strin"}, '"strin"'),
        ({"$ref": "#/$defs/none"}, "names nothing"),
        ({"$ref": "https://example.org/x"}, "names nothing"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "allOf|cannot be kept"),
        (False, "no schema that has values"),
    ],
)
def test_what_cannot_be_promised_is_refused(schema: object, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        json_schema_to_gbnf(json.dumps(schema))


def test_place_of_the_trouble_is_named() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string", "format": "uri"}}}}
    with pytest.raises(UsageError, match="#/properties/a/items"):
        json_schema_to_gbnf(json.dumps(schema))


def test_text_that_is_no_json_is_refused_with_its_place() -> None:
    with pytest.raises(UsageError) as caught:
        json_schema_to_gbnf('{"type": }')
    assert "line 1 column 10" in (caught.value.evidence or "")


@pytest.mark.parametrize(
    "pattern", ["(?=a)", r"\bword", "a{2}{3}", "(a", "[a", "[z-a]", "a)b", "^a|b$", r"\1", "a^b", "*"]
)
def test_pattern_that_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="cannot be followed"):
        pattern_rule(pattern, any_char="char")


def test_pattern_without_anchors_may_stand_anywhere() -> None:
    assert pattern_rule("a", any_char="char").startswith("char* (")
    assert not pattern_rule("^a$", any_char="char").startswith("char*")
    assert pattern_rule(r"^a\$", any_char="char").endswith("char*")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["integer", "number"], "maximum": 5},
        {"type": "string", "const": 5},
        {"type": "string", "enum": [5, None]},
        {"type": "string", "anyOf": [{"type": "integer"}]},
        {"type": "null", "allOf": [{"type": "string"}]},
        {"type": "boolean", "$ref": "#/$defs/n", "$defs": {"n": {"const": 1}}},
        {"items": False, "minItems": 1},
        {"allOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"properties": {"b": {}}}]},
        {"const": 1e400},
    ],
)
def test_no_word_is_left_out(schema: object) -> None:
    with pytest.raises(UsageError):
        json_schema_to_gbnf(json.dumps(schema).replace("Infinity", "1e400"))


def test_type_beside_alternatives_keeps_those_of_that_type() -> None:
    either = {"type": "string", "anyOf": [{"type": "integer"}, {"type": ["null", "string"]}, {"enum": [1, "x"]}]}
    assert rules(either)["root"] == r'(string | ("\"x\""))'
    assert (
        rules({"type": "integer", "anyOf": [{"type": "number", "maximum": 5, "minimum": 5}]})["root"].strip("()")
        == '"5"'
    )
    assert rules({"type": ["string", "null"], "enum": ["a", None, 3]})["root"] == r'("\"a\"" | "null")'
    assert rules({"type": ["integer", "number"]})["root"] == "number"


def test_dropped_alternative_leaves_no_half_made_rule() -> None:
    node = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/node"}}]}
    made = rules({"$defs": {"node": node}, "type": "null", "anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
    assert made["root"] == "(null)" or made["root"] == "null"
    assert not any(name.startswith("ref") for name in made)


@pytest.mark.parametrize(
    ("schema", "at"),
    [
        ({"enum": 5}, "#"),
        ({"items": {"minItems": "2", "type": "array"}}, "#/items"),
        ({"properties": {"a/b": {"type": {}}}}, "#/properties/a~1b"),
        ({"type": []}, "#"),
        ({"type": [["string"]]}, "#"),
        ({"minItems": -1}, "#"),
        ({"minimum": True}, "#"),
        ({"anyOf": 5}, "#"),
        ({"anyOf": [5]}, "#/anyOf/0"),
        ({"allOf": []}, "#"),
        ({"allOf": [3, {"properties": {}}]}, "#/allOf/0"),
        ({"$ref": 3}, "#"),
        ({"properties": []}, "#"),
        ({"properties": {"a": 3}}, "#/properties/a"),
        ({"required": "a", "properties": {"a": {}}}, "#"),
        ({"required": [[]], "properties": {"a": {}}}, "#"),
        ({"items": [{}]}, "#"),
        ({"prefixItems": {}}, "#"),
        ({"additionalProperties": 3}, "#"),
        ({"pattern": 3}, "#"),
        ({"pattern": "(a"}, "#"),
        ({"format": {}}, "#"),
        ([], "#"),
    ],
)
def test_malformed_schema_is_refused_at_its_place(schema: object, at: str) -> None:
    with pytest.raises(UsageError) as caught:
        json_schema_to_gbnf(json.dumps(schema))
    assert f"at {at}: " in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#"}]},
        {"$ref": "#"},
        {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
def test_reference_that_leads_back_to_itself_is_refused(schema: object) -> None:
    with pytest.raises(UsageError, match="leads back to itself"):
        json_schema_to_gbnf(json.dumps(schema))


def test_schema_nested_beyond_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="deep"):
        json_schema_to_gbnf('{"items":' * 5000 + "true" + "}" * 5000)

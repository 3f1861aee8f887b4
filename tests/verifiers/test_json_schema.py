"""json_schema: what is JSON, every keyword on values that satisfy it and that do not, and patterns against `re`."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import GroundTruthError, check, verify
from verifiers.json_schema.pattern import Pattern
from verifiers.json_schema.schema import KINDS
from verifiers.json_schema.values import RULES

CASES = [  # schema, values that satisfy it, values that do not
    ({}, [None, 0, "a", [], {}], []),
    ({"type": "integer"}, [0, -3, 2.0, 10**30], [1.5, "1", True, None]),
    ({"type": "number"}, [0, 1.5], ["1", False]),
    ({"type": ["string", "null"]}, ["a", None], [0, []]),
    ({"type": "boolean"}, [True], [0, 1, "true"]),
    ({"enum": [1, "a", [1, {"b": None}]]}, [1, 1.0, "a", [1, {"b": None}]], [True, "b", [1], [1, {"b": 0}]]),
    ({"const": {"a": [False]}}, [{"a": [False]}], [{"a": [0]}, {"a": []}, {}]),
    ({"minimum": 2, "exclusiveMaximum": 5}, [2, 4.9, "x"], [1.9, 5]),
    ({"maximum": 2, "exclusiveMinimum": 0}, [2, 0.1], [0, 2.1]),
    ({"multipleOf": 0.1}, [0.3, 1, 0, -0.7, 1e20], [0.25, 1e-3]),
    ({"multipleOf": 3}, [9, 9.0], [10]),
    ({"minLength": 2, "maxLength": 3}, ["ab", "äöü", 1], ["a", "abcd"]),
    ({"pattern": "^[A-Z]{2}[0-9]+$"}, ["AB1", 5], ["AB", "xAB1", "AB1x"]),
    ({"pattern": "b"}, ["abc"], ["ac"]),
    ({"format": "date"}, ["2024-02-29", 3], ["2023-02-29", "2024-2-9", "20240229", "２０２４-01-01"]),
    (
        {"format": "date-time"},
        ["2024-02-29T23:59:60Z", "2024-01-01t00:00:00.5+01:30"],
        ["2024-01-01", "2024-01-01T25:00:00Z"],
    ),
    ({"format": "time"}, ["10:20:30Z"], ["10:20", "10:20:30"]),
    ({"format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
    ({"format": "ipv4"}, ["1.2.3.4"], ["1.2.3", "1.2.3.256", "::1"]),
    ({"format": "ipv6"}, ["::1"], ["1.2.3.4", "::1%eth0"]),
    ({"items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2], "x"], [[], [1, 2, 3], [1, "2"]]),
    ({"prefixItems": [{"type": "string"}], "items": False}, [["a"], []], [[1], ["a", 1]]),
    ({"uniqueItems": True}, [[1, True, "1", [1]], []], [[1, 1.0], [[1], [1]], [{"a": 1}, {"a": 1}]]),
    ({"contains": {"const": 1}}, [[0, 1]], [[0], []]),
    ({"contains": {"const": 1}, "minContains": 2, "maxContains": 3}, [[1, 1], [1, 1, 1]], [[1], [1] * 4]),
    ({"contains": {"const": 1}, "minContains": 0}, [[0]], []),
    ({"properties": {"a": {"type": "string"}}, "required": ["a"]}, [{"a": "x", "b": 1}, 3], [{}, {"a": 1}]),
    ({"properties": {"a": True}, "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
    (
        {"patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        [{"x-a": 1, "b": "c"}],
        [{"x-a": "1"}, {"b": 1}],
    ),
    ({"propertyNames": {"maxLength": 2}}, [{"ab": 1}], [{"abc": 1}]),
    ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
    ({"dependentRequired": {"a": ["b"]}}, [{"b": 1}, {"a": 1, "b": 2}], [{"a": 1}]),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, [3], [2, "x"]),
    ({"anyOf": [{"type": "integer"}, {"minLength": 2}]}, [1, "ab", None], ["a"]),
    ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, [2, 3], [6, 5, "x"]),
    ({"not": {"type": "string"}}, [1], ["a"]),
    ({"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"minimum": 0}}, ["ab", 1], ["a", -1]),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "string"}}}, ["x"], [1]),
    (
        {"properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
        [{"next": {"next": {}}}],
        [{"next": {"n": 1}}],
    ),
    ({"$ref": "#/$defs/a", "maximum": 3, "$defs": {"a": {"minimum": 1}}}, [2], [0, 4]),
]  # schema, right, wrong


@pytest.mark.parametrize(("schema", "right", "wrong"), CASES, ids=[json.dumps(case[0])[:40] for case in CASES])
def test_every_keyword(schema, right, wrong):
    for truth in (schema, json.dumps(schema)):
        check("json_schema", truth)
        for value in right:
            assert verify(json.dumps(value), truth, "json_schema").score == 1, value
        for value in wrong:
            verdict = verify(json.dumps(value), truth, "json_schema")
            assert (verdict.score, verdict.status) == (0, "ok") and verdict.reason.startswith("$"), value


def test_every_keyword_that_is_used_has_a_case():
    tested = {key for schema, *_ in CASES for key in schema}
    said = {key for key, kind in KINDS.items() if kind != "notes"}
    assert tested >= said - {"definitions"} and set(RULES) <= said
    assert said - set(RULES) == {"minContains", "maxContains", "then", "else", "$defs", "definitions"}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"typ": "string"}, r"unknown keyword typ \(nearest: type\)"),
        (
            {"properties": {"a": {"unevaluatedProperties": False}}},
            "#/properties/a: unknown keyword unevaluatedProperties",
        ),
        ({"type": "strin"}, r"unknown type strin \(nearest: string\)"),
        ({"$ref": "https://example.com/a"}, "expected a place in this schema"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "there is no"),
        ({"$ref": "#/$defs", "$defs": {"a": {}}}, "unknown keyword a"),
        ({"format": "email"}, "format email is not checked here"),
        ({"items": [{}]}, "expected a schema"),
        ({"minimum": "1"}, "expected a number"),
        ({"minimum": float("nan")}, "expected a number"),
        ({"multipleOf": 0}, "expected a number above 0"),
        ({"minLength": -1}, "whole number from 0"),
        ({"required": "a"}, "list of names"),
        ({"enum": []}, "list of values"),
        ({"anyOf": []}, "list of schemas"),
        ({"properties": []}, "expected an object"),
        ({"uniqueItems": 1}, "true or false"),
        ({"pattern": "(?=a)b"}, "is not read"),
        ({"pattern": r"(a)\1"}, "is not read"),
        ({"pattern": "a{1000}"}, "expected"),
        ({"pattern": "(a{99}){99}"}, "more than 400 states"),
        ({"patternProperties": {"(": {}}}, "does not end"),
        ("[1]", "expected a JSON schema"),
        ('{"a": NaN}', "not JSON"),
        ("{", "not JSON"),
        (None, "expected a JSON schema"),
        (True, "expected a JSON schema"),
    ],
)
def test_what_is_not_of_the_subset_is_refused_by_name(schema, says):
    with pytest.raises(GroundTruthError, match=says) as problem:
        check("json_schema", schema)
    assert "\n" not in str(problem.value)
    assert verify("{}", schema, "json_schema").status == "error"


def test_deep_schemas_are_refused():
    schema: dict = {}
    for _ in range(100):
        schema = {"items": schema}
    with pytest.raises(GroundTruthError, match="nested deeper than 64"):
        check("json_schema", schema)


OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"a": 1}', 1),
        (' \n{"a": 1}\n', 1),
        ('```json\n{"a": 1}\n```', 1),
        ('Here it is:\n```\n{"a": 1}\n```\nI hope that it helps.', 1),
        ('<think>{</think>{"a": 1}', 1),
        ('<think>x</think><answer>{"a": 1}</answer>', 1),
        ('Here it is: {"a": 1}', 0),
        ('```json\n{"a": 1}\n```\n```json\n{"a": 2}\n```', 0),
        ('```json\n{"a": 1}', 0),
        ('{"a": 1} {"b": 2}', 0),
        ('{"a": NaN}', 0),
        ('{"a": Infinity}', 0),
        ('{"a": 1e400}', 0),
        ('{"a": 1, "a": 1}', 0),
        ("{'a': 1}", 0),
        ('{"a": 1,}', 0),
        ('{"a": "```"}', 1),
        ('{"a": 01}', 0),
        ("", 0),
        ("\u200b", 0),
        ('{"a": ' * 65 + "1" + "}" * 65, 0),
        ('{"a": ' * 64 + "1" + "}" * 64, 1),
        ("[]", 0),
    ],
)
def test_what_is_json(response, score):
    verdict = verify(response, OBJECT, "json_schema")
    assert (verdict.score, verdict.status) == (score, "ok"), verdict


def test_a_loop_of_references_ends():
    for loop in ({"$ref": "#"}, {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"not": {"$ref": "#"}}):
        verdict = verify("1", loop, "json_schema")
        assert verdict.score == 0 and "too much" in verdict.reason and verdict.status == "ok"


def test_work_is_bounded_where_nothing_is_deep():
    schema = {"items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}
    assert verify(json.dumps([1] * 300), schema, "json_schema").score == 1
    verdict = verify(json.dumps([1] * 3000), schema, "json_schema")
    assert verdict.score == 0 and "too much" in verdict.reason and verdict.status == "ok"


# --- patterns ---------------------------------------------------------------------------------------------------------

ATOMS = st.sampled_from(
    ["a", "b", "c", ".", "[ab]", "[^a]", "[a-c]", r"\d", r"\w", r"\W", r"\.", "[-a]", "1", r"\x61", r"[\d.]"]
)
COUNTS = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,}", "{0,2}", "*?", "+?", "{0}"])
PATTERNS = st.recursive(
    st.tuples(ATOMS, COUNTS).map("".join),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.tuples(st.sampled_from(["(", "(?:"]), st.lists(inner, min_size=1, max_size=3).map("|".join), COUNTS).map(
            lambda parts: f"{parts[0]}{parts[1]}){parts[2]}"
        )
        | inner.map("^{}".format)
        | inner.map("{}$".format)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(PATTERNS, st.text("abc1. -", max_size=8))
def test_a_pattern_means_what_it_means_to_re(pattern, text):
    assert Pattern(pattern).search(text, lambda work: None) == bool(re.search(pattern, text, re.ASCII))


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "^(a+)+$", "(a?){50}a{50}b", ".*.*.*.*b", "([a-z]+)*1"])
def test_patterns_that_backtrack_for_ever_elsewhere(pattern):
    spent = []
    start = time.process_time()
    assert not Pattern(pattern).search("a" * 3000 + "!", spent.append)
    assert time.process_time() - start < 1 and sum(spent) < 100_000
    verdict = verify(json.dumps("a" * 3000 + "!"), {"pattern": pattern}, "json_schema")
    assert verdict.score == 0 and verdict.status == "ok"

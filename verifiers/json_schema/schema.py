"""A subset of JSON Schema 2020-12 (json-schema.org/draft/2020-12), of which every keyword is either used or refused.

Used: type, enum, const; minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf; minLength, maxLength,
pattern, format (date, time, date-time, uuid, ipv4, ipv6); items, prefixItems, contains, minContains, maxContains,
minItems, maxItems, uniqueItems; properties, required, additionalProperties, patternProperties, propertyNames,
minProperties, maxProperties, dependentRequired; allOf, anyOf, oneOf, not, if, then, else; $ref within the schema,
$defs, definitions. Notes that say nothing about the value (title, description, default, examples, ...) are passed over.
Refused by name: every other keyword, `$ref` to elsewhere, other formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from verifiers.json_schema.formats import FORMATS
from verifiers.json_schema.pattern import compiled
from verifiers.strings import nearest, shown
from verifiers.verdict import GroundTruthError

MAX_DEPTH = 64  # of a schema, and of references within references
MAX_SCHEMA = 64 * 1024  # characters
WORDS = {
    "notes": "title description default examples $schema $comment $id $anchor deprecated readOnly writeOnly",
    "a schema": "additionalProperties propertyNames items contains not if then else",
    "schemas": "allOf anyOf oneOf prefixItems",
    "schemas by name": "properties patternProperties $defs definitions",
    "a size": "minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains",
    "a bound": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    "other": "type enum const pattern format uniqueItems required dependentRequired $ref",
}
KINDS = {word: kind for kind, words in WORDS.items() for word in words.split()}  # keyword → what it holds
TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda x: x is None,
    "boolean": lambda x: isinstance(x, bool),
    "integer": lambda x: is_number(x) and x == x // 1,
    "number": lambda x: is_number(x),
    "string": lambda x: isinstance(x, str),
    "array": lambda x: isinstance(x, list),
    "object": lambda x: isinstance(x, dict),
}


def is_number(value: Any) -> bool:
    """JSON's true is no number, as Python's is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- the schema -------------------------------------------------------------------------------------------------------


def check(schema: Any, root: Any, where: str = "#", depth: int = 0, seen: set[str] | None = None) -> None:
    """Raises GroundTruthError, naming the place and the keyword, for what is not of the subset."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise wrong(where, f"expected a schema, found {shown(schema)}")
    if depth > MAX_DEPTH:
        raise wrong(where, f"nested deeper than {MAX_DEPTH}")
    seen = set() if seen is None else seen
    for key, value in schema.items():
        kind, place = KINDS.get(key), f"{where}/{key}"
        inner: dict[str, Any] = {}
        if kind is None:
            raise wrong(where, f"unknown keyword {shown(key)}{nearest(key, KINDS)}")
        if kind == "schemas by name":
            if not isinstance(value, dict):
                raise wrong(place, f"expected an object, found {shown(value)}")
            inner = {f"{place}/{name}": of for name, of in value.items()}
            for name in value if key == "patternProperties" else ():
                compiled(name)
        elif kind == "schemas":
            if not isinstance(value, list) or not value:
                raise wrong(place, f"expected a list of schemas, found {shown(value)}")
            inner = {f"{place}/{i}": of for i, of in enumerate(value)}
        elif kind == "a schema":
            inner = {place: value}
        elif key == "$ref":
            target = referred(value, root, place)
            inner = {} if value in seen else {value: target}
            seen.add(value)
        elif kind != "notes":
            check_value(key, value, place)
        for name, of in inner.items():
            check(of, root, name, depth + 1, seen)


def check_value(key: str, value: Any, place: str) -> None:
    """The same for a keyword that holds no schema."""
    texts = isinstance(value, list) and all(isinstance(x, str) for x in value)
    if KINDS[key] == "a size" and not (TYPES["integer"](value) and value >= 0):
        raise wrong(place, f"expected a whole number from 0, found {shown(value)}")
    if KINDS[key] == "a bound" and not (
        is_number(value) and math.isfinite(value) and (key != "multipleOf" or value > 0)
    ):
        raise wrong(place, f"expected a number{' above 0' * (key == 'multipleOf')}, found {shown(value)}")
    if key == "type":
        for name in value if texts and value else [value]:
            if not isinstance(name, str) or name not in TYPES:
                raise wrong(place, f"unknown type {shown(name)}{nearest(name, TYPES)}")
    if key == "enum" and not (isinstance(value, list) and value):
        raise wrong(place, f"expected a list of values, found {shown(value)}")
    if key == "required" and not texts:
        raise wrong(place, f"expected a list of names, found {shown(value)}")
    if key == "dependentRequired" and not (
        isinstance(value, dict)
        and all(isinstance(names, list) and all(isinstance(x, str) for x in names) for names in value.values())
    ):
        raise wrong(place, f"expected name → list of names, found {shown(value)}")
    if key == "uniqueItems" and not isinstance(value, bool):
        raise wrong(place, f"expected true or false, found {shown(value)}")
    if key == "pattern":
        if not isinstance(value, str):
            raise wrong(place, f"expected a regular expression, found {shown(value)}")
        compiled(value)
    if key == "format" and (not isinstance(value, str) or value not in FORMATS):
        raise wrong(place, f"format {shown(value)} is not checked here (known: {', '.join(FORMATS)})")


def wrong(where: str, what: str) -> GroundTruthError:
    """The error that names a place of the schema."""
    return GroundTruthError(f"ground_truth: schema {shown(where)}: {what}")


def referred(reference: Any, root: Any, where: str = "#") -> Any:
    """The part of the schema that a `$ref` names. Raises GroundTruthError."""
    if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
        raise wrong(where, f"expected a place in this schema such as #/$defs/name, found {shown(reference)}")
    target = root
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and key.isascii() and key.isdigit() and len(key) < 6 and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict) and key in target:
            target = target[key]
        else:
            raise wrong(where, f"there is no {shown(reference)}")
    return target

"""Does the response hold JSON that satisfies the schema of the ground truth?

The response, behind '</think>' and without <answer> tags, is strict JSON as a whole, or holds exactly one fenced block
(```json … ```) that is; prose around a fence is allowed. Strict: no NaN or Infinity, no key twice, no number beyond a
double. A text of more than 16,384 characters, a value nested deeper than 64, or more work than MAX_WORK scores 0, said
in the reason: an empty schema is no licence for junk. open-instruct has no such verifier, so every mode is the default.
"""

import json
import math
import re
from collections import Counter
from functools import lru_cache

from verifiers.json_schema.schema import MAX_DEPTH, MAX_SCHEMA, check
from verifiers.json_schema.values import Comparison, TooMuch, told
from verifiers.strings import is_blank, shown, without_thinking
from verifiers.verdict import GroundTruthError, Verdict, failed, passed

MAX_JSON = 16 * 1024
FENCE = re.compile(r"(?m)^ {0,3}```([^\n`]*)$")


class NotStrict(ValueError):
    """What Python's reader takes and JSON does not know."""


def verify(response: str, ground_truth: object, mode: str = "default") -> Verdict:
    """1 if the response is JSON that satisfies the schema, else 0. Raises GroundTruthError; else total, bounded."""
    schema = parse(ground_truth)
    if is_blank(response):
        return failed("empty response")
    text, why = json_text(without_thinking(response))
    if why:
        return failed(why)
    try:
        value = read(text)
    except (ValueError, RecursionError) as problem:
        return failed(f"not JSON: {shown(problem)}")
    try:
        found = Comparison(schema).problem(value, schema)
    except TooMuch:
        return failed("too much to compare: more work than is allowed")
    return failed(told(found)) if found else passed("satisfies the schema")


def parse(ground_truth: object) -> object:
    """The schema, checked. Raises GroundTruthError."""
    schema = ground_truth
    if isinstance(schema, str):
        return of_text(schema)
    if not isinstance(schema, dict):
        raise GroundTruthError(f"ground_truth: expected a JSON schema, found {shown(schema)}")
    check(schema, schema)
    return schema


@lru_cache(maxsize=1024)
def of_text(text: str) -> object:
    """The schema in a text. Raises GroundTruthError."""
    if len(text) > MAX_SCHEMA:
        raise GroundTruthError(f"ground_truth: a schema of {len(text)} characters is too long")
    try:
        schema = read(text)
    except (ValueError, RecursionError) as problem:
        raise GroundTruthError(f"ground_truth: the schema is not JSON: {shown(problem)}") from None
    return parse(schema if isinstance(schema, dict) else [schema])


def json_text(text: str) -> tuple[str, str]:
    """(the text that should be JSON, '') or ('', why there is none)."""
    fences = list(FENCE.finditer(text)) if len(text) <= MAX_JSON else []
    if len(fences) == 2 and fences[1][1].strip() == "":
        text = text[fences[0].end() : fences[1].start()]
    elif fences:
        return "", f"{len(fences)} lines of ```, wanted one block"
    text = text.strip(" \t\n\r")
    return (text, "") if len(text) <= MAX_JSON else ("", f"too long: {len(text)} characters")


def read(text: str) -> object:
    """Strict JSON as an object. Raises ValueError, RecursionError."""
    value = json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=without_doubles)
    if text.count("[") + text.count("{") > MAX_DEPTH and depth_of(value) > MAX_DEPTH:
        raise NotStrict(f"nested deeper than {MAX_DEPTH}")
    return value


def depth_of(value: object) -> int:
    """How many lists and objects stand within each other."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, (list, dict))]:
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth


def refuse(name: str) -> None:
    """Raises NotStrict for NaN and Infinity."""
    raise NotStrict(f"{name} is no JSON number")


def finite(text: str) -> float:
    """A number that a double can hold. Raises NotStrict."""
    number = float(text)
    if not math.isfinite(number):
        raise NotStrict(f"{shown(text, 20)} is beyond a double")
    return number


def without_doubles(pairs: list) -> dict:
    """An object each of whose keys stands once. Raises NotStrict."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotStrict(f"the key {shown(twice, 30)} stands twice")
    return found

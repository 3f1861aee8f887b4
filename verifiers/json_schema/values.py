"""A value against a schema that schema.py has passed: the first thing that is wrong with it, in bounded work.

A keyword is a rule: `rule(run, value, argument, schema, where, depth)` says what is wrong or None, and passes over
values that it does not speak of, as JSON Schema has it. A problem is put into words (`told`) only if it is the verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from verifiers.json_schema.formats import FORMATS
from verifiers.json_schema.pattern import compiled
from verifiers.json_schema.schema import MAX_DEPTH, TYPES, is_number, referred
from verifiers.strings import shown

MAX_WORK = 3000  # comparisons of a part of the value with a schema, or of a character with a state of a pattern

Where = tuple | None  # (the place that holds it, the name or number in it); None is the whole value
Problem = tuple[Where, str, tuple] | None  # the place, a sentence with gaps, what they hold


class TooMuch(Exception):
    """A response that costs more than MAX_WORK."""


class Comparison:
    """One value's way through one schema. Raises TooMuch beyond MAX_WORK."""

    def __init__(self, root: Any) -> None:
        self.root, self.work, self.enums = root, 0, dict[int, frozenset]()

    def spend(self, amount: int = 1) -> None:
        """Counts work."""
        self.work += amount
        if self.work > MAX_WORK:
            raise TooMuch

    def problem(self, value: Any, schema: Any, where: Where = None, depth: int = 0) -> Problem:
        """What is wrong with the value, the first thing found; None if it satisfies the schema."""
        if isinstance(schema, bool):
            return None if schema else (where, "nothing is allowed here", ())
        self.spend(2)
        if depth > 2 * MAX_DEPTH:
            raise TooMuch
        for key, argument in schema.items():
            rule = RULES.get(key)
            if rule is not None and (found := rule(self, value, argument, schema, where, depth + 1)):
                return found
        return None

    def fits(self, value: Any, schema: Any, depth: int) -> bool:
        """Whether it satisfies the schema."""
        return self.problem(value, schema, None, depth) is None

    def plain(self, value: Any) -> Any:
        """`plain`, at its cost."""
        if isinstance(value, (list, dict)):
            self.spend(1 + len(value))
        return plain(value, self.plain)


def plain(value: Any, inside: Callable[[Any], Any] | None = None) -> Any:
    """A value that is equal and hashes the same where JSON's is equal: 1 is 1.0, and not true."""
    inside = inside or plain
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, list):
        return ("array", *map(inside, value))
    if isinstance(value, dict):
        return ("object", frozenset((key, inside(held)) for key, held in value.items()))
    return value


def told(problem: Problem) -> str:
    """A problem in words: '$.list[3]: expected integer, found null'."""
    where, sentence, values = problem or (None, "", ())
    place = ""
    while where is not None:
        where, part = where
        place = (f"[{part}]" if isinstance(part, int) else f".{shown(part, 20)}") + place
    place = f"...{place[-80:]}" if len(place) > 80 else place
    return f"${place}: {sentence.format(*map(brief, values))}"


Rule = Callable[[Comparison, Any, Any, dict, Where, int], Problem]


def brief(value: Any) -> str:
    """A value in a reason."""
    if isinstance(value, (list, dict)):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else shown(value, 30)


def type_(run: Comparison, value: Any, kinds: Any, schema: dict, where: Where, depth: int) -> Problem:
    """type: one, or one of several."""
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if any(TYPES[kind](value) for kind in kinds):
        return None
    return where, "expected {}, found {}", (" or ".join(kinds), value)


def enum(run: Comparison, value: Any, values: Any, schema: dict, where: Where, depth: int) -> Problem:
    """enum: equal to one."""
    if id(values) not in run.enums:
        run.enums[id(values)] = frozenset(map(plain, values))
    return None if run.plain(value) in run.enums[id(values)] else (where, "{} is not in the enum", (value,))


def const(run: Comparison, value: Any, wanted: Any, schema: dict, where: Where, depth: int) -> Problem:
    """const: equal."""
    same = run.plain(value) == plain(wanted)
    return None if same else (where, "expected {}, found {}", (wanted, value))


def bound(key: str, holds: Callable[[Any, Any], bool]) -> Rule:
    """The rule of a bound on numbers."""

    def rule(run: Comparison, value: Any, argument: Any, schema: dict, where: Where, depth: int) -> Problem:
        broken = is_number(value) and not holds(value, argument)
        return (where, "{} breaks {} {}", (value, key, argument)) if broken else None

    return rule


def size(key: str, kind: type[str] | type[list] | type[dict], holds: Callable[[Any, Any], bool]) -> Rule:
    """The rule of a bound on the length of texts, lists or objects."""

    def rule(run: Comparison, value: Any, argument: Any, schema: dict, where: Where, depth: int) -> Problem:
        broken = isinstance(value, kind) and not holds(len(value), argument)
        return (where, "{} breaks {} {}", (len(value), key, argument)) if broken else None

    return rule


def multiple_of(run: Comparison, value: Any, argument: Any, schema: dict, where: Where, depth: int) -> Problem:
    """multipleOf, on the decimal digits: 0.3 is a multiple of 0.1."""
    if not is_number(value):
        return None
    written = repr(value)
    run.spend(8 if len(written) < 16 and "e" not in written else 40)
    fine = Fraction(written) % Fraction(repr(argument)) == 0
    return None if fine else (where, "{} breaks {} {}", (value, "multipleOf", argument))


def pattern(run: Comparison, value: Any, argument: Any, schema: dict, where: Where, depth: int) -> Problem:
    """pattern: found anywhere in the text."""
    if not isinstance(value, str) or compiled(argument).search(value, run.spend):
        return None
    return where, "{} does not match {}", (value, argument)


def format_(run: Comparison, value: Any, argument: Any, schema: dict, where: Where, depth: int) -> Problem:
    """format, asserted."""
    fine = not isinstance(value, str) or FORMATS[argument](value)
    return None if fine else (where, "{} is no {}", (value, argument))


def items(run: Comparison, value: Any, inner: Any, schema: dict, where: Where, depth: int) -> Problem:
    """items: those behind prefixItems."""
    if not isinstance(value, list) or inner is True:
        return None
    first = len(schema.get("prefixItems", ()))
    for i, item in enumerate(value[first:], first):
        if problem := run.problem(item, inner, (where, i), depth):
            return problem
    return None


def prefix_items(run: Comparison, value: Any, schemas: Any, schema: dict, where: Where, depth: int) -> Problem:
    """prefixItems: the first ones, each its own."""
    for i, (item, inner) in enumerate(zip(value if isinstance(value, list) else (), schemas, strict=False)):
        if problem := run.problem(item, inner, (where, i), depth):
            return problem
    return None


def contains(run: Comparison, value: Any, inner: Any, schema: dict, where: Where, depth: int) -> Problem:
    """contains, with minContains and maxContains."""
    if not isinstance(value, list):
        return None
    count = sum(run.fits(item, inner, depth) for item in value)
    low, high = schema.get("minContains", 1), schema.get("maxContains", count)
    return None if low <= count <= high else (where, "contains {} such items", (count,))


def unique_items(run: Comparison, value: Any, wanted: Any, schema: dict, where: Where, depth: int) -> Problem:
    """uniqueItems."""
    if not wanted or not isinstance(value, list):
        return None
    return (where, "two items are equal", ()) if len(set(map(run.plain, value))) < len(value) else None


def required(run: Comparison, value: Any, names: Any, schema: dict, where: Where, depth: int) -> Problem:
    """required."""
    missing = [name for name in names if name not in value] if isinstance(value, dict) else []
    return (where, "{} is missing", (missing[0],)) if missing else None


def dependent_required(run: Comparison, value: Any, needs: Any, schema: dict, where: Where, depth: int) -> Problem:
    """dependentRequired."""
    names = [n for key, needed in needs.items() if key in value for n in needed] if isinstance(value, dict) else []
    return required(run, value, names, schema, where, depth)


def properties(run: Comparison, value: Any, schemas: Any, schema: dict, where: Where, depth: int) -> Problem:
    """properties: those that are there."""
    for name, inner in schemas.items() if isinstance(value, dict) else ():
        if name in value and (problem := run.problem(value[name], inner, (where, name), depth)):
            return problem
    return None


def pattern_properties(run: Comparison, value: Any, schemas: Any, schema: dict, where: Where, depth: int) -> Problem:
    """patternProperties: those whose name matches."""
    for text, inner in schemas.items():
        for name in value if isinstance(value, dict) else ():
            found = compiled(text).search(name, run.spend)
            if found and (problem := run.problem(value[name], inner, (where, name), depth)):
                return problem
    return None


def additional(run: Comparison, value: Any, inner: Any, schema: dict, where: Where, depth: int) -> Problem:
    """additionalProperties: those that neither properties nor patternProperties name."""
    if not isinstance(value, dict) or inner is True:
        return None
    named, patterns = schema.get("properties", {}), [compiled(p) for p in schema.get("patternProperties", {})]
    for name in value:
        is_other = name not in named and not any(p.search(name, run.spend) for p in patterns)
        if is_other and (problem := run.problem(value[name], inner, (where, name), depth)):
            return problem
    return None


def property_names(run: Comparison, value: Any, inner: Any, schema: dict, where: Where, depth: int) -> Problem:
    """propertyNames."""
    for name in value if isinstance(value, dict) else ():
        if problem := run.problem(name, inner, (where, name), depth):
            return problem
    return None


def all_of(run: Comparison, value: Any, schemas: Any, schema: dict, where: Where, depth: int) -> Problem:
    """allOf."""
    return next((found for inner in schemas if (found := run.problem(value, inner, where, depth))), None)


def any_of(run: Comparison, value: Any, schemas: Any, schema: dict, where: Where, depth: int) -> Problem:
    """anyOf."""
    fine = any(run.fits(value, inner, depth) for inner in schemas)
    return None if fine else (where, "{} satisfies none of anyOf", (value,))


def one_of(run: Comparison, value: Any, schemas: Any, schema: dict, where: Where, depth: int) -> Problem:
    """oneOf."""
    count = sum(run.fits(value, inner, depth) for inner in schemas)
    return None if count == 1 else (where, "{} satisfies {} of oneOf", (value, count))


def not_(run: Comparison, value: Any, inner: Any, schema: dict, where: Where, depth: int) -> Problem:
    """not."""
    return (where, "{} satisfies what it must not", (value,)) if run.fits(value, inner, depth) else None


def if_(run: Comparison, value: Any, inner: Any, schema: dict, where: Where, depth: int) -> Problem:
    """if, then, else."""
    branch = "then" if run.fits(value, inner, depth) else "else"
    return run.problem(value, schema.get(branch, True), where, depth)


def ref(run: Comparison, value: Any, reference: Any, schema: dict, where: Where, depth: int) -> Problem:
    """$ref, within the schema."""
    return run.problem(value, referred(reference, run.root), where, depth)


def at_least(a: Any, b: Any) -> bool:
    """a >= b"""
    return a >= b


def at_most(a: Any, b: Any) -> bool:
    """a <= b"""
    return a <= b


RULES: dict[str, Rule] = {
    "type": type_,
    "enum": enum,
    "const": const,
    "minimum": bound("minimum", at_least),
    "maximum": bound("maximum", at_most),
    "exclusiveMinimum": bound("exclusiveMinimum", lambda a, b: a > b),
    "exclusiveMaximum": bound("exclusiveMaximum", lambda a, b: a < b),
    "multipleOf": multiple_of,
    "minLength": size("minLength", str, at_least),
    "maxLength": size("maxLength", str, at_most),
    "minItems": size("minItems", list, at_least),
    "maxItems": size("maxItems", list, at_most),
    "minProperties": size("minProperties", dict, at_least),
    "maxProperties": size("maxProperties", dict, at_most),
    "pattern": pattern,
    "format": format_,
    "items": items,
    "prefixItems": prefix_items,
    "contains": contains,
    "uniqueItems": unique_items,
    "required": required,
    "dependentRequired": dependent_required,
    "properties": properties,
    "patternProperties": pattern_properties,
    "additionalProperties": additional,
    "propertyNames": property_names,
    "allOf": all_of,
    "anyOf": any_of,
    "oneOf": one_of,
    "not": not_,
    "if": if_,
    "$ref": ref,
}

"""When are two answers of a mathematics problem the same?

In this order: the same text; the same words; then both are parsed whole and compared by kind: values as values
(math_value), tuples and intervals place by place, sets, lists and unions in any order but with every element once,
equations and inequalities up to a factor, 'x = 5' against '5' by its value. A text that does not parse equals only
itself. There is no tolerance: 0.333 is not 1/3 (but a decimal of 12 or more digits, correctly rounded, is its number).
Conventions (docs/verifiers.md): 50% is 50; a unit on one side only is ignored, two different units differ.
"""

import re
from fractions import Fraction
from functools import lru_cache

from verifiers.math import value as math_value
from verifiers.math.parse import parse
from verifiers.math.tokens import MAX_LENGTH, THOUSANDS, Unparseable, normalise
from verifiers.math.value import NoValue, Undefined, close, same_up_to_factor, same_value, variables

MAX_ITEMS = 30
DECIMAL_COMMA = re.compile(r"-?0,[0-9]+")
TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}")
FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|mathsf|bf|rm|it)(?![a-z])\s*")


def equal(prediction: str, answer: str) -> bool:
    """True if the two texts state the same answer. Total; not symmetric only in that an empty `answer` equals nothing."""
    if max(len(prediction), len(answer)) > MAX_LENGTH:
        return False
    try:
        prediction, answer = normalise(prediction), normalise(answer)
    except Unparseable:
        return False
    if not prediction or not answer:
        return False
    if squeezed(prediction) == squeezed(answer):
        return True
    if squeezed(TEXT.sub(r"\1", prediction)) == squeezed(TEXT.sub(r"\1", answer)):
        return True
    words = same_words(prediction, answer)
    if words is not None:
        return words
    if DECIMAL_COMMA.fullmatch(prediction) and "," not in answer:
        prediction = prediction.replace(",", ".")
    if DECIMAL_COMMA.fullmatch(answer) and "," not in prediction:
        answer = answer.replace(",", ".")
    grouped = THOUSANDS.search(prediction) or THOUSANDS.search(answer)
    return any(same_reading(prediction, answer, thousands) for thousands in ((True, False) if grouped else (True,)))


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def same_words(prediction: str, answer: str) -> bool | None:
    """Whether two texts of words are the same, in any case and font and with or without brackets around them; None if
    neither is words: 'Evelyn', '\\text{(C)}'. Bare single letters are variables: 'x' and 'X' are not words."""
    a, b = plain_words(prediction), plain_words(answer)
    if a is None or b is None:
        return None
    if len(a) == len(b) == 1:
        return a.casefold() == b.casefold() if "\\" in prediction + answer else None
    both = a.casefold() == b.casefold()
    if not both and {a.lower(), b.lower()} & {"no", "on", "yes", "so", "is", "it", "am", "pm"}:
        return False
    return True if both else None if max(len(a), len(b)) <= 3 and " " not in a + b else False


@lru_cache(maxsize=4096)
def plain_words(text: str) -> str | None:
    bare = FONT.sub("", text)
    bare = re.sub(r"[{}]", "", bare).strip(" .,;:!\"'")
    while bare.startswith("(") and bare.endswith(")"):
        bare = bare[1:-1].strip()
    return " ".join(bare.split()) if re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ \-',.])*", bare) else None


def same_reading(prediction: str, answer: str, thousands: bool) -> bool:
    a, b = read(prediction, thousands), read(answer, thousands)
    if a is None or b is None:
        return False
    try:
        return same(a, b, prediction + "|" + answer)
    except RecursionError:
        return False


@lru_cache(maxsize=4096)
def read(text: str, thousands: bool) -> tuple | None:
    """The tree of a normalised text in canonical form, or None."""
    try:
        return canonical(parse(text, thousands))
    except (Unparseable, RecursionError):
        return None


# --- canonical form -----------------------------------------------------------------------------------------------------


def canonical(tree: tuple) -> tuple:
    """± as the list of its two values, lists in lists flattened, 'x in S' as S, > as <, nested
    unions as one."""
    kind = tree[0]
    if kind == "seq" and tree[1] == "":
        items = []
        for item in map(canonical, tree[3]):
            items += item[3] if item[:3] == ("seq", "", "") else [item]
        return ("seq", "", "", tuple(items))
    if kind == "seq":
        return (*tree[:3], tuple(map(canonical, tree[3])))
    if kind == "rel":
        return canonical_relation(*tree[1:])
    if kind == "union":
        parts = []
        for part in map(canonical, tree[1]):
            parts += part[1] if part[0] == "union" else [part]
        return ("union", tuple(parts))
    if kind == "unit" and tree[2] in ("%", "°"):
        return canonical(tree[1])
    if kind in ("sum", "prod", "neg", "div", "pm", "mp", "pow", "unit") and has_sign(tree):
        return ("seq", "", "", (with_sign(tree, False), with_sign(tree, True)))
    return tree


def has_sign(tree) -> bool:
    return isinstance(tree, tuple) and (tree[:1] in (("pm",), ("mp",)) or any(map(has_sign, tree)))


def with_sign(tree, minus: bool):
    """`tree` with every ± read as one sign, and every ∓ as the other."""
    if not isinstance(tree, tuple):
        return tree
    if tree[:1] in (("pm",), ("mp",)):
        inside = with_sign(tree[1], minus)
        return ("neg", inside) if minus == (tree[0] == "pm") else inside
    return tuple(with_sign(part, minus) for part in tree)


FLIPPED = {">": "<", ">=": "<="}
INFINITY = ("const", "inf")


def canonical_relation(operators: tuple, sides: tuple) -> tuple:
    if set(operators) <= {">", ">="}:
        operators, sides = tuple(FLIPPED[o] for o in reversed(operators)), tuple(reversed(sides))
    if operators == ("in",) and is_name(sides[0]):
        return canonical(sides[1])
    if has_sign(sides) and operators == ("=",) and not has_sign(sides[0]):
        pair = (with_sign(sides[1], False), with_sign(sides[1], True))
        return ("seq", "", "", tuple(("rel", ("=",), (sides[0], side)) for side in pair))
    return ("rel", operators, tuple(map(canonical, sides)))


def as_interval(tree: tuple) -> tuple:
    """a < x <= b and x <= b (one variable, constant bounds) as an interval; any other tree as it is."""
    if tree[0] != "rel" or not set(tree[1]) <= {"<", "<="}:
        return tree
    (_, _operators, sides), low, high = tree, "[" if tree[1][0] == "<=" else "(", "]" if tree[1][-1] == "<=" else ")"
    if len(sides) == 3 and sides[1][0] == "sym" and not variables(sides[0]) | variables(sides[2]):
        return ("seq", low, high, (sides[0], sides[2]))
    if len(sides) == 2 and sides[0][0] == "sym" and not variables(sides[1]):
        return ("seq", "(", high, (("neg", INFINITY), sides[1]))
    if len(sides) == 2 and sides[1][0] == "sym" and not variables(sides[0]):
        return ("seq", low, ")", (sides[0], INFINITY))
    return tree


def is_name(tree: tuple) -> bool:
    """What can stand before '=' as the name of a quantity: x, a_1, AB, |AB|, f(2), P(A), A:B, NO/BO, (p, q), a text."""
    kind = tree[0]
    if kind in ("sym", "text"):
        return True
    if kind == "unit":  # \\angle ABC
        return tree[1][0] == "sym"
    if kind == "pow":  # f^{-1}(x)
        return tree[1][0] == "sym" and tree[1][1] in "fgh" and tree[2][0] == "neg"
    if kind == "fn":
        return tree[1].startswith("apply ") or (tree[1] in ("abs", "sin", "cos", "tan") and all(map(is_name, tree[2])))
    if kind == "prod":
        return is_name(tree[1][0]) and all(is_name(part) or part[0] == "num" for part in tree[1][1:])
    if kind in ("div", "ratio"):
        return all(map(is_name, tree[1] if kind == "ratio" else tree[1:]))
    return kind == "seq" and tree[1] == "(" and bool(tree[3]) and all(map(is_name, tree[3]))


# --- comparison ---------------------------------------------------------------------------------------------------------


def same(a: tuple, b: tuple, salt: str) -> bool:
    """The comparison by kind of two canonical trees."""
    if a == b:
        return True
    if a[0] == "rel" and b[0] == "rel":
        return same_relation(a, b, salt)
    if a[0] == "rel" or b[0] == "rel":
        a, b = as_interval(unnamed(a, salt)), as_interval(unnamed(b, salt))
        return a[0] != "rel" and b[0] != "rel" and same(a, b, salt)
    if a[0] == "unit" or b[0] == "unit":
        return same_units(a, b) and same(without_unit(a), without_unit(b), salt)
    if a[0] == "seq" or b[0] == "seq":
        return a[0] == b[0] and same_sequence(a, b, salt)
    if a[0] in ("union", "inter", "minus", "ratio") or b[0] in ("union", "inter", "minus", "ratio"):
        if a[0] != b[0] or len(a[1]) != len(b[1]):
            return False
        return same_in_any_order(a[1], b[1], salt) if a[0] in ("union", "inter") else in_places(a[1], b[1], salt)
    if a[0] == "based" or b[0] == "based":
        return False  # equal digits in equal bases were equal trees
    if a[0] == "text" or b[0] == "text":
        return a[0] in ("text", "sym") and b[0] in ("text", "sym") and a[1].strip("() ").lower() == b[1].strip("() ").lower()
    if infinite(a) or infinite(b):
        return infinite(a) == infinite(b)
    try:
        return same_value(a, b, salt) or rounded(a, b) or rounded(b, a)
    except (NoValue, Undefined):
        return False


def infinite(tree: tuple) -> int:
    """1 for ∞, -1 for -∞, else 0."""
    return 1 if tree == INFINITY else -1 if tree == ("neg", INFINITY) else 0


def same_sequence(a: tuple, b: tuple, salt: str) -> bool:
    """Tuples and intervals by place; sets and bare lists, which may stand for each other, in any order."""
    if len(a[3]) != len(b[3]):
        return False
    if {a[1], b[1]} <= {"", "{"}:
        return same_in_any_order(a[3], b[3], salt)
    return a[1:3] == b[1:3] and in_places(a[3], b[3], salt)


def in_places(a: tuple, b: tuple, salt: str) -> bool:
    return len(a) == len(b) and all(same(x, y, salt) for x, y in zip(a, b, strict=False))


def same_in_any_order(a: tuple, b: tuple, salt: str) -> bool:
    """A one-to-one matching: {1, 2, 2} is not {1, 2}, and the first match may be taken because 'same' is transitive."""
    if len(a) != len(b) or len(a) > MAX_ITEMS:
        return in_places(a, b, salt)
    left = list(b)
    for item in a:
        place = next((i for i, other in enumerate(left) if same(item, other, salt)), None)
        if place is None:
            return False
        del left[place]
    return True


def same_relation(a: tuple, b: tuple, salt: str) -> bool:
    """Equations and inequalities: the same sides; or the same difference of sides up to a factor."""
    if a[1] == b[1] and in_places(a[2], b[2], salt):
        return True
    x, y = unnamed(a, salt), unnamed(b, salt)
    if x[0] != "rel" and y[0] != "rel":
        return same(a[2][0], b[2][0], salt) and same(x, y, salt)
    if a[1] != b[1] or len(a[1]) != 1 or a[1][0] == "in":
        return False
    try:
        differences = [("sum", (side[2][0], ("neg", side[2][1]))) for side in (a, b)]
        return same_up_to_factor(*differences, salt, positive=a[1][0] in ("<", "<="))
    except (NoValue, Undefined):
        return False


def unnamed(tree: tuple, salt: str) -> tuple:
    """The value of 'name = value', or of a true 'value = value'; any other tree as it is."""
    if tree[0] != "rel" or set(tree[1]) != {"="}:
        return tree
    values = tree[2][1:] if is_name(tree[2][0]) else tree[2]
    if values is tree[2] and any(variables(value) for value in values):
        return tree
    return values[-1] if all(same(value, values[-1], salt) for value in values[:-1]) else tree


# --- units, roundings -----------------------------------------------------------------------------------------------------

SAME_UNIT = {
    **dict.fromkeys(("inches", "inch", "in"), "in"),
    **dict.fromkeys(("feet", "foot", "ft"), "ft"),
    **dict.fromkeys(("meters", "meter", "metres", "metre", "m"), "m"),
    **dict.fromkeys(("centimeters", "centimeter", "centimetres", "cm"), "cm"),
    **dict.fromkeys(("kilometers", "kilometer", "km"), "km"),
    **dict.fromkeys(("miles", "mile", "mi"), "mi"),
    **dict.fromkeys(("hours", "hour", "hr", "hrs", "h"), "h"),
    **dict.fromkeys(("minutes", "minute", "min"), "min"),
    **dict.fromkeys(("seconds", "second", "sec", "s"), "s"),
    **dict.fromkeys(("dollars", "dollar"), "$"),
    **dict.fromkeys(("cents", "cent"), "cent"),
    **dict.fromkeys(("degrees", "degree"), "°"),
    **dict.fromkeys(("kilograms", "kilogram", "kg"), "kg"),
    **dict.fromkeys(("grams", "gram", "g"), "g"),
    **dict.fromkeys(("pounds", "pound", "lb", "lbs"), "lb"),
    **dict.fromkeys(("mm", "mph", "yd", "ml", "mg"), None),
}


def same_units(a: tuple, b: tuple) -> bool:
    """False only for two units that are both known and differ: '5 cm' and '5 m', '15 cm^2' and '15 cm^3'."""
    if a[0] != "unit" or b[0] != "unit":
        return True
    x, y = unit_key(a[2]), unit_key(b[2])
    return x is None or y is None or x == y


def unit_key(unit: str) -> tuple | None:
    """(canonical name, exponent), or None for a unit that is not known."""
    name, _, exponent = unit.lower().replace(".", "").partition("^")
    name, exponent = name.strip(), exponent.strip() or "1"
    if name.startswith(("square ", "sq ", "cubic ")):
        exponent, name = ("3" if name.startswith("cubic") else "2"), name.partition(" ")[2]
    return ((SAME_UNIT[name] or name), exponent) if name in SAME_UNIT else None


def without_unit(tree: tuple) -> tuple:
    return tree[1] if tree[0] == "unit" else tree


def rounded(decimal: tuple, value: tuple) -> bool:
    """True if `decimal` is written with 12 or more decimals and is `value` to within one unit of the last: a number that
    was printed, not one that was rounded to be read (3.14159 is not pi)."""
    sign = -1 if decimal[0] == "neg" else 1
    decimal = decimal[1] if decimal[0] == "neg" else decimal
    if decimal[0] != "num" or decimal[2] < 12 or variables(value) or value[0] in ("num", "neg"):
        return False
    x = math_value.Evaluator().value(value)
    if isinstance(x, tuple) or close(x, Fraction(0)):
        return False
    unit = math_value.context.mpf(10) ** -decimal[2]
    return abs(math_value.inexact(x) - math_value.inexact(sign * decimal[1])) <= unit

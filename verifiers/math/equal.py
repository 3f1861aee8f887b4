"""When are two answers of a mathematics problem the same?

In this order: the same text; the same words; then both are parsed whole and compared by kind: values as values
(verifiers.math.value), tuples and intervals place by place, sets, lists and unions in any order but with every element
once, equations and inequalities up to a factor, 'x = 5' against '5' by its value. A text that does not parse equals
only itself. There is no tolerance: 0.333 is not 1/3 (but a decimal of 12 or more digits, correctly rounded, is its
number).
Conventions (docs/verifiers.md): 50% is 50; a unit on one side only is ignored, two different units differ.
"""

import re
from fractions import Fraction
from functools import lru_cache
from itertools import chain

from verifiers.math.arithmetic import Undefined, context, inexact
from verifiers.math.assignments import is_family, orders, pairs_of
from verifiers.math.canonical import canonical, is_name
from verifiers.math.parse import parse
from verifiers.math.regions import same_region
from verifiers.math.spellings import normalise
from verifiers.math.tokens import MAX_LENGTH, THOUSANDS, Unparseable
from verifiers.math.tree import (
    ONE,
    Based,
    Const,
    Div,
    Inter,
    Matrix,
    Minus,
    Neg,
    Node,
    Num,
    Ratio,
    Rel,
    Seq,
    Sum,
    Sym,
    Text,
    Union,
    Unit,
)
from verifiers.math.units import same_units, without_unit
from verifiers.math.value import Evaluator, NoValue, close, same_up_to_factor, same_value, variables
from verifiers.math.words import choice, labels, same_words

MAX_ITEMS = 30
DECIMAL_COMMA = re.compile(r"([-+]?\s?[0-9]+),([0-9]+)(\s*(?:\\text\{[^{}]*\}|\\mathrm\{[^{}]*\}|\\%|°|[A-Za-z]*))")
DECIMAL_POINT = re.compile(r"(?<![0-9.])[0-9]*\.[0-9]")
BETWEEN_DIGITS = re.compile(r"(?<![0-9.])\s+|\s+(?![0-9.])")
TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{(\s*[^{}0-9\s][^{}]*|\s*)\}")


def equal(prediction: str, answer: str) -> bool:
    """True if the two texts state the same answer: '1/2' and '0.5'. Total."""
    if max(len(prediction), len(answer)) > MAX_LENGTH:
        return False
    try:
        prediction, answer = normalise(prediction), normalise(answer)
    except Unparseable:
        return False
    if not prediction or not answer:
        return False
    letters = same_choice(prediction, answer)
    return compared(prediction, answer) if letters is None else letters


def compared(prediction: str, answer: str) -> bool:
    """True if two normalised texts state the same answer, the letters of choices left aside."""
    if squeezed(prediction) == squeezed(answer):
        return True
    if squeezed(TEXT.sub(r"\1", prediction)) == squeezed(TEXT.sub(r"\1", answer)):
        return True
    several = labels(prediction), labels(answer)
    if None not in several:
        return several[0] == several[1]
    words = same_words(prediction, answer)
    if words is not None:
        return words
    prediction, answer = with_decimal_point(prediction, answer), with_decimal_point(answer, prediction)
    grouped = THOUSANDS.search(prediction) or THOUSANDS.search(answer)
    return any(same_reading(prediction, answer, thousands) for thousands in ((True, False) if grouped else (True,)))


def squeezed(text: str) -> str:
    """`text` without white space, but for that between two digits: '1 1/2' is not '11/2'."""
    return BETWEEN_DIGITS.sub("", text)


def same_choice(prediction: str, answer: str) -> bool | None:
    r"""Whether two answers to a question of choices are the same, by their letters; None if neither text is a letter
    with something after it: '\textbf{(B)}\ 5' is 'B', and is '5'."""
    a, b = choice(prediction), choice(answer)
    if a and b:
        return a[0] == b[0] and (not a[1] or not b[1] or compared(a[1], b[1])) if a[1] or b[1] or a[0] == b[0] else None
    if (a and a[1]) or (b and b[1]):
        return compared(a[1] if a else prediction, b[1] if b else answer)
    return None


def with_decimal_point(text: str, other: str) -> str:
    """`text` with its decimal comma as a point: '0,5', and '3,5' beside a number with a point; '3,5' alone is a list
    and '1,234' a thousand."""
    match = DECIMAL_COMMA.fullmatch(text)
    if match is None or "," in other:
        return text
    zero = match[1].lstrip("+- ") == "0"
    if not zero and (len(match[2]) == 3 or not DECIMAL_POINT.search(other)):
        return text
    return f"{match[1]}.{match[2]}{match[3]}"


def same_reading(prediction: str, answer: str, thousands: bool) -> bool:
    """True if both texts parse, 1,234 as one number or as two, and their trees are the same."""
    a, b = read(prediction, thousands), read(answer, thousands)
    if a is None or b is None:
        return False
    return same(a, b, prediction + "|" + answer)


@lru_cache(maxsize=4096)
def read(text: str, thousands: bool) -> Node | None:
    """The tree of a normalised text in canonical form, or None."""
    try:
        return canonical(parse(text, thousands))
    except Unparseable:
        return None


def same(a: Node, b: Node, salt: str) -> bool:
    """The comparison by kind of two canonical trees. `salt` (the two texts) chooses the points of evaluation."""
    if a == b:
        return True
    as_sets = same_region(a, b)
    if as_sets is not None:
        return as_sets
    match a, b:
        case Rel(), Rel():
            return same_relation(a, b, salt)
        case (Rel(), _) | (_, Rel()):
            return same_as_named(a, b, salt) if isinstance(a, Rel) else same_as_named(b, a, salt)
        case (Unit(), _) | (_, Unit()):
            return same_units(a, b) and same(without_unit(a), without_unit(b), salt)
        case Seq(), Seq():
            return same_sequence(a, b, salt)
        case (Seq("(", ")", items), Matrix(rows)) | (Matrix(rows), Seq("(", ")", items)):
            return 1 in (len(rows), len(rows[0])) and in_places(tuple(chain.from_iterable(rows)), items, salt)
        case (Seq(), _) | (_, Seq()):
            return False
        case (Union(left), Union(right)) | (Inter(left), Inter(right)):
            return len(left) == len(right) and same_in_any_order(left, right, salt)
        case Minus(left), Minus(right):
            return in_places(left, right, salt)
        case (Union() | Inter() | Minus(), _) | (_, Union() | Inter() | Minus()):
            return False
        case (Ratio(), _) | (_, Ratio()):
            return same_ratio(a, b, salt)
        case (Based(), _) | (_, Based()):
            return False  # equal digits in equal bases were equal trees
        case (Text(left) | Sym(left), Text(right)) | (Text(left), Sym(right)):
            return left.strip("() ").lower() == right.strip("() ").lower()
        case (Text(), _) | (_, Text()):
            return False
    if infinite(a) or infinite(b):
        return infinite(a) == infinite(b)
    try:
        return same_value(a, b, salt) or rounded(a, b) or rounded(b, a)
    except (NoValue, Undefined):
        return False


def infinite(tree: Node) -> int:
    """1 for ∞, -1 for -∞, else 0."""
    match tree:
        case Const("inf"):
            return 1
        case Neg(Const("inf")):
            return -1
    return 0


def same_ratio(a: Node, b: Node, salt: str) -> bool:
    """3:4 as 6:8 and as 3/4; what may be a time of day (10:30) is no quotient."""
    if isinstance(a, Ratio) and isinstance(b, Ratio) and in_places(a.parts, b.parts, salt):
        return True
    if any(isinstance(tree, Ratio) and is_time(tree) for tree in (a, b)):
        return False
    parts = [tree.parts if isinstance(tree, Ratio) else (tree, ONE) for tree in (a, b)]
    if len(parts[0]) != len(parts[1]):
        return False
    quotients = [[Div(part, row[-1]) for part in row[:-1]] for row in parts]
    try:
        return all(same_value(x, y, salt) for x, y in zip(*quotients, strict=True))
    except (NoValue, Undefined):
        return False


def is_time(ratio: Ratio) -> bool:
    """True for what can be hours and minutes: 10:30."""
    match ratio.parts:
        case (Num(hours, 0), Num(minutes, 0)):
            return (hours <= 24 and 10 <= minutes < 60) or minutes == 0
    return any(isinstance(part, (Unit, Text)) for part in ratio.parts)


def same_sequence(a: Seq, b: Seq, salt: str) -> bool:
    """Tuples and intervals by place; sets and bare lists, which may stand for each other, in any order."""
    if {a.opening, b.opening} <= {"", "{"}:
        left, right = (without_repetitions(seq, salt) if seq.opening else seq.items for seq in (a, b))
        return same_in_any_order(left, right, salt)
    return (a.opening, a.closing) == (b.opening, b.closing) and in_places(a.items, b.items, salt)


def without_repetitions(elements: Seq, salt: str) -> tuple[Node, ...]:
    """The elements of a set, each once: {1, 1, 2} is {1, 2}."""
    if len(elements.items) > MAX_ITEMS:
        return elements.items
    once: list[Node] = []
    for item in elements.items:
        if not any(same(item, other, salt) for other in once):
            once.append(item)
    return tuple(once)


def in_places(a: tuple[Node, ...], b: tuple[Node, ...], salt: str) -> bool:
    """True if the trees of `a` are those of `b`, one by one."""
    return len(a) == len(b) and all(same(x, y, salt) for x, y in zip(a, b, strict=False))


def same_in_any_order(a: tuple[Node, ...], b: tuple[Node, ...], salt: str) -> bool:
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


def same_relation(a: Rel, b: Rel, salt: str) -> bool:
    """Equations and inequalities: the same sides; or the same difference of sides up to a factor."""
    if a.operators == b.operators and in_places(a.sides, b.sides, salt):
        return True
    first, second = pairs_of(a), pairs_of(b)
    if first and second:
        values = dict(second)
        return dict(first).keys() == values.keys() and all(same(value, values[name], salt) for name, value in first)
    x, y = unnamed(a, salt), unnamed(b, salt)
    if not isinstance(x, Rel) and not isinstance(y, Rel):
        return same(a.sides[0], b.sides[0], salt) and same(x, y, salt)
    if a.operators != b.operators or len(a.operators) != 1 or a.operators[0] == "in":
        return False
    try:
        left, right = (Sum((side.sides[0], Neg(side.sides[1]))) for side in (a, b))
        return same_up_to_factor(left, right, salt, positive=a.operators[0] in ("<", "<="))
    except (NoValue, Undefined):
        return False


def same_as_named(rel: Node, other: Node, salt: str) -> bool:
    """'x = 5' as 5, 'x = 1, y = 2' as (1, 2) and as the list 1, 2."""
    pairs = pairs_of(rel)
    if pairs and isinstance(other, Seq) and other.opening in ("", "(") and other.closing in ("", ")"):
        if not other.opening and is_family(pairs):
            return same_in_any_order(orders(pairs)[0], other.items, salt)
        return any(in_places(values, other.items, salt) for values in orders(pairs))
    tree = unnamed(rel, salt)
    return not isinstance(tree, Rel) and same(tree, other, salt)


def unnamed(tree: Node, salt: str) -> Node:
    """The value of 'name = value', or of a true 'value = value'; any other tree as it is: of 'x = 5' 5."""
    if not isinstance(tree, Rel) or set(tree.operators) != {"="}:
        return tree
    if not is_name(tree.sides[0]) and isinstance(tree.sides[-1], Sym):  # 5 = x
        tree = Rel(tree.operators, tree.sides[::-1])
    named = is_name(tree.sides[0])
    values = tree.sides[1:] if named else tree.sides
    if not named and any(variables(value) for value in values):
        return tree
    return values[-1] if all(same(value, values[-1], salt) for value in values[:-1]) else tree


def rounded(decimal: Node, value: Node) -> bool:
    """True if `decimal` is written with 12 or more decimals and is `value` to within one unit of the last: a number
    that was printed, not one that was rounded to be read (3.14159 is not pi)."""
    sign, number = (-1, decimal.inside) if isinstance(decimal, Neg) else (1, decimal)
    if not isinstance(number, Num) or number.decimals < 12 or variables(value) or isinstance(value, (Num, Neg)):
        return False
    x = Evaluator().value(value)
    if isinstance(x, tuple) or close(x, Fraction(0)):
        return False
    unit = context.mpf(10) ** -number.decimals
    return abs(inexact(x) - inexact(sign * number.value)) <= unit

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

from verifiers.math.arithmetic import Undefined, context, inexact
from verifiers.math.canonical import as_interval, canonical, is_name
from verifiers.math.parse import parse
from verifiers.math.tokens import MAX_LENGTH, THOUSANDS, Unparseable, normalise
from verifiers.math.tree import Based, Const, Inter, Minus, Neg, Node, Num, Ratio, Rel, Seq, Sum, Sym, Text, Union, Unit
from verifiers.math.units import same_units, without_unit
from verifiers.math.value import Evaluator, NoValue, close, same_up_to_factor, same_value, variables

MAX_ITEMS = 30
DECIMAL_COMMA = re.compile(r"-?0,[0-9]+")
TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}")
FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|mathsf|bf|rm|it)(?![a-z])\s*")


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
    """`text` without white space."""
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
    r"""The words of a text of nothing else, without fonts and outer brackets: of '\text{(C)}' 'C'; None for '2x'."""
    bare = FONT.sub("", text)
    bare = re.sub(r"[{}]", "", bare).strip(" .,;:!\"'")
    while bare.startswith("(") and bare.endswith(")"):
        bare = bare[1:-1].strip()
    return " ".join(bare.split()) if re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ \-',.])*", bare) else None


def same_reading(prediction: str, answer: str, thousands: bool) -> bool:
    """True if both texts parse, 1,234 as one number or as two, and their trees are the same."""
    a, b = read(prediction, thousands), read(answer, thousands)
    if a is None or b is None:
        return False
    try:
        return same(a, b, prediction + "|" + answer)
    except RecursionError:
        return False


@lru_cache(maxsize=4096)
def read(text: str, thousands: bool) -> Node | None:
    """The tree of a normalised text in canonical form, or None."""
    try:
        return canonical(parse(text, thousands))
    except (Unparseable, RecursionError):
        return None


def same(a: Node, b: Node, salt: str) -> bool:
    """The comparison by kind of two canonical trees. `salt` (the two texts) chooses the points of evaluation."""
    if a == b:
        return True
    match a, b:
        case Rel(), Rel():
            return same_relation(a, b, salt)
        case (Rel(), _) | (_, Rel()):
            a, b = as_interval(unnamed(a, salt)), as_interval(unnamed(b, salt))
            return not isinstance(a, Rel) and not isinstance(b, Rel) and same(a, b, salt)
        case (Unit(), _) | (_, Unit()):
            return same_units(a, b) and same(without_unit(a), without_unit(b), salt)
        case Seq(), Seq():
            return same_sequence(a, b, salt)
        case (Seq(), _) | (_, Seq()):
            return False
        case (Union(left), Union(right)) | (Inter(left), Inter(right)):
            return len(left) == len(right) and same_in_any_order(left, right, salt)
        case (Minus(left), Minus(right)) | (Ratio(left), Ratio(right)):
            return in_places(left, right, salt)
        case (Union() | Inter() | Minus() | Ratio(), _) | (_, Union() | Inter() | Minus() | Ratio()):
            return False
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


def same_sequence(a: Seq, b: Seq, salt: str) -> bool:
    """Tuples and intervals by place; sets and bare lists, which may stand for each other, in any order."""
    if len(a.items) != len(b.items):
        return False
    if {a.opening, b.opening} <= {"", "{"}:
        return same_in_any_order(a.items, b.items, salt)
    return (a.opening, a.closing) == (b.opening, b.closing) and in_places(a.items, b.items, salt)


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
    x, y = unnamed(a, salt), unnamed(b, salt)
    if not isinstance(x, Rel) and not isinstance(y, Rel):
        return same(a.sides[0], b.sides[0], salt) and same(x, y, salt)
    if a.operators != b.operators or len(a.operators) != 1 or a.operators[0] == "in":
        return False
    try:
        first, second = (Sum((side.sides[0], Neg(side.sides[1]))) for side in (a, b))
        return same_up_to_factor(first, second, salt, positive=a.operators[0] in ("<", "<="))
    except (NoValue, Undefined):
        return False


def unnamed(tree: Node, salt: str) -> Node:
    """The value of 'name = value', or of a true 'value = value'; any other tree as it is: of 'x = 5' 5."""
    if not isinstance(tree, Rel) or set(tree.operators) != {"="}:
        return tree
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

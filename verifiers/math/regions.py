r"""Sets of real numbers in their many spellings: [0, 1], 0 \le x \le 1, |x - 1/2| \le 1/2 and x \ge 0, x \le 1.

Two sets with finitely many ends are equal if they agree at every end and between any two neighbours, so both are asked
for membership at these points; nothing is rewritten. Inequalities are linear in one variable, or in the absolute value
of a linear expression. Left out: polynomial inequalities (x^2 < 4 is not solved), sets of integers.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import pairwise

from verifiers.math.arithmetic import Undefined, Value, add, context, divide, exact, inexact, multiply
from verifiers.math.tree import (
    INFINITY,
    Call,
    Const,
    Div,
    Inter,
    Minus,
    Neg,
    Node,
    Prod,
    Rel,
    Seq,
    Sum,
    Sym,
    Union,
    Unit,
)
from verifiers.math.value import Evaluator, NoValue, close, variables

MAX_ENDS = 24
ORDERS: dict[str, Callable[[int], bool]] = {
    "<": lambda sign: sign < 0,
    "<=": lambda sign: sign <= 0,
    "=": lambda sign: sign == 0,
    "!=": lambda sign: sign != 0,
}
EVERYTHING = Sym("mathbb R")
ZERO = Fraction(0)


class NoRegion(ValueError):
    """A tree that is no set of real numbers in this module's sense."""


class Region:
    """A set of real numbers: the ends of its pieces, and a test of membership that is constant between them."""

    def __init__(self, ends: Iterable[Value], has: Callable[[Value], bool]):
        self.ends, self.has = list(ends), has
        if len(self.ends) > MAX_ENDS:
            raise NoRegion("too many ends")


def is_set(tree: Node) -> bool:
    """True for what can only be a set of numbers: an inequality, an interval with an infinite or one open end, a union
    of such; (1, 2) and [1, 2] may be something else."""
    match tree:
        case Rel(operators, _):
            return set(operators) <= {"<", "<=", "!="}
        case Union(sets) | Inter(sets) | Minus(sets):
            return any(map(is_set, sets)) or all(isinstance(part, Seq) and part.opening in ("(", "[") for part in sets)
        case Seq("(" | "[" as opening, closing, (low, high)):
            return (opening + closing) in ("(]", "[)") or high == INFINITY or low == Neg(INFINITY)
        case Seq("", _, items):
            return any(map(is_set, items))
    return tree == EVERYTHING


def same_region(a: Node, b: Node) -> bool | None:
    """Whether two trees are the same set of real numbers; None if one is no set of them, or neither must be one."""
    if not (is_set(a) or is_set(b)) or (is_bracketed(a) and is_bracketed(b)):
        return None
    if not all(isinstance(tree, (Rel, Union, Inter, Minus, Seq, Sym)) for tree in (a, b)):
        return None
    names = names_of(a) | names_of(b)
    if len(names) > 1:
        return None
    try:
        x, y = region(a), region(b)
        points = probes([*x.ends, *y.ends])
        return all(x.has(point) == y.has(point) for point in points)
    except (NoRegion, NoValue, Undefined):
        return None


def is_bracketed(tree: Node) -> bool:
    """True for a tuple, an interval or a set in brackets: two of these are compared by place."""
    return isinstance(tree, Seq) and tree.opening != ""


def names_of(tree: Node) -> frozenset[str]:
    """The variables that the inequalities in a tree are about."""
    return variables(tree) - {EVERYTHING.name}


def probes(ends: list[Value]) -> list[Value]:
    """Every end once, a point between any two neighbours, and one beyond either side."""
    ordered: list[Value] = []
    for end in sorted(ends, key=inexact):
        if not ordered or not close(ordered[-1], end):
            ordered.append(end)
    if not ordered:
        return [ZERO]
    between = [divide(add(a, b), Fraction(2)) for a, b in pairwise(ordered)]
    return [add(ordered[0], Fraction(-1)), *ordered, *between, add(ordered[-1], Fraction(1))]


def region(tree: Node) -> Region:
    """The set that a canonical tree describes. Raises NoRegion, NoValue, Undefined."""
    match tree:
        case Rel(operators, sides) if len(operators) <= MAX_ENDS:
            pairs = zip(operators, sides, sides[1:], strict=False)
            return all_of([comparison(operator, left, right) for operator, left, right in pairs])
        case Union(sets) if len(sets) <= MAX_ENDS:
            return any_of([region(part) for part in sets])
        case Inter(sets):
            return all_of([region(part) for part in sets])
        case Minus((first, *others)):
            whole, without = region(first), any_of([region(part) for part in others])
            return Region([*whole.ends, *without.ends], lambda x: whole.has(x) and not without.has(x))
        case Seq("(" | "[" as opening, closing, (low, high)):
            low_end = comparison("<=" if opening == "[" else "<", low, None)
            interval = all_of([low_end, comparison("<=" if closing == "]" else "<", None, high)])
            if not any(map(interval.has, probes(interval.ends))):
                raise NoRegion("the ends of an interval in the wrong order")
            return interval
        case Seq("{", "}", items):
            values = [number(item) for item in items]
            return Region(values, lambda x: any(close(x, value) for value in values))
        case Seq("", joined, items):
            parts = [region(item) for item in items]
            if joined == "" and all(isinstance(item, Rel) or item == EVERYTHING for item in items):
                both = all_of(parts)  # 'x > 1, x < 3' is both; 'x < 1, x > 3' can only be either
                if any(map(both.has, probes(both.ends))):
                    return both
            return either_of(parts)
    if tree == EVERYTHING:
        return Region([], lambda x: True)
    raise NoRegion(type(tree).__name__)


def all_of(parts: list[Region]) -> Region:
    """The intersection."""
    return Region([end for part in parts for end in part.ends], lambda x: all(part.has(x) for part in parts))


def any_of(parts: list[Region]) -> Region:
    """The union."""
    return Region([end for part in parts for end in part.ends], lambda x: any(part.has(x) for part in parts))


def either_of(parts: list[Region]) -> Region:
    """The union of sets that do not meet: '(0, 1) or [0, 1)' is no set, but two answers. Raises NoRegion."""
    union = any_of(parts)
    if any(sum(part.has(point) for part in parts) > 1 for point in probes(union.ends)):
        raise NoRegion("sets that meet")
    return union


def comparison(operator: str, left: Node | None, right: Node | None) -> Region:
    """The x with left < right, where None is x itself, and one side may be infinite or an absolute value."""
    if operator not in ORDERS:
        raise NoRegion(operator)
    holds = ORDERS[operator]
    if left == Neg(INFINITY) or right == INFINITY:
        return Region([], lambda x: True)
    sign = 1
    match left, right:
        case (Call("abs", (inside,)), bound):
            pass
        case (bound, Call("abs", (inside,))):
            sign = -1
        case _:
            a, b = linear(left), linear(right)
            slope, rest = subtract(a[0], b[0]), subtract(a[1], b[1])
            ends = [] if is_zero(slope) else [divide(negative(rest), slope)]
            return Region(ends, lambda x: holds(sign_of(add(multiply(slope, x), rest))))
    slope, rest = linear(inside)
    limit = number(bound)
    if is_zero(slope):
        raise NoRegion("an absolute value without a variable")
    ends = [divide(subtract(end, rest), slope) for end in (limit, negative(limit))]
    return Region(ends, lambda x: holds(sign * sign_of(subtract(abs(add(multiply(slope, x), rest)), limit))))


def linear(tree: Node | None) -> tuple[Value, Value]:
    """(slope, rest) of an expression linear in its one variable; None is the variable. Raises NoRegion."""
    if tree is None:
        return Fraction(1), ZERO
    if not variables(tree):
        return ZERO, number(tree)
    match tree:
        case Sym():
            return Fraction(1), ZERO
        case Neg(inside):
            slope, rest = linear(inside)
            return negative(slope), negative(rest)
        case Unit(amount, _):
            return linear(amount)
        case Sum(terms):
            parts = [linear(term) for term in terms]
            slope, rest = parts[0]
            for part in parts[1:]:
                slope, rest = add(slope, part[0]), add(rest, part[1])
            return slope, rest
        case Div(top, bottom) if not variables(bottom):
            slope, rest = linear(top)
            return divide(slope, number(bottom)), divide(rest, number(bottom))
        case Prod(factors):
            unknown = [factor for factor in factors if variables(factor)]
            if len(unknown) == 1:
                slope, rest = linear(unknown[0])
                for factor in factors:
                    if factor is not unknown[0]:
                        slope, rest = multiply(slope, number(factor)), multiply(rest, number(factor))
                return slope, rest
    raise NoRegion("not linear")


def number(tree: Node | None) -> Value:
    """The real value of a constant. Raises NoRegion for any other tree."""
    if tree is None or variables(tree) or (isinstance(tree, (Const, Neg)) and tree in (INFINITY, Neg(INFINITY))):
        raise NoRegion("not a number")
    value = Evaluator().value(tree)
    if isinstance(value, tuple) or (not exact(value) and context.im(value) != 0):
        raise NoRegion("not a real number")
    return value


def sign_of(value: Value) -> int:
    """-1, 0 or 1; what is within 30 digits of zero is zero."""
    if is_zero(value):
        return 0
    return 1 if (value if exact(value) else context.re(value)) > 0 else -1


def is_zero(value: Value) -> bool:
    """True for zero, or for an inexact value that is zero but for its last digits."""
    return value == 0 if exact(value) else abs(value) < context.mpf(10) ** -30


def negative(value: Value) -> Value:
    """-value."""
    return -value


def subtract(a: Value, b: Value) -> Value:
    """a - b."""
    return add(a, -b)

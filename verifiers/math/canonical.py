"""One form for what can be written in several: the trees that verifiers.math.equal compares."""

from fractions import Fraction
from itertools import chain
from typing import Any

from verifiers.math.assignments import grouped
from verifiers.math.regions import is_set
from verifiers.math.tree import (
    LEAVES,
    Call,
    Div,
    Matrix,
    Minus,
    MinusPlus,
    Neg,
    Node,
    Num,
    PlusMinus,
    Pow,
    Prod,
    Ratio,
    Rel,
    Seq,
    Sum,
    Sym,
    Text,
    Union,
    Unit,
    bare_list,
)

COUNTS = {"hundred": Fraction(100), "thousand": Fraction(10**3), "million": Fraction(10**6), "billion": Fraction(10**9)}
FLIPPED = {">": "<", ">=": "<="}


def canonical(tree: Node) -> Node:
    """± as the list of its two values, lists in lists and in sets flattened, an 'or' that joins no sets as a comma, 'x
    in S' as S, > as <, nested unions as one, percent and degree signs dropped: x = ±2 is the list x = 2, x = -2."""
    match tree:
        case Seq("", "or", items):
            parts = _flattened(items)
            return Seq("", "or", parts) if any(map(is_set, parts)) else grouped(parts)
        case Seq("", "", items):
            return grouped(_flattened(items))
        case Seq("[", "]", items) if items and all(isinstance(item, Seq) and item.opening == "[" for item in items):
            rows = tuple(item.items for item in items if isinstance(item, Seq))
            return Matrix(rows) if len({len(row) for row in rows}) == 1 else tree
        case Sum((Sym("mathbb R") as whole, Neg(Seq("{", "}", _) as without))):
            return Minus((whole, canonical(without)))
        case Seq("{", "}", items):
            return Seq("{", "}", _flattened(items))
        case Sym("emptyset"):
            return Seq("{", "}", ())
        case Seq(opening, closing, items):
            return Seq(opening, closing, tuple(map(canonical, items)))
        case Rel(operators, sides):
            return canonical_relation(operators, sides)
        case Union(sets):
            return Union(tuple(chain.from_iterable(map(_sets_of_union, map(canonical, sets)))))
        case Unit(amount, unit) if unit.partition(" ")[0] in COUNTS:
            count, _, rest = unit.partition(" ")
            tree = Prod((amount, Num(COUNTS[count], 0)))
            return Unit(tree, rest) if rest else tree
        case Unit(amount, "%" | "°"):
            return canonical(amount)
        case Neg(Unit(amount, unit)):
            return canonical(Unit(Neg(amount), unit))
        case Sum() | Prod() | Neg() | Div() | PlusMinus() | MinusPlus() | Pow() | Unit() if has_sign(tree):
            return bare_list((with_sign(tree, False), with_sign(tree, True)))
    return tree


def _flattened(items: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(chain.from_iterable(map(_items_of_list, map(canonical, items))))


def _items_of_list(tree: Node) -> tuple[Node, ...]:
    match tree:
        case Seq("", "" | "or", items):
            return items
    return (tree,)


def _sets_of_union(tree: Node) -> tuple[Node, ...]:
    return tree.sets if isinstance(tree, Union) else (tree,)


def has_sign(tree: object) -> bool:
    """True if a ± or ∓ stands in a tree, or in a tuple of trees; False for any other field of a node."""
    if isinstance(tree, (PlusMinus, MinusPlus)):
        return True
    if isinstance(tree, Node):
        return not isinstance(tree, LEAVES) and any(map(has_sign, tree.fields()))
    return isinstance(tree, tuple) and any(map(has_sign, tree))


def with_sign(tree: Any, minus: bool) -> Any:
    """`tree` with every ± read as one sign, and every ∓ as the other: 1 ± x as 1 + x, or with `minus` as 1 - x."""
    if isinstance(tree, tuple):
        return tuple(with_sign(part, minus) for part in tree)
    match tree:
        case PlusMinus(part) | MinusPlus(part):
            inside = with_sign(part, minus)
            return Neg(inside) if minus == isinstance(tree, PlusMinus) else inside
        case Node():
            return type(tree)(*(with_sign(value, minus) for value in tree.fields()))
    return tree


def canonical_relation(operators: tuple[str, ...], sides: tuple[Node, ...]) -> Node:
    """The canonical form of a relation: 2 > x as x < 2, x in S as S, x = ±2 as a list of two equations."""
    if set(operators) <= {">", ">="}:
        operators, sides = tuple(FLIPPED[o] for o in reversed(operators)), tuple(reversed(sides))
    if operators == ("=",) and isinstance(sides[1], Sym) and not is_name(sides[0]):  # 5 = x
        sides = sides[::-1]
    if operators == ("in",) and is_name(sides[0]):
        return canonical(sides[1])
    if has_sign(sides) and operators == ("=",) and not has_sign(sides[0]):
        pair = (with_sign(sides[1], False), with_sign(sides[1], True))
        return bare_list(tuple(Rel(("=",), (sides[0], side)) for side in pair))
    return Rel(operators, tuple(map(canonical, sides)))


def is_name(tree: Node) -> bool:
    """What can stand before '=' as the name of a quantity: x, a_1, AB, |AB|, f(2), P(A), A:B, NO/BO, (p, q), a text."""
    match tree:
        case Sym() | Text():
            return True
        case Unit(amount, _):  # \angle ABC
            return isinstance(amount, Sym)
        case Pow(Sym(name), exponent):  # f^{-1}(x)
            return name in "fgh" and isinstance(exponent, Neg)
        case Call(name, arguments):
            return name.startswith("apply ") or (name in ("abs", "sin", "cos", "tan") and all(map(is_name, arguments)))
        case Prod(factors):
            return is_name(factors[0]) and all(is_name(part) or isinstance(part, Num) for part in factors[1:])
        case Div(top, bottom):
            return is_name(top) and is_name(bottom)
        case Ratio(parts):
            return all(map(is_name, parts))
        case Seq("(", _, items):
            return bool(items) and all(map(is_name, items))
    return False

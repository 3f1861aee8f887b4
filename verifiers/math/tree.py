r"""The nodes of an answer's tree, as the parsers build them: \frac{1}{2} is Div(Num(1, 0), Num(2, 0)).

Every node is frozen, hashable, and equal to a node of the same kind with equal fields. A tree may be some hundred
nodes deep (a product of many letters is a chain), so equality is decided without recursion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction


class Node:
    """What all kinds of node share: their fields in order, equality, a hash."""

    __slots__: tuple[str, ...] = ()

    def fields(self) -> list:
        """The values of the fields, in order: those of Div(a, b) are [a, b]."""
        return [getattr(self, name) for name in self.__slots__]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Node) or self.__class__ is not other.__class__:
            return False
        pairs: list[tuple] = [(self, other)]
        while pairs:
            a, b = pairs.pop()
            if a is b:
                continue
            if a.__class__ is not b.__class__:
                return False
            if isinstance(a, Node):
                pairs.extend((getattr(a, name), getattr(b, name)) for name in a.__slots__)
            elif not isinstance(a, tuple):
                if a != b:
                    return False
            elif len(a) == len(b):
                pairs.extend(zip(a, b, strict=True))
            else:
                return False
        return True

    def __hash__(self) -> int:
        return hash((self.__class__, *self.fields()))


@dataclass(frozen=True, slots=True, eq=False)
class Num(Node):
    """An exact number, and how many decimals it was written with: 0.50 is Num(Fraction(1, 2), 2)."""

    value: Fraction
    decimals: int


@dataclass(frozen=True, slots=True, eq=False)
class Sym(Node):
    """A variable with its subscript and primes: x, x_1, f', theta, 'vec v'."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Const(Node):
    """A known number or infinity: Const('pi'), Const('e'), Const('i'), Const('inf')."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Text(Node):
    r"""Words: \text{no solution} is Text('no solution')."""

    words: str


@dataclass(frozen=True, slots=True, eq=False)
class Sum(Node):
    """a + b - c is Sum((a, b, Neg(c)))."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Prod(Node):
    """2x is Prod((2, x)); 2xy is Prod((Prod((2, x)), y))."""

    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Neg(Node):
    """-x is Neg(x)."""

    inside: Node


@dataclass(frozen=True, slots=True, eq=False)
class PlusMinus(Node):
    """±x is PlusMinus(x)."""

    inside: Node


@dataclass(frozen=True, slots=True, eq=False)
class MinusPlus(Node):
    """∓x is MinusPlus(x): minus where a ± beside it is plus."""

    inside: Node


@dataclass(frozen=True, slots=True, eq=False)
class Div(Node):
    """a/b is Div(a, b)."""

    top: Node
    bottom: Node


@dataclass(frozen=True, slots=True, eq=False)
class Pow(Node):
    """x^2 is Pow(x, 2)."""

    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True, eq=False)
class Call(Node):
    r"""A function of arguments: \sqrt{2} is Call('sqrt', (2,)), |x| is Call('abs', (x,)), f(x), which is not known, is
    Call('apply f', (x,))."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Unit(Node):
    r"""An amount of something: 5\text{ cm} is Unit(5, 'cm'), 50\% is Unit(50, '%'), 90^\circ is Unit(90, '°')."""

    amount: Node
    unit: str


@dataclass(frozen=True, slots=True, eq=False)
class Based(Node):
    """Digits in a base: 1101_2 is Based('1101', '2')."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True, eq=False)
class Ratio(Node):
    """3:4 is Ratio((3, 4))."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rel(Node):
    """A chain of relations: 0 < x <= 5 is Rel(('<', '<='), (0, x, 5)); the operators are = < > <= >= != in."""

    operators: tuple[str, ...]
    sides: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Seq(Node):
    """Items in brackets: (1, 2] is Seq('(', ']', (1, 2)), the set {1, 2} is Seq('{', '}', (1, 2)), the bare list 1, 2
    is Seq('', '', (1, 2))."""

    opening: str
    closing: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Union(Node):
    r"""A \cup B is Union((A, B))."""

    sets: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Inter(Node):
    r"""A \cap B is Inter((A, B))."""

    sets: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Minus(Node):
    r"""A \setminus B is Minus((A, B))."""

    sets: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix(Node):
    r"""\begin{pmatrix}1&2\\3&4\end{pmatrix} is Matrix(((1, 2), (3, 4)))."""

    rows: tuple[tuple[Node, ...], ...]


LEAVES = (Num, Sym, Const, Text, Based)  # the kinds without trees in their fields
ONE = Num(Fraction(1), 0)
MINUS_ONE = Neg(ONE)
INFINITY = Const("inf")
MAX_TREE_DEPTH = 120  # three frames a level in the deepest recursion: far below any recursion limit of Python


def bare_list(items: tuple[Node, ...]) -> Seq:
    """The list of the items without brackets: '1, 2' is bare_list((1, 2))."""
    return Seq("", "", items)


def too_deep(tree: Node) -> bool:
    """True for a tree of more than MAX_TREE_DEPTH levels; found without recursion."""
    level: list = [tree]
    for _ in range(MAX_TREE_DEPTH):
        level = [part for node in level if not isinstance(node, LEAVES) for part in _parts(node)]
        if not level:
            return False
    return True


def _parts(node: Node) -> Iterator[Node]:
    for field in node.fields():
        row = [field] if isinstance(field, Node) else field if isinstance(field, tuple) else ()
        for part in row:
            if isinstance(part, Node):
                yield part
            elif isinstance(part, tuple):
                yield from part


def walk(tree: Node) -> Iterator[Node]:
    """All the nodes of a tree, itself first; without recursion."""
    stack: list = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, LEAVES):
            yield part
        elif isinstance(part, Node):
            yield part
            stack.extend(part.fields())
        elif isinstance(part, tuple):
            stack.extend(part)

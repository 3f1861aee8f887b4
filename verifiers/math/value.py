"""The value of an answer's tree at a point: exact fractions as long as the mathematics allows, else 50 digits.

`same_value(a, b)` decides a = b for expressions: identical at a point for constants, at several generic points
(positive and negative) for expressions in variables. Two different rational functions agree at a random point with
probability about degree / number of points (Schwartz 1980), so this is algebra by evaluation: no rewriting that could
run away. The arithmetic and its bounds are those of verifiers.math.arithmetic.
Left out: assumptions about variables (sqrt(x^2) is not x; (-1)^(2n) is not 1).
"""

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

from verifiers.math.arithmetic import (
    FUNCTIONS,
    TOLERANCE,
    Undefined,
    Value,
    add,
    bounded,
    context,
    divide,
    exact,
    inexact,
    multiply,
    power,
)
from verifiers.math.tree import Call, Const, Div, Matrix, Neg, Node, Num, Pow, Prod, Sum, Sym, Unit, walk

POINTS = 4
MIN_POINTS = 2  # where a point falls on a pole it does not count
MAX_DETERMINANT = 4  # rows
MAX_WORK = 600  # operations on inexact numbers in one comparison


class NoValue(ValueError):
    """A tree that has no numeric value (a text, an interval)."""


def _negate(a: Value) -> Value:
    return -a


OPERATIONS: dict[type[Node], Callable] = {Sum: add, Prod: multiply, Div: divide, Pow: power, Neg: _negate}


class Evaluator:
    """Values of trees at one point, a variable's coordinate being a function of its name; counts the work it does."""

    def __init__(self, salt: str = "", point: int = 0):
        self.salt, self.point, self.work = salt, point, 0

    def coordinate(self, name: str) -> Value:
        """A generic fraction between 0.17 and 4; all positive at point 0, all negative at point 1, then mixed."""
        bits = zlib.crc32(f"{self.salt}|{self.point}|{name}".encode("utf-8", "replace"))
        sign = (1, -1, 1 - 2 * (bits >> 30 & 1))[min(self.point, 2)]
        return Fraction(sign * (17 + bits % 383), 101)

    def value(self, tree: Node) -> Value:
        """A Fraction, an mpmath number, or a tuple of rows of them. Raises Undefined or NoValue."""
        match tree:
            case Num():
                return tree.value
            case Sym():
                return self.coordinate(tree.name)
            case Sum(parts) | Prod(parts):
                pass
            case Div(first, second) | Pow(first, second):
                parts = (first, second)
            case Neg(inside):
                parts = (inside,)
            case Call(name, arguments):
                return self.function(name, arguments)
            case Unit(amount, _):
                return self.value(amount)
            case Const("inf"):
                raise NoValue("infinity")
            case Const(name):
                return {"pi": +context.pi, "e": +context.e, "i": context.mpc(0, 1)}[name]
            case Matrix(rows):
                return tuple(tuple(self.value(entry) for entry in row) for row in rows)
            case _:
                raise NoValue(type(tree).__name__)
        return self.combine(type(tree), [self.value(part) for part in parts])

    def combine(self, kind: type[Node], values: list) -> Value:
        """The sum, product, quotient, power or negative (`kind`) of values, from left to right."""
        if any(isinstance(value, tuple) for value in values):
            return matrix_operation(kind, values)
        operation = OPERATIONS[kind]
        result = values[0] if len(values) > 1 else operation(values[0])
        for value in values[1:]:
            result = operation(result, value)
            self.count(result)
        return result

    def count(self, result: Value) -> None:
        """Count the work of an operation by its result: exact ones are free. Raises Undefined beyond MAX_WORK."""
        self.work += 0 if exact(result) else 3
        if self.work > MAX_WORK:
            raise Undefined("too much work")

    def function(self, name: str, arguments: tuple[Node, ...]) -> Value:
        """The value of a function: of 'sqrt' by mpmath, of an unknown 'apply f' as of a cubic of its own."""
        values = [self.value(tree) for tree in arguments]
        self.work += 4
        if any(isinstance(value, tuple) for value in values):
            if name != "det" or shape(values[0])[0] != shape(values[0])[1] or len(values[0]) > MAX_DETERMINANT:
                raise NoValue("a function of a matrix")
            return determinant(values[0])
        if name.startswith("apply "):
            return self._unknown_function(name, values)
        if name not in FUNCTIONS:
            raise NoValue(name)
        try:
            result = bounded(FUNCTIONS[name](*values))
        except (ValueError, ZeroDivisionError, OverflowError, TypeError) as problem:
            raise Undefined(str(problem)) from None
        self.count(result)
        return result

    def _unknown_function(self, name: str, values: list) -> Value:
        total = self.coordinate(name)
        for i, x in enumerate(values):
            for n in (1, 2, 3):
                total = add(total, multiply(self.coordinate(f"{name} {i} {n}"), power(x, Fraction(n))))
        return total


class ComplexEvaluator(Evaluator):
    """sympy assumes nothing of a variable: it is complex, and every root is the principal one."""

    def coordinate(self, name: str) -> Value:
        """A generic complex number."""
        return context.mpc(inexact(super().coordinate(name)), inexact(super().coordinate(name + " i")))

    def function(self, name: str, arguments: tuple[Node, ...]) -> Value:
        """As an Evaluator's, but an overline is the conjugate."""
        if name == "apply overline":
            return context.conj(inexact(self.value(arguments[0])))
        return super().function(name, arguments)

    def combine(self, kind: type[Node], values: list) -> Value:
        """As an Evaluator's, but a root of a negative number is the principal one."""
        if kind is Pow and exact(values[0]) and values[0] < 0 and not (exact(values[1]) and values[1].denominator == 1):
            self.work += 1
            return bounded(context.power(inexact(values[0]), inexact(values[1])))
        return super().combine(kind, values)


def matrix_operation(kind: type[Node], values: list) -> tuple:
    """Sums and products of matrices, and a matrix times a number. Raises NoValue for any other operation."""
    result = values[0]
    if kind is Neg:
        return tuple(tuple(-x for x in row) for row in result)
    for value in values[1:]:
        both = isinstance(result, tuple) and isinstance(value, tuple)
        if kind is Sum and both and shape(result) == shape(value):
            result = tuple(tuple(map(add, r, v)) for r, v in zip(result, value, strict=False))
        elif kind is Prod and both and shape(result)[1] == shape(value)[0] and len(result) <= 8 >= len(value[0]):
            result = tuple(tuple(dot(row, column) for column in zip(*value, strict=False)) for row in result)
        elif kind in (Prod, Div) and isinstance(result, tuple) and not isinstance(value, tuple):
            operation = OPERATIONS[kind]
            result = tuple(tuple(operation(x, value) for x in row) for row in result)
        elif kind is Prod and isinstance(value, tuple) and not isinstance(result, tuple):
            result = tuple(tuple(multiply(result, x) for x in row) for row in value)
        else:
            raise NoValue("matrices that do not fit")
    return result


def dot(row: Iterable[Value], column: Iterable[Value]) -> Value:
    """The sum of the products of a row's and a column's entries."""
    total = Fraction(0)
    for a, b in zip(row, column, strict=False):
        total = add(total, multiply(a, b))
    return total


def determinant(rows: tuple) -> Value:
    """The determinant of a small square matrix, along its first row."""
    if not rows:
        return Fraction(1)
    total = Fraction(0)
    for at, entry in enumerate(rows[0]):
        minor = tuple(row[:at] + row[at + 1 :] for row in rows[1:])
        total = add(total, multiply(entry * (-1) ** at, determinant(minor)))
    return total


def shape(matrix: tuple) -> tuple[int, int]:
    """(number of rows, number of columns)."""
    return len(matrix), len(matrix[0])


def close(a: Value, b: Value) -> bool:
    """Equality of two values: exact for fractions and matrices of them, else to DIGITS - 15 digits."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        same = isinstance(a, tuple) and isinstance(b, tuple) and shape(a) == shape(b)
        return same and all(close(x, y) for r, s in zip(a, b, strict=False) for x, y in zip(r, s, strict=False))
    if exact(a) and exact(b):
        return a == b
    a, b = inexact(a), inexact(b)
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b), context.mpf(10) ** -12)


def variables(tree: Node) -> frozenset[str]:
    """The names of the variables and unknown functions in a tree: of f(x) 'apply f' and 'x'."""
    names = set()
    for part in walk(tree):
        match part:
            case Sym(name):
                names.add(name)
            case Call(name, _) if name.startswith("apply "):
                names.add(name)
    return frozenset(names)


def number_of_points(a: Node, b: Node) -> int:
    """At how many points two expressions are compared: 1 for constants, POINTS for expressions in variables."""
    return POINTS if variables(a) or variables(b) else 1


def values_at_points(
    a: Node, b: Node, number: int, salt: str, evaluator: type[Evaluator] = Evaluator
) -> Iterator[tuple[Value, Value]]:
    """(value of a, value of b) at each of `number` points where both have one, and of two more if it is not 1."""
    work = 0
    for point in range(number + 2 * (number > 1)):
        at = evaluator(salt, point)
        at.work = work
        with contextlib.suppress(Undefined):
            yield at.value(a), at.value(b)
        work = at.work


def same_value(a: Node, b: Node, salt: str = "", evaluator: type[Evaluator] = Evaluator) -> bool:
    """True if the two expressions have the same value wherever both have one. Raises NoValue for other trees."""
    seen, number = 0, number_of_points(a, b)
    for x, y in values_at_points(a, b, number, salt, evaluator):
        if not close(x, y):
            return False
        seen += 1
        if seen == POINTS:
            break
    return seen >= min(number, MIN_POINTS)


def same_up_to_factor(a: Node, b: Node, salt: str = "", positive: bool = False) -> bool:
    """True if a = c b with one constant c ≠ 0 (c > 0 on request): two equations, or two inequalities, that say the
    same. Raises NoValue."""
    ratios = []
    for x, y in values_at_points(a, b, number_of_points(a, b), salt):
        if isinstance(x, tuple) or isinstance(y, tuple) or (x == 0) != (y == 0):
            return False
        if x == 0:  # a point on both curves says nothing of the factor
            continue
        ratios.append(divide(x, y))
    same = len(ratios) >= MIN_POINTS and all(close(ratio, ratios[0]) for ratio in ratios)
    return same and (not positive or context.re(inexact(ratios[0])) > 0)

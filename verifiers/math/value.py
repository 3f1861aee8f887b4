"""The value of an answer's tree at a point: exact fractions as long as the mathematics allows, else 50 digits.

`same_value(a, b)` decides a = b for expressions: identical at a point for constants, at several generic points
(positive and negative) for expressions in variables. Two different rational functions agree at a random point with
probability about degree / number of points (Schwartz 1980), so this is algebra by evaluation: no rewriting that could
run away. Fractions never become floats; every operation first looks at the size of what it would make.
Left out: assumptions about variables (sqrt(x^2) is not x; (-1)^(2n) is not 1).
"""

import contextlib
import math
import zlib
from fractions import Fraction
from functools import lru_cache

import mpmath

DIGITS = 50
MAX_BITS = 20_000  # of an exact numerator or denominator
MAX_ARGUMENT = 10_000  # of exp, sin, gamma ...
POINTS = 4
MIN_POINTS = 2  # where a point falls on a pole it does not count
MAX_WORK = 600  # operations on inexact numbers in one comparison

context = mpmath.mp.clone()
context.dps = DIGITS
TOLERANCE = context.mpf(10) ** -(DIGITS - 15)


class Undefined(ArithmeticError):
    """No finite value here: a pole, or a value beyond the bounds."""


class NoValue(ValueError):
    """A tree that has no numeric value (a text, an interval)."""


def exact(x) -> bool:
    return isinstance(x, Fraction)


def inexact(x):
    return context.mpf(x.numerator) / x.denominator if exact(x) else x


def bounded(x):
    """`x`, if it is finite and not too long."""
    if exact(x):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise Undefined("too many digits")
    elif not context.isfinite(x):
        raise Undefined("not finite")
    return x


def add(a, b):
    return bounded(a + b) if exact(a) and exact(b) else bounded(inexact(a) + inexact(b))


def multiply(a, b):
    return bounded(a * b) if exact(a) and exact(b) else bounded(inexact(a) * inexact(b))


def divide(a, b):
    if b == 0:
        raise Undefined("division by zero")
    return bounded(a / b) if exact(a) and exact(b) else bounded(inexact(a) / inexact(b))


def power(a, b):
    """a^b; an odd root of a negative number is the real one, any other is principal."""
    if a == 0:
        if exact(b) and b > 0:
            return Fraction(0)
        if b == 0:
            return Fraction(1)
        raise Undefined("0 to a negative power")
    if exact(a) and exact(b):
        if b.denominator == 1:
            if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > MAX_BITS:
                if abs(a) != 1:
                    raise Undefined("too many digits")
                return a if b.numerator % 2 else Fraction(1)
            return a**b.numerator
        if b.denominator <= 64 and (root := rational_root(a, b.denominator)) is not None:
            return power(root, Fraction(b.numerator))
        if a < 0 and b.denominator % 2:
            return (-1) ** (b.numerator % 2) * power(-a, b)
    a, b = inexact(a), inexact(b)
    if abs(b * context.log(a)) > MAX_ARGUMENT:
        raise Undefined("too large")
    return bounded(context.power(a, b))


def rational_root(a: Fraction, n: int) -> Fraction | None:
    """The exact real n-th root of `a`, if it is rational."""
    if a < 0:
        root = rational_root(-a, n) if n % 2 else None
        return None if root is None else -root
    top, bottom = integer_root(a.numerator, n), integer_root(a.denominator, n)
    return None if top is None or bottom is None else Fraction(top, bottom)


def integer_root(value: int, n: int) -> int | None:
    if value < 2:
        return value
    if n == 2:
        root = math.isqrt(value)
    elif value.bit_length() <= 150:  # the float below is then right to one unit
        root = round(value ** (1 / n))
    else:
        return None
    for candidate in (root - 1, root, root + 1):
        if candidate**n == value:
            return candidate
    return None


def logarithm(x, base=None):
    if x == 0:
        raise Undefined("log of 0")
    if base is None:
        return context.log(inexact(x))
    return divide(logarithm(x), logarithm(base))


def factorial(x):
    if exact(x) and x.denominator == 1:
        if x < 0 or x > 1000:
            raise Undefined("factorial")
        return bounded(Fraction(math.factorial(x.numerator)))
    return context.gamma(argument(x) + 1)


def binomial(n, k):
    if exact(n) and exact(k) and n.denominator == k.denominator == 1 and n >= 0:
        if n > 2000:
            raise Undefined("binomial")
        return Fraction(math.comb(n.numerator, k.numerator) if k >= 0 else 0)
    return context.binomial(argument(n), argument(k))


def argument(x):
    """`x` as an argument of a transcendental function, if that is not too large to be computed with DIGITS digits."""
    x = inexact(x)
    if abs(x) > MAX_ARGUMENT:
        raise Undefined("too large")
    return x


def real(x) -> Fraction:
    if not exact(x) and context.im(x) != 0:
        raise Undefined("not real")
    return x if exact(x) else context.re(x)


def transcendental(name: str):
    function = getattr(context, name)
    return lambda x: bounded(function(argument(x)))


FUNCTIONS = {
    **{name: transcendental(name) for name in str.split("sin cos tan sec csc cot sinh cosh tanh exp")},
    **{"arc" + name: transcendental("a" + name) for name in ("sin", "cos", "tan")},
    "log": logarithm,
    "ln": logarithm,
    "lg": lambda x: logarithm(x, Fraction(10)),
    "sqrt": lambda x: power(x, Fraction(1, 2)),
    "root": lambda x, n: power(x, divide(Fraction(1), n)),
    "abs": abs,
    "floor": lambda x: Fraction(math.floor(real(x))),
    "ceil": lambda x: Fraction(math.ceil(real(x))),
    "factorial": factorial,
    "binom": binomial,
    "min": lambda *xs: min(xs, key=real),
    "max": lambda *xs: max(xs, key=real),
    "gcd": lambda *xs: Fraction(math.gcd(*map(whole, xs))),
    "lcm": lambda *xs: bounded(Fraction(math.lcm(*map(whole, xs)))),
}


def whole(x) -> int:
    if not exact(x) or x.denominator != 1:
        raise Undefined("not a whole number")
    return x.numerator


class Evaluator:
    """Values of trees at one point, a variable's coordinate being a function of its name; counts the work it does."""

    def __init__(self, salt: str = "", point: int = 0):
        self.salt, self.point, self.work = salt, point, 0

    def coordinate(self, name: str) -> Fraction:
        """A generic fraction between 0.17 and 4; all positive at point 0, all negative at point 1, then mixed."""
        bits = zlib.crc32(f"{self.salt}|{self.point}|{name}".encode("utf-8", "replace"))
        sign = (1, -1, 1 - 2 * (bits >> 30 & 1))[min(self.point, 2)]
        return Fraction(sign * (17 + bits % 383), 101)

    def value(self, tree: tuple):
        """A Fraction, an mpmath number, or a tuple of rows of them. Raises Undefined or NoValue."""
        kind = tree[0]
        if kind == "num":
            return tree[1]
        if kind == "sym":
            return self.coordinate(tree[1])
        if kind == "const":
            if tree[1] == "inf":
                raise NoValue("infinity")
            return {"pi": +context.pi, "e": +context.e, "i": context.mpc(0, 1)}[tree[1]]
        if kind == "fn":
            return self.function(tree[1], tree[2])
        if kind == "unit":
            return self.value(tree[1])
        if kind == "matrix":
            return tuple(tuple(self.value(entry) for entry in row) for row in tree[1])
        if kind not in OPERATIONS:
            raise NoValue(kind)
        values = [self.value(part) for part in (tree[1] if kind in ("sum", "prod") else tree[1:])]
        return self.combine(OPERATIONS[kind], kind, values)

    def combine(self, operation, kind: str, values: list):
        if any(isinstance(value, tuple) for value in values):
            return matrix_operation(kind, values)
        result = values[0] if len(values) > 1 else operation(values[0])
        for value in values[1:]:
            result = operation(result, value)
            self.count(result)
        return result

    def count(self, result) -> None:
        self.work += 0 if exact(result) else 3
        if self.work > MAX_WORK:
            raise Undefined("too much work")

    def function(self, name: str, arguments: tuple):
        values = [self.value(tree) for tree in arguments]
        self.work += 4
        if any(isinstance(value, tuple) for value in values):
            raise NoValue("a function of a matrix")
        if name.startswith("apply "):  # an unknown function: a cubic of its own
            total = self.coordinate(name)
            for i, x in enumerate(values):
                for n in (1, 2, 3):
                    total = add(total, multiply(self.coordinate(f"{name} {i} {n}"), power(x, Fraction(n))))
            return total
        if name not in FUNCTIONS:
            raise NoValue(name)
        try:
            result = bounded(FUNCTIONS[name](*values))
        except (ValueError, ZeroDivisionError, OverflowError, TypeError) as problem:
            raise Undefined(str(problem)) from None
        self.count(result)
        return result


class ComplexEvaluator(Evaluator):
    """sympy assumes nothing of a variable: it is complex, and every root is the principal one."""

    def coordinate(self, name: str):
        return context.mpc(inexact(super().coordinate(name)), inexact(super().coordinate(name + " i")))

    def function(self, name: str, arguments: tuple):
        if name == "apply overline":
            return context.conj(inexact(self.value(arguments[0])))
        return super().function(name, arguments)

    def combine(self, operation, kind: str, values: list):
        if kind == "pow" and exact(values[0]) and values[0] < 0 and not (exact(values[1]) and values[1].denominator == 1):
            self.work += 1
            return bounded(context.power(inexact(values[0]), inexact(values[1])))
        return super().combine(operation, kind, values)


OPERATIONS = {"sum": add, "prod": multiply, "div": divide, "pow": power, "neg": lambda a: -a}


def matrix_operation(kind: str, values: list) -> tuple:
    """Sums and products of matrices, and a matrix times a number."""
    result = values[0]
    if kind == "neg":
        return tuple(tuple(-x for x in row) for row in result)
    for value in values[1:]:
        both = isinstance(result, tuple) and isinstance(value, tuple)
        if kind == "sum" and both and shape(result) == shape(value):
            result = tuple(tuple(map(add, r, v)) for r, v in zip(result, value, strict=False))
        elif kind == "prod" and both and shape(result)[1] == shape(value)[0] and len(result) <= 8 >= len(value[0]):
            result = tuple(tuple(dot(row, column) for column in zip(*value, strict=False)) for row in result)
        elif kind in ("prod", "div") and isinstance(result, tuple) and not isinstance(value, tuple):
            result = tuple(tuple((multiply if kind == "prod" else divide)(x, value) for x in row) for row in result)
        elif kind == "prod" and isinstance(value, tuple) and not isinstance(result, tuple):
            result = tuple(tuple(multiply(result, x) for x in row) for row in value)
        else:
            raise NoValue("matrices that do not fit")
    return result


def dot(row, column):
    total = Fraction(0)
    for a, b in zip(row, column, strict=False):
        total = add(total, multiply(a, b))
    return total


def shape(matrix: tuple) -> tuple[int, int]:
    return len(matrix), len(matrix[0])


def close(a, b) -> bool:
    """Equality of two values: exact for fractions and matrices of them, else to DIGITS - 15 digits."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        same = isinstance(a, tuple) and isinstance(b, tuple) and shape(a) == shape(b)
        return same and all(close(x, y) for r, s in zip(a, b, strict=False) for x, y in zip(r, s, strict=False))
    if exact(a) and exact(b):
        return a == b
    a, b = inexact(a), inexact(b)
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b), context.mpf(10) ** -12)


@lru_cache(maxsize=4096)
def variables(tree: tuple) -> frozenset:
    """The names of the variables and unknown functions in a tree."""
    names, stack = set(), [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, tuple):
            if part[:1] == ("sym",) or (part[:1] == ("fn",) and part[1].startswith("apply ")):
                names.add(part[1])
            stack.extend(part)
    return frozenset(names)


def values_at_points(a: tuple, b: tuple, salt: str, evaluator=Evaluator):
    """(value of a, value of b) at each point where both have one: one point for constants, POINTS for variables."""
    number = POINTS if variables(a) or variables(b) else 1
    work = 0
    for point in range(number + 2 * (number > 1)):
        at = evaluator(salt, point)
        at.work = work
        with contextlib.suppress(Undefined):
            yield at.value(a), at.value(b)
        work = at.work


def same_value(a: tuple, b: tuple, salt: str = "", evaluator=Evaluator) -> bool:
    """True if the two expressions have the same value wherever both have one. Raises NoValue for other trees."""
    needed = MIN_POINTS if variables(a) or variables(b) else 1
    seen = 0
    for x, y in values_at_points(a, b, salt, evaluator):
        if not close(x, y):
            return False
        seen += 1
        if seen == POINTS:
            break
    return seen >= needed


def same_up_to_factor(a: tuple, b: tuple, salt: str = "", positive: bool = False) -> bool:
    """True if a = c b with one constant c ≠ 0 (c > 0 on request): two equations, or two inequalities, that say the
    same. Raises NoValue."""
    ratios = []
    for x, y in values_at_points(a, b, salt):
        if isinstance(x, tuple) or isinstance(y, tuple) or x == 0 or y == 0:
            return False
        ratios.append(divide(x, y))
    same = len(ratios) >= MIN_POINTS and all(close(ratio, ratios[0]) for ratio in ratios)
    return same and (not positive or context.re(inexact(ratios[0])) > 0)

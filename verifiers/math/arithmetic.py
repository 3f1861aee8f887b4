"""Arithmetic with bounds: exact fractions as long as the mathematics allows, else mpmath numbers of 50 digits.

Fractions never become floats; every operation first looks at the size of what it would make, and raises Undefined at a
pole or beyond the bounds. A Value is a Fraction, or a real or complex mpmath number.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

Value = Any  # Fraction | context.mpf | context.mpc, which mpmath makes at run time
DIGITS = 50
MAX_BITS = 20_000  # of an exact numerator or denominator
MAX_ARGUMENT = 10_000  # of exp, sin, gamma ...

context = mpmath.mp.clone()
context.dps = DIGITS
TOLERANCE = context.mpf(10) ** -(DIGITS - 15)


class Undefined(ArithmeticError):
    """No finite value here: a pole, or a value beyond the bounds."""


def exact(x: Value) -> bool:
    """True for a Fraction."""
    return isinstance(x, Fraction)


def inexact(x: Value) -> Value:
    """`x` as an mpmath number: 1/3 to 50 digits."""
    return context.mpf(x.numerator) / x.denominator if exact(x) else x


def bounded(x: Value) -> Value:
    """`x`, if it is finite and not too long. Raises Undefined."""
    if exact(x):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise Undefined("too many digits")
    elif not context.isfinite(x):
        raise Undefined("not finite")
    return x


def add(a: Value, b: Value) -> Value:
    """a + b."""
    return bounded(a + b) if exact(a) and exact(b) else bounded(inexact(a) + inexact(b))


def multiply(a: Value, b: Value) -> Value:
    """a b."""
    return bounded(a * b) if exact(a) and exact(b) else bounded(inexact(a) * inexact(b))


def divide(a: Value, b: Value) -> Value:
    """a / b."""
    if b == 0:
        raise Undefined("division by zero")
    return bounded(a / b) if exact(a) and exact(b) else bounded(inexact(a) / inexact(b))


def power(a: Value, b: Value) -> Value:
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
    """The whole n-th root of a natural number, if there is one: 5 for (125, 3). None also for a cube root, or a higher
    one, of a number of more than 150 bits."""
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


def logarithm(x: Value, base: Value = None) -> Value:
    """The logarithm of `x` to the base, or the natural one."""
    if x == 0:
        raise Undefined("log of 0")
    if base is None:
        return context.log(inexact(x))
    return divide(logarithm(x), logarithm(base))


def factorial(x: Value) -> Value:
    """x!, by the gamma function where `x` is not whole."""
    if exact(x) and x.denominator == 1:
        if x < 0 or x > 1000:
            raise Undefined("factorial")
        return bounded(Fraction(math.factorial(x.numerator)))
    return context.gamma(argument(x) + 1)


def binomial(n: Value, k: Value) -> Value:
    """n over k, by the gamma function where they are not whole."""
    if exact(n) and exact(k) and n.denominator == k.denominator == 1 and n >= 0:
        if n > 2000:
            raise Undefined("binomial")
        return Fraction(math.comb(n.numerator, k.numerator) if k >= 0 else 0)
    return context.binomial(argument(n), argument(k))


def argument(x: Value) -> Value:
    """`x` as an argument of a transcendental function, if that is not too large to be computed with DIGITS digits."""
    x = inexact(x)
    if abs(x) > MAX_ARGUMENT:
        raise Undefined("too large")
    return x


def real(x: Value) -> Value:
    """`x`, if it is real: its real part where it is an mpmath number. Raises Undefined."""
    if not exact(x) and context.im(x) != 0:
        raise Undefined("not real")
    return x if exact(x) else context.re(x)


def transcendental(name: str) -> Callable[[Value], Value]:
    """mpmath's function of that name, bounded: transcendental('sin')(1) is sin 1."""
    function = getattr(context, name)
    return lambda x: bounded(function(argument(x)))


def whole(x: Value) -> int:
    """`x` as an int. Raises Undefined where it is not whole."""
    if not exact(x) or x.denominator != 1:
        raise Undefined("not a whole number")
    return x.numerator


FUNCTIONS: dict[str, Callable[..., Value]] = {
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

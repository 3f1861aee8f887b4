"""Exact values, their spellings, and their near misses.

Left out, because a reader could take it for something else: '3,5' (two numbers, or a decimal comma); lists in which a
comma without a space stands before three digits ('1,200'); a/bx; '1 2' for 12.
"""

import math
import random
from fractions import Fraction

Surd = dict[int, Fraction]  # square-free n -> q, for the sum of q sqrt(n)
Polynomial = dict[tuple[int, int], Fraction]  # (i, j) -> coefficient of x^i y^j


def integer(rng: random.Random, size: int = 60) -> int:
    """An integer, small more often than not."""
    return rng.choice((rng.randint(-9, 9), rng.randint(-size, size)))


def rational(rng: random.Random) -> Fraction:
    """A rational number with a small denominator; every third one is whole."""
    return Fraction(integer(rng), rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 20, 1)))


def next_to(rng: random.Random, x: Fraction) -> Fraction:
    """Another rational number that looks like `x`: a sign, a digit, the inverse, a factor of ten."""
    while True:
        y = rng.choice((-x, x + 1, x - 1, 1 / x if x else Fraction(1), x * 10, x + Fraction(1, 2), x + 10, x * 2))
        if y != x:
            return y


def decimal(x: Fraction) -> str | None:
    """`x` as a decimal of at most six places, if it has one."""
    for places in range(7):
        if (x * 10**places).denominator == 1:
            digits = f"{abs(x.numerator) * 10**places // x.denominator:0{places + 1}d}"
            whole, part = digits[: len(digits) - places], digits[len(digits) - places :]
            return ("-" if x < 0 else "") + whole + ("." + part if places else "")
    return None


def spelled(rng: random.Random, x: Fraction, plain: bool = False) -> str:
    """A spelling of a rational number, in LaTeX, or without any commands."""
    sign, top, bottom = ("-" if x < 0 else ""), abs(x.numerator), x.denominator
    k = rng.randint(2, 5)
    options = [f"{sign}{top}/{bottom}"] if bottom > 1 else [f"{sign}{top}", f"{sign}{top}", f"{sign}{top}.0"]
    point = decimal(x)
    if point is not None and bottom > 1:
        options += [point, point + "0"]
        if abs(x) < 1:
            options.append(sign + point.removeprefix("-").removeprefix("0"))
    if plain:
        return rng.choice(options)
    if bottom > 1:
        for command in ("frac", "dfrac", "tfrac"):
            options.append(f"{sign}\\{command}{{{top}}}{{{bottom}}}")
        options += [f"\\frac{{{sign}{top}}}{{{bottom}}}", f"{sign}\\frac{{{k * top}}}{{{k * bottom}}}"]
        options += [f"\\frac{{{top if sign else -top}}}{{-{bottom}}}", f"{sign}{{{top}}}/{{{bottom}}}"]
        if top < 10 and bottom < 10:
            options += [f"{sign}\\frac{top}{bottom}", f"{sign}\\frac {top} {bottom}", f"{sign}\\frac{{{top}}}{bottom}"]
        if top > bottom:
            options.append(f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    else:
        options += [f"{sign}\\frac{{{k * top}}}{{{k}}}", f"{{{sign}{top}}}", f"{sign} {top}", f"{sign}{top}\\,"]
    return rng.choice(options)


def long_integer(rng: random.Random, n: int) -> str:
    """A whole number of four or more digits in the ways that thousands are grouped."""
    commas = f"{n:,}"
    joint = rng.choice((",", "{,}", "\\,", "\\ ", " ", "\u202f", ",\\!", ""))
    return commas.replace(",", joint)


# --- sums of square roots ---------------------------------------------------------------------------------------------


def square_free(n: int) -> tuple[int, int]:
    """(k, m) with n = k k m and m square-free."""
    k = max(k for k in range(1, math.isqrt(n) + 1) if n % (k * k) == 0)
    return k, n // (k * k)


def surd(rng: random.Random) -> Surd:
    """A sum of one to three rational multiples of square roots, the first of an irrational one."""
    roots = rng.sample((2, 3, 5, 6, 7, 10, 11), rng.randint(1, 2)) + rng.choice(([], [1]))
    return {n: Fraction(rng.choice((1, 2, 3, 4, 5, -1, -2, -3)), rng.choice((1, 1, 2, 3))) for n in roots}


def surd_next_to(rng: random.Random, value: Surd) -> Surd:
    """Another sum of square roots."""
    n = rng.choice(list(value))
    other = dict(value)
    how = rng.randrange(3)
    if how == 0:
        other[n] = -other[n]
    elif how == 1:
        other[n] = other[n] + rng.choice((1, -1)) * 7
    else:
        fresh = rng.choice([m for m in (1, 2, 3, 5, 6, 7, 13) if m not in value])
        other[fresh] = other.pop(n)
    return {m: q for m, q in other.items() if q}


def spelled_surd(rng: random.Random, value: Surd) -> str:
    """A spelling of a sum of square roots, its terms in any order."""
    terms = list(value.items())
    rng.shuffle(terms)
    if len(terms) > 1 and rng.random() < 0.3:  # over one denominator
        below = math.lcm(*(q.denominator for _, q in terms)) * rng.randint(1, 2)
        if below > 1:
            return f"\\frac{{{_sum([_root(rng, q * below, n) for n, q in terms])}}}{{{below}}}"
    return _sum([_root(rng, q, n) for n, q in terms])


def _root(rng: random.Random, q: Fraction, n: int) -> str:
    sign, top, bottom = ("-" if q < 0 else ""), abs(q.numerator), q.denominator
    if n == 1:
        return f"{sign}{top}" if bottom == 1 else f"{sign}\\frac{{{top}}}{{{bottom}}}"
    root = rng.choice((f"\\sqrt{{{n}}}", f"\\sqrt {n}" if n < 10 else f"\\sqrt{{{n}}}", f"{n}^{{1/2}}"))
    one = "" if top == 1 else rng.choice((f"{top}", f"{top}\\cdot ", f"{top} \\times "))
    if root[0].isdigit() and one and one[-1].isdigit():
        one += "\\cdot "
    if bottom == 1:
        return sign + rng.choice((one + root, f"\\sqrt{{{top * top * n}}}", f"\\frac{{{top * n}}}{{\\sqrt{{{n}}}}}"))
    return sign + rng.choice(
        (
            f"\\frac{{{one}{root}}}{{{bottom}}}",
            f"\\frac{{{top}}}{{{bottom}}}\\sqrt{{{n}}}",
            f"\\frac{{{top * n}}}{{{bottom}\\sqrt{{{n}}}}}",
            f"\\sqrt{{\\frac{{{top * top * n}}}{{{bottom * bottom}}}}}",
        )
    )


def _sum(terms: list[str]) -> str:
    text = terms[0]
    for term in terms[1:]:
        text += term if term.startswith("-") else "+" + term
    return text or "0"


# --- polynomials ------------------------------------------------------------------------------------------------------


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    """The product."""
    total: Polynomial = {}
    for (i, j), p in a.items():
        for (k, m), q in b.items():
            total[i + k, j + m] = total.get((i + k, j + m), Fraction(0)) + p * q
    return {power: c for power, c in total.items() if c}


def spelled_polynomial(rng: random.Random, value: Polynomial) -> str:
    """The terms in any order, the factors of each in any order."""
    terms = list(value.items())
    rng.shuffle(terms)
    return _sum([_monomial(rng, c, powers) for powers, c in terms])


def _monomial(rng: random.Random, c: Fraction, powers: tuple[int, int]) -> str:
    sign, size = ("-" if c < 0 else ""), abs(c)
    letters = [
        name if n == 1 else rng.choice((f"{name}^{n}", f"{name}^{{{n}}}", name * n))
        for name, n in zip("xy", powers, strict=True)
        if n
    ]
    number = f"{size.numerator}" if size.denominator == 1 else f"\\frac{{{size.numerator}}}{{{size.denominator}}}"
    if not letters:
        return sign + number
    rng.shuffle(letters)
    if size == 1:
        return sign + rng.choice(("", "\\cdot ", " ")).join(letters)
    if rng.random() < 0.4:  # y \cdot 3
        return sign + "\\cdot ".join(rng.sample([*letters, number], len(letters) + 1))
    return sign + number + rng.choice(("", " ", "\\cdot ", "\\,")) + "".join(letters)

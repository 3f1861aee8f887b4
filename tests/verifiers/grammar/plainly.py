"""Kinds written without LaTeX, and mixtures: plain text, decimal commas, money, times, powers, rational functions,
punctured lines. Each kind returns (response, label, whether they are equal).

Left out: '3,5' against the list 3, 5; a time of day against a ratio; '1/2x'.
"""

import random
from fractions import Fraction
from itertools import pairwise

from tests.verifiers.grammar.singles import Case
from tests.verifiers.grammar.values import (
    Polynomial,
    decimal,
    next_to,
    rational,
    spelled,
    spelled_polynomial,
    spelled_surd,
    surd,
    surd_next_to,
)


def plain_number(rng: random.Random) -> Case:
    """Fractions and radicals in plain text against LaTeX."""
    if rng.random() < 0.5:
        x = rational(rng)
        y = x if rng.random() < 0.5 else next_to(rng, x)
        return spelled(rng, y, plain=True), spelled(rng, x), x == y
    value = surd(rng)
    other = value if rng.random() < 0.5 else surd_next_to(rng, value) or {2: Fraction(9)}
    terms = [_plain_root(rng, q, n) for n, q in rng.sample(list(other.items()), len(other))]
    text = rng.choice(("+", " + ")).join(terms).replace("+ -", "- ").replace("+-", "-")
    return text, spelled_surd(rng, value), value == other


def _plain_root(rng: random.Random, q: Fraction, n: int) -> str:
    if n == 1:
        return str(q)
    root = rng.choice((f"sqrt({n})", f"√{n}", f"√({n})", f"{n}^(1/2)", f"{n}**(1/2)"))
    sign, top, below = "-" if q < 0 else "", abs(q.numerator), "" if q.denominator == 1 else f"/{q.denominator}"
    return sign + ("" if top == 1 else f"{top}*") + root + below


def plain_set(rng: random.Random) -> Case:
    """Intervals and inequalities in plain text against LaTeX."""
    low, closed = rational(rng), rng.random() < 0.5
    high = low + rng.randint(1, 9)
    near = rng.choice(
        (
            (low, closed, high),
            (low, closed, high),
            (low, not closed, high),
            (low - 1, closed, high),
            (low, closed, high + 1),
        )
    )
    a, b = (spelled(rng, end, plain=True) for end in (near[0], near[2]))
    ray = rng.random() < 0.5
    left, right = ("[", "<=") if near[1] else ("(", "<")
    text = rng.choice(
        (
            f"{left}{a}, {rng.choice(('oo', 'inf', 'infinity'))})",
            f"x {right.replace('<', '>')} {a}",
            f"x in {left}{a}, oo)",
            f"{a} {right} x",
        )
        if ray
        else (f"{a} {right} x < {b}", f"x in {left}{a}, {b})", f"{b} > x {right.replace('<', '>')} {a}")
    )
    opening = "[" if closed else "("
    label = f"x \\in {opening}{spelled(rng, low)}, " + ("\\infty)" if ray else f"{spelled(rng, high)})")
    same = near[:2] == (low, closed) and (ray or near[2] == high)
    return text, label, same


def plain_union(rng: random.Random) -> Case:
    """x != a, and the line without a point or two."""
    points = sorted({rng.randint(-9, 9) for _ in range(rng.randint(1, 2))})
    others = points if rng.random() < 0.5 else sorted({*points[:-1], points[-1] + 1})

    def text(of: list[int]) -> str:
        ends = ["-\\infty", *map(str, of), "\\infty"]
        pieces = [f"({a}, {b})" for a, b in pairwise(ends)]
        inside = ", ".join(map(str, rng.sample(of, len(of))))
        options = [
            " \\cup ".join(rng.sample(pieces, len(pieces))),
            " U ".join(pieces),
            f"\\mathbb{{R}} \\setminus \\{{{inside}\\}}",
        ]
        if len(of) == 1:
            options += [
                f"x \\ne {inside}",
                f"x \\neq {inside}",
                f"\\{{x \\mid x \\ne {inside}\\}}",
                f"x < {inside} \\text{{ or }} x > {inside}",
            ]
        return rng.choice(options)

    return text(others), text(points), points == others


def decimal_comma(rng: random.Random) -> Case:
    """A decimal comma beside a decimal point: not three decimals, which are thousands."""
    n = rng.randint(1, 999)
    places = rng.choice((1, 2))
    x = Fraction(n * 10 + rng.randint(1, 9), 10**places)
    y = x if rng.random() < 0.5 else rng.choice((x * 10, x + Fraction(1, 10), -x))
    text = decimal(y) or ""
    if "." not in text:
        return text, decimal(x) or "", x == y
    sign = rng.choice((",", "{,}"))
    return (
        text.replace(".", sign) + rng.choice(("", "", "\\%", "\\text{ cm}")),
        decimal(x) or "",
        x == y and "." in (decimal(x) or ""),
    )


def money(rng: random.Random) -> Case:
    """Amounts of money."""
    n = rng.randint(1, 9999)
    x = Fraction(n, rng.choice((1, 100)))
    y = x if rng.random() < 0.5 else next_to(rng, x)
    y = y if decimal(y) else x + 1
    digits = f"{decimal(y)}"
    if y.denominator > 1 and rng.random() < 0.5:
        digits += "0" * (2 - len(digits.partition(".")[2]))
    form = rng.choice(
        (
            "\\${}",
            "${}",
            "{}\\text{{ dollars}}",
            "{} dollars",
            "\\$ {}",
            "€{}",
            "£{}",
            "{}",
            "USD {}",
            "\\text{{\\${}}}",
        )
    )
    return form.format(digits), rng.choice(("\\${}", "{}", "{}\\text{{ dollars}}")).format(decimal(x)), x == y


def time_of_day(rng: random.Random) -> Case:
    """Times: 10:30 with am or pm; another minute or the other half of the day differs."""
    hour, minute, half = rng.randint(1, 12), rng.randint(10, 59), rng.choice("ap")
    other = rng.choice(
        (
            (hour, minute, half),
            (hour, minute, half),
            (hour, minute, "p" if half == "a" else "a"),
            (hour % 12 + 1, minute, half),
            (hour, 10 + (minute - 9) % 50, half),
        )
    )
    mark = lambda h: rng.choice(
        (f" {h}m", f"\\text{{ {h}.m.}}", f"\\ \\text{{{h.upper()}M}}", f" {h.upper()}M", f"\\text{{ {h}m}}")
    )
    colon = lambda: rng.choice((":", ":", "\\!:\\!"))
    text = lambda t: f"{t[0]}{colon()}{t[1]}{mark(t[2])}"
    return text(other), text((hour, minute, half)), other == (hour, minute, half)


def power(rng: random.Random) -> Case:
    """Powers and roots of small numbers with rational exponents, by their prime."""
    prime, top, bottom = rng.choice((2, 3, 5, 7)), rng.randint(1, 5), rng.randint(2, 4)
    exponent = Fraction(top, bottom)
    other = (
        exponent
        if rng.random() < 0.5
        else rng.choice((-exponent, exponent + 1, 1 / exponent if exponent != 1 else Fraction(2)))
    )

    def text(q: Fraction) -> str:
        options = [f"{prime}^{{{q}}}", f"{prime}^{{\\frac{{{q.numerator}}}{{{q.denominator}}}}}", f"{prime}^({q})"]
        if q > 0:
            options += [
                f"\\sqrt[{q.denominator}]{{{prime**q.numerator}}}" if q.denominator > 1 else str(prime**q.numerator)
            ]
            whole, rest = divmod(q, 1)
            if whole and rest:
                options += [
                    f"{prime ** int(whole)} \\cdot {prime}^{{{rest}}}",
                    f"{prime ** int(whole)}\\sqrt[{rest.denominator}]{{{prime**rest.numerator}}}",
                ]
        else:
            options += [f"\\frac{{1}}{{{prime}^{{{-q}}}}}"]
        return rng.choice(options)

    return text(other), text(exponent), exponent == other


def rational_function(rng: random.Random) -> Case:
    """Quotients of linear polynomials; above and below times the same number, or with both signs turned."""
    above: Polynomial = {(1, 0): Fraction(rng.randint(1, 5)), (0, 0): Fraction(rng.randint(-9, 9) or 1)}
    below: Polynomial = {(1, 0): Fraction(rng.randint(1, 5)), (0, 0): Fraction(rng.randint(-9, 9) or 2)}
    k = Fraction(rng.choice((1, -1, 2, 3)))
    top, bottom = dict(above), dict(below)
    if rng.random() < 0.5:
        change = rng.choice((top, bottom))
        change[0, 0] = change[0, 0] + rng.choice((10, -20)) or Fraction(5)
    same = all(_cross(above, bottom).get(n, 0) == _cross(top, below).get(n, 0) for n in range(3))
    scaled = [{powers: c * k for powers, c in side.items()} for side in (top, bottom)]
    texts = [spelled_polynomial(rng, side) for side in scaled]
    plain = rng.random() < 0.3
    text = f"({texts[0]})/({texts[1]})" if plain else f"\\frac{{{texts[0]}}}{{{texts[1]}}}"
    return text, f"\\dfrac{{{spelled_polynomial(rng, above)}}}{{{spelled_polynomial(rng, below)}}}", same


def _cross(a: Polynomial, b: Polynomial) -> dict[int, Fraction]:
    total: dict[int, Fraction] = {}
    for (i, _), p in a.items():
        for (j, _), q in b.items():
            total[i + j] = total.get(i + j, Fraction(0)) + p * q
    return total


def names(rng: random.Random) -> Case:
    """The labels of several right statements."""
    letters = rng.sample("ABCDE", rng.randint(2, 3))
    others = rng.choice((letters, letters, [*letters[1:], "F"], [*letters, "G"]))

    def text(of: list[str]) -> str:
        of = rng.sample(of, len(of))
        bare = rng.choice((", ".join(of), ", ".join(of[:-1]) + " and " + of[-1], ", ".join(f"({x})" for x in of)))
        return rng.choice(("{}", "\\text{{{}}}", "\\textbf{{{}}}")).format(bare)

    return text(others), text(letters), set(letters) == set(others)


KINDS = {
    kind.__name__: kind
    for kind in (
        plain_number,
        plain_set,
        plain_union,
        decimal_comma,
        money,
        time_of_day,
        power,
        rational_function,
        names,
    )
}

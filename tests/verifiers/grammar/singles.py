"""Kinds of one value. Each kind returns (response, label, whether they are equal).

Left out, as references and readers differ: 0.5 against 50%; sqrt(x^2) against x or |x|; rounded decimals.
"""

import math
import random
from fractions import Fraction

from tests.verifiers.grammar.values import (
    decimal,
    integer,
    long_integer,
    next_to,
    rational,
    spelled,
    spelled_polynomial,
    spelled_surd,
    surd,
    surd_next_to,
    times,
)

Case = tuple[str, str, bool]


def fraction(rng: random.Random) -> Case:
    """Rational numbers."""
    x = rational(rng)
    y = x if rng.random() < 0.5 else next_to(rng, x)
    return spelled(rng, y), spelled(rng, x), x == y


def thousands(rng: random.Random) -> Case:
    """Long whole numbers, with and without marks between their thousands."""
    n = rng.randint(1000, 10 ** rng.randint(4, 10))
    other = n if rng.random() < 0.5 else rng.choice((n + 1, n * 10, n + 1000, int(str(n)[::-1])))
    return long_integer(rng, other), rng.choice((str(n), f"{n:,}")), n == other


def mixed(rng: random.Random) -> Case:
    """Mixed numbers against fractions; '1 1/2' is neither 11/2 nor 1/2."""
    whole, bottom = rng.randint(1, 20), rng.randint(2, 9)
    top = rng.randint(1, bottom - 1)
    sign = rng.choice(("", "", "-"))
    text = sign + rng.choice(
        (
            f"{whole}\\frac{{{top}}}{{{bottom}}}",
            f"{whole} {top}/{bottom}",
            f"{whole}\\dfrac{top}{bottom}",
            f"{whole}\\ \\tfrac{{{top}}}{{{bottom}}}",
        )
    )
    x = (whole + Fraction(top, bottom)) * (-1 if sign else 1)
    y = rng.choice((x, x, Fraction(whole * 10 + top, bottom), Fraction(whole * top, bottom), -x, x + 1))
    return text, spelled(rng, y), x == y


def scientific(rng: random.Random) -> Case:
    """a times a power of ten."""
    mantissa, power = Fraction(rng.randint(11, 99), 10), rng.randint(-4, 6)
    other = rng.choice((power, power, power + 1, -power))
    digits = decimal(mantissa)
    sign = rng.choice(("\\times ", "\\cdot ", " \\times ", "×"))
    text = rng.choice((f"{digits}{sign}10^{{{power}}}", f"{digits}e{power}", f"{digits}E{power}"))
    return text, spelled(rng, mantissa * Fraction(10) ** other), power == other


def radical(rng: random.Random) -> Case:
    """Sums of rational multiples of square roots."""
    value = surd(rng)
    other = value if rng.random() < 0.5 else surd_next_to(rng, value)
    other = other or {2: Fraction(9)}
    return spelled_surd(rng, other), spelled_surd(rng, value), value == other


def polynomial(rng: random.Random) -> Case:
    """Polynomials, expanded and as products of linear factors."""
    factors = [
        {(1, 0): Fraction(rng.randint(1, 4)), (0, rng.randint(0, 1)): Fraction(rng.choice((-3, -2, -1, 1, 2, 5)))}
        for _ in range(rng.randint(1, 3))
    ]
    value = {(0, 0): Fraction(1)}
    for factor in factors:
        value = times(value, factor)
    other = dict(value)
    if rng.random() < 0.5:
        powers = rng.choice(list(other))
        other[powers] += rng.choice((1, -1, 2)) if rng.random() < 0.7 else -2 * other[powers]
        other = {powers: c for powers, c in other.items() if c} or {(0, 0): Fraction(7)}
    label = spelled_polynomial(rng, value)
    if rng.random() < 0.4:
        rng.shuffle(factors)
        label = "".join(f"({spelled_polynomial(rng, factor)})" for factor in factors)
    text = spelled_polynomial(rng, other)
    if rng.random() < 0.2:
        text = "f(x)=" + text
    return text, label, value == other


UNITS = {
    "cm": ("cm", "centimeters", "centimetres"),
    "m": ("meters", "metres"),
    "km": ("km", "kilometers"),
    "in": ("inches", "in"),
    "ft": ("feet", "ft"),
    "h": ("hours", "hr"),
    "min": ("minutes", "min"),
    "kg": ("kg", "kilograms"),
    "mph": ("mph", "miles per hour", "mi/h"),
    "m/s": ("m/s", "meters per second"),
}
COMMANDS = ("text", "textnormal", "mathrm", "mbox", "textrm", "operatorname", "textbf")


def unit(rng: random.Random) -> Case:
    """Amounts with units: the unit may be left out, but not replaced by another one."""
    x = rational(rng)
    y = x if rng.random() < 0.7 else next_to(rng, x)
    ours, theirs = rng.sample(list(UNITS), 2)
    theirs = ours if rng.random() < 0.6 else theirs
    power = rng.choice(("", "", "^2", "^{3}")) if not {"m/s", "mph"} & {ours, theirs} else ""
    labelled = rng.random() < 0.5
    label = spelled(rng, x) + (_unit(rng, ours) + power if labelled else "")
    return spelled(rng, y) + _unit(rng, theirs) + power, label, x == y and (ours == theirs or not labelled)


def _unit(rng: random.Random, unit: str) -> str:
    name = rng.choice(UNITS[unit])
    command = rng.choice(COMMANDS)
    if command == "operatorname" and not name.isalpha():
        command = "text"
    return rng.choice(
        (f"\\{command}{{ {name}}}", f"\\ \\{command}{{{name}}}", f"\\,\\{command}{{{name}}}", f"~\\{command}{{{name}}}")
    )


def percent(rng: random.Random) -> Case:
    """Percentages: 50% is '50\\%' and 50."""
    x = abs(rational(rng))
    y = x if rng.random() < 0.5 else next_to(rng, x)
    mark = lambda: rng.choice(("\\%", "\\,\\%", " \\%", " percent", "\\text{ percent}", "\\text{\\%}", ""))
    return spelled(rng, y) + mark(), spelled(rng, x) + mark(), x == y


def degrees(rng: random.Random) -> Case:
    """Angles in degrees, with and without their sign."""
    n = rng.randint(1, 359)
    other = n if rng.random() < 0.5 else rng.choice((n + 1, 360 - n if n != 180 else 90, n * 10))
    mark = lambda: rng.choice(("^\\circ", "^{\\circ}", "°", "\\degree", "\\text{ degrees}", " degrees", ""))
    return f"{other}{mark()}", f"{n}{mark()}", n == other


def based(rng: random.Random) -> Case:
    """Digits in a base."""
    base = rng.randint(2, 9)
    digits = str(rng.randint(1, base - 1)) + "".join(str(rng.randrange(base)) for _ in range(rng.randint(2, 5)))
    others = (digits, digits[:-1] + str((int(digits[-1]) + 1) % base))
    other, other_base = rng.choice(others), rng.choice((base, base, base % 9 + 1 if base > 1 else 5))
    words = {2: "two", 3: "three", 5: "five", 8: "eight"}
    mark = lambda b: rng.choice((f"_{b}", f"_{{{b}}}", f"_{{\\text{{{words.get(b, b)}}}}}", f"_{{({b})}}"))
    return (
        rng.choice((other, f"({other})")) + mark(other_base),
        digits + mark(base),
        (other, other_base) == (digits, base),
    )


def complex_number(rng: random.Random) -> Case:
    """a + b i."""
    a, b = rational(rng), rational(rng) or Fraction(1)
    c, d = rng.choice(((a, b), (a, b), (a, -b), (b, a), (-a, b), (a + 1, b)))
    return _complex(rng, c, d), _complex(rng, a, b), (a, b) == (c, d)


def _complex(rng: random.Random, a: Fraction, b: Fraction) -> str:
    real = (
        spelled(rng, a)
        if a.denominator == 1
        else f"{'-' if a < 0 else ''}\\frac{{{abs(a.numerator)}}}{{{a.denominator}}}"
    )
    real = real.strip()
    size = abs(b)
    number = (
        ""
        if size == 1
        else str(size.numerator)
        if size.denominator == 1
        else f"\\frac{{{size.numerator}}}{{{size.denominator}}}"
    )
    imaginary = rng.choice((number + "i", "i" + ("\\cdot " + number if number else "")))
    if rng.random() < 0.5 and not real.startswith("-") and not real.startswith("+"):
        return f"{'-' if b < 0 else ''}{imaginary}+{real}"
    return f"{real}{'-' if b < 0 else '+'}{imaginary}"


def function(rng: random.Random) -> Case:
    """Factorials, binomials, logarithms, sines of simple angles: functions with exact values."""
    n, k = rng.randint(3, 9), rng.randint(1, 3)
    base = rng.choice((2, 3, 5, 10))
    sines = {
        "\\frac{\\pi}{6}": Fraction(1, 2),
        "\\frac{\\pi}{2}": Fraction(1),
        "\\pi": Fraction(0),
        "30^\\circ": Fraction(1, 2),
        "\\frac{3\\pi}{2}": Fraction(-1),
    }
    angle = rng.choice(list(sines))
    text, value = rng.choice(
        (
            (f"{n}!", Fraction(math.factorial(n))),
            (
                rng.choice((f"\\binom{{{n}}}{{{k}}}", f"\\dbinom{n}{k}", f"{{{n} \\choose {k}}}")),
                Fraction(math.comb(n, k)),
            ),
            (
                rng.choice(
                    (f"\\log_{{{base}}}{{{base**k}}}", f"\\log_{{{base}}}({base**k})", f"\\log_{{{base}}} {base**k}")
                ),
                Fraction(k),
            ),
            (
                rng.choice(
                    (
                        f"\\sin{{{angle}}}",
                        f"\\sin({angle})",
                        f"\\sin\\left({angle}\\right)",
                        f"\\operatorname{{sin}}({angle})",
                    )
                ),
                sines[angle],
            ),
            (f"\\sqrt[3]{{{n**3}}}", Fraction(n)),
            (f"{n}^{{-{k}}}", Fraction(1, n**k)),
            (f"\\left|-{n}\\right|", Fraction(n)),
            (f"\\lfloor {n}.{k} \\rfloor", Fraction(n)),
        )
    )
    other = value if rng.random() < 0.5 else next_to(rng, value)
    return text, spelled(rng, other), value == other


def pi_multiple(rng: random.Random) -> Case:
    """Rational multiples of pi, plus a rational number."""
    q = rational(rng) or Fraction(2)
    p = q if rng.random() < 0.5 else next_to(rng, q) or Fraction(77)
    return _pi(rng, p), _pi(rng, q), p == q


def _pi(rng: random.Random, q: Fraction) -> str:
    sign, top, bottom = ("-" if q < 0 else ""), abs(q.numerator), q.denominator
    times_pi = "\\pi" if top == 1 else rng.choice((f"{top}\\pi", f"{top} \\cdot \\pi", f"\\pi \\cdot {top}", f"{top}π"))
    if bottom == 1:
        return sign + times_pi
    return sign + rng.choice(
        (f"\\frac{{{times_pi}}}{{{bottom}}}", f"\\frac{{{top}}}{{{bottom}}}\\pi", f"\\dfrac{{{top}}}{{{bottom}}} \\pi")
    )


def ratio(rng: random.Random) -> Case:
    """a : b, reduced or not; small numbers, as 10:30 may be a time."""
    a, b, k = rng.randint(1, 9), rng.randint(1, 9), rng.choice((1, 1, 1))
    c, d = rng.choice(((a, b), (a, b), (b, a), (a + 1, b)))
    colon = lambda: rng.choice((":", " : ", "\\colon ", "\\!:\\!"))
    return f"{c * k}{colon()}{d * k}", f"{a}{colon()}{b}", a * d == b * c


def choice_letter(rng: random.Random) -> Case:
    """The letter of a choice, alone or with the text of the choice."""
    letter = rng.choice("ABCDE")
    other = rng.choice((letter, letter, rng.choice("ABCDE")))
    n = integer(rng)
    forms = (
        "\\text{{({0})}}",
        "\\textbf{{({0})}}",
        "({0})",
        "\\text{{{0}}}",
        "\\mathrm{{({0})}}",
        "\\textbf{{({0})}}\\ {1}",
        "\\text{{({0}) }} {1}",
        "\\mathbf{{({0})}}",
    )
    return (
        rng.choice(forms).format(other, n),
        rng.choice(("{0}", "\\text{{({0})}}", "\\textbf{{({0})}}")).format(letter),
        letter == other,
    )


def words(rng: random.Random) -> Case:
    """Names and sentences in several fonts and cases."""
    known = (
        "Monday",
        "Tuesday",
        "yes",
        "no",
        "Evelyn",
        "Evelny",
        "no solution",
        "infinitely many",
        "odd",
        "even",
        "circle",
        "parabola",
    )
    a = rng.choice(known)
    b = rng.choice((a, rng.choice(known)))
    form = lambda w: rng.choice(
        ("\\text{{{0}}}", "{0}", "\\textbf{{{0}}}", "\\mbox{{{0}}}", "\\textnormal{{{0}}}", '"{0}"', "\\text{{{0}.}}")
    ).format(rng.choice((w, w.capitalize(), w.upper())))
    return form(b), form(a), a == b


def dressed(rng: random.Random) -> Case:
    """Spacing, sizes, fonts, quotation marks, invisible characters around a number."""
    x = rational(rng)
    y = x if rng.random() < 0.5 else next_to(rng, x)
    dress = rng.choice(
        (
            "\\left({}\\right)",
            "\\displaystyle {}",
            "\\!{}",
            "{}\\;",
            "\\boldsymbol{{{}}}",
            "{{\\rm {}}}",
            '"{}"',
            "``{}''",
            "{}\u200b",
            "\u2060{}",
            "\\bigl({}\\bigr)",
            "x={}",
            "x = {}",
            "{} = x",
            "\\quad {}",
            "{}.",
            "({})",
            "\\$ {}",
            "\\text{{{}}}",
        )
    )
    text = (decimal(y) or spelled(rng, y, plain=True)) if dress.startswith("\\text") else spelled(rng, y)
    return dress.format(text), spelled(rng, x), x == y


def plus_minus(rng: random.Random) -> Case:
    r"""\pm as the list of both values."""
    a, value = rng.randint(-5, 5), rng.randint(1, 9)
    b = value if rng.random() < 0.5 else value + 1
    shown = f"{a} \\pm {b}" if a else f"\\pm {b}"
    values = rng.sample([a + value, a - value], 2)
    label = rng.choice(("{}, {}", "{} \\text{{ and }} {}", "\\{{{}, {}\\}}", "x={} \\text{{ or }} x={}")).format(
        *values
    )
    return rng.choice(("", "x = ")) + shown, label, b == value


def repeating(rng: random.Random) -> Case:
    """Repeating decimals against fractions."""
    period = "".join(rng.choice("123456789") for _ in range(rng.randint(1, 3)))
    whole = rng.randint(0, 3)
    x = whole + Fraction(int(period), 10 ** len(period) - 1)
    y = rng.choice((x, x, whole + Fraction(int(period), 10 ** len(period)), x + 1))
    return f"{whole}.\\overline{{{period}}}", spelled(rng, y), x == y


KINDS = {
    kind.__name__: kind
    for kind in (
        *(fraction, thousands, mixed, scientific, radical, polynomial, unit, percent, degrees, based, complex_number),
        *(function, pi_multiple, ratio, choice_letter, words, dressed, plus_minus, repeating),
    )
}

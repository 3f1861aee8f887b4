"""GSM8K's sentences: a number said in many ways, other numbers around it. Each kind returns (response, label, whether
the response states the label).

Left out: '42 (43)', '42, 43 of them', 'The answer is 5 dozen, which is 60' and the like, where readers differ.
"""

import random
from fractions import Fraction

from tests.verifiers.grammar.singles import Case
from tests.verifiers.grammar.values import decimal, next_to

PLACES = ("apples", "dollars", "miles per hour", "pages", "of them", "")


def _number(rng: random.Random) -> Fraction:
    whole = rng.choice((rng.randint(1, 99), rng.randint(100, 9999), rng.randint(10**4, 10**7)))
    return Fraction(whole) if rng.random() < 0.8 else Fraction(whole * 100 + 25, 100)


def _spelled(rng: random.Random, x: Fraction, sentence: bool = True, spaced: bool = True) -> str:
    """Digits, grouped or not, of this or another script, with currency; spaces as thousands only where
    `sentence`, after a minus only where `spaced`."""
    digits = decimal(abs(x)) or ""
    whole, point, part = digits.partition(".")
    commas = f"{int(whole):,}"
    groups = (whole, commas, commas.replace(",", "\u202f"), commas.replace(",", "\u00a0"), commas.replace(",", "{,}"))
    text = rng.choice((*groups, commas.replace(",", " ")) if sentence else groups)
    text += point + part if point else rng.choice(("", "", ".0", ".00"))
    if rng.random() < 0.1:
        text = text.translate({ord(c): chr(0xFF10 + int(c)) for c in "0123456789"})
    minus = rng.choice(("-", "−", "–", "- ")[: 4 if spaced else 3]) if x < 0 else ""
    return minus + rng.choice(("", "", "", "$", "\\$", "€", "£")) + text


def _other(rng: random.Random, x: Fraction) -> Fraction:
    y = next_to(rng, x)
    while decimal(y) is None:
        y = next_to(rng, x)
    return y


def declared(rng: random.Random) -> Case:
    """A declaration, with a unit, a remark, mark-up, and other numbers before and after it."""
    x = _number(rng) * rng.choice((1, 1, 1, -1))
    y = x if rng.random() < 0.5 else _other(rng, x)
    a, b = rng.randint(2, 9), rng.randint(10, 99)
    form = rng.choice(
        (
            "#### {0}",
            f"{a} + {b} = {a + b}\n#### {{0}}",
            f"#### {{0}} {rng.choice(PLACES)}",
            f"#### {{0}}\n\nLet me know if you need {a} more.",
            f"#### {{0}} (that is {a} times {b})",
            f"#### {{0}} apples for {a} children",
            f"#### {{0}}. Check: {a} + {b} = {a + b}",
            f"#### {a} * {b} = {{0}}",
            f"#### {{0}} = {a} * {b}",
            "#### **{0}**",
            "The answer is {0}.",
            f"The answer is {{0}} {rng.choice(PLACES)}.",
            f"The final answer is {{0}}, which is {a} times {b}.",
            "**Answer:** {0}",
            "Answer: ${0}$",
            "Final answer: **{0}**.",
            f"There are {a} groups of {b}.\nA: {{0}}",
            f"<answer>{{0}}</answer> I needed {a} steps.",
            f"<think>maybe {a}</think> The answer is {{0}}.",
        )
    )
    return form.format(_spelled(rng, y, sentence="$" not in form)), f"{decimal(x)}", x == y


def boxed(rng: random.Random) -> Case:
    """A box, with text around and in it."""
    x = _number(rng) * rng.choice((1, 1, -1))
    y = x if rng.random() < 0.5 else _other(rng, x)
    a = rng.randint(2, 9)
    form = rng.choice(
        (
            "\\boxed{{{0}}}",
            "\\boxed{{{0}\\text{{ apples}}}}",
            "So $\\boxed{{{0}}}$ since {1} + {1} is even.",
            "\\[\\boxed{{{0}}}\\]\nThis took {1} steps.",
            "\\boxed{{x = {0}}}",
            "\\boxed{{{1}}} was wrong. \\boxed{{{0}}}",
        )
    )
    return form.format(_spelled(rng, y, sentence=False), a), str(decimal(x)), x == y


def undeclared(rng: random.Random) -> Case:
    """The last number of the text, its remark in brackets left aside."""
    x = _number(rng)
    y = x if rng.random() < 0.5 else _other(rng, x)
    a, b = rng.randint(2, 9), rng.randint(10, 99)
    form = rng.choice(
        (
            f"{a} + {b} = {a + b}, so she has {{}} {rng.choice(PLACES)}.",
            f"{a} x {b} = {{}}",
            f"In all they need {{}} apples ({a} times {b}).",
            "It costs {}!",
            f"First {b}. Then {a}. Now {{}}%",
            "Total - {}",
            f"Step {a}: add. The total comes to {{}} m^2.",
            "The bus is No.{}",
            f"Sums:\n- {a}\n- {b}\n- {{}}",
        )
    )
    sentence = "No." not in form and not form.endswith("= {}")
    text = _spelled(rng, y, sentence, spaced=False)  # "they need - 3" is a dash
    if "No." in form or "- {}" in form:
        text = (decimal(y) or "").removeprefix("-")
        y = abs(y)
    return form.format(text), str(decimal(x)), x == y


def operators(rng: random.Random) -> Case:
    """A sign between two values is an operator; a sign after 'is' or '=' belongs to its number."""
    a, b = rng.randint(10, 99), rng.randint(2, 9)
    form, value = rng.choice(
        (
            (f"so we have {a} - {b}", b),
            (f"so we have {a} + {b}", b),
            (f"{a} apples - {b}", b),
            (f"so we have {a}-{b}", b),
            (f"the answer is - {b}", -b),
            (f"the answer is -{b}", -b),
            (f"x = -{b}", -b),
            (f"{b} - {a} = - {b}", -b),
            (f"#### - {b}", -b),
            (f"the total is ${-b}", -b),
            (f"({a}) - {b}", b),
        )
    )
    other = rng.choice((value, -value))
    return form, str(other), other == value


def hedges(rng: random.Random) -> Case:
    """Two answers are none, whichever is asked for."""
    x = rng.randint(2, 500)
    y = x + rng.choice((1, 2, 10))
    form = rng.choice(
        (
            *(
                "#### {} or {}",
                "#### {}, {}",
                "#### {} (or {})",
                "\\boxed{{{}}} or \\boxed{{{}}}",
                "The answer is {} or {}.",
            ),
            *(
                "#### {}-{}",
                "#### {} to {}",
                "#### {} apples or {} apples",
                "\\boxed{{{} \\text{{ or }} {}}}",
                "#### {} / {}",
            ),
            *("Answer: {} and {}", "#### {} (maybe {})", "\\boxed{{{}, {}}}", "#### {} * {}"),
        )
    )
    return form.format(x, y), str(rng.choice((x, y))), False


def fractions(rng: random.Random) -> Case:
    """a/b, LaTeX's fractions, mixed numbers."""
    whole, bottom = rng.randint(1, 20), rng.choice((2, 4, 5, 8))
    top = rng.randint(1, bottom - 1)
    x = Fraction(top, bottom)
    text, value = rng.choice(
        (
            (f"{top}/{bottom}", x),
            (f"\\frac{{{top}}}{{{bottom}}}", x),
            (f"\\dfrac{top}{bottom}", x),
            (f"{whole} {top}/{bottom}", whole + x),
            (f"{whole}\\frac{{{top}}}{{{bottom}}}", whole + x),
            (f"-{top}/{bottom}", -x),
        )
    )
    label = value if rng.random() < 0.5 else _other(rng, value)
    form = rng.choice(("#### {}", "The answer is {}.", "\\boxed{{{}}}", "so it is {}"))
    return form.format(text), str(decimal(label)), label == value


KINDS = {kind.__name__: kind for kind in (declared, boxed, undeclared, operators, hedges, fractions)}
KINDS = {f"gsm8k {name}": kind for name, kind in KINDS.items()}

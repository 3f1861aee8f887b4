"""Pairs of answers whose truth is known by construction: one value in two spellings, or two values that nearly agree.

The truth comes from exact arithmetic of this package alone (Python's fractions and integers, normal forms of
polynomials and of sums of square roots): nothing here reads what it wrote, nothing of verifiers/ or sympy is used.

values.py     exact values: their normal forms, their spellings, and values next to them
singles.py    kinds of one value: fractions, radicals, polynomials, units, percentages, bases, complex numbers, choices
several.py    kinds of several values: tuples, sets, lists, intervals, matrices, assignments, boxes
plainly.py    kinds in plain text, and mixtures: decimal commas, money, times, powers, rational functions
sentences.py  GSM8K's sentences

    python -m tests.verifiers.grammar --pairs 20000 --seed 0     # counts by kind, and every wrong pair
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.verifiers.grammar import plainly, sentences, several, singles


class Pair(NamedTuple):
    """A response, a label, and whether the one states the other."""

    kind: str
    dataset: str
    response: str
    label: str
    equal: bool


FRAMES = (
    "{}",
    "${}$",
    "\\boxed{{{}}}",
    "So the answer is $\\boxed{{{}}}$.",
    "We add them up.\n\\[\\boxed{{{}}}\\]",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
)
MATH = {**singles.KINDS, **several.KINDS, **plainly.KINDS}
WHOLE = {**several.RESPONSES}  # kinds that write a whole response
GSM8K = sentences.KINDS


def pairs(number: int, seed: int) -> Iterator[Pair]:
    """`number` pairs, the kinds in turn, reproducible from the seed."""
    kinds: list[tuple[str, str, Callable]] = [("math", name, kind) for name, kind in {**MATH, **WHOLE}.items()]
    kinds += [("gsm8k", name, kind) for name, kind in GSM8K.items()]
    for i in range(number):
        dataset, name, kind = kinds[i % len(kinds)]
        rng = random.Random(f"{seed} {i} {name}")
        response, label, equal = kind(rng)
        if name in MATH:
            response, label = rng.choice(FRAMES).format(response), label
        yield Pair(name, dataset, response, label, equal)

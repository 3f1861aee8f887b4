"""Two models on the same prompts: is one better, by how much, and could it be chance?

    d_i = mean of B's scores of prompt i - mean of A's        difference = mean of d_i

All samples and seeds of a prompt are one d_i: answers to one prompt resemble each other, and prompts are what is drawn
from a population. One right or wrong answer each is a fourfold table, of which b prompts only B answers, c only A:

    interval   Tango's score interval (1998): the differences that a score test does not reject
    p          McNemar's test, exact: b of b + c by a fair coin, two-sided

Else (means of several answers, scores between 0 and 1):

    interval   Student's t over the d_i and two more prompts, one of d = s and one of d = -s: what Bonett and Price
               (2012) add to a fourfold table, so that few prompts, or none that differ, do not pass for certainty.
               s^2 is the part of one answer's variance that is left in a prompt's mean: 1 for one answer, 1 / K for K
               independent ones.
    p          signs of the d_i flipped at random (Fisher 1935): all of them, or 9,999 draws of a fixed seed

Sources: Tango, Statistics in Medicine 17 (1998) 891; Bonett & Price, J. Educ. Behav. Stat. 37 (2012) 479; Fagerland,
Lydersen & Laake, BMC Med. Res. Methodol. 14 (2014) 121 compare the intervals of the fourfold table.
Left out: what another training run, of another seed, would give. A model is one draw of its recipe.

N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of 95 %, two-sided
FLIPS, ALL_FLIPS, SEED = 9_999, 14, 20_211_128  # draws; prompts up to which all signs are tried; the draws' seed


@dataclass(frozen=True)
class Paired:
    """B against A on the same prompts: means and difference in [0, 1] units of score, its 95 % interval, and p."""

    prompts: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p: float
    better_a: int  # prompts of which A's mean score is the higher
    better_b: int
    single: bool  # one right or wrong answer each: b and c of a fourfold table


def paired(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Paired:
    """The comparison of N prompts' scores under A and under B, each a list in [0, 1] of at least one score. NaN and an
    interval of all there is for no prompt."""
    a_N, b_N = (np.array([np.mean(scores) for scores in of], dtype=float) for of in (a, b))
    n = len(a_N)
    if not n:
        return Paired(0, math.nan, math.nan, math.nan, -1.0, 1.0, 1.0, 0, 0, True)
    d_N = np.where(np.abs(b_N - a_N) < 1e-12, 0.0, b_N - a_N)
    better_b, better_a = int((d_N > 0).sum()), int((d_N < 0).sum())
    single = all(len(scores) == 1 and scores[0] in (0.0, 1.0) for of in (a, b) for scores in of)
    if single:
        (low, high), p = tango(better_b, better_a, n), mcnemar(better_b, better_a)
    else:
        low, high = mean_difference(d_N, spread_left(a_N, b_N, max(len(scores) for of in (a, b) for scores in of)))
        p = sign_flips(d_N)
    means = float(a_N.mean()), float(b_N.mean())
    return Paired(n, *means, float(d_N.mean()), low, high, p, better_a, better_b, single)


# --- one answer each --------------------------------------------------------------------------------------------------


def tango(b: int, c: int, n: int, z: float = Z) -> tuple[float, float]:
    """The score interval of (b - c) / n, where b and c of n pairs differ one way and the other (Tango 1998).

    Its ends solve (b - c - n d)^2 = z^2 n (2 q + d (1 - d)), q the likeliest share of the second kind at the difference
    d: the positive root of 2 n q^2 + (b' ) q - c d (1 - d) = 0 with b' = (2 n - b + c) d - b - c.
    """

    def distance(d: float) -> float:
        linear = (2 * n - b + c) * d - b - c
        q = (math.sqrt(max(0.0, linear * linear + 8 * n * c * d * (1 - d))) - linear) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        off = b - c - n * d
        return off / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, off) if off else 0.0

    found = (b - c) / n
    return _root(distance, z, -1.0, found), _root(distance, -z, found, 1.0)


def _root(falling, value: float, low: float, high: float) -> float:
    """Where a falling function has this value; the end of [low, high] that is nearest, where it has it nowhere."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return (low + high) / 2


def mcnemar(b: int, c: int) -> float:
    """P(a fair coin falls as unevenly as b to c, or more), two-sided, exact."""
    n, fewer = b + c, min(b, c)
    if b == c:
        return 1.0
    i_I = np.arange(1, fewer + 1)
    log_choose_I = np.concatenate([[0.0], np.cumsum(np.log((n - i_I + 1) / i_I))])
    return min(1.0, 2 * float(np.exp(log_choose_I - n * math.log(2)).sum()))


# --- means ------------------------------------------------------------------------------------------------------------


def spread_left(a_N: np.ndarray, b_N: np.ndarray, most: int) -> float:
    """s: the root of the share of one answer's variance that prompts' means keep, between 1 / `most` and 1."""
    means = [float(of_N.mean()) for of_N in (a_N, b_N)]
    one = sum(p * (1 - p) for p in means)
    kept = sum(float(((of_N - p) ** 2).mean()) for of_N, p in zip((a_N, b_N), means, strict=True))
    return math.sqrt(min(1.0, max(1 / most, kept / one))) if one > 1e-12 else 1.0


def mean_difference(d_N: np.ndarray, s: float) -> tuple[float, float]:
    """The interval of the mean of d_i, within [-1, 1]; s as at the head of this file."""
    with_two = np.concatenate([d_N, [s, -s]])
    n = len(with_two)
    half = student(n - 1) * math.sqrt(float(with_two.var(ddof=1)) / n)
    middle = float(with_two.mean())
    return max(-1.0, middle - half), min(1.0, middle + half)


def student(degrees: int) -> float:
    """The t that |T| exceeds with probability 5 %, by bisection of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    if degrees > 400:
        return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)

    def outside(t: float) -> float:
        theta = math.atan(t / math.sqrt(degrees))
        odd, cosine = degrees % 2, math.cos(theta)
        term = cosine if odd else 1.0
        total = term if degrees > 1 else 0.0
        for k in range(3 if odd else 2, degrees - 1, 2):
            term *= (k - 1) / k * cosine * cosine
            total += term
        inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
        return 1 - inside

    return _root(outside, 0.05, 0.0, 1e3)


def sign_flips(d_N: np.ndarray) -> float:
    """P(|sum of d_i with signs at random| >= |sum of d_i|): that of all signs for few prompts, else that of FLIPS draws
    and the signs as they are."""
    d_N = d_N[d_N != 0]
    n, observed = len(d_N), abs(float(d_N.sum()))
    bound = observed - 1e-9 * float(np.abs(d_N).sum())  # sums in another order round otherwise
    if n <= ALL_FLIPS:
        signs_FN = (np.arange(2**n)[:, None] >> np.arange(n)[None]) & 1
        return float((np.abs((1 - 2 * signs_FN) @ d_N) >= bound).mean())
    words = -(-n // 64)
    stream, reached = np.random.Philox(key=SEED), 0
    for start in range(0, FLIPS, 512):
        count = min(512, FLIPS - start)
        bits_FN = np.unpackbits(stream.random_raw(count * words).view(np.uint8).reshape(count, -1), axis=1)[:, :n]
        reached += int((np.abs(d_N.sum() - 2 * (bits_FN @ d_N)) >= bound).sum())
    return (1 + reached) / (1 + FLIPS)

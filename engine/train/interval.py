"""95 % intervals of an accuracy: Wilson's, and with several samples a prompt, Wilson's at the effective number of
responses.

    n_eff = N K / (1 + (K - 1) rho)

for N prompts of K samples whose scores correlate by rho within a prompt (Kish's design effect).

N prompts · K samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def wilson(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (p + zz / 2 - half) / (1 + zz), (p + zz / 2 + half) / (1 + zz)


def accuracy(scores_NK: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of the scores of N prompts under K seeds, with the 95 % interval below.

    Scores in [0, 1], float64; NaN where there is no verdict: an error is no wrong answer, and its prompt is left out of
    the mean. Without any prompt that is left, (NaN, 0, 1). rho is the one-way ANOVA estimate (Donner 1986), clipped to
    [0, 1]; without any spread there is nothing to estimate it from, and it is taken as 1. Left out: variance between
    seeds that is common to all prompts.
    """
    mean, effective = mean_and_number(scores_NK)
    return (mean, *wilson(mean * effective, effective)) if effective else (math.nan, 0.0, 1.0)


def mean_and_number(scores_NK: np.ndarray) -> tuple[float, float]:
    """(mean, effective number of responses), as `accuracy` takes them; (NaN, 0) without any prompt."""
    scores_NK = scores_NK[~np.isnan(scores_NK).any(1)]
    n, k = scores_NK.shape
    if not n:
        return math.nan, 0.0
    mean, rho = float(scores_NK.mean()), 0.0
    if k > 1:
        by_prompt_N = scores_NK.mean(1)
        between = k * by_prompt_N.var(ddof=1) if n > 1 else 0.0
        within = ((scores_NK - by_prompt_N[:, None]) ** 2).sum() / (n * (k - 1))
        total = between + (k - 1) * within
        rho = min(1.0, max(0.0, (between - within) / total)) if total > 0 else 1.0
    effective = n * k / (1 + (k - 1) * rho)
    return mean, effective


def mean_of_groups(groups: list[np.ndarray], z: float = 1.96) -> tuple[float, float, float]:
    """(mean, low, high) of the groups' means, each counting the same, from the scores_NK of each.

    The variance is the sum of the groups', each taken at Agresti and Coull's centre (1998), so that a group of which
    all are right does not pass for certainty. Without any group, (NaN, 0, 1).
    """
    found = [(mean, n) for mean, n in map(mean_and_number, groups) if n]
    if not found:
        return math.nan, 0.0, 1.0
    centres = [((mean * n + z * z / 2) / (n + z * z), n + z * z) for mean, n in found]
    half = z * math.sqrt(sum(centre * (1 - centre) / n for centre, n in centres)) / len(found)
    mean = sum(mean for mean, _ in found) / len(found)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def clustered(hits_N: np.ndarray, trials_N: np.ndarray, most: float | None = None) -> tuple[float, float, float]:
    """(share, low, high) of hits among trials that come in prompts of different sizes: Wilson's interval for

        n_eff = p (1 - p) / var,    var = N / (N - 1) sum (hits_i - p trials_i)^2 / (sum trials_i)^2

    the variance of a ratio over clusters (Cochran 1977, section 11.12). n_eff is at most `most` (all trials) and, where
    nothing spreads, N. Without any trial, (NaN, 0, 1). Left out: as above.
    """
    hits_N, trials_N = hits_N[trials_N > 0].astype(float), trials_N[trials_N > 0].astype(float)
    n, total = len(trials_N), float(trials_N.sum())
    if not n:
        return math.nan, 0.0, 1.0
    p = min(1.0, max(0.0, float(hits_N.sum()) / total))
    squares = float(((hits_N - p * trials_N) ** 2).sum())
    most = total if most is None else most
    effective = float(n)
    if n > 1 and squares > 1e-12 and 0 < p < 1:
        effective = min(most, p * (1 - p) * total * total * (n - 1) / (n * squares))
    return p, *wilson(p * effective, effective)


def pass_at_k(right_N: np.ndarray, samples: int, k: int) -> np.ndarray:
    """The unbiased estimate, of each prompt, that one of k samples is right, from c right ones of n = `samples`:

        1 - C(n - c, k) / C(n, k) = 1 - product over i = n - c + 1 .. n of (1 - k / i)

    Source: Chen et al. 2021 (arXiv:2107.03374), equation 1.
    """
    factors = 1 - k / np.arange(1, samples + 1)  # 0 for i = k: with fewer than k wrong ones, k hold a right one
    products = np.concatenate([[1.0], np.cumprod(factors[::-1])])  # of the last c factors
    return 1 - products[np.asarray(right_N, dtype=int)]


def over_seeds(values_K: Sequence[float]) -> tuple[float, float, tuple[float, float], tuple[float, float]]:
    """(mean, sd, 95 % interval of the mean, 95 % interval of the sd) of a figure under K seeds, taken as normal.

        mean +- t sd / sqrt(K),   sd sqrt((K - 1) / c_high) to sd sqrt((K - 1) / c_low)

    with Student's t and the chi-square quantiles c of K - 1 degrees of freedom (Student 1908; Cochran 1934). With K = 1
    there is no sd (NaN). Left out: the uncertainty of each value itself.
    """
    k, mean = len(values_K), float(np.mean(values_K))
    if k < 2:
        return mean, math.nan, (math.nan, math.nan), (math.nan, math.nan)
    sd = float(np.std(values_K, ddof=1))
    half = _quantile(lambda t: _student(t, k - 1), 0.975) * sd / math.sqrt(k)
    chi_square = lambda x: float(torch.special.gammainc(torch.tensor((k - 1) / 2.0).double(), torch.tensor(x / 2.0)))
    bounds = [sd * math.sqrt((k - 1) / _quantile(chi_square, share)) for share in (0.975, 0.025)]
    return mean, sd, (mean - half, mean + half), (bounds[0], bounds[1])


def of_ratio(sums: Mapping[str, float], n: int) -> tuple[float, float, float]:
    """(r, low, high) of r = sum a / sum b over n rows, with its 95 % interval, for the sums aa, ab, bb of the products.

        r +- 1.96 sqrt( n / (n - 1) sum (a - r b)^2 ) / sum b

    The rows are the sample: tokens of one row resemble each other (Cochran 1977, 2.11).
    """
    r = sums["a"] / sums["b"]
    squares = max(0.0, sums["aa"] - 2 * r * sums["ab"] + r * r * sums["bb"])
    half = 1.96 * math.sqrt(squares * n / (n - 1)) / sums["b"] if n > 1 else math.inf
    return r, r - half, r + half


def _quantile(distribution: Callable[[float], float], share: float) -> float:
    """Where a distribution on [0, inf) reaches this share, by bisection."""
    low, high = 0.0, 1.0
    while distribution(high) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < share else (low, middle)
    return high


def _student(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine, odd = math.sin(angle), math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(2 + odd, degrees + 1, 2):  # of 1, 3, ... or 2, 4, ... degrees
        total += term
        term *= cosine * cosine * (i - 1) / i
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + within / 2

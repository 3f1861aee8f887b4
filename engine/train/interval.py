"""95 % intervals of an accuracy: Wilson's, and with several samples a prompt, Wilson's at the effective number of
responses.

    n_eff = N K / (1 + (K - 1) rho)

for N prompts of K samples whose scores correlate by rho within a prompt (Kish's design effect).

N prompts · K samples of each.
"""

from __future__ import annotations

import math

import numpy as np


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
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
    scores_NK = scores_NK[~np.isnan(scores_NK).any(1)]
    n, k = scores_NK.shape
    if not n:
        return math.nan, 0.0, 1.0
    mean, rho = float(scores_NK.mean()), 0.0
    if k > 1:
        by_prompt_N = scores_NK.mean(1)
        between = k * by_prompt_N.var(ddof=1) if n > 1 else 0.0
        within = ((scores_NK - by_prompt_N[:, None]) ** 2).sum() / (n * (k - 1))
        total = between + (k - 1) * within
        rho = min(1.0, max(0.0, (between - within) / total)) if total > 0 else 1.0
    effective = n * k / (1 + (k - 1) * rho)
    return mean, *wilson(mean * effective, effective)

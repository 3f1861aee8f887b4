"""engine/train/paired.py and the intervals of groups: published figures, exact coverage, size, scalar oracles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from engine.train.interval import accuracy, clustered, mean_of_groups, pass_at_k, wilson
from engine.train.paired import Z, mcnemar, mean_difference, paired, sign_flips, spread_left, student, tango


def test_the_interval_of_a_fourfold_table_is_the_published_one():
    """Airway hyper-responsiveness before and after stem cell transplantation, 1 and 7 of 21 pairs: Fagerland, Lydersen
    and Laake 2014 give -0.517 to -0.026 for Tango's interval and 0.070 for the exact test."""
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(18 / 256)


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (88, 47, 1319), (0, 5, 30), (5, 0, 30), (3, 3, 6), (10, 0, 10)])
def test_its_ends_solve_the_score_equation(b, c, n):
    """With q the likeliest share of the second kind at that difference, found by a search over its log-likelihood."""
    for end in tango(b, c, n):
        if abs(end) > 1 - 1e-9:
            continue
        low, high = max(0.0, -end), (1 - end) / 2
        q = np.linspace(low, high, 2_000_001)[1:-1]
        with np.errstate(divide="ignore"):
            likelihood = (
                (n - b - c) * np.log(1 - 2 * q - end) + (b * np.log(q + end) if b else 0) + (c * np.log(q) if c else 0)
            )
        best = float(q[np.argmax(likelihood)])
        assert (b - c - n * end) ** 2 == pytest.approx(Z**2 * n * (2 * best + end * (1 - end)), rel=2e-3, abs=2e-3)


def test_the_interval_turns_with_its_sides_and_ends_where_there_is_nothing():
    low, high = tango(9, 2, 40)
    assert tango(2, 9, 40) == pytest.approx((-high, -low))
    low, high = tango(0, 0, 20)
    assert (-low, high) == pytest.approx((Z**2 / (20 + Z**2),) * 2)  # as Wilson's for 0 of 20
    assert tango(20, 0, 20)[1] == pytest.approx(1) and tango(20, 0, 20)[0] > 0.6
    none = paired([], [])
    assert none.prompts == 0 and math.isnan(none.difference) and (none.low, none.high, none.p) == (-1, 1, 1)


def exact_coverage(n: int, only_b: float, only_a: float) -> tuple[float, float]:
    """(P(the interval holds the truth), P(the exact test finds p <= 0.05)), summed over every table."""
    held = found = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            ways = math.comb(n, b) * math.comb(n - b, c)
            chance = ways * only_b**b * only_a**c * (1 - only_b - only_a) ** (n - b - c)
            if chance > 1e-12:
                low, high = tango(b, c, n)
                held += chance * (low - 1e-9 <= only_b - only_a <= high + 1e-9)
                found += chance * (mcnemar(b, c) <= 0.05)
    return held, found


@pytest.mark.parametrize(("only_b", "only_a"), [(0.1, 0.1), (0.3, 0.1), (0.02, 0.01), (0.4, 0.4), (0.8, 0.05), (0, 0)])
def test_coverage_and_size_of_one_answer_each(only_b, only_a):
    held, found = exact_coverage(20, only_b, only_a)
    assert held > 0.94 and (only_b != only_a or found <= 0.05)


@pytest.mark.parametrize(
    ("n", "k", "shape", "shift"),
    [(10, 4, (0.4, 0.8), 0.1), (40, 8, (5, 5), 0.1), (60, 4, (0.05, 4), 0.01), (8, 3, (9, 1), 0)],
)
def test_coverage_and_size_of_several_answers(n, k, shape, shift):
    """Prompts of very different difficulty, and models that are nearly always wrong: 95 % or more."""
    generator = np.random.Generator(np.random.Philox(key=2))
    p_RN = generator.beta(*shape, (600, n))
    truth = float(np.minimum(generator.beta(*shape, 200_000) + shift, 1).mean() - shape[0] / sum(shape))
    a_RN, b_RN = generator.binomial(k, p_RN) / k, generator.binomial(k, np.minimum(p_RN + shift, 1)) / k
    held = rejected = 0
    for a_N, b_N in zip(a_RN, b_RN, strict=True):
        low, high = mean_difference(b_N - a_N, spread_left(a_N, b_N, k))
        held += low - 0.002 <= truth <= high + 0.002
    for a_N, b_N in zip(a_RN[:120], (generator.binomial(k, p_RN[:120]) / k), strict=True):  # no difference
        rejected += sign_flips(b_N - a_N) <= 0.05
    assert held / 600 > 0.94 and rejected / 120 < 0.12


def test_sign_flips_against_all_signs():
    differences = np.array([0.5, -0.25, 0.25, 0.75, 0.0, -0.5, 1.0])
    sums = [abs(float(np.dot(signs, differences))) for signs in itertools.product((-1, 1), repeat=7)]
    assert sign_flips(differences) == np.mean([s >= 1.75 - 1e-12 for s in sums])
    many = np.tile(differences, 9)  # drawn: near the normal approximation, and the same every time
    z = many.sum() / math.sqrt(float((many**2).sum()))
    assert sign_flips(many) == sign_flips(many) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.004)
    assert sign_flips(np.zeros(5)) == 1.0
    ones = np.array([1.0] * 9 + [-1.0])  # one answer each: McNemar's test
    assert sign_flips(ones) == pytest.approx(mcnemar(9, 1))


def test_students_quantiles_are_those_of_the_tables():
    tables = {
        1: 12.7062,
        2: 4.30265,
        3: 3.18245,
        4: 2.77645,
        9: 2.26216,
        30: 2.04227,
        120: 1.97993,
        400: 1.96591,
        401: 1.96590,
    }
    assert all(student(degrees) == pytest.approx(t, abs=6e-6) for degrees, t in tables.items())


def test_a_prompt_counts_once_and_every_answer_of_it():
    one = paired([[1.0], [0.0], [0.0], [1.0]], [[1.0], [1.0], [1.0], [0.0]])
    assert one.single and (one.better_b, one.better_a, one.difference) == (2, 1, 0.25)
    assert (one.low, one.high) == tango(2, 1, 4) and one.p == 1.0
    assert paired([[1.0] * 3, [0.0] * 3], [[1.0, 0.0], [1.0, 1.0]]).difference == pytest.approx(0.25)
    twice = paired([[1.0, 1.0], [0.0, 0.0]] * 20, [[1.0, 1.0], [1.0, 1.0]] * 20)
    once = paired([[1.0], [0.0]] * 20, [[1.0], [1.0]] * 20)
    assert not twice.single and twice.high - twice.low > 0.7 * (once.high - once.low)  # copies add nothing
    same = paired([[1.0, 1.0]] * 20, [[1.0, 1.0]] * 20)
    assert -same.low == same.high > 0.1 and same.p == 1.0  # twenty that agree do not say that all do
    fractions = paired([[0.25], [0.5]], [[0.25], [0.75]])
    assert not fractions.single and fractions.difference == 0.125


def test_pass_at_k_counts_the_subsets():
    for n, k in ((5, 1), (5, 2), (5, 5), (8, 4)):
        for right in range(n + 1):
            answers = [True] * right + [False] * (n - right)
            expected = np.mean([any(chosen) for chosen in itertools.combinations(answers, k)])
            assert pass_at_k(np.array([right]), n, k)[0] == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(np.array([1]), 10_000, 100)[0] == pytest.approx(0.01)


def test_the_interval_of_clusters_of_different_sizes():
    """One trial each is Wilson's; doubled clusters say what single ones do; independent trials say more; it covers."""
    hits, ones = np.array([1, 0, 0, 1, 1, 0, 0, 0]), np.ones(8)
    p, low, high = clustered(hits, ones)
    assert p == 3 / 8 and (low, high) == pytest.approx(wilson(3 / 8 * 7, 7))  # n - 1: the variance is estimated
    assert clustered(2 * hits, 2 * ones) == pytest.approx(clustered(hits, ones))
    assert clustered(np.zeros(4), np.array([1, 2, 3, 0]))[1:] == wilson(0, 3)
    assert math.isnan(clustered(np.zeros(2), np.zeros(2))[0])
    generator = np.random.Generator(np.random.Philox(key=3))
    held = 0
    for _ in range(600):
        sizes = generator.integers(1, 6, 60)
        held += (
            (found := clustered(generator.binomial(sizes, generator.beta(0.5, 1, 60)), sizes))[1] <= 1 / 3 <= found[2]
        )
    assert 0.93 < held / 600 < 0.97


def test_the_interval_of_a_mean_over_groups():
    """Each counts the same, whatever its size; one that is always right has a width; it covers."""
    small, large = np.array([[1.0], [0.0]]), np.tile([[1.0], [1.0], [1.0], [0.0]], (50, 1))
    mean, low, high = mean_of_groups([small, large])
    assert mean == 0.625 and high - low > accuracy(np.concatenate([small, large]))[2] - 0.75
    assert mean_of_groups([np.ones((50, 2)), np.ones((9, 2))])[1] < 0.97
    assert math.isnan(mean_of_groups([np.full((2, 1), np.nan)])[0])
    generator = np.random.Generator(np.random.Philox(key=4))
    truth, held = np.array([0.05, 0.3, 0.5, 0.9]), 0
    for _ in range(600):
        groups = [(generator.random((n, 2)) < p).astype(float) for n, p in zip((15, 40, 25, 100), truth, strict=True)]
        _, low, high = mean_of_groups(groups)
        held += low <= truth.mean() <= high
    assert held / 600 > 0.93

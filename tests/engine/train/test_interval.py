"""Intervals over seeds and of ratios: against printed tables, and scalar loops."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from engine.train import interval

# 97.5 % quantiles of Student's t, 2.5 % and 97.5 % of chi-square, as any table prints them
TABLE = {
    1: (12.706, 0.000982, 5.024),
    2: (4.303, 0.0506, 7.378),
    3: (3.182, 0.216, 9.348),
    4: (2.776, 0.484, 11.143),
    9: (2.262, 2.700, 19.023),
    10: (2.228, 3.247, 20.483),
    30: (2.042, 16.791, 46.979),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_seeds_give_the_intervals_of_the_tables(degrees):
    t, low, high = TABLE[degrees]
    values = [random.Random(i).gauss(3, 2) for i in range(degrees + 1)]
    mean, sd, of_mean, of_sd = interval.over_seeds(values)
    assert (mean, sd) == pytest.approx((statistics.fmean(values), statistics.stdev(values)))
    half = t * sd / math.sqrt(len(values))
    assert of_mean == pytest.approx((mean - half, mean + half), abs=2e-3 * half)
    assert of_sd == pytest.approx((sd * math.sqrt(degrees / high), sd * math.sqrt(degrees / low)), rel=1e-2)


def test_one_seed_has_no_spread_and_equal_ones_have_none():
    assert interval.over_seeds([0.5])[0] == 0.5 and math.isnan(interval.over_seeds([0.5])[1])
    assert interval.over_seeds([0.5, 0.5, 0.5]) == (0.5, 0.0, (0.5, 0.5), (0.0, 0.0))


def test_the_interval_of_a_loss_per_token_is_of_conversations():
    """Against a scalar loop; rows that are each said twice, with twice the tokens, say no more."""
    rng = random.Random(1)
    rows = [(rng.uniform(5, 40), rng.randint(3, 30)) for _ in range(40)]

    def found(rows):
        sums = {"a": sum(a for a, _ in rows), "b": sum(b for _, b in rows), "aa": sum(a * a for a, _ in rows)}
        return interval.of_ratio(
            sums | {"ab": sum(a * b for a, b in rows), "bb": sum(b * b for _, b in rows)}, len(rows)
        )

    r = sum(a for a, _ in rows) / sum(b for _, b in rows)
    error = math.sqrt(40 / 39 * sum((a - r * b) ** 2 for a, b in rows)) / sum(b for _, b in rows)
    assert found(rows) == pytest.approx((r, r - 1.96 * error, r + 1.96 * error), rel=1e-9)
    assert found([(2 * a, 2 * b) for a, b in rows]) == pytest.approx(found(rows), rel=1e-9)
    assert found(rows[:1])[1:] == (-math.inf, math.inf)

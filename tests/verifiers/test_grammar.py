"""Every pair of the grammar is judged as it was made; the grammar's own arithmetic is what it says."""

from fractions import Fraction

import pytest

from tests.verifiers.grammar import GSM8K, MATH, WHOLE, Pair, pairs, several, singles, values
from tests.verifiers.grammar.__main__ import judge

KINDS = {*MATH, *WHOLE, *GSM8K}


def wrong(number: int, seed: int) -> list[Pair]:
    """The pairs that are judged otherwise than they were made."""
    return [pair for pair in pairs(number, seed) if not judge(pair)]


def test_every_pair_is_judged_as_it_was_made():
    assert not wrong(1500, seed=0)


@pytest.mark.drill
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_twenty_thousand_pairs_are_judged_as_they_were_made(seed):
    assert not wrong(20_000, seed)


def test_the_pairs_are_of_every_kind_equal_and_not():
    """A grammar of equal pairs alone would praise a verifier that accepts everything."""
    made = list(pairs(40 * len(KINDS), seed=0))
    assert {pair.kind for pair in made} == KINDS
    for kind in KINDS:
        equal = sum(pair.equal for pair in made if pair.kind == kind)
        assert equal < 40 and (equal > 0 or kind == "gsm8k hedges"), kind
    assert made == list(pairs(40 * len(KINDS), seed=0))


def test_a_wrong_verdict_is_wrong():
    assert judge(Pair("fraction", "math", "1/2", "0.5", True)) and not judge(
        Pair("fraction", "math", "1/2", "0.5", False)
    )


def test_the_normal_forms():
    third, one, two = Fraction(1, 3), Fraction(1), Fraction(2)
    assert several.merged([(one, True, two, False), (None, False, one, False)]) == [(None, False, two, False)]
    assert len(several.merged([(one, False, two, False), (None, False, one, False)])) == 2
    assert values.times({(1, 0): one, (0, 0): one}, {(1, 0): one, (0, 0): -one}) == {(2, 0): one, (0, 0): -one}
    assert (
        values.square_free(72) == (6, 2)
        and values.decimal(third) is None
        and values.decimal(-third * 3 / 8) == "-0.125"
    )
    assert singles.KINDS.keys().isdisjoint(several.KINDS)

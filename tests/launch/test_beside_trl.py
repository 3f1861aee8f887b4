"""`python -m benchmarks.against_trl grpo` compares settings that launch.grpo has: their words are its flags.

The comparison itself needs TRL, whose import alone takes longer than a test may.
"""

from __future__ import annotations

import pytest

from benchmarks.group_cases import CASES
from launch import grpo


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.trl} ~ {case.ours}")
def test_our_words_of_a_case_are_flags_that_fit_each_other(case):
    flags = case.of_ours()
    config = grpo.Config(**flags)
    config.check()
    assert {name: vars(config)[name] for name in flags} == flags
    assert set(flags) >= {"aggregate"}, "a case says how it takes its mean"


def test_only_cases_that_say_why_may_differ():
    assert all(case.agrees or case.why for case in CASES)
    assert sum(case.agrees for case in CASES) > len(CASES) / 2

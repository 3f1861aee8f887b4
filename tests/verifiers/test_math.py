"""MATH's verifier on single answers: what is the same, what only looks like it, and where a response settles."""

from __future__ import annotations

import pytest

from verifiers import verify
from verifiers.math.equal import equal

SAME = [
    (r"\{1, 2, 3\}", r"\{3, 1, 2\}"),
    ("1, 2", "2, 1"),
    (r"1 < x \le 2", "(1, 2]"),
    ("2 > x", "x < 2"),
    ("3 > x > 1", "1 < x < 3"),
    ("x < 2", "3x < 6"),
    ("x < 2", "-x > -2"),
    (r"\log_2 8", "3"),
    (r"\lg 1000", "3"),
    (r"0.\overline{3}", r"\frac13"),
    (r"1.2\overline{34}", r"\frac{611}{495}"),
    (r"(-2)^{\frac13}", r"-\sqrt[3]{2}"),
    (r"\pm 1 \mp 2", "1, -1"),
    (r"x = \pm 2", "2, -2"),
    ("5 cm", "5 centimeters"),
    ("5", "5 cm"),
    (r"15\text{ square feet}", r"15\text{ ft}^2"),
    (r"-\infty", r"-\infty"),
    (r"0.333333333333", r"\frac13"),
]
OTHER = [
    ("(1, 2)", "(1, 2]"),
    ("[1, 2)", "[1, 2]"),
    (r"\{1, 2, 2\}", r"\{1, 1, 3\}"),
    ("1, 2, 2", "1, 1, 2"),
    ("(1, 2)", "(2, 1)"),
    ("[1, 2]", r"1 < x \le 2"),
    ("x < 2", "x > 2"),
    ("x < 1", "-x < -1"),
    ("x < 2", r"x \le 2"),
    (r"\infty", r"-\infty"),
    ("0.333", r"\frac13"),
    ("3.14159", r"\pi"),
    ("0.33333", r"\frac13"),
    ("5 cm", "5 m"),
    ("15 cm^2", "15 cm^3"),
    (r"15\text{ square feet}", r"15\text{ cubic feet}"),
    (r"\log_2 8", r"\frac13"),
    (r"\lg 1000", r"\ln 1000"),
    (r"0.\overline{3}", "0.3"),
    (r"(-2)^{\frac13}", r"\sqrt[3]{2}"),
    (r"\pm 1 \mp 2", "3, -3"),
]


@pytest.mark.parametrize("a, b", SAME)
def test_the_same(a, b):
    assert equal(a, b) and equal(b, a)


@pytest.mark.parametrize("a, b", OTHER)
def test_not_the_same(a, b):
    assert not equal(a, b) and not equal(b, a)


@pytest.mark.parametrize(
    "response, answer, wrong",
    [
        (r"First \boxed{5}. No: the answer is 6.", "6", "5"),
        (r"The answer is 6. That is, \boxed{7}.", "7", "6"),
        (r"\boxed{1} and \boxed{2}", "1, 2", "2"),
        (r"\boxed{1}, \boxed{2} or \boxed{3}", "1, 2, 3", "3"),
        (r"<think>\boxed{4}</think> \boxed{5}", "5", "4"),
        ("so it grows to $x^2$ and then $y$", "y", "x^2"),
    ],
)
def test_where_a_response_settles(response, answer, wrong):
    assert verify(response, answer, "math").score == 1 and verify(response, wrong, "math").score == 0


@pytest.mark.parametrize("response", ["so it may be 5 or 6", "I counted again, it is 5, or 6"])
def test_two_numbers_offered_are_no_answer(response):
    assert all(verify(response, label, "math").score == 0 for label in ("5", "6"))


def test_a_thought_that_does_not_end_is_no_answer():
    assert verify(r"<think> so it is \boxed{5}", "5", "math").score == 0

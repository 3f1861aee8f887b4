"""MATH's verifier on single answers: what is the same, what only looks like it, and where a response settles."""

from __future__ import annotations

import sys

import pytest

from verifiers import verify
from verifiers.math.equal import equal, read

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
    (r"12\text{ cm and }5\text{ cm}", "12, 5"),
    (r"\text{June 20}", "June 20"),
    ("5", "5 cm"),
    (r"15\text{ square feet}", r"15\text{ ft}^2"),
    (r"-\infty", r"-\infty"),
    (r"0.333333333333", r"\frac13"),
    # sets of numbers
    ("[0,1]", r"0\le x\le 1"),
    ("[0,1]", r"|x-1/2|\le 1/2"),
    ("x > 3", r"(3,\infty)"),
    (r"x<1\text{ or }x>3", r"(3,\infty)\cup(-\infty,1)"),
    ("|x-2|>1", r"(-\infty,1)\cup(3,\infty)"),
    ("x > 1, x < 3", "1 < x < 3"),
    (r"[1,2]\cup[2,3]", "x in [1, 3]"),
    (r"\mathbb{R}\setminus\{3\}", r"x\ne 3"),
    (r"\{x \mid x \ge \sqrt2\}", r"[\sqrt{2}, oo)"),
    (r"|2x+1| < \sqrt{8}", r"(-\frac12-\sqrt2, \sqrt2-\frac12)"),
    # names
    ("p=5, q=2; p=7, q=2", "(7,2),(5,2)"),
    ("x=1, y=2", "(1,2)"),
    ("y=2, x=1", "(x,y)=(1,2)"),
    ("5 = x", "x = 5"),
    (r"\begin{cases}x=2\\y=3\end{cases}", "(2,3)"),
    ("x_1=3, x_2=5", "5, 3"),
    # letters and words
    (r"\textbf{(B)}\ 5", "B"),
    ("Option B", r"\text{(B)}"),
    (r"\text{(A) and (C)}", "C, A"),
    ("the circle", r"\text{Circle}"),
    # numbers
    ("1 1/2", r"\frac32"),
    (r"4\frac12\%", r"4.5\%"),
    ("3,5", "3.5"),
    ("3{,}5", r"\frac72"),
    ("12 345", "12345"),
    ("``42''", "42"),
    ("4\u200b2", "42"),
    (r"1011_{\text{two}}", "(1011)_2"),
    ("5 million", r"5\cdot 10^6"),
    (r"\frac13\approx0.333", r"\frac13"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"),
    (r"{5\choose 2}", "10"),
    ("3:4", "6:8"),
    ("3:4", r"\frac34"),
    # units
    (r"5\textnormal{ cm}", r"5\operatorname{cm}"),
    ("5 m/s", r"5\text{ meters per second}"),
    (r"-5\text{ min}", r"-5\,\mathrm{minutes}"),
    # vectors, factors
    (r"\langle 1,2\rangle", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("[[1,2],[3,4]]", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("2x+3y", r"y\cdot3+x\cdot 2"),
    ("2pqr", r"r\cdot 2qp"),
    ("-4x-2y > 14", "2x+y < -7"),
    (r"\{1, 1, 2\}", r"\{2, 1\}"),
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
    ("[0,1]", "0 < x < 1"),
    ("[0,1]", r"|x-1/2| < 1/2"),
    ("x+y < 1", "-x-y < -1"),
    ("x+y < 1", r"x+y \le 1"),
    (r"(1,2)\cup(2,3)", "(1,3)"),
    (r"x<1\text{ or }x>3", "(1,3)"),
    ("x < 3 or x > 1", "(1,3)"),
    (r"[0,1)\text{ or }(0,1)", "[0,1)"),
    ("[0,0)", "(0,0)"),
    (r"5\text{ if } x>0", r"(0,\infty)"),
    ("x > 3", r"y > 3"),
    ("x=1, y=2", "(2,1)"),
    ("p=5, q=2; p=7, q=3", "p=5, q=3; p=7, q=2"),
    (r"\textbf{(B)}\ 5", "C"),
    ("a b", "b"),
    ("1 1/2", "11/2"),
    ("1,234", "1.234"),
    ("(3,5)", "3.5"),
    ("3 4", "34"),
    ("(1011)_2", "(1012)_3"),
    ("5 million", "5"),
    ("10:30 am", "10:30 PM"),
    ("5 m/s", "5 km/h"),
    (r"-5\text{ cm}", r"-5\text{ m}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("2pqr", "2"),
    (r"\text{A and C}", r"\text{A and B}"),
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
        ("the solutions are $x=3$ and $x=5$.", "3, 5", "5"),
        ("The answers are 3 and 5.", "3, 5", "5"),
        (r"For (a) we get \boxed{1} and for (b) we get \boxed{2}.", "1, 2", "2"),
        (r"Part (a): $\boxed{1}$. Part (b): $\boxed{2}$.", "1, 2", "2"),
        (r"The length is $\boxed{3}$ and the width is $\boxed{4}$.", "3, 4", "4"),
        (r"I find \boxed{1}. Wait, and now \boxed{2}", "2", "1, 2"),
        (r"$n=\boxed{1}$ and hence \boxed{2}", "2", "1, 2"),
        ("Final Answer: The final answer is $(1,\n2)$. I hope it is correct.", "(1,2)", "1"),
    ],
)
def test_where_a_response_settles(response, answer, wrong):
    assert verify(response, answer, "math").score == 1 and verify(response, wrong, "math").score == 0


DEEP = [
    *("-" * 119 + "1", "(" * 28 + "x" + ")" * 28, "x^{" * 27 + "2" + "}" * 27, "abcdefgh" * 80, "1/" * 119 + "2"),
    *("1/" * 150 + "2", "a" + "!" * 119, "\\frac{1}{" * 28 + "2" + "}" * 28, "\\sin(" * 14 + "x" + ")" * 14),
    *("x<" * 23 + "1", "\\{" * 28 + "1" + "\\}" * 28, "-(" * 14 + "x" + ")" * 14),
]


def test_a_verdict_does_not_depend_on_pythons_recursion_limit():
    """Trees are bounded by MAX_TREE_DEPTH, far below any limit; what is deeper equals only itself."""

    def verdicts(frames: int) -> list:
        depth, frame = 0, sys._getframe()
        while frame := frame.f_back:
            depth += 1
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(depth + frames)
        try:
            read.cache_clear()
            return [equal(text, other) for text in DEEP for other in (text, text + "+0", f"({text})", "x")]
        finally:
            sys.setrecursionlimit(before)

    assert verdicts(450) == verdicts(20_000)
    assert equal(DEEP[-1], "x") and not equal("1/" * 150 + "2", "1/" * 150 + "2+0")


def test_the_reference_splits_a_decimal_base():
    """\\log_2 2 0.5 was an error; it is the logarithm of .5 to the base 220, which sympy cannot read."""
    assert verify(r"\log_2 2 0.5", r"\log_2 2 0.5", "math", "reference").status == "ok"
    assert verify(r"\boxed{\log_{25.5}}", "1", "math", "reference")[::2] == (0.0, "ok")


@pytest.mark.parametrize("response", ["so it may be 5 or 6", "I counted again, it is 5, or 6"])
def test_two_numbers_offered_are_no_answer(response):
    assert all(verify(response, label, "math").score == 0 for label in ("5", "6"))


def test_a_thought_that_does_not_end_is_no_answer():
    assert verify(r"<think> so it is \boxed{5}", "5", "math").score == 0

"""GSM8K's default verifier on answers that name two numbers, and on fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest

from verifiers import GroundTruthError, check, verify


def right(response: str, ground_truth: str) -> bool:
    verdict = verify(response, ground_truth, "gsm8k")
    assert verdict.status == "ok", verdict
    return verdict.score == 1


# --- two answers ------------------------------------------------------------------------------------------------------

HEDGED = [
    "#### 42 or 43",
    "#### 42, 43",
    "#### 42, or 43",
    "#### 42 and 43",
    "#### 42 to 43",
    "#### 42; 43",
    "#### 42 | 43",
    "#### $42 or $43",
    "#### 42 or -43",
    "#### 42 or 43 apples",
    "It is 42.\n#### 42 or 43\nI hope that helps.",
    "\\boxed{42, 43}",
    "Answer: 42 or 43",
    "Final answer: 42 or 43",
    "The answer is 42 or 43.",
    "The answer is: 42 and 43",
    "#### 6 * 7 = 42 or 43",
    "#### 42 or 43 or 44",
    "#### 42 / 43",
    "#### **42** or **43**",
]


@pytest.mark.parametrize("response", HEDGED)
def test_two_answers_are_none(response):
    """Whichever of the two is asked for: a hedge would win half of the time."""
    for label in ("42", "43", "-43", "4243"):
        verdict = verify(response, label, "gsm8k")
        assert verdict.status == "ok" and verdict.score == 0 and verdict.reason.startswith("two answers: "), (
            label,
            verdict,
        )


@pytest.mark.parametrize(
    "response",
    [
        "#### 42 or 42",
        "#### 42 and 42.0",
        "#### 42, $42",
        "#### 84/2 or 42",
        "#### 1,042 or 1042",
        "The answer is 42, or 42.00.",
        "\\boxed{42, 042}",
    ],
)
def test_one_answer_said_twice_is_one(response):
    assert right(response, "1042" if "1042" in response else "42") and not right(response, "43")


@pytest.mark.parametrize(
    "response, answer",
    [
        ("#### 42 apples for 7 children", "42"),  # other words between the two: the first is declared
        ("\\boxed{42} (7 of 50)", "42"),
        ("#### 42\nor 43 if one counts the last", "42"),  # the declaration ends with its line
        ("#### 6 * 7 = 42", "42"),
        ("It is 41 or 43.\n#### 42", "42"),  # what was weighed before the declaration
        ("#### 41 or 43\nNo:\n#### 42", "42"),  # the last declaration counts
        ("it is 41 or 42", "42"),  # nothing is declared: the last number of the text
        ("Answer: 42 apples, 7 of them red", "42"),  # the number right after the declaration
        ("Answer: 41 apples and 1 more are 42", "42"),  # a sentence with several numbers is no declaration
    ],
)
def test_other_numbers_nearby_are_no_hedge(response, answer):
    assert right(response, answer)
    assert not any(right(response, other) for other in {"42", "7", "41", "43"} - {answer})


# --- fractions --------------------------------------------------------------------------------------------------------

FRAMES = ["#### {}", "\\boxed{{{}}}", "The answer is {}.", "so it is {}"]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("top, bottom", [(1, 2), (7, 4), (84, 2), (9, 3), (1, 3), (0, 5), (1000, 8), (3, 100)])
def test_a_fraction_is_its_quotient(frame, top, bottom):
    """Exactly, and neither of its two numbers, nor its product, nor its inverse."""
    quotient = Fraction(top, bottom)
    wrong = {
        Fraction(top),
        Fraction(bottom),
        Fraction(top * bottom),
        quotient + 1,
        -quotient,
        *([1 / quotient] if top else []),
    } - {quotient}
    for spelled in (f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{top}}}{{{bottom}}}"):
        response = frame.format(spelled)
        assert right(response, f"{quotient.numerator}/{quotient.denominator}"), response
        assert not any(right(response, f"{x.numerator}/{x.denominator}") for x in wrong), response


@pytest.mark.parametrize(
    "response, label",
    [("#### 1/2", "0.5"), ("#### 0.5", "1/2"), ("#### 3/6", "2/4"), ("#### -1/2", "-.5"), ("#### 1,000/4", "250")],
)
def test_a_fraction_equals_its_decimals(response, label):
    assert right(response, label) and not right(response, label + "1")


def test_a_fraction_is_exact():
    """0.333 and 0.3333333333333333, the double nearest to a third, are not a third."""
    assert right("#### 1/3", "2/6") and not right("#### 0.333", "1/3") and not right("#### 0.3333333333333333", "1/3")
    assert right("#### 10000000000000001/10000000000000000", "1.0000000000000001") and not right(
        "#### 10000000000000001/10000000000000000", "1"
    )


@pytest.mark.parametrize("zero", ["0", "00"])
def test_a_division_by_zero_is_no_answer_and_no_label(zero):
    for label in ("5", "0", "1"):
        assert not right(f"#### 5/{zero}", label)
    assert verify("#### 5", f"5/{zero}", "gsm8k").score == 0
    with pytest.raises(GroundTruthError, match="no number"):
        check("gsm8k", f"5/{zero}")


@pytest.mark.parametrize("response", ["#### 1/2.5", "#### 10/20/30"])
def test_what_is_no_fraction_of_two_integers_is_not_read_as_one(response):
    """Neither as what it begins with, nor as one of its numbers."""
    assert not any(right(response, label) for label in ("1/2", "0.5", "0.4", "1", "2", "2.5", "10", "20", "30", "1/60"))


# --- what a reader would say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, answer, wrong",
    [
        # a sign between two values is an operator
        ("so we are left with 12 - 4", "4", "-4"),
        ("in all 12 + 4", "4", "16"),
        ("12 apples - 4 apples", "4", "-4"),
        ("the difference is 10 -7", "7", "-7"),
        ("Answer - 42", "42", "-42"),
        ("Sums:\n- 41\n- 42", "42", "-42"),
        ("the answer is - 5", "-5", "5"),
        ("x = - 5", "-5", "5"),
        ("it is -$5", "-5", "5"),
        ("it is _-5_", "-5", "5"),
        ("the total is –5", "-5", "5"),
        # thousands
        ("it is 1 080", "1080", "80"),
        ("it costs $400 000.", "400000", "0"),
        ("it is 1\u202f080\u202f500 km", "1080500", "500"),
        ("#### 1\u00a0080", "1080", "80"),
        ("\\boxed{1{,}080}", "1080", "80"),
        ("Step 1 080", "80", "1080"),
        ("it is 1 08", "8", "108"),
        ("it is 1 0800", "800", "10800"),
        # marks around a number
        ("the bus No.42", "42", "0.42"),
        ("the answer is...42", "42", "0.42"),
        ("it is ４２", "42", "2"),
        ("it is ٤٢", "42", "2"),
        ("it is 42€", "42", "4"),
        ("It has 42 m^2.", "42", "2"),
        ("It has 42 cm2", "42", "2"),
        # other numbers after it
        ("So she has 42 apples (6 times 7).", "42", "7"),
        ("So she has 3 apples (that makes a total of 42).", "42", "3"),
        ("#### 42 (6 * 7)", "42", "7"),
        ("#### 42 (so 6*7=42)", "42", "7"),
        ("#### 6 * 7 = 42", "42", "7"),
        ("#### 42 = 6 * 7", "42", "6"),
        ("#### 3 dozen = 36", "36", "3"),
        ("#### 42 (and 6 + 1 = 7)", "42", "7"),
        ("#### 42. Check: 2 + 3 = 5", "42", "5"),
        ("\\boxed{42} since 2 + 3 = 5", "42", "5"),
        ("\\boxed{42} took 6 steps. Answer: see above", "42", "6"),
        ("The answer is 42, which is 6 times 7.", "42", "7"),
        ("The answer is 15.4 bags, which rounds up to 16", "16", "15.4"),
        ("The answer is 5 * 66 = 330 pages in 2 weeks.", "330", "2"),
        ("<answer>42</answer> in 3 steps", "42", "3"),
        ("#### Step 3: add\nSo it is 42", "42", "3"),
        # mixed numbers
        ("#### 2 1/2", "2.5", "2"),
        ("it is 2\\frac{1}{2}", "5/2", "21/2"),
        ("it is 2½", "2.5", "2"),
        ("it is -2 1/2", "-2.5", "-1.5"),
    ],
)
def test_what_a_reader_would_say(response, answer, wrong):
    assert right(response, answer), verify(response, answer, "gsm8k")
    assert not right(response, wrong)


@pytest.mark.parametrize(
    "response", ["#### 42 (or 43)", "#### 42 (43?)", "\\boxed{42} or \\boxed{43}", "\\boxed{42} or 43"]
)
def test_a_second_answer_in_brackets_or_in_a_box_is_a_hedge(response):
    assert not right(response, "42") and not right(response, "43")


@pytest.mark.parametrize("response", ["#### 6 * 7", "#### 40 + 2", "#### 50-8", "Answer: 6 × 7"])
def test_arithmetic_that_is_not_worked_out_names_no_number(response):
    verdict = verify(response, "42", "gsm8k")
    assert verdict.score == 0 and verdict.reason.startswith("not worked out: ")
    assert not any(right(response, label) for label in ("6", "7", "40", "2", "50", "8"))


def test_a_number_in_a_chat_marker_is_not_said():
    assert not right("<|reserved_42|>", "42")


# --- signs, thinking, and the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("minus", ["-", "−"])
def test_a_minus_of_either_length_is_a_sign(minus):
    assert right(f"#### {minus}42", "-42") and not right(f"#### {minus}42", "42") and right("#### 42", "42")


def test_what_was_thought_is_not_said():
    assert right("<think>#### 41</think> it is 42", "42") and not right("<think>it is 42</think> I cannot say", "42")


def test_the_references_rules():
    """open-instruct's: thousands are joined, the last number of the text, with its sign; Tülu 3's lost the sign."""
    score = lambda response, label, mode: verify(response, label, "gsm8k", mode).score
    assert score("it is 1,234", "1234", "reference") == 1 == score("it is 1,234", "1234", "tulu3")
    assert score("it is 1,2,3", "3", "reference") == 1  # one pass: 12,3
    assert score("it is -5", "-5", "reference") == 1 and score("it is -5", "5", "reference") == 0
    assert score("it is -5", "-5", "tulu3") == 0 and score("it is -5", "5", "tulu3") == 1

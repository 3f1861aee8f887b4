"""From a row to its verifier: names, several verifiers of one row, errors, and what a reader does not see."""

from __future__ import annotations

import pytest

from verifiers import GroundTruthError, check, verify
from verifiers.strings import is_blank, without_thinking

COMMAS = {"func_name": "validate_no_commas"}


def test_names_in_any_case():
    for name in ("gsm8k", "GSM8K", " GSM8k "):
        assert verify("#### 42", "42", name).score == 1


def test_ifeval_is_the_form_of_its_ground_truth():
    assert verify("no comma", COMMAS, "ifeval").score == 1
    assert verify("no comma", {"instruction_id": ["punctuation:no_comma"], "kwargs": [{}]}, "ifeval").score == 1


def test_scores_of_several_verifiers_are_summed():
    names = ["gsm8k", "ifeval"]
    scores = [verify(text, ["42", COMMAS], names).score for text in ("it is 42", "it is, 42", "it is, 41")]
    assert scores == [2, 1, 0]


@pytest.mark.parametrize("bad", [["no number", COMMAS], ["42", {"func_name": "validate_no_comma"}]])
def test_one_error_is_an_error_of_the_row(bad):
    verdict = verify("it is 42", bad, ["gsm8k", "ifeval"])
    assert verdict.status == "error" and verdict.score == 0
    with pytest.raises(GroundTruthError):
        check(["gsm8k", "ifeval"], bad)


def test_several_are_checked_in_the_mode_that_is_asked_for():
    truth = {"instruction_id": ["keywords:existence"], "kwargs": [{"keywords": ["(a+)+"]}]}
    check(["ifeval"], [truth])
    with pytest.raises(GroundTruthError, match="regular expression"):
        check(["ifeval"], [truth], "reference")


def test_an_empty_box_is_no_answer_to_verify():
    with pytest.raises(GroundTruthError, match="the boxed answer is empty"):
        check("math", "so it is \\boxed{}")
    check("math", "so it is \\boxed{5}")


def test_what_a_reader_does_not_see():
    assert all(map(is_blank, ("", " \n\t", "\u200b", "<|assistant|>\n", "<think></think>", "</s>")))
    assert not any(map(is_blank, (".", "<|assistant|> a", "0")))


def test_thinking_and_tags_are_taken_off():
    assert without_thinking("<think>a</think> <answer>b</answer>") == "b" and without_thinking("b") == "b"
    assert without_thinking("a</think>b</think>c") == "c"

"""From a row to its verifier: names, several verifiers of one row, errors, and what a reader does not see."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import VERIFIERS, GroundTruthError, check, verify
from verifiers.route import OTHERS
from verifiers.strings import is_blank, without_thinking

COMMAS = {"func_name": "validate_no_commas"}


def test_names_in_any_case():
    for name in ("gsm8k", "GSM8K", " GSM8k "):
        assert verify("#### 42", "42", name).score == 1


def test_f1_is_another_name():
    assert verify("<answer>Paris</answer>", "paris", "F1") == verify("<answer>Paris</answer>", "paris", "string_f1")


@pytest.mark.parametrize(
    "name", ["code", "CODE", "code_stdio", "code-python", "general-quality_ref", "general_verifier"]
)
def test_what_is_not_had_here_says_why(name):
    why = "code is not executed here" if name.lower().startswith("code") else "asks another model to judge"
    for dataset, truth in ((name, ["assert f() == 1"]), (["gsm8k", name], ["42", "x"])):
        with pytest.raises(GroundTruthError, match=f"dataset: {name} is not here: .*{why}") as problem:
            check(dataset, truth)
        assert "unknown" not in str(problem.value) and "\n" not in str(problem.value)
        verdict = verify("print(42)", truth, dataset)
        assert verdict.status == "error" and why in verdict.reason and verdict.score == 0
    for other in ("codex", "encode", "generally"):
        with pytest.raises(GroundTruthError, match="unknown verifier"):
            check(other, "x")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 99)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["B", "{}", "[1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["answer", "options", "tags", "opened", "type", "items", "$ref", "enum"]), inner
        )
    ),
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(OTHERS)), JSON, st.sampled_from(["default", "reference", "tulu3"]), st.text(max_size=12))
def test_a_row_of_the_newer_verifiers_is_judged_or_refused(name, truth, mode, response):
    assert name in VERIFIERS
    try:
        check(name, truth, mode)
    except GroundTruthError as problem:
        assert "\n" not in str(problem) and len(str(problem)) < 400
        assert verify(response, truth, name, mode).status == "error"
        return
    verdict = verify(response, truth, name, mode)
    assert verdict.status == "ok" and 0 <= verdict.score <= 1, verdict


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

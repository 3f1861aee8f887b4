"""string_matcher and string_f1: SQuAD's rule against a loop over words, and where the default keeps more than it."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers import GroundTruthError, check, verify

WORDS = st.sampled_from(
    ["paris", "France", "a", "An", "THE", "of", "42", "don't", "U.S.", "x_y", "(b)", "--", "é", "a.an"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)
PLAIN = st.lists(st.sampled_from(["paris", "oslo", "is", "big", "7", "été"]), min_size=1, max_size=5)


def words_of(text: str) -> list[str]:
    """SQuAD's words, by hand."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def f1_of(found: list[str], wanted: list[str]) -> float:
    """By hand: strike out each wanted word once."""
    left, same = list(wanted), 0
    for word in found:
        if word in left:
            left.remove(word)
            same += 1
    return (
        0.0 if not same else 2 * (same / len(found)) * (same / len(wanted)) / (same / len(found) + same / len(wanted))
    )


def in_tags(text: str) -> str:
    return f"<think>so</think>It is <answer>{text}</answer>."


@given(TEXTS, TEXTS)
def test_the_reference_is_squads_rule(answer, label):
    if not label.strip():
        return
    verdict = verify(in_tags(answer), label, "string_matcher", "reference")
    assert verdict.score == (words_of(answer) == words_of(label))
    f1 = verify(answer, label, "string_f1", "reference")
    assert f1.score == pytest.approx(f1_of(words_of(answer), words_of(label)), abs=1e-12)


@given(PLAIN, PLAIN)
def test_f1_counts_words_and_takes_the_nearest_label(answer, label):
    score = lambda truth: verify(in_tags(" ".join(answer)), truth, "string_f1").score
    one, other = f1_of(answer, label), f1_of(answer, ["oslo"])
    assert score(" ".join(label)) == pytest.approx(one, abs=1e-12) and 0 <= one <= 1
    assert score([" ".join(label), "Oslo"]) == pytest.approx(max(one, other), abs=1e-12)
    assert (score(" ".join(label)) == 1) == (sorted(answer) == sorted(label))


@given(PLAIN, st.sampled_from(["{}", " {}\n", "The {}.", '"{}"', "**{}**", "“{}”!", "a {} ,", "\u200b{}", "({})"]))
def test_case_articles_punctuation_and_white_space_do_not_count(words, form):
    label = " ".join(words)
    assert verify(in_tags(form.format(label.upper())), label, "string_matcher").score == 1
    assert verify(in_tags(form.format(label)), ["another", label], "string_matcher").score == 1
    assert verify(in_tags(form.format(label + "x")), label, "string_matcher").score == 0
    assert verify(in_tags("extra " + form.format(label)), label, "string_matcher").score == 0


@pytest.mark.parametrize(
    ("label", "answer", "default", "reference"),
    [
        ("A", "A", 1, 1),
        ("A", "(a)", 1, 1),
        ("A", "the", 0, 1),
        ("A", "!", 0, 1),
        ("A", "", 0, 1),
        ("3.14", "314", 0, 1),
        ("3.14", "3.14.", 1, 1),
        ("-5", "5", 0, 1),
        ("-5", "−5", 1, 0),
        ("1/2", "12", 0, 1),
        ("1,000", "1000", 1, 1),
        ("1,2", "12", 0, 1),
        ("10:30", "1030", 0, 1),
        ("x^2", "x2", 0, 1),
        ("C++", "C", 0, 1),
        ("C++", "c++,", 1, 1),
        ("C#", "C", 0, 1),
        ("A-", "A+", 0, 1),
        ("B-", "B-.", 1, 1),
        ("+", "-", 0, 1),
        ("+", "+", 1, 1),
        ("Paris", "“Paris”", 1, 0),
        ("U.S.", "US", 1, 1),
        ("don't", "dont", 1, 1),
        ("Straße", "STRASSE", 1, 0),
        ("well-known", "wellknown", 1, 1),
        ("caf\u00e9", "cafe\u0301", 1, 0),
    ],
)
def test_where_the_default_keeps_what_squads_rule_loses(label, answer, default, reference):
    assert verify(in_tags(answer), label, "string_matcher").score == default
    assert verify(in_tags(answer), label, "string_matcher", "reference").score == reference


@pytest.mark.parametrize(
    ("response", "default", "reference"),
    [
        ("Paris", 0, 0),  # no tags
        ("<answer>Rome</answer> no, <answer>Paris</answer>", 1, 1),
        ("<answer>Paris</answer> no, <answer>Rome</answer>", 0, 0),
        ("<answer>Paris</answer> and then <answer>Ro", 1, 0),  # the last that is closed
        ("<answer>Paris", 0, 0),
        ("</answer>Paris<answer>", 0, 0),
        ("</answer><answer>Paris", 0, 1),
        ("<think><answer>Paris</answer></think>Rome", 0, 1),  # a thought is not an answer
        ("<think><answer>Paris</answer>", 0, 1),
        ("<answer>Paris<answer>Paris</answer></answer>", 1, 1),
    ],
)
def test_which_text_is_the_answer(response, default, reference):
    assert verify(response, "Paris", "string_matcher").score == default
    assert verify(response, "Paris", "string_matcher", "reference").score == reference


def test_f1_without_tags_is_that_of_the_response():
    assert verify("It is Paris", "Paris", "f1").score == pytest.approx(0.5)
    assert verify("<think>Paris</think>It is Rome", "Paris", "string_f1").score == 0
    assert verify("<think>Paris", "Paris", "string_f1").score == 0
    assert verify("much. <answer>Paris</answer>", "Paris", "string_f1").score == 1
    assert verify("<answer>Paris</answer> it is", "Paris", "string_f1", "reference").score == pytest.approx(0.5)
    assert verify("word " * 500 + "Paris", "Paris", "string_f1").score == 0  # no answer is so long


def test_labels():
    assert verify(in_tags("b"), json.dumps(["a", "b"]), "string_matcher").score == 1  # as JSON
    assert verify(in_tags("[0, 1)"), "[0, 1)", "string_matcher").score == 1  # which is no JSON
    assert verify(in_tags("7"), 7, "string_matcher").score == 1
    for bad in (None, True, [], [None], [["a"]], "", " ", ["a", ""], "x" * 20_000, {"a": 1}):
        for name in ("string_matcher", "string_f1"):
            with pytest.raises(GroundTruthError):
                check(name, bad)

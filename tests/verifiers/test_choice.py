"""multiple_choice: how an option is named, what names none, and what is a word and no option."""

from __future__ import annotations

import itertools

import pytest

from verifiers import GroundTruthError, check, verify

OPTIONS = {"answer": "B", "options": ["London", "Paris", "Rome"]}
LETTERS = "ABCDEFGHIJ"
FORMS = [
    "{}",
    "({})",
    "[{}]",
    "{}.",
    "{})",
    "**{}**",
    "**({})**",
    "{}) Paris",
    "({}) Paris",
    "{}. Paris",
    "**{}. Paris**",
    r"\boxed{{{}}}",
    r"$\boxed{{\text{{{}}}}}$",
    r"\boxed{{\textbf{{({})}}}}",
    r"\boxed{{{}) Paris}}",
    "Answer: {}",
    "Answer: ({})",
    "**Answer:** {}",
    "**Answer**: ({}) Paris",
    "Answer:\n{}",
    "Final answer: `{}`",
    "#### {}",
    "The answer is {}",
    "The answer is ({}).",
    "The correct answer is {}.",
    "The best option is {}.",
    "the answer is option {}",
    "the answer is: {}",
    "The answer is **{}**, since no other fits.",
    "The answer is {} because (Z) is wrong.",
    "<answer>{}</answer>",
    "<answer>The answer is {}.</answer>",
    "So it must be ({}).",
    "{}.\n\nIt is the capital of France.",
    "A dog barked at me.\nThe answer is {}.",
    "A) London\nB) Paris\nC) Rome\n\nAnswer: {}",
    "A) London\nB) Paris\n\n{}",
    "I think it over.\n({})",
    "Is it A or B? No: the answer is {}",
    "<think>It is A or B.</think>{}",
    "The answer is A. No, the answer is {}",
]
HEDGES = [
    "{0} or {1}",
    "({0}) or ({1})",
    "{0}/{1}",
    "{0}, {1}",
    "{0} and {1}",
    "{0} & {1}",
    "({0})({1})",
    "({0}) ({1})",
    "{0} or maybe {1}",
    "{0}; {1}",
    "{0}) Paris or {1}) Rome",
    "({0}) Paris, or ({1}) Rome",
    "either {0} or {1}",
    "both {0} and {1}",
    "{0}|{1}",
    "{0} {1}",
    "{0}, possibly {1}",
    "neither {0} nor {1}",
    "not {0}, but {1}",
]
DECLARED = ["{}", "Answer: {}", "The answer is {}", "The answer is {}.", "<answer>{}</answer>"]


@pytest.mark.parametrize("form", FORMS)
def test_an_option_that_is_named_is_recognised_and_no_other_is(form):
    for letter in LETTERS:
        for label in LETTERS:
            assert verify(form.format(letter), label, "multiple_choice").score == (letter == label), (letter, label)


@pytest.mark.parametrize("hedge", HEDGES)
def test_two_options_are_none(hedge):
    for one, other in itertools.permutations(LETTERS, 2):
        named = hedge.format(one, other)
        for response in (*(form.format(named) for form in DECLARED), rf"\boxed{{\text{{{named}}}}}"):
            for label in (one, other):
                assert verify(response, label, "multiple_choice").score == 0, (response, label)


@pytest.mark.parametrize(
    "response",
    [
        "A dog is in the garden",
        "A dog",
        "The answer is A dog",
        "a dog",
        "The answer is a dog",
        "A's",
        "A-list",
        "Answer: AB",
        "A: well, yes",
        "I think so",
        "The answer is not A",
        "It isn't (A).",
        "A) London\nB) Paris\nC) Rome",
        "(A) (B) (C)",
        "A. K. Rowling wrote it",
        "Answer: either A or B",
        "<think>A</think>",
        "<think>Answer: A",
        "Answer: none",
        "A+",
    ],
)
def test_a_word_is_no_option(response):
    assert verify(response, "A", "multiple_choice").score == 0


@pytest.mark.parametrize(
    "response", ["A", "A.", "a", "(a)", "A) cat", "The answer is A because it is", "Answer: A (cat)"]
)
def test_an_option_a_is_no_word(response):
    assert verify(response, "A", "multiple_choice").score == 1


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("Paris", 1),
        ("Answer: paris.", 1),
        (r"\boxed{\text{Paris}}", 1),
        ("<answer>The Paris</answer>", 1),
        ("Rome", 0),
        ("It is Paris or Rome", 0),
        ("Answer: B) Paris", 1),
        ("Answer: B) Rome", 0),  # the letter of one, the text of another
        ("Answer: A) Paris", 0),
    ],
)
def test_options_that_are_known_may_be_written_out(response, score):
    assert verify(response, OPTIONS, "multiple_choice").score == score
    assert verify(response, OPTIONS | {"answer": "Paris"}, "multiple_choice").score == score


def test_labels():
    for label in (
        "b",
        "(B)",
        "B.",
        "B) Paris",
        ["B"],
        '{"answer": "B"}',
        OPTIONS,
        {"answer": "B", "options": {"b": "x", "C": "y"}},
    ):
        check("multiple_choice", label)
        assert verify("Answer: B", label, "multiple_choice").score == 1
        assert verify("Answer: C", label, "multiple_choice").score == 0
    for bad in (
        "K",
        "Paris",
        "",
        "AB",
        1,
        None,
        ["A", "B"],
        {"answer": 1},
        {"answer": "D", **{"options": ["x", "y"]}},
        {"answer": "z"},
        {"answer": "A", "options": ["x", "The x."]},
        {"answer": "A", "options": ["x"]},
        {"answer": "A", "options": "xy"},
        {"answer": "A", "options": ["x"] * 11},
        {"answer": "A", "options": ["x", None]},
        {"answer": "A", "choices": ["x", "y"]},
    ):
        with pytest.raises(GroundTruthError):
            check("multiple_choice", bad)

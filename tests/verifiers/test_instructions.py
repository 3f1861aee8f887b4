"""IFEvalG's and IFBench's instructions: responses that are made to follow or to violate them, and refusals of rows."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.verifiers import making_ifbench, making_ifbench_forms, making_ifevalg
from tests.verifiers.arguments_of import NEW
from verifiers import check, verify
from verifiers.ifeval import parts_of_speech
from verifiers.ifeval.google import MAX_READ
from verifiers.ifeval.instructions import GOOGLE, IFBENCH, INSTRUCTIONS, OPEN_INSTRUCT

MAKE = making_ifevalg.MAKE | making_ifbench.MAKE | making_ifbench_forms.MAKE
few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def row(name: str, arguments: dict | None) -> dict:
    return {"instruction_id": [name], "kwargs": [arguments]}


def test_every_instruction_has_a_maker():
    assert len(OPEN_INSTRUCT) == 29 and len(IFBENCH) == 58 and len(INSTRUCTIONS) == 25 + 29 + 58
    assert set(MAKE) | {"words:start_verb"} == set(INSTRUCTIONS) - set(GOOGLE)
    assert set(NEW) == set(MAKE)


@pytest.mark.parametrize("name", sorted(MAKE))
@few
@given(seed=st.integers(0, 10**9))
def test_what_is_made_to_follow_does_and_what_is_made_to_violate_does_not(name, seed):
    arguments, good, bad = MAKE[name](Random(seed))
    truth = row(name, {**arguments, "unused": None})
    check("ifeval", truth)
    verdict = verify(good, truth, "ifeval")
    assert verdict.status == "ok" and verdict.score == 1, (arguments, good, verdict)
    verdict = verify(bad, truth, "ifeval")
    assert verdict.status == "ok" and verdict.score == 0, (arguments, bad, verdict)
    verdict = verify(good, truth, "ifeval", "reference")
    assert verdict.status == "ok" or "at random" in verdict.reason


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200) | st.text(alphabet="aA .!?,\n*-[]<>\"'1\ud800é", max_size=200), data=st.data())
def test_every_rule_is_total(text, data):
    for name in data.draw(st.lists(st.sampled_from(sorted(NEW)), min_size=20, max_size=20)):
        for mode in ("default", "reference"):
            verdict = verify(text, row(name, NEW[name]), "ifeval", mode, loose=True)
            assert verdict.status == "ok", (name, mode, verdict)
            verdict.reason.encode("utf-8")


def test_rows_as_they_are_published():
    ids = ["detectable_format:square_brackets", "count:lowercase_counting", "punctuation:no_comma"]
    kwargs = [None, {"N": 1, "keyword": None}, {}]
    inner = {"instruction_id": ids, "kwargs": kwargs}
    for truth in (inner, [inner], json.dumps([inner]), str([inner]), str([json.dumps(inner)])):
        check(["ifeval"], [truth])
        assert verify("[A] [b]", [truth], ["ifeval"]).score == 1
        assert verify("[A], b c", [truth], ["ifeval"]).score == 0
        assert verify("[a] [b]", truth, "ifeval").score == pytest.approx(2 / 3)
    assert verify("A\n\nb", row("first_word:first_word_sent", {"first_word": ["A", "x"]}), "ifeval").score == 1
    assert verify("a b c", row("count:unique_word_count", {"N": 3.0}), "ifeval").score == 1


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("keywords:palindromes", {}, "nearest: keywords:palindrome"),
        ("count:word_count_ranges", {}, "nearest: count:word_count_range"),
        ("copy:copying_multiple", {"prompt_to_repeat": "x"}, "argument N must be a whole number, found None"),
        ("copy:copying_multiple", {"prompt_to_repeat": "x", "N": 0}, "N must be at least 1, found 0"),
        ("copy:copy", {"prompt_to_repeat": " "}, "prompt_to_repeat is blank"),
        ("copy:repeat_phrase", {"phrase": "a b", "small_n": 1}, "phrase must have a word between two"),
        ("new:copy_span_idx", {"prompt_to_repeat": "abc", "n_start": 5, "n_end": 9}, "no text from n_start 5"),
        ("count:numbers", {"N": -1}, "N must be at least 0, found -1"),
        ("count:words_japanese", {"N": 0}, "N must be at least 1, found 0"),
        ("letters:letter_counting", {"N": 3, "relation": "more than"}, "must be 'at least' or 'less than'"),
        ("format:list", {"sep": "-", "seperator": "-"}, "unknown argument seperator \\(nearest: sep\\)"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        check("ifeval", row(name, arguments))
    assert verify("x", row(name, arguments), "ifeval").status == "error"


def test_what_the_reference_draws_at_random_is_refused_there_alone():
    for name, arguments in (
        ("count:lowercase_counting", {"N": 0}),
        ("new:copy_span_idx", {"prompt_to_repeat": "abc", "n_start": 0, "n_end": 1}),
    ):
        check("ifeval", row(name, arguments))
        with pytest.raises(ValueError, match="at random"):
            check("ifeval", row(name, arguments), "reference")


def test_a_verb_needs_the_taggers_data():
    truth = row("words:start_verb", {})
    if parts_of_speech.is_available():
        assert verify("Run to the river.", truth, "ifeval").score == 1
        assert verify("The river runs.", truth, "ifeval").score == 0
    else:
        with pytest.raises(ValueError, match=r"needs nltk and its tagger: python -m nltk\.downloader"):
            check("ifeval", truth)


DIFFERENT = [  # (instruction, arguments, a response, paid by default, paid by the reference)
    ("copy:copy", {"prompt_to_repeat": "Say it."}, "SAY IT.", 0, 1),
    ("new:copy_span_idx", {"prompt_to_repeat": "abcdef", "n_start": 1, "n_end": 3}, "bcd", 1, 0),
    ("keywords:word_once", {"keyword": "a.c"}, "abc", 0, 1),
    ("keywords:exclude_word_harder", {"keyword": "river"}, "A river.", 0, 1),
    ("count:counting_composition", {"n_sent": 1, "n_words": 2}, "A b.\n* * *\nC d.\n* * *\nE f.", 1, 0),
    ("first_word:first_word_answer", {"first_word": "so"}, "So, yes", 1, 0),
    ("count:count_unique", {}, "a, b, c", 1, 0),
    ("count:conjunctions", {"small_n": 2}, "and And", 0, 1),
    ("format:list", {"sep": "-"}, "well-known up-to", 0, 1),
    ("format:sub-bullets", {}, "no bullets", 0, 1),
    ("format:title_case", {}, "War and Peace", 1, 0),
    ("format:thesis", {}, "First. <em></em> x", 0, 1),
    ("ratio:sentence_type", {}, "Well!", 0, 1),
    ("custom:date_format_list", {}, "1800-00-00", 0, 1),
    ("custom:reverse_newline", {}, "\n".join(["Zimbabwe"] * 52), 0, 1),
    ("repeat:repeat_change", {"prompt_to_repeat": "Say it."}, " Say it.", 0, 1),
    ("words:vowel", {}, "...", 0, 1),
]


@pytest.mark.parametrize("name, arguments, text, default, reference", DIFFERENT)
def test_where_the_default_differs_from_the_reference(name, arguments, text, default, reference):
    assert verify(text, row(name, arguments), "ifeval").score == default
    assert verify(text, row(name, arguments), "ifeval", "reference").score == reference


def test_a_row_of_ifbench_is_read_as_it_stands_by_its_reference():
    text, here = "<think>a b</think>\nA-b", row("format:no_whitespace", {})
    assert verify(text, here, "ifeval", "reference").score == 0
    assert verify(text, row("count:count_unique", {}), "ifeval", "reference").score == 1


def test_more_than_is_read_is_said():
    verdict = verify("a" * (MAX_READ + 1), row("format:no_whitespace", {}), "ifeval")
    assert verdict.score == 0 and str(MAX_READ) in verdict.reason
    assert verify("a" * MAX_READ, row("format:no_whitespace", {}), "ifeval").score == 1

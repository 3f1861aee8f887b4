"""IFEval's instructions and Tülu 3's constraints, rule by rule, on either side of what they ask for."""

from __future__ import annotations

import pytest

from verifiers import GroundTruthError, check, verify
from verifiers.ifeval.google import follow, parse
from verifiers.ifeval.sentences import count_sentences


def google(name: str, **arguments) -> dict:
    return {"instruction_id": [name], "kwargs": [arguments]}


FOLLOWED = [  # (instruction, arguments, a response that follows it, one that does not)
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "at least"}, "ab AB", "ab"),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "less than"}, "ab", "ab AB"),
    ("keywords:forbidden_words", {"forbidden_words": ["art"]}, "party", "an Art."),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": "at least"}, "Eve, e", "Even so"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "don't go", "do-not"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo\n***\n", "one\n***\n\n***\ntwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "well\n\nSo, then",
        "so\n\nwell",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "It is 5 p.m. now.",
        "All is well. So it ends.",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* a\n- b\n- c", "* a\n- b"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **b"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "**b**", "** **"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("startend:end_checker", {"end_phrase": "The End."}, '"so. the end."', "the end. so"),
    ("startend:quotation", {}, '"a"', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "ONE two",
        "ONE TWO",
    ),
]


@pytest.mark.parametrize("name, arguments, good, bad", FOLLOWED)
def test_an_instruction_is_followed_or_not(name, arguments, good, bad):
    assert verify(good, google(name, **arguments), "ifeval").score == 1
    verdict = verify(bad, google(name, **arguments), "ifeval")
    assert verdict.status == "ok" and verdict.score == 0


@pytest.mark.parametrize("text", ["preamble,\nno comma", "no comma\nwell, goodbye", "well,\nno comma\nor, rather"])
def test_the_loose_metric_leaves_out_first_and_last_lines(text):
    [(name, given)] = parse(google("punctuation:no_comma"))
    assert not follow(text, name, given)[0] and follow(text, name, given, loose=True)[0]


def test_all_is_not_any():
    truth = {"instruction_id": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    assert verify("no comma", truth, "ifeval", combine="all").score == 0
    assert verify("no comma", truth, "ifeval").score == 0.5


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "more than"}),
        ("keywords:letter_frequency", {"letter": "a", "let_frequency": 1, "let_relation": "at most"}),
        ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "exactly"}),
    ],
)
def test_a_relation_that_is_none_is_refused(name, arguments):
    with pytest.raises(GroundTruthError, match="must be 'at least' or 'less than'"):
        check("ifeval", google(name, **arguments))


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One. Two! Three? Four", 4),
        ("Mr. Smith met Dr. Jones.", 1),
        ("J. R. Smith was here. He left.", 2),
        ("He likes pears etc. The rest is his.", 2),
        ("It costs 3.50 in all.", 1),
    ],
)
def test_sentences(text, sentences):
    assert count_sentences(text, 99) == sentences


# --- Tülu 3's constraints ---------------------------------------------------------------------------------------------

TULU = [  # (function and arguments, a response that is paid, one that is not)
    ({"func_name": "validate_word_constraint", "N": 3, "quantifier": "around"}, "a b c d", "a b c d e"),
    ({"func_name": "validate_word_constraint", "N": 3, "quantifier": "at most"}, "a b", "a b c d"),
    ({"func_name": "validate_word_constraint", "N": 3, "quantifier": "at least"}, "a b c d", "a b"),
    ({"func_name": "validate_paragraphs", "N": 2, "first_word": "so", "i": 2}, "a\n\nso b", "so a\n\nb"),
    ({"func_name": "verify_keyword_frequency", "word": "well done", "N": 1}, "Well done!", "well, done"),
    ({"func_name": "validate_quotation"}, '"a"', '"'),
    ({"func_name": "validate_sections", "N": 2, "section_splitter": "S:"}, "intro S: a S: b", "S: a"),
    ({"func_name": "validate_forbidden_words", "forbidden_words": ["art"]}, "party", "art"),
    ({"func_name": "validate_no_commas"}, "a", "a, b"),
]


@pytest.mark.parametrize("truth, good, bad", TULU)
def test_a_constraint_is_satisfied_or_not(truth, good, bad):
    assert verify(good, truth, "ifeval").score == 1
    verdict = verify(bad, truth, "ifeval")
    assert verdict.status == "ok" and verdict.score == 0


@pytest.mark.parametrize("silence", ["", " \n", "<|assistant|>", "<think></think>"])
def test_silence_has_no_commas_and_is_not_paid(silence):
    truth = {"func_name": "validate_no_commas"}
    assert verify(silence, truth, "ifeval").score == 0 and verify(silence, truth, "ifeval", "reference").score == 1

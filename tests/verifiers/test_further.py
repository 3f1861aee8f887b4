"""verifiers/further.py: the answer agrees with the verdict, equal answers are one, hostile text is borne."""

from __future__ import annotations

import json

import pytest

from tests.verifiers.test_hostile import hostile
from verifiers import verify
from verifiers.further import MAX_ANSWER, VOTING, answer, asked_of, judged, num_instructions, same, votes

IFEVAL = {"instruction_id": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}]}
CHOICE = {"answer": "B", "options": ["Rome", "Paris"]}
SAID = [
    ("gsm8k", "#### 1,080", "1080.0", "1080"),
    ("gsm8k", "the half: #### 1/2", "0.5", "1/2"),
    ("gsm8k", "#### 42 or 43", "42", None),
    ("gsm8k", "none", "42", None),
    ("gsm8k", "<|reserved_42|>", "42", None),
    ("math", r"so \boxed{\frac{1}{2}}", "0.5", r"\frac{1}{2}"),
    ("math", "", "0.5", None),
    ("string_matcher", "<answer>The Nile!</answer>", "nile", "nile"),
    ("string_matcher", "the Nile", "nile", None),
    ("multiple_choice", "The answer is (B).", "B", "B"),
    ("multiple_choice", "<answer>Paris</answer>", CHOICE, "B"),
    ("multiple_choice", "<think>The answer is (B).", "B", None),
    ("ifeval", "no comma", IFEVAL, None),
    ("code", "x", "x", None),
]


@pytest.mark.parametrize(("dataset", "response", "truth", "expected"), SAID)
def test_the_answer_that_is_read(dataset, response, truth, expected):
    assert answer(response, truth, dataset) == expected
    found = judged(response, truth, dataset, "answer", mode="default", loose=False, combine="fraction")
    assert (found.score, found.reason, found.status) == (float(expected is not None), expected or "", "ok")


def test_what_is_asked_of_a_row():
    assert asked_of("GSM8K", "1") == asked_of("math", "1") == ("verdict", "answer")
    assert asked_of("ifeval", IFEVAL) == asked_of("ifeval", json.dumps(IFEVAL)) == ("verdict", "loose")
    assert num_instructions("ifeval", IFEVAL) == 2
    old = json.dumps({"func_name": "validate_lowercase"})
    for dataset, truth in (
        ("ifeval", old),
        ("string_f1", "a"),
        (["gsm8k", "ifeval"], ["1", IFEVAL]),
        ("mine", 1),
        ("ifeval", "?"),
    ):
        assert asked_of(dataset, truth) == ("verdict",) and not votes(dataset) and num_instructions(dataset, truth) == 0
    assert all(map(votes, VOTING))


@pytest.mark.parametrize("file", ["gsm8k.jsonl", "math_extract.jsonl"])
def test_right_answers_are_one_and_wrong_ones_are_others(file, shared_data):
    """Over real responses: a verdict of 1 is where the answer read is the label's."""
    dataset = file.split("_")[0].removesuffix(".jsonl")
    rows = [json.loads(line) for line in (shared_data / "verifiers" / file).open()]
    checked = 0
    for row in rows[::5]:
        response, truth = row.get("response"), row.get("ground_truth", row.get("label"))
        if not isinstance(response, str) or truth is None:
            continue
        verdict, found = verify(response, truth, dataset), answer(response, truth, dataset)
        if verdict.status != "ok":
            continue
        label = answer(f"#### {truth}" if dataset == "gsm8k" else f"\\boxed{{{truth}}}", truth, dataset)
        checked += 1
        assert (verdict.score == 1) == (found is not None and label is not None and same(found, label, dataset)), row
    assert checked > 50


@pytest.mark.parametrize("dataset", VOTING)
@pytest.mark.parametrize("mode", ["default", "reference", "tulu3"])
def test_hostile_responses_cost_nothing_but_their_vote(dataset, mode):
    truth = {"multiple_choice": "B"}.get(dataset, "42")
    found = [answer(text, truth, dataset, mode) for text in hostile(dataset)[::4]]
    assert all(a is None or (isinstance(a, str) and len(a) <= MAX_ANSWER) for a in found)
    assert all(json.loads(json.dumps(a)) == a and same(str(a), str(a), dataset) for a in found)


def test_long_answers_are_told_apart():
    long = [f"<answer>{'a' * 1000}{end}</answer>" for end in "xyx"]
    first, second, third = (answer(text, "a", "string_matcher") for text in long)
    assert first == third != second and len(first) <= MAX_ANSWER

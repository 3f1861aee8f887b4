"""launch/evaluation/results.py and table.py: what is measured of responses made by hand, and what is said of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from engine.train.interval import accuracy, wilson
from launch.evaluation import results
from launch.evaluation.file import response_of
from launch.evaluation.table import table
from tests.launch.test_compare import row
from verifiers import verify
from verifiers.further import judged, num_instructions


def measured(rows):
    responses = {(r.key, r.seed, r.sample): r for r in map(response_of, rows)}
    return results.evaluation(responses, list(responses)), list(responses.values())


def test_accuracy_by_verifier_source_and_lengths():
    ends = {1: {"response_tokens": 100}, 2: {"response_tokens": 9, "finish_reason": "length"}}  # by seed
    kinds = [{"dataset": "GSM8K" if i % 2 else "math", "source": "ab"[i // 4], "prompt_tokens": 2**i} for i in range(8)]
    rows = [row(f"k{i}", float(i < 3), seed=s, **kinds[i], **ends[s]) for s in ends for i in range(8)]
    rows[8] |= {"status": "error", "score": 0.0}  # of k0
    found, responses = measured(rows)
    assert found.scores_NK.shape == (8, 2) and np.isnan(found.scores_NK[0, 1]) and found.without_verdict == 1
    assert (found.accuracy, found.low, found.high) == accuracy(found.scores_NK) and found.accuracy == pytest.approx(
        2 / 7
    )
    by = {kind: {name: (s.mean, s.prompts, s.responses) for name, s in of.items()} for kind, of in found.by.items()}
    assert by["verifier"] == {"gsm8k": (0.25, 4, 8), "math": (pytest.approx(1 / 3), 3, 6)}
    assert found.over_sources.mean == pytest.approx(1 / 3) and found.over_sources.prompts == 7
    assert by["source"] == {"a": (pytest.approx(2 / 3), 3, 6), "b": (0.0, 4, 8)}
    bins = ["0 to 7", "8 to 15", "16 to 31", "32 to 63", "64 to 127", "128 to 255"]
    assert [*by["prompt tokens"].items()] == [(bins[0], (1.0, 2, 4)), *((name, (0.0, 1, 2)) for name in bins[1:])]
    assert by["response tokens"] == {"8 to 15": (pytest.approx(2 / 7), 7, 7), "64 to 127": (pytest.approx(2 / 7), 7, 7)}
    assert by["response ended"].keys() == {"by itself", "cut off"}
    assert found.seeds == pytest.approx({1: 2 / 7, 2: 2 / 7})
    said = "\n".join(table(found, responses))
    assert "left out: 1 prompts with 1 responses that could not be verified" in said
    assert "seeds: 1: 28.57%, 2: 28.57%; standard deviation 0.00%" in said
    columns = [line[: line.index("%")] for line in said.splitlines()[1:15]]
    assert len({len(column) for column in columns}) == 1


def test_one_group_is_one_line():
    found, responses = measured([row("k0", 1.0), row("k1", 0.0)])
    assert found.by.keys() == {"verifier"} and not found.pass_at and found.majority is None and not found.ifeval
    lines = table(found, responses)
    low, high = wilson(1, 2)
    assert (
        lines[1] == f"verifier gsm8k        2          2   50.00%   {low:.2%} to {high:.2%}"
        and lines[2][:9] == "responses"
    )


def test_pass_at_k_and_the_majority_by_hand():
    """Two prompts, two seeds of four samples each."""
    answers = {("k0", 1): "7 8 8 9", ("k0", 2): "7 7 8 8", ("k1", 1): "- - - 7", ("k1", 2): "- - - -"}
    rows = [
        row(key, float(a == "8" if key == "k0" else a == "7"), seed=seed, sample=j, answer=None if a == "-" else a)
        for (key, seed), said in sorted(answers.items(), key=lambda item: item[0][1])
        for j, a in enumerate(said.split())
    ]
    found, responses = measured(rows)
    right = {name: [a == ("8" if name[0] == "k0" else "7") for a in said.split()] for name, said in answers.items()}
    for k in (1, 2, 4):
        each = [np.mean([any(some) for some in itertools.combinations(of, k)]) for of in right.values()]
        assert found.pass_at[k].mean == pytest.approx(np.mean(each)) and found.pass_at[k].responses == 16
    assert found.pass_at.keys() == {1, 2, 4} and found.pass_at[1].mean == found.accuracy
    assert found.majority.mean == 0.5  # 8 wins 2 to 1; 7 and 8 tie and 7 is seen first; 7 alone; nobody votes
    assert (found.majority.prompts, found.majority.responses) == (2, 16)
    assert "majority@4" in "\n".join(table(found, responses))


def test_equal_answers_of_math_vote_together():
    texts = [r"\frac{1}{2}", "2", "0.5", "2", r"\dfrac12"]
    rows = [row("k0", float(t != "2"), sample=j, answer=t, dataset="math") for j, t in enumerate(texts)]
    found, _ = measured(rows)
    assert found.majority.mean == 1.0 and found.pass_at.keys() == {1, 2, 4, 5}
    assert results.winner([response_of(r) for r in rows[:4]]).answer == r"\frac{1}{2}"  # two of each


def test_a_verifier_without_answers_has_no_majority():
    rows = [row("k0", 0.5, sample=j, dataset="ifeval", instructions=2, loose=1.0) for j in range(2)]
    found, responses = measured(rows)
    assert found.majority is None and found.pass_at[2].mean == 0.0  # a half is no full mark
    assert "majority is not defined for ifeval" in "\n".join(table(found, responses))
    both, _ = measured([*rows, *(row("k1", 1.0, sample=j, answer="1") for j in range(2))])
    assert both.majority.prompts == 1 and both.majority.mean == 1.0


TRUTHS = [
    {"instruction_id": ["punctuation:no_comma"], "kwargs": [{}]},
    {"instruction_id": ["change_case:english_lowercase", "detectable_format:title"], "kwargs": [{}, {}]},
    {
        "instruction_id": ["startend:quotation", "punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}, {}],
    },
]
SAID = ["No comma here.", "Sure:\nthis is lower case <<title>>", '*"it is quoted, and <<titled>>"*']


def test_ifevals_four_metrics_by_its_own_definitions():
    """Prompts and instructions, strictly and in any of the eight variants, counted one instruction at a time."""
    rows, followed = [], {"strict": [], "loose": []}
    for i, (truth, text) in enumerate(zip(TRUTHS, SAID, strict=True)):
        options = {"mode": "default", "loose": False, "combine": "fraction"}
        strict, loose = (judged(text, truth, "ifeval", what, **options) for what in ("verdict", "loose"))
        assert strict == verify(text, truth, "ifeval")
        extra = {"dataset": "ifeval", "loose": loose.score, "instructions": num_instructions("ifeval", truth)}
        rows.append(row(f"k{i}", strict.score, **extra))
        for how in followed:
            ones = [{"instruction_id": [n], "kwargs": [k]} for n, k in zip(*truth.values(), strict=True)]
            followed[how].append([verify(text, one, "ifeval", loose=how == "loose").score == 1 for one in ones])
    found, responses = measured(rows)
    assert followed == {
        "strict": [[True], [False, True], [False, False, True]],
        "loose": [[True], [True, True], [True, False, True]],
    }
    for how, of in followed.items():
        assert found.ifeval[f"prompt-level {how}"].mean == np.mean([all(each) for each in of])
        assert found.ifeval[f"instruction-level {how}"].mean == pytest.approx(np.mean([x for each in of for x in each]))
    assert found.ifeval.keys() == {
        f"{level}-level {how}" for level in ("prompt", "instruction") for how in ("strict", "loose")
    }
    assert "IFEval instruction-level loose" in "\n".join(table(found, responses))


def test_nothing_that_could_be_verified():
    found, responses = measured([row(f"k{i}", 0.0, sample=j, status="error") for i in range(2) for j in range(2)])
    assert np.isnan(found.accuracy) and (found.low, found.high) == (0.0, 1.0) and np.isnan(found.seeds[1])
    assert any("left out: 2 prompts with 4 responses" in line for line in table(found, responses))


def test_rows_are_read_as_they_were_written():
    whole = row("k", 0.5, answer="5", dataset=["gsm8k", "IFEval"], status="error")
    two = whole | {"status": "ok", "score": 1.5}
    assert response_of(two).score == 0.75  # of two verifiers, which add up
    assert measured([two, two | {"key": "l", "score": 2.0}])[0].accuracy == 0.875
    response = response_of(json.loads(json.dumps(whole)))
    assert (
        response.verifier == "gsm8k+ifeval" and np.isnan(response.score) and response.stopped and response.answer == "5"
    )

"""launch.evaluate: the interval, the same responses on one rank and two, its file, and its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.train.interval import accuracy, wilson
from tests import ranks


def test_interval_of_one_seed_is_wilsons():
    scores = np.array([[1.0], [0.0], [1.0], [1.0]])
    assert accuracy(scores) == (0.75, *wilson(3, 4))
    low, high = wilson(3, 4)
    for p in (low, high):  # its ends solve (p - 3/4)^2 = z^2 p (1 - p) / 4
        assert abs((p - 0.75) ** 2 - 1.96**2 * p * (1 - p) / 4) < 1e-12


def test_seeds_count_for_what_they_add():
    """Repeating the same answers adds nothing; independent answers add all; unanimous ones are taken to add nothing."""
    generator = np.random.Generator(np.random.Philox(key=0))
    alone = (generator.random((200, 1)) < 0.4).astype(float)
    assert accuracy(np.repeat(alone, 5, 1)) == pytest.approx(accuracy(alone))
    independent = (generator.random((400, 8)) < 0.4).astype(float)
    mean, low, high = accuracy(independent)
    pooled = wilson(mean * 3200, 3200)
    assert high - low == pytest.approx(pooled[1] - pooled[0], rel=0.05)
    assert accuracy(np.zeros((96, 3)))[1:] == pytest.approx(wilson(0, 96))
    assert accuracy(np.ones((1, 4)))[0] == 1.0


def test_a_prompt_without_a_verdict_is_left_out():
    scores = np.array([[1.0, 0.0], [np.nan, 0.0], [1.0, 1.0]])
    assert accuracy(scores) == accuracy(scores[[0, 2]])
    assert np.isnan(accuracy(scores[1:2])[0]) and accuracy(scores[1:2])[1:] == (0.0, 1.0)


def test_interval_covers():
    """95 % of intervals hold the truth, for prompts of very different difficulty under four seeds."""
    generator = np.random.Generator(np.random.Philox(key=1))
    hits = 0
    for _ in range(1000):
        difficulty_N1 = generator.beta(0.4, 0.8, (60, 1))  # of mean 1/3
        _, low, high = accuracy((generator.random((60, 4)) < difficulty_N1).astype(float))
        hits += low <= 1 / 3 <= high
    assert 0.93 < hits / 1000 < 0.97


def test_two_ranks_give_the_same_file(tmp_path):
    outputs = []
    for count in (1, 2):
        out = tmp_path / f"{count}.jsonl"
        argv = [
            "--cache_dir",
            tmp_path / "cache",
            "--output",
            out,
            "--num_prompts",
            10,
            "--num_seeds",
            2,
            "--top_k",
            40,
        ]
        result = ranks.launch(argv, count, module="launch.evaluate", log=tmp_path / f"{count}.log")
        assert result.ok and "95 % interval" in result.output, result.output
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1]
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert len(rows) == 20 and {row["seed"] for row in rows} == {1, 2} and rows[0]["response"] != rows[10]["response"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--temperature", "-1"], "--temperature must be between 0 and 1000, got -1.0"),
        (["--model_name_or_path", "x"], "--model_name_or_path needs --dataset_name"),
        (["--response_length", "4096"], "--response_length 4096 leaves no room for a prompt in 256 tokens"),
        (["--num_seed", "3"], "unknown flag --num_seed (did you mean num_seeds?)"),
        (["--output", "/nowhere/x.jsonl"], "no such directory"),
    ],
)
def test_bad_input_gets_one_line(argv, line, tmp_path):
    result = ranks.launch([*argv, "--cache_dir", tmp_path], module="launch.evaluate", log=tmp_path / "log")
    errors = [text for text in result.output.splitlines() if text.startswith("error: ")]
    assert result.codes == [2] and len(errors) == 1 and line in errors[0], result.output

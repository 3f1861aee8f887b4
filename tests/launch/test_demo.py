"""launch.demo: the problems are what they say, and the acts end in a table and a page, the same after a kill."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.data.word_problems import WordProblems, word_problems
from engine.errors import UserError
from launch import demo, dpo, ppo
from launch.demo import Config
from tests.needs import matplotlib


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def problems(cache) -> WordProblems:
    return word_problems(cache)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(question: str) -> int:
    """What a story or a sum comes to, read from its words by a reading of its own."""
    if question.startswith("What is"):
        return sum(map(int, re.findall(r"\d+", question)))
    start, *changes = re.split(r"[.] | and then ", question)[:-1]
    total = int(re.search(r"\d+", start)[0])
    for change in changes:
        n = int(re.search(r"\d+", change)[0])
        total += -n if re.search(r"\b(gives away|loses|sells)\b", change) else n
    return total


# --- the problems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["problems", "held_out", "practice", "exam"])
def test_the_ground_truth_is_what_the_words_come_to(name, problems):
    for row in rows(problems._asdict()[name]):
        assert row["ground_truth"] == str(answered(row["messages"][0]["content"]))


def test_careless_answers_are_wrong_as_often_as_said_and_pairs_mostly_the_right_way_round(problems):
    def right(messages: list[dict]) -> bool:
        return messages[1]["content"].endswith(f"#### {answered(messages[0]['content'])}")

    of = [right(row["messages"]) for row in rows(problems.conversations)]
    assert 0.6 < sum(of) / len(of) < 0.72
    pairs = rows(problems.pairs)
    assert all(right(row["chosen"]) != right(row["rejected"]) for row in pairs)
    assert 0.85 < sum(right(row["chosen"]) for row in pairs) / len(pairs) < 0.95


def test_no_held_out_problem_has_the_numbers_of_one_that_is_trained_on(problems):
    def sums(row: dict) -> tuple:
        question = row.get("messages", row.get("chosen"))[0]["content"]
        losses = re.findall(r"(gives away|loses|sells)|finds|given|buys", question)
        return tuple(re.findall(r"\d+", question)), tuple(map(bool, losses))

    held_out = {sums(row) for row in rows(problems.held_out)}
    trained = [sums(row) for name in ("conversations", "pairs", "problems") for row in rows(problems._asdict()[name])]
    assert len(held_out) == 256 and not held_out & set(trained)
    exam, practice = ({row["messages"][0]["content"] for row in rows(of)} for of in (problems.exam, problems.practice))
    assert len(exam) == 240 and not exam & practice


# --- the acts ---------------------------------------------------------------------------------------------------------


@matplotlib
def test_all_acts_a_table_and_a_page_the_same_after_kills(tmp_path, cache, monkeypatch, capsys):
    """Killed before the last act, and in the middle of an evaluation: the same figures, and nothing is done twice."""
    flags = {"cache_dir": str(cache), "scale": 0.01}
    demo.demo(Config(output_dir=str(tmp_path / "whole"), **flags))
    said = capsys.readouterr().out
    table = [row["name"] for row in json.loads((tmp_path / "whole" / "results.json").read_text())["rows"]]
    assert table == ["base", "SFT", "DPO", "PPO", "GRPO"]
    assert all(
        name in said for name in ("launch/sft.py", "launch/dpo.py", "launch/ppo.py", "launch/grpo.py", "report.html")
    )
    assert "<html" in (tmp_path / "whole" / "report.html").read_text()[:200]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            demo.demo(Config(output_dir=str(tmp_path / "killed"), **flags))
    half = tmp_path / "killed" / "evaluations" / "dpo.jsonl"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "load_policy", killed)  # the finished acts train no more
        demo.demo(Config(output_dir=str(tmp_path / "killed"), **flags))
    results = [(tmp_path / name / "results.json").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1]


@matplotlib
@pytest.mark.drill
def test_killed_at_random_moments_it_ends_in_the_same_table(tmp_path, cache):
    """kill -9 of the command as a user types it, ever later, until it gets through."""
    command = [sys.executable, "-m", "launch.demo", "--cache_dir", str(cache), "--scale", "0.01", "--output_dir"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=600)
    began, kills, patience = time.monotonic(), 0, 6.0
    moment = random.Random(13)
    while time.monotonic() - began < 900:
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
        try:
            assert process.wait(moment.uniform(0.8, 1.2) * patience) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills, patience = kills + 1, patience * 1.25
    assert kills >= 3
    results = [(tmp_path / name / "results.json").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model_name_or_path": "m"}, "--model_name_or_path needs --conversations and --pairs"),
        ({"model_name_or_path": "m", "pairs": "p"}, "needs --conversations"),
        ({"pairs": "p"}, "--conversations and --pairs are read with --model_name_or_path"),
        ({"scale": 0.0}, "--scale"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        demo.demo(Config(output_dir=str(tmp_path), **flags))

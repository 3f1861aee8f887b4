"""launch.evaluate: the interval, the same file on one rank and two, killed or grown, its refusals, from Python."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from engine.data import embedded
from engine.errors import UserError
from engine.train.interval import accuracy, wilson
from launch import evaluate, verify
from launch.evaluation import answers
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


class Place:
    """A cache, and runs of the embedded model that differ in their flags."""

    def __init__(self, root):
        self.root, self.runs = root, 0
        self.flags = {"num_prompts": 6, "num_seeds": 2, "num_samples_per_prompt": 2, "top_k": 40}

    def run(self, name, count=1, hook="", **flags):
        self.runs += 1
        flags = self.flags | {"cache_dir": self.root / "cache", "output": self.root / name} | flags
        argv = [word for key, value in flags.items() if value is not None for word in (f"--{key}", value)]
        log = self.root / f"log{self.runs}"
        return ranks.launch(argv, count, module="launch.evaluate", log=log, hook=hook)

    def content(self, name):
        return (self.root / name).read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def whole(place):
    """What one rank writes that is not disturbed."""
    result = place.run("whole")
    assert result.ok and "95 % interval" in result.output and "pass@2" in result.output, result.output
    return place.content("whole")


def test_two_ranks_give_the_same_file(place, whole):
    result = place.run("two", 2)
    assert result.ok, result.output
    assert place.content("two") == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    names = [(row["seed"], row["sample"]) for row in rows]
    assert names == [(seed, sample) for seed in (1, 2) for _ in range(6) for sample in (0, 1)]
    assert len({row["key"] for row in rows}) == 6 and len({row["response"] for row in rows}) > 20
    assert {row["settings"]["top_k"] for row in rows} == {40} and all(row["dataset"] == "gsm8k" for row in rows)


def kill_after_7_responses():
    from launch.evaluation import file

    write = file.ResponseFile.write

    def counting(self, line):
        response = write(self, line)
        if len(self.responses) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return response

    file.ResponseFile.write = counting


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 1, 2), (1, 0, 2)])
def test_lines_of_ranks_that_end_before_or_after_the_first(order):
    """Whichever rank ends when: rank 0 takes every line once."""
    store, taken = dist.HashStore(), []
    mails = []
    for rank in range(3):
        mails.append(answers.Mail(SimpleNamespace(size=3, rank=rank, is_main=rank == 0, store=store), taken.append))
        mails[-1].name = "test"
    for rank in order:
        for number in range(3):
            mails[rank].send(f"{rank} {number}")
        if rank:
            mails[rank].end()
    mails[0].send("0 last")
    mails[0].end()
    assert sorted(taken) == sorted([*(f"{rank} {number}" for rank in range(3) for number in range(3)), "0 last"])


def test_a_killed_run_goes_on_and_ends_the_same(place, whole):
    """Killed on two ranks with seven responses written, its last line torn, gone on with on one."""
    killed = place.run("killed", 2, hook="tests.launch.test_evaluate:kill_after_7_responses")
    assert killed.codes[0] == -signal.SIGKILL
    there = place.content("killed")
    assert there.count("\n") == 7 and {*there.splitlines()} < {*whole.splitlines()}
    (place.root / "killed").write_text(there[:-9])
    result = place.run("killed")
    assert result.ok and place.content("killed") == whole, result.output
    result = place.run("killed", hook="tests.launch.test_evaluate:refuse_to_sample")
    assert result.ok and place.content("killed") == whole, result.output


@pytest.mark.parametrize("count", [1, 2])
def test_told_to_end_it_goes_on_and_ends_the_same(count, place, whole):
    """Whichever rank was told: the others end their share, and all end with 85 and one line."""
    name = f"told-{count}"
    told = place.run(name, count, hook="tests.faults:terminate_rank_0_at_the_2nd_response")
    (line,) = [line for line in told.output.splitlines() if line.startswith(("stopped", "error", "Traceback"))]
    assert told.codes == [85] * count, told.output
    assert line == (
        f"stopped: SIGTERM, while responses were sampled; the same command goes on from {place.root / name}"
    )
    assert 2 <= place.content(name).count("\n") < whole.count("\n")
    result = place.run(name)
    assert result.ok and place.content(name) == whole, result.output


def refuse_to_sample():
    from rollout import Sampler

    Sampler.stream = None


def test_a_file_grows_and_is_compared(place, whole, capsys):
    """Fewer prompts and seeds first; then all, and they are those of one run; another model's file is refused."""
    assert place.run("grown", num_prompts=2, num_seeds=1).ok
    result = place.run("grown", baseline=place.root / "whole")
    assert result.ok and place.content("grown") == whole, result.output
    assert "the baseline and this model are equal" in result.output and "not covered" in result.output
    for flags, line in (
        ({"num_prompts": 2}, "a response that this command does not ask for"),
        ({"temperature": 0.5}, "holds responses of temperature 1.0, this run has 0.5: give another file"),
        ({"baseline": place.root / "whole", "num_prompts": 7, "verifier_mode": "tulu3"}, "of verifier_mode default"),
        ({"baseline": place.root / "grown"}, "is --output: expected another model's file"),
    ):
        refused = place.run("grown", hook="tests.launch.test_evaluate:refuse_to_load", **flags)
        assert refused.codes == [2] and line in refused.output and "LOADING" not in refused.output, refused.output
    assert place.content("grown") == whole
    config = verify.Config(file=str(place.root / "whole"), quiet=True, output=str(place.root / "verdicts"))
    assert verify.judge(config) == 0
    assert "gsm8k                  24" in capsys.readouterr().out
    scores = [json.loads(line)["score"] for line in place.content("verdicts").splitlines()]
    assert scores == [json.loads(line)["score"] for line in whole.splitlines()]


def refuse_to_load():
    from launch.evaluation import answers

    answers.load_untrained = lambda *_: print("LOADING", flush=True)


def test_from_python_with_examples_before_the_question(place, tmp_path, capsys):
    """evaluate() returns what it prints; examples count for the room; greedy answers are one."""
    made = embedded(place.root / "cache")
    problems, examples = made.held_out_problems, made.train_sums
    flags = {"model_name_or_path": str(problems.parent / "model"), "dataset_name": str(problems), "num_prompts": 8}
    flags |= {"temperature": 0.0, "response_length": 8, "num_few_shot": 2, "few_shot_file": str(examples)}
    found = evaluate.evaluate(evaluate.Config(**flags, output=str(tmp_path / "a")))
    rows = [json.loads(line) for line in (tmp_path / "a").open()]
    assert found.scores_NK.tolist() == [[row["score"]] for row in rows] and found.output == tmp_path / "a"
    assert found.keys == tuple(row["key"] for row in rows) and len(rows) == 8
    assert (found.accuracy, found.low, found.high) == accuracy(found.scores_NK)
    said = capsys.readouterr().out
    assert f"2 examples before the question, the first of {examples}, as turns of the chat" in said
    assert "greedy, one response to each prompt, of at most 8 tokens" in said and "written: " in said
    first = [json.loads(line)["messages"] for line in examples.open()][:2]
    assert all(message["content"] in row["prompt"] for row in rows for messages in first for message in messages)
    assert all(row["prompt"].count("<|user|>") == 3 for row in rows)
    with pytest.raises(UserError, match="no usable prompt, none has at most"):
        evaluate.evaluate(evaluate.Config(**flags, max_seq_length=50))
    longer = rows[0] | {"prompt": "How many are there, if each of them has one more of each of them?"}
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [json.loads(next(problems.open())), longer])
    )
    limited = flags | {"dataset_name": str(tmp_path / "p.jsonl"), "max_seq_length": rows[0]["prompt_tokens"] + 8}
    short = evaluate.evaluate(evaluate.Config(**limited))
    assert (len(short.keys), short.too_long, found.too_long) == (1, 1, 0)
    assert "left out: 1 prompts too long for --max_seq_length" in capsys.readouterr().out
    plain = evaluate.evaluate(evaluate.Config(**flags | {"num_few_shot": 0, "few_shot_file": None}))
    assert plain.keys == found.keys and plain.output is None
    assert "nothing was written: --output FILE keeps the responses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--temperature", "-1"], "--temperature must be between 0 and 1000, got -1.0"),
        (["--model_name_or_path", "x"], "--model_name_or_path needs --dataset_name"),
        (["--response_length", "4096"], "--response_length 4096 leaves no room for a prompt in 256 tokens"),
        (["--num_seed", "3"], "unknown flag --num_seed (did you mean num_seeds?)"),
        (["--output", "/nowhere/x.jsonl"], "no such directory"),
        (["--baseline", "/nowhere/x.jsonl"], "/nowhere/x.jsonl: No such file or directory"),
        (["--temperature", "0", "--num_samples_per_prompt", "2"], "greedy samples are all the same"),
        (["--num_samples_per_prompt", "0"], "--num_samples_per_prompt must be greater than 0"),
        (["--num_few_shot", "2", "--few_shot_file", "/nowhere.jsonl"], "/nowhere.jsonl: no such file or directory"),
    ],
)
def test_bad_input_gets_one_line(argv, line, tmp_path):
    result = ranks.launch([*argv, "--cache_dir", tmp_path], module="launch.evaluate", log=tmp_path / "log")
    errors = [text for text in result.output.splitlines() if text.startswith("error: ")]
    assert result.codes == [2] and len(errors) == 1 and line in errors[0], result.output

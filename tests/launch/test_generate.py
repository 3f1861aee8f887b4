"""launch.generate: rows in their order on one rank and two, greedy answers as launch.evaluate's, every form of row, and
refusals.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter

import pytest

from engine.config import parse
from engine.data import QuestionReader, embedded
from engine.data.chat import load_tokenizer
from engine.data.rows import BadRow
from engine.errors import UserError
from engine.flags import PromptFlags
from launch import generate, responses
from tests import ranks

USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    embedded(root)
    return root


def run(cache, *argv, count=1, module="launch.generate", hook=""):
    return ranks.launch([*argv, "--cache_dir", cache], count, module=module, log=cache / "log", hook=hook)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_ranks_write_the_same_file_in_the_order_of_the_rows(cache, tmp_path):
    asked = [f"question {i}" for i in range(5)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": q, "ground_truth": i}) + "\n" for i, q in enumerate(asked)))
    outputs = []
    for count, parts in ((1, 1), (2, 1), (2, 2)):
        out = tmp_path / f"{count}-{parts}.jsonl"
        argv = ["--dataset_name", data, "--output", out, "--num_samples_per_prompt", 2, "--rollout_slots", 3]
        argv += ["--rollout_tensor_parallel", parts]
        result = run(cache, *argv, "--response_length", 9, "--top_k", 50, count=count)
        assert result.ok and "10 responses" in result.output, result.output
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1] == outputs[2]
    found = rows(out)
    assert [row["messages"][0]["content"] for row in found] == [q for q in asked for _ in range(2)]
    assert [(row["ground_truth"], row["sample"]) for row in found] == [(i, j) for i in range(5) for j in range(2)]
    assert all(row["tokens"] <= 9 and row["finish_reason"] in ("stop", "length") for row in found)
    assert all(row["messages"][-1] == {"role": "assistant", "content": row["response"]} for row in found)
    assert len({row["response"] for row in found}) == 10


@pytest.mark.parametrize("count", (1, pytest.param(2, marks=pytest.mark.drill)))
def test_a_run_that_was_killed_goes_on(count, cache, tmp_path):
    """With what had ended; the file is that of a run that was not killed. Other flags start anew, and say so."""
    data, out, partial = tmp_path / "rows.jsonl", tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial"
    data.write_text("".join(json.dumps({"prompt": f"question {i}", "ground_truth": i}) + "\n" for i in range(12)))
    argv = ["--dataset_name", data, "--num_samples_per_prompt", 2, "--rollout_slots", 2, "--response_length", 40]
    assert run(cache, *argv, "--output", tmp_path / "whole.jsonl", count=count).ok
    processes = ranks.start(
        "launch.generate", [*argv, "--output", out, "--cache_dir", cache], count, cache / "killed.log"
    )
    end = time.monotonic() + 120
    while not (partial.is_file() and partial.read_bytes().count(b"\n") > 6):
        assert processes[0].is_alive() and time.monotonic() < end
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    assert not out.exists()
    kept = partial.read_bytes()
    partial.write_bytes(kept.replace(b"[", b"{", 1) + b'[3, 0, "st')  # one line damaged, one torn
    result = run(cache, *argv, "--output", out, count=count)
    there = int(re.search(r"(\d+) responses are there already", result.output)[1])
    assert result.ok and kept.count(b"\n") - 3 <= there < 24, result.output
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text() and not partial.exists()
    partial.write_bytes(kept)
    result = run(cache, *argv, "--output", out, "--num_samples_per_prompt", 1, count=count)
    assert result.ok and len(rows(out)) == 12, "none of another number of samples is left in it"
    partial.write_bytes(kept)
    result = run(cache, *argv, "--output", out, "--seed", 5, count=count)
    assert result.ok and "is of another model, prompts or flags: it starts anew" in result.output
    assert out.read_text() != (tmp_path / "whole.jsonl").read_text() and not partial.exists()


def test_a_run_that_is_told_to_end_goes_on(cache, tmp_path):
    """Status 85, one line, and the file of a run that was not told."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)))
    argv = ["--dataset_name", data, "--rollout_slots", 2, "--response_length", 12]
    assert run(cache, *argv, "--output", tmp_path / "whole.jsonl").ok
    out, partial = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial"
    told = run(cache, *argv, "--output", out, hook="tests.faults:terminate_rank_0_at_the_2nd_response")
    (line,) = [line for line in told.output.splitlines() if line.startswith(("stopped", "error", "Traceback"))]
    assert told.codes == [85] and not out.exists(), told.output
    assert line == f"stopped: SIGTERM, while responses were sampled; the same command goes on from {partial}"
    result = run(cache, *argv, "--output", out)
    there = int(re.search(r"(\d+) responses are there already", result.output)[1])
    assert result.ok and 2 <= there < 12 and out.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_model_that_holds_little_needs_no_length(cache, tmp_path):
    """The embedded model holds 512 tokens, by its path too: half of them are a response."""
    out = tmp_path / "out.jsonl"
    model = next(cache.glob("embedded-v*/model"))
    result = run(cache, "--model_name_or_path", model, "--prompt", "a?", "b?", "--output", out)
    assert result.ok and {row["tokens"] for row in rows(out)} <= set(range(1, 257)), result.output
    assert max(row["tokens"] for row in rows(out)) > 48  # it has read nothing, and ends by chance


def test_greedy_answers_are_those_of_evaluate(cache, tmp_path):
    greedy = ["--temperature", 0, "--response_length", 12, "--output"]
    problems = embedded(cache).held_out_problems
    model = ["--model_name_or_path", embedded(cache).model, "--dataset_name", problems]
    assert run(cache, *model, *greedy, tmp_path / "ours.jsonl").ok
    argv = [*model, *greedy, tmp_path / "theirs.jsonl", "--rollout_tensor_parallel", 2]  # one rank judges for both
    assert run(cache, *argv, module="launch.evaluate", count=2).ok
    ours, theirs = rows(tmp_path / "ours.jsonl"), rows(tmp_path / "theirs.jsonl")
    keys = ("prompt", "response", "finish_reason", "ground_truth", "dataset")
    assert len(ours) == 96 and [[row[k] for k in keys] for row in ours] == [[row[k] for k in keys] for row in theirs]


FORMS = [
    ({"messages": [USER, ANSWER]}, [USER]),
    ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]}, [USER]),
    ({"prompt": "a?", "completion": "b."}, [USER]),
    ({"prompt": [USER], "chosen": "b.", "rejected": "c."}, [USER]),
    ({"instruction": "a?", "input": "", "output": "b."}, [USER]),
    ({"instruction": "x", "input": "y", "output": "b."}, [{"role": "user", "content": "x\n\ny"}]),
    ({"instruction": "a?", "history": [["a?", "b."]], "output": "b."}, [USER, ANSWER, USER]),
    ({"question": "a?", "answer": "b."}, [USER]),
    ({"query": "a?", "response": "b."}, [USER]),
    ({"problem": "a?", "solution": "b."}, [USER]),
    ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
    ({"prompt": "a?", "system": "S"}, [{"role": "system", "content": "S"}, USER]),
]


@pytest.fixture(scope="module")
def chat(embedded_dir):
    return load_tokenizer(embedded_dir.model, 512)


@pytest.mark.parametrize("row, expected", FORMS)
def test_every_form_of_row_is_a_prompt(row, expected, chat):
    notes: Counter = Counter()
    question = QuestionReader(chat, PromptFlags())(row, notes)
    assert question.messages == expected and question.labels == {}
    assert question.ids.tolist() == chat.prompt_ids(expected).tolist()
    read = {"messages", "conversations", "instruction", "input", "history", "system"} | {"problem"}
    unread = set(row) - read - {"prompt", "question", "query"}
    assert {column for what, column in notes if what == "not used" and " " not in column} == unread


def test_labels_go_along_and_the_flags_are_said(chat):
    flags = PromptFlags(system_prompt="S", prompt_template="Q: {prompt}")
    question = QuestionReader(chat, flags)({"prompt": "a?", "ground_truth": "1", "dataset": "gsm8k"}, Counter())
    assert question.messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q: a?"}]
    assert question.labels == {"ground_truth": "1", "dataset": "gsm8k"}
    folded = QuestionReader(chat, flags, fold_system=True)({"prompt": "a?"}, Counter())
    assert folded.ids.tolist() == chat.prompt_ids([{"role": "user", "content": "S\n\nQ: a?"}]).tolist()


@pytest.mark.parametrize("row", [{"text": "a?"}, {"messages": [ANSWER]}, {"prompt": 7}, {"prompt": "a <|end|> b"}])
def test_a_row_that_asks_nothing_is_bad(row, chat):
    with pytest.raises(BadRow):
        QuestionReader(chat, PromptFlags())(row, Counter())


def test_prompts_add_up_and_keep_their_spaces(tmp_path):
    argv = ["--prompt", "one text", "--prompt", "two", "a third one"]
    assert parse(generate.Config, argv).prompt == ("one text", "two", "a third one")
    (tmp_path / "r.yaml").write_text("prompt: one text of five words\ndataset_split: x\n")
    assert parse(generate.Config, ["--config", str(tmp_path / "r.yaml")]).prompt == ("one text of five words",)
    with pytest.raises(UserError, match="--prompt and --dataset_name are two ways"):
        parse(generate.Config, ["--prompt", "a", "--dataset_name", "b"])


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("earlier")

    def full(*_):
        yield {}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(responses, "rows_of", full)
    with pytest.raises(UserError, match=r"out\.jsonl: No space left on device"):
        responses.write(path, [], [], None)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"] and path.read_text() == "earlier"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--prompt", " "], "--prompt: expected texts, got an empty one"),
        (["--prompt", "a <|end|>"], "--prompt 1: content of message 0 holds the control token '<|end|>'"),
        (["--prompt", "a " * 600], "--prompt 1: 621 tokens; --max_seq_length and --response_length leave room for 464"),
        (["--model_name_or_path", "x"], "nothing to answer: give --prompt TEXT or --dataset_name FILE"),
        (["--output", "/nowhere/x.jsonl"], "--output /nowhere/x.jsonl: no such directory"),
        (["--load_in_4bit", "true"], "--load_in_4bit is not read without --adapter_name_or_path"),
        (["--num_samples_per_prompt", "0"], "--num_samples_per_prompt must be greater than 0"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl: no such file or directory"),
    ],
)
def test_bad_input_gets_one_line(argv, line, cache):
    result = run(cache, *argv)
    errors = [text for text in result.output.splitlines() if text.startswith("error: ")]
    assert result.codes == [2] and len(errors) == 1 and line in errors[0], result.output


def test_a_runs_directory_is_its_final(cache, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    asked = ["--model_name_or_path", tmp_path, "--prompt", "a", "--response_length", 3]
    refused = run(cache, *asked)
    assert refused.codes == [2] and f"has no final/ yet: python -m launch.export {tmp_path}" in refused.output
    (tmp_path / "final").symlink_to(embedded(cache).model)
    result = run(cache, *asked)
    assert result.ok and f"model: {tmp_path / 'final'}" in result.output
    assert "has no chat template, so Tülu's is used; a base model was not trained to chat" in result.output

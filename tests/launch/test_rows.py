# ruff: noqa: E501 (tables of rows)
"""Rows as people bring them, through each stage's `train` with --dry_run: used, named as not used, or refused in one
line. Every form of the datasets of the field, in words of ours.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.config import parse
from engine.errors import UserError
from tests import ranks

# tools, calls, thoughts and names, in plain words around the embedded tokenizer's one control token
TEMPLATE = (
    "{% for t in tools or [] %}tool {{ t.function.name }}\n{% endfor %}{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %} call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{{ '<|end|>' if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ASK, SAY = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is one."}
NO = SAY | {"content": "Nobody."}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"what": "door"}'}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALLING = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "one"}, SAY]
HUMAN, GPT = {"from": "human", "value": "Who is it?"}, {"from": "gpt", "value": "It is one."}
PAIR = {"question": "Who is it?", "response_a": "It is one.", "response_b": "Nobody."}
SCORED = {"prompt": "Who?", "completions": [{"response": "One.", "score": 2}, {"response": "Two.", "score": 5}]}

# (rows, flags, what the screen shows, in order)
SFT: dict[str, tuple[list[dict], str, list[str]]] = {
    "tools": ([{"messages": CALLING, "tools": [TOOL]}], "", ['tool look_up\nuser: Who is it?\nassistant: [[ call look_up {"what": "door"}<|end|>]]\ntool: one\nassistant: [[It is one.<|end|>]]']),
    "tools as text": ([{"messages": CALLING, "tools": json.dumps([TOOL["function"]])}], "", ["tool look_up\n", '[[ call look_up {"what": "door"}<|end|>]]']),
    "weights": ([{"messages": [ASK, NO | {"weight": 0}, ASK, SAY | {"weight": 1}]}], "", ["assistant: Nobody.<|end|>\n", "[[It is one.<|end|>]]"]),
    "train": ([{"messages": [ASK, NO | {"train": False}, ASK, SAY]}], "", ["assistant: Nobody.<|end|>\n", "[[It is one.<|end|>]]"]),
    "trainable": ([{"messages": [ASK | {"loss_mask": 0}, NO | {"trainable": 0}, ASK, SAY | {"loss_mask": 1}]}], "", ["assistant: Nobody.<|end|>\n", "[[It is one.<|end|>]]"]),
    "parts": ([{"messages": [ASK | {"content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]}, SAY]}], "", ["user: Who is it?\n"]),
    "thought": ([{"messages": [ASK, SAY | {"reasoning_content": "It rang."}]}], "", ["[[<think>It rang.</think>It is one.<|end|>]]"]),
    "sharegpt": ([{"conversations": [HUMAN, GPT], "system": "Be kind.", "id": 7}], "", ["not used: id", "system: Be kind.\nuser: Who is it?\nassistant: [[It is one.<|end|>]]"]),
    "sharegpt tools": ([{"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "look_up", "arguments": {"what": "door"}}'}, {"from": "observation", "value": "one"}, GPT], "tools": json.dumps([TOOL])}], "", ["tool look_up\n", '[[ call look_up {"what": "door"}<|end|>]]\ntool: one\n']),
    "alpaca": ([{"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hello?", "Hello."]], "system": "Be kind."}], "", ["system: Be kind.\nuser: Hello?\nassistant: [[Hello.<|end|>]]\nuser: Add.\n\n1 2\nassistant: [[3<|end|>]]"]),
    "question": ([{"question": "Who is it?", "answer": "It is one.", "source": "x", "score": 1}], "", ["not used: score, source", "user: Who is it?\nassistant: [[It is one.<|end|>]]"]),
    "query": ([{"query": "Who is it?", "response": "It is one."}], "", ["user: Who is it?\nassistant: [[It is one.<|end|>]]"]),
    "text": ([{"text": "It is one of them.", "id": 1}], "--text_column text", ["not used: id", "[[It is one of them.<|end|>]]"]),
    "kto": ([{"prompt": "Who?", "completion": "One.", "label": True}, {"prompt": "Who?", "completion": "Two.", "label": False}], "--only_label true", ["2 rows, 1 kept, 1 dropped (labelled false)", "[[One.<|end|>]]"]),
    "kto numbers": ([{"prompt": "Who?", "completion": "One.", "label": 1}, {"prompt": "Who?", "completion": "Two.", "label": "0"}], "--only_label true", ["1 dropped (labelled false)", "[[One.<|end|>]]"]),
    "a class": ([{"messages": [ASK, SAY], "label": 1}], "", ["not used: label"]),
    "an answer in JSON": ([{"question": "Who is it?", "answer": '{"role": "assistant", "content": "Hi"}'}], "", ['[[{"role": "assistant", "content": "Hi"}<|end|>]]']),
    "a call's other keys": ([{"messages": [ASK, SAY | {"content": "", "tool_calls": [{"id": 7, "function": {"name": "look_up", "arguments": None, "parameters": {"a": 1}, "strict": True}}]}]}], "", ["not used: messages[].tool_calls[].function.strict, messages[].tool_calls[].id", '[[ call look_up {"a": 1}<|end|>]]']),
    "a name that stands elsewhere": ([{"messages": [ASK | {"name": "Who"}, SAY]}], "", ["not used: messages[].name"]),
    "names": ([{"messages": [ASK | {"name": "Ann", "mood": "good"}, SAY]}], "", ["not used: messages[].mood, messages[].name"]),
    "functions": ([{"messages": [ASK, {"role": "assistant", "content": None, "function_call": {"name": "look_up", "arguments": "{}"}}, {"role": "function", "name": "look_up", "content": "one"}, SAY]}], "", ["not used: messages[].name", "[[ call look_up {}<|end|>]]\ntool: one\n"]),
    "developer": ([{"messages": [{"role": "developer", "content": "Be kind."}, ASK, SAY]}], "", ["system: Be kind.\n"]),
    "folded": ([{"messages": [{"role": "system", "content": "Be kind."}, ASK, SAY]}], "--system_role fold", ["user: Be kind.\n\nWho is it?\nassistant: [[It is one.<|end|>]]"]),
}  # fmt: skip
DPO: dict[str, tuple[list[dict], str, list[str]]] = {
    "messages": ([{"prompt": [ASK], "chosen": SAY, "rejected": NO}], "", ["assistant: [[It is one.<|end|>]]", "assistant: [[Nobody.<|end|>]]"]),
    "tools": ([{"prompt": CALLING[:3], "chosen": [SAY], "rejected": [NO], "tools": [TOOL]}], "", ["tool look_up\n", 'assistant:  call look_up {"what": "door"}<|end|>\ntool: one\nassistant: [[It is one.<|end|>]]']),
    "sharegpt": ([{"conversations": [HUMAN], "chosen": GPT, "rejected": GPT | {"value": "Nobody."}}], "", ["user: Who is it?\nassistant: [[It is one.<|end|>]]"]),
    "orca": ([{"system": "Be kind.", "question": "Who is it?", "chosen": "It is one.", "rejected": "Nobody."}], "", ["system: Be kind.\nuser: Who is it?\nassistant: [[It is one.<|end|>]]", "[[Nobody.<|end|>]]"]),
    "label": ([PAIR | {"better": "response_b", "id": 1}], "--preference_column better", ["not used: id", "[[Nobody.<|end|>]]", "[[It is one.<|end|>]]"]),
    "letters": ([PAIR | {"better": "A"}, PAIR | {"better": "tie"}], "--preference_column better", ["1 dropped (labelled a tie)", "[[It is one.<|end|>]]", "[[Nobody.<|end|>]]"]),
    "helpsteer": ([{"context": [ASK], "response1": "It is one.", "response2": "Nobody.", "overall_preference": 2}, {"context": [ASK], "response1": "It is one.", "response2": "Nobody.", "overall_preference": 0}], "--preference_column overall_preference", ["1 dropped (labelled a tie)", "[[Nobody.<|end|>]]", "[[It is one.<|end|>]]"]),
    "other questions": ([{"question": "Who?", "response": "One.", "score": 5}, {"question": "Why?", "response": "Two.", "score": 1}, {"question": "Why?", "system": "Be kind.", "response": "So.", "score": 3}, {"question": "Why?", "system": "Be kind.", "response": "No.", "score": 4, "source": "x"}], "--chosen_by_score score", ["3 rows, 1 kept, 2 dropped (only one answer)", "not used: source", "system: Be kind.\nuser: Why?\nassistant: [[No.<|end|>]]", "[[So.<|end|>]]"]),
    "another prompt": ([{"prompt": "Which one?", "chosen": [ASK, SAY], "rejected": [ASK, NO]}], "", ["not used: prompt that the conversations do not hold"]),
    "keys of completions": ([SCORED | {"completions": [c | {"model": "m"} for c in SCORED["completions"]]}], "--chosen_by_score score", ["not used: completions[].model"]),
    "helpsteer scores": ([{"prompt": "Who?", "response": "One.", "helpfulness": 4, "verbosity": 1}, {"prompt": "Who?", "response": "Two.", "helpfulness": 1}, {"prompt": "Why?", "response": "So.", "helpfulness": 1}], "--chosen_by_score helpfulness", ["2 rows, 1 kept, 1 dropped (only one answer)", "not used: verbosity", "[[One.<|end|>]]", "[[Two.<|end|>]]"]),
    "index": ([PAIR | {"better": 1}], "--preference_column better --preference_numbers index", ["[[Nobody.<|end|>]]", "[[It is one.<|end|>]]"]),
    "ultrafeedback": ([SCORED, SCORED | {"completions": [{"response": "A", "score": 1}] * 2}], "--chosen_by_score score", ["1 dropped (equal scores)", "[[Two.<|end|>]]", "[[One.<|end|>]]"]),
    "score columns": ([PAIR | {"score_a": 1.5, "score_b": "0.5"}], "--chosen_by_score score_a score_b", ["[[It is one.<|end|>]]", "[[Nobody.<|end|>]]"]),
    "binarized": ([{"prompt": "Who is it?", "chosen": [ASK, SAY], "rejected": [ASK, NO], "messages": [ASK, SAY], "score_chosen": 9.0}], "", ["not used: messages, score_chosen", "[[It is one.<|end|>]]"]),
}  # fmt: skip
MATHS = {"problem": "What is one and one?", "solution": r"It is $\boxed{2}$.", "level": "Level 1", "type": "Algebra"}
SEVERAL = "[{'instruction_id': ['keywords:existence', 'count:lowercase_counting'], 'kwargs': [{'keywords': ['one']}, {'N': 5, 'x': None}]}]"
PPO: dict[str, tuple[list[dict], str, list[str]]] = {
    "gsm8k": ([{"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"}], "", ["1 prompts (1 gsm8k)", "user: One and one?\nassistant: "]),
    "math": ([MATHS], "", ["not used: level, type", "1 prompts (1 math)", "user: What is one and one?\n"]),
    "prompt and answer": ([{"prompt": "One and one?", "answer": "2"}], "--verifier gsm8k", ["1 prompts (1 gsm8k)"]),
    "open r1": ([MATHS | {"answer": "2", "messages": [ASK, SAY]}], "--verifier math", ["not used: answers at the end of messages, level, problem, solution, type", "(1 math)", "user: Who is it?\n"]),
    "problem and answer": ([{"problem": "One and one?", "answer": "2"}], "", ["(1 math)"]),
    "verl": ([{"data_source": "openai/gsm8k", "prompt": [ASK], "ability": "math", "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 0}}], "", ["not used: ability, extra_info", "(1 gsm8k)"]),
    "dapo": ([{"data_source": "math_dapo", "prompt": [ASK], "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}}], "", ["(1 math)"]),
    "lists": ([{"messages": [ASK], "ground_truth": ["4"], "dataset": ["math"]}], "", ["(1 math)"]),
    "several instructions": ([{"messages": [ASK], "ground_truth": truth, "dataset": dataset} for truth in (SEVERAL, [SEVERAL]) for dataset in ("ifeval", ["ifeval"])], "", ["4 rows, 4 kept", "4 prompts (4 ifeval)"]),
    "a heading": ([{"problem": "One half?", "solution": "#### Step 2\nSo \\boxed{\\frac{1}{2}}"}], "", ["(1 math)"]),
    "a provenance": ([{"messages": [ASK], "ground_truth": "2", "dataset": "my/own", "data_source": "openai/gsm8k"}], "--verifier math", ["not used: data_source, dataset that is no verifier's name", "(1 math)"]),
    "short answers": ([{"messages": [ASK], "ground_truth": "one", "dataset": "string_matcher"}, {"messages": [ASK], "ground_truth": "B", "dataset": "multiple_choice"}], "", ["1 string_matcher, 1 multiple_choice"]),
    "suffix": ([{"question": "One and one?", "answer": "#### 2"}], "--prompt_template|{prompt} Put it in \\boxed{}.|--system_prompt|Be kind.", ["system: Be kind.\nuser: One and one? Put it in \\boxed{}.\nassistant: "]),
    "worked": ([{"messages": [ASK, SAY], "ground_truth": "2", "dataset": "GSM8K", "source": "x"}], "", ["not used: answers at the end of messages, source", "user: Who is it?\nassistant: "]),
}  # fmt: skip
REFUSED: dict[str, tuple[str, list[dict], str, str]] = {
    "a picture": ("sft", [{"messages": [ASK | {"content": [{"type": "image_url", "image_url": "x"}]}, SAY]}], "", r":1: messages\[0\].content\[0\]: expected a part of type text, got 'image_url'"),
    "no content": ("sft", [{"messages": [ASK | {"content": None}, SAY]}], "", r":1: messages\[0\].content: expected text, got null"),
    "half a weight": ("sft", [{"messages": [ASK, SAY | {"weight": 0.5}]}], "", r"messages\[1\].weight: expected 0 or 1"),
    "opposite weights": ("sft", [{"messages": [ASK, SAY | {"weight": 0, "train": True}]}], "", r"messages\[1\].train: expected the same as weight"),
    "kto": ("sft", [{"prompt": "Who?", "completion": "One.", "label": False}], "", "label: a KTO row .*--only_label true"),
    "kto pairs": ("dpo", [{"prompt": "Who?", "completion": "One.", "label": False}], "", "label: a KTO row, .*expected chosen and rejected"),
    "another label": ("sft", [{"prompt": "Who?", "completion": "One.", "label": "good"}], "", "label: expected true or false.*'good'"),
    "two labels": ("sft", [{"prompt": "Who?", "completion": "One.", "label": True, "kto_tag": False}], "--only_label true", "kto_tag: expected the same as label"),
    "two kinds of calls": ("sft", [{"messages": [ASK, SAY | {"tool_calls": [CALL], "function_call": {"name": "g", "arguments": "{}"}}]}], "", r"messages\[1\].function_call: expected tool_calls or function_call"),
    "half of a character": ("sft", [{"instruction": "a", "output": "b", "history": [["\ud800", "x"]]}], "", "history: expected text, got a lone surrogate"),
    "half of a character in arguments": ("sft", [{"messages": [ASK, SAY | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud800"}}}]}]}], "", r"arguments: expected text, got a lone surrogate"),
    "a deep schema": ("sft", [{"messages": [ASK, SAY], "tools": [{"name": "f", "parameters": json.loads('{"a":' * 90 + "1" + "}" * 90)}]}], "", r"tools\[0\]: expected at most 64 levels"),
    "an input beside messages": ("sft", [{"instruction": [ASK], "input": "x", "output": "y"}], "", "input: expected none beside"),
    "both names": ("sft", [{"conversations": [HUMAN | {"content": "x"}, GPT]}], "", r"conversations\[0\]: expected from and value, or role and content, got both"),
    "judged already": ("dpo", [PAIR | {"chosen": "a", "rejected": "b", "better": "A"}], "--preference_column better", "chosen: expected answers to be judged"),
    "a judge of another kind": ("ppo", [{"prompt": [ASK], "reward_model": {"style": "model", "ground_truth": "2"}, "data_source": "openai/gsm8k"}], "", "reward_model.style: expected rule"),
    "nothing trained": ("sft", [{"messages": [ASK, SAY | {"weight": 0}]}], "", r"no row is left, all were dropped \(no turn that is trained\)"),
    "text": ("sft", [{"text": "It is one."}], "", "columns: expected messages or .*--text_column text"),
    "no label": ("sft", [{"prompt": "Who?", "completion": "One."}], "--only_label true", "label: expected true or false"),
    "two systems": ("sft", [{"system": "Be kind.", "messages": [{"role": "system", "content": "Be brief."}, ASK, SAY]}], "", "system: expected the conversation's own"),
    "arguments": ("sft", [{"messages": [ASK, SAY | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}], "", r"messages\[1\].tool_calls\[0\].arguments: expected JSON"),
    "calls of a user": ("sft", [{"messages": [ASK | {"tool_calls": [CALL]}, SAY]}], "", r"messages\[0\].tool_calls: expected on the assistant's turns"),
    "two thoughts": ("sft", [{"messages": [ASK, SAY | {"thinking": "a", "reasoning": "b"}]}], "", r"messages\[1\].reasoning: expected the same as thinking"),
    "history": ("sft", [{"instruction": "Add.", "output": "3", "history": ["Hello?"]}], "", "history: expected a list of"),
    "answers without a label": ("dpo", [PAIR], "", "chosen: got response_a and response_b: expected --preference_column"),
    "completions without a score": ("dpo", [SCORED], "", "chosen: got completions: expected --chosen_by_score"),
    "another score": ("dpo", [SCORED], "--chosen_by_score scor", r"completions\[0\].scor: expected a score, got nothing \(did you mean score\?\)"),
    "a number": ("dpo", [PAIR | {"better": 1}], "--preference_column better", "better: a number: expected --preference_numbers"),
    "another index": ("dpo", [PAIR | {"better": 2}], "--preference_column better --preference_numbers index", "better: expected 0 or 1"),
    "two ways": ("dpo", [PAIR], "--preference_column better --chosen_by_score score", "two ways to say one thing"),
    "nothing asked": ("ppo", [{"answer": "2"}], "", "messages: expected what is asked"),
    "no answer": ("ppo", [{"question": "One and one?"}], "", "ground_truth: missing"),
    "no verifier": ("ppo", [{"prompt": "One and one?", "answer": "2"}], "", "dataset: missing .*--verifier"),
    "unknown source": ("ppo", [{"prompt": [ASK], "reward_model": {"ground_truth": "2"}, "data_source": "mine/own"}], "", "--verifier.*'mine/own' is not a known one"),
    "a typo": ("ppo", [{"question": "One and one?", "answer": "#### 2", "dataset": "gms8k"}], "", "unknown verifier gms8k.*gsm8k"),
    "code": ("ppo", [{"messages": [ASK], "ground_truth": "assert f() == 1", "dataset": "code"}], "", "code"),
    "no number": ("ppo", [{"messages": [ASK], "ground_truth": "two", "dataset": "gsm8k"}], "--verifier math", "no number in"),
    "a template without a place": ("ppo", [MATHS], "--prompt_template|Answer in a box.", "--prompt_template: expected {prompt} once"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(embedded_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("with_tools") / "model"
    shutil.copytree(embedded_dir.model, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(autouse=True)
def no_plan(monkeypatch):
    """A dry run ends in a plan, in a process of its own: ten seconds that say nothing of rows."""
    for stage in ("sft", "dpo", "ppo"):
        monkeypatch.setattr(f"launch.{stage}.show_plan", lambda *_, **__: None)


def screen(stage: str, data: Path, flags: str, model: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> str:
    """What `python -m launch.STAGE --dry_run` shows; flags may be separated by bars."""
    module = importlib.import_module(f"launch.{stage}")
    words = (flags.split("|") if "|" in flags else flags.split()) + ["--dry_run", "--on_bad_row", "error"]
    words += ["--dataset_name", str(data), "--model_name_or_path", str(model), "--max_seq_length", "256"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
    words += ["--response_length", "8"] if stage == "ppo" else []
    module.train(parse(module.Config, words))
    return capsys.readouterr().out


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("stage", "form"), [(stage, form) for stage, of in (("sft", SFT), ("dpo", DPO), ("ppo", PPO)) for form in of]
)
def test_rows_are_read(stage, form, model, capsys, tmp_path):
    rows, flags, shown = {"sft": SFT, "dpo": DPO, "ppo": PPO}[stage][form]
    text = screen(stage, lines(tmp_path / "rows.jsonl", rows), flags, model, capsys, tmp_path)
    assert ("not used:" in text) == any("not used:" in part for part in shown), text
    for part in shown:
        assert part in text, text
        text = text[text.index(part) + len(part) :]


@pytest.mark.parametrize("reason", REFUSED)
def test_rows_are_refused(reason, model, capsys, tmp_path):
    stage, rows, flags, said = REFUSED[reason]
    with pytest.raises(UserError) as error:
        screen(stage, lines(tmp_path / "rows.jsonl", rows), flags, model, capsys, tmp_path)
    assert re.search(said, str(error.value)), str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl.gz"])
def test_tables_of_conversations(form, model, capsys, tmp_path):
    """A cell may hold turns as JSON text; an empty one says nothing."""
    rows = [{"instruction": "Who is it?", "input": "", "output": "It is one.", "system": "", "source": "x"}]
    turns = [{"messages": json.dumps(CALLING), "tools": json.dumps([TOOL]), "label": ""}]
    for rows_of, shown in ((rows, "user: Who is it?\nassistant: [[It is one.<|end|>]]"), (turns, "tool look_up\n")):
        path = tmp_path / f"{len(shown)}.{form}"
        if form == "jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows_of).encode()))
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, rows_of[0], delimiter="," if form == "csv" else "\t")
                table.writeheader()
                table.writerows(rows_of)
        text = screen("sft", path, "", model, capsys, tmp_path)
        assert shown in text
        assert ("not used: source" in text) == (rows_of is rows)


def test_a_table_gives_every_row_every_key(model, capsys, tmp_path):
    """parquet: a message has the keys of all messages, null where it says nothing; so has a call, with its arguments."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    given = {"look_up": {"what": "door", "n": None}, "add": {"what": None, "n": 2}}
    calls = [{"type": "function", "function": {"name": name, "arguments": given[name]}} for name in given]
    messages = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "one"},
        SAY,
    ]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "x.parquet")
    text = screen("sft", tmp_path / "x.parquet", "", model, capsys, tmp_path)
    assert (
        '[[ call look_up {"what": "door"} call add {"n": 2}<|end|>]]\ntool: one\nassistant: [[It is one.<|end|>]]'
        in text
    )
    assert "2 tool calls with null arguments, which are left out" in text


@pytest.mark.parametrize("choice", ["rendered", "each"])
def test_thoughts_of_earlier_turns(choice, embedded_dir, capsys, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(embedded_dir.model, directory)
    path = directory / "tokenizer_config.json"
    last = TEMPLATE.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": last}))
    said = SAY | {"reasoning_content": "It rang."}
    rows = [{"messages": [ASK, said, ASK, said]}]
    text = screen("sft", lines(tmp_path / "x.jsonl", rows), f"--history_thoughts {choice}", directory, capsys, tmp_path)
    turn = "user: Who is it?\nassistant: "
    if choice == "rendered":
        assert "1 thoughts that the chat template leaves out (--history_thoughts each)" in text
        assert f"{turn}[[It is one.<|end|>]]\n{turn}[[<think>It rang.</think>It is one.<|end|>]]" in text
    else:
        assert "1 conversations cut into an example for each turn" in text and "1 rows, 2 kept" in text
        assert f"{turn}[[<think>It rang.</think>It is one.<|end|>]]" in text


# --- problems of others, sampled and judged ---------------------------------------------------------------------------


def gsm8k_rows(shared: Path | None) -> list[dict]:
    """GSM8K's own form: of the real problems where they are, else of our own words."""
    if shared is None:
        return [{"question": f"What is {n} and one?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]
    text = (shared / "sft" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    found = [[message["content"] for message in json.loads(line)["messages"]] for line in text]
    return [{"question": question, "answer": answer} for question, answer in found]


@pytest.mark.parametrize("form", ["gsm8k", "gsm8k rows", "verl"])
def test_two_iterations_on_problems_of_others(form, model, tmp_path, request):
    """launch.ppo on GSM8K's own rows, on RLVR rows of them, and on verl's parquet."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    shared = shared if shared.is_dir() else None
    data = tmp_path / ("train.parquet" if form == "verl" else "train.jsonl")
    rows = gsm8k_rows(shared)
    assert all("####" in row["answer"] for row in rows)
    if form == "verl":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": row["question"]}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": row["answer"].rpartition("####")[2].strip()},
                "extra_info": {"index": i},
            }
            for i, row in enumerate(rows)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    elif form == "gsm8k rows":
        if shared is None:
            pytest.skip("no ../shared/data")
        data.write_text("\n".join((shared / "rlvr" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:8]))
    else:
        lines(data, rows)
    words = ["--dataset_name", data, "--model_name_or_path", model, "--max_seq_length", 2048, "--response_length", 8]
    words += ["--batch_size", 4, "--max_steps", 2, "--num_ppo_epochs", 1, "--cache_dir", tmp_path / "cache"]
    result = ranks.launch([*words, "--output_dir", tmp_path / "run"], module="launch.ppo")
    assert result.ok, result.output
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2]
    assert all("verified/gsm8k" in row for row in metrics if "loss" in row), result.output


# --- more bad rows than a run goes on with ----------------------------------------------------------------------------


def test_more_bad_rows_than_the_bound(embedded_dir, tmp_path):
    """On two ranks: refused in one line before a weight is loaded; with another bound the run begins, from what is
    tokenised by then, and the bound is nothing that a run is known by.
    """
    rows: list[Any] = [{"prompt": f"Who is {i}?", "chosen": "It is one.", "rejected": "Nobody."} for i in range(12)]
    rows[5:5], rows[9:9] = [{"prompt": "Why?", "chosen": None, "rejected": "x"}], [[7]]
    data = lines(tmp_path / "x.jsonl", rows)
    words = ["--dataset_name", data, "--model_name_or_path", embedded_dir.model, "--max_steps", 1, "--batch_size", 4]
    words += ["--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", "--quiet"]
    refused = ranks.launch(words, ranks=2)
    assert refused.codes == [2, 2] and "Traceback" not in refused.output, refused.output
    assert (
        f"error: {data}: 2 of 14 rows are bad, and --max_bad_rows 0.01 lets 1 pass: 1 x chosen: expected text or a list"
        " of messages, got null; 1 x expected an object, got a list; the first is"
    ) in refused.output
    assert "go on without them by --max_bad_rows 2" in refused.output and not (tmp_path / "run" / "final").exists()
    [store] = [d for d in (tmp_path / "cache" / "tokens").iterdir() if d.is_dir()]
    built = (store / "header.json").stat().st_mtime_ns
    trained = ranks.launch([*words, "--max_bad_rows", 2], ranks=2)
    assert trained.ok and (tmp_path / "run" / "final").exists(), trained.output
    again = ranks.launch([*words, "--max_bad_rows", 0.5], ranks=2)
    assert again.ok, again.output
    assert (store / "header.json").stat().st_mtime_ns == built

"""Examples before the question, rendered against a function of this file's own; which are taken; what is refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from engine.config import parse
from engine.data import PromptReader
from engine.data.chat import load_tokenizer
from engine.data.rows import BadRow
from engine.errors import UserError
from launch import evaluate
from launch.evaluation import few_shot

ANSWERS = [(f"How many are {i} and {i}?", f"Twice {i}.\n#### {2 * i}") for i in range(2, 8)]
QUESTION = {
    "messages": [{"role": "user", "content": "How many are 20 and 1?"}],
    "ground_truth": "21",
    "dataset": "gsm8k",
}
FORMS = {
    "question": lambda q, a: {"question": q, "answer": a},
    "prompt": lambda q, a: {"prompt": q, "completion": a},
    "instruction": lambda q, a: {"instruction": q, "input": "", "output": a},
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "conversations": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "query": lambda q, a: {"query": q, "response": a, "type": "x"},
}


@pytest.fixture(scope="module")
def chat(embedded_dir):
    return load_tokenizer(embedded_dir.model, 10_000)


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reader(chat, examples, fold=False, **flags):
    config = evaluate.Config(**flags)
    return few_shot.QuestionReader(PromptReader(chat, config, lambda *_: None, fold_system=fold), examples)


def text_of(chat, read, row=QUESTION):
    return chat.tokenizer.decode(read(row, Counter()).ids, skip_special_tokens=False)


def in_tulus_words(turns, end):
    """The conversation as Tülu's template writes it, up to the answer that is wanted."""
    said = []
    for role, content in turns:
        said.append(f"<|{role}|>\n{content}{end}\n" if role == "assistant" else f"<|{role}|>\n{content}\n")
    return "".join(said) + "<|assistant|>\n"


@pytest.mark.parametrize("form", FORMS)
def test_as_turns_of_the_chat(form, chat, tmp_path):
    path = file_of(tmp_path / "f.jsonl", [FORMS[form](*pair) for pair in ANSWERS])
    examples, lines = few_shot.read_exemplars(path, 3, chat, form="turns", drawn=False, seed=1)
    turns = [turn for q, a in ANSWERS[:3] for turn in (("user", q), ("assistant", a))]
    expected = in_tulus_words([*turns, ("user", "How many are 20 and 1?")], chat.end_of_turn)
    assert text_of(chat, reader(chat, examples)) == expected
    assert lines[0] == f"{path}: 3 examples" and any("not used: type" in line for line in lines) == (form == "query")


def test_as_text_in_the_questions_turn(chat, tmp_path):
    path = file_of(tmp_path / "f.jsonl", [FORMS["question"](*pair) for pair in ANSWERS])
    examples, _ = few_shot.read_exemplars(path, 2, chat, form="text", drawn=False, seed=1)
    text = (
        "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in ANSWERS[:2]) + "Question: How many are 20 and 1?\nAnswer:"
    )
    assert text_of(chat, reader(chat, examples)) == in_tulus_words([("user", text)], chat.end_of_turn)


def test_the_system_turn_stays_first_and_the_template_goes_around_every_question(chat, tmp_path):
    path = file_of(tmp_path / "f.jsonl", [FORMS["prompt"](*pair) for pair in ANSWERS])
    examples, _ = few_shot.read_exemplars(path, 1, chat, form="turns", drawn=False, seed=1)
    flags = {"prompt_template": "{prompt} Think.", "system_prompt": "Be kind."}
    (q, a), asked = ANSWERS[0], "How many are 20 and 1? Think."
    turns = [("user", f"{q} Think."), ("assistant", a), ("user", asked)]
    end = chat.end_of_turn
    assert text_of(chat, reader(chat, examples, **flags)) == in_tulus_words([("system", "Be kind."), *turns], end)
    folded = [("user", f"Be kind.\n\n{q} Think."), *turns[1:]]
    assert text_of(chat, reader(chat, examples, fold=True, **flags)) == in_tulus_words(folded, end)


def test_one_that_asks_the_question_itself_gives_way_to_the_next(chat, tmp_path):
    asked = ("How many are  20 and 1?\n", "#### 21")
    path = file_of(tmp_path / "f.jsonl", [FORMS["question"](*pair) for pair in (ANSWERS[0], asked, *ANSWERS[1:3])])
    examples, _ = few_shot.read_exemplars(path, 2, chat, form="turns", drawn=False, seed=1)
    text = text_of(chat, reader(chat, examples))
    assert text.count("How many are 20 and 1?") == 1 and ANSWERS[0][0] in text and ANSWERS[1][0] in text
    assert examples.lines() == ["few-shot: 1 prompts are among the examples themselves, and have others in their place"]
    few, _ = few_shot.read_exemplars(
        file_of(tmp_path / "g", [FORMS["question"](*asked)]) and path, 4, chat, form="turns", drawn=False, seed=1
    )
    assert text_of(chat, reader(chat, few)).count("<|user|>") == 4
    assert few.lines()[0].endswith("in their place, 1 of them with fewer than 4")
    other = QUESTION | {"messages": [{"role": "user", "content": "How many are 9 and 9?"}]}
    assert text_of(chat, reader(chat, few), other).count("<|user|>") == 5


def test_drawn_ones_are_a_function_of_seed_and_question(chat, tmp_path):
    path = file_of(tmp_path / "f.jsonl", [FORMS["question"](*pair) for pair in ANSWERS])

    def drawn(seed, question="How many are 20 and 1?"):
        examples, _ = few_shot.read_exemplars(path, 3, chat, form="turns", drawn=True, seed=seed)
        row = QUESTION | {"messages": [{"role": "user", "content": question}]}
        return text_of(chat, reader(chat, examples), row)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(6)}) > 3
    behind = {drawn(1, f"How many are {i} and 30?").partition("<|user|>\nHow many are ")[2][:1] for i in range(8)}
    assert len(behind) > 2  # other questions, other examples


def test_the_key_is_of_the_question_and_its_answer_alone(chat, tmp_path):
    path = file_of(tmp_path / "f.jsonl", [FORMS["question"](*pair) for pair in ANSWERS])
    examples, _ = few_shot.read_exemplars(path, 2, chat, form="turns", drawn=False, seed=1)
    plain, behind = (
        reader(chat, few_shot.FewShot()),
        reader(chat, examples, prompt_template="{prompt}!", system_prompt="S"),
    )
    key = plain(QUESTION, Counter()).key
    assert key == behind(QUESTION | {"id": 3, "source": "x"}, Counter()).key
    assert key != plain(QUESTION | {"ground_truth": "22"}, Counter()).key
    again = few_shot.told_apart([plain(QUESTION, Counter())] * 3)
    assert [question.key for question in again] == [key, f"{key}-2", f"{key}-3"]
    notes = Counter()
    assert plain(QUESTION | {"source": "olympiad", "id": 1}, notes).source == "olympiad"
    assert notes == {("not used", "id"): 1}


def test_a_column_says_where_a_row_is_from(chat):
    def source(row, column=None):
        config = evaluate.Config()
        read = few_shot.QuestionReader(PromptReader(chat, config, lambda *_: None), few_shot.FewShot(), column)
        return read(QUESTION | row, notes).source

    notes = Counter()
    assert source({"type": "Algebra", "source": "x"}, "type") == "Algebra" and notes == {("not used", "source"): 1}
    assert source({"data_source": "openai/gsm8k"}) == "openai/gsm8k" and source({}) == ""
    for row in ({}, {"typ": "a"}, {"type": 3}):
        with pytest.raises(BadRow, match=r"type: expected text \(--source_column\)"):
            source(row, "type")


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("rows", "form", "message"),
    [
        ([FORMS["question"](*ANSWERS[0])], "turns", "holds 1 examples, --num_few_shot asks for 2"),
        (
            [QUESTION, QUESTION],
            "turns",
            ":1: messages: expected turns of user and assistant, the assistant's last, got user",
        ),
        ([{"text": "x"}], "turns", "f.jsonl:1: columns: expected"),
        (
            [FORMS["question"](*ANSWERS[0]), FORMS["query"](*ANSWERS[1])],
            "turns",
            ":2: columns: the file begins with rows of question, this one is of query",
        ),
        (
            [FORMS["prompt"](*ANSWERS[0]) | {"label": False}],
            "turns",
            ":1: label: a row that says whether an answer was liked",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]}],
            "text",
            "expected turns of text alone, got reasoning_content",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]}],
            "text",
            "expected turns of text alone, got tool_calls",
        ),
        (
            [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant") * 2]}],
            "text",
            "expected one question and one answer (--few_shot_as text), got 4 turns",
        ),
        ([FORMS["question"]("a", "b<|end|>"), {}], "turns", ":1: content of message 1 holds the control token"),
    ],
)
def test_what_is_no_worked_answer_gets_one_line(rows, form, message, chat, tmp_path):
    end = chat.end_of_turn
    rows = [json.loads(json.dumps(row).replace("<|end|>", end)) for row in rows]
    path = file_of(tmp_path / "f.jsonl", rows)
    with pytest.raises(UserError) as caught:
        few_shot.read_exemplars(path, 2, chat, form=form, drawn=False, seed=1)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "--few_shot_file" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--num_few_shot 4", "--num_few_shot 4 needs --few_shot_file"),
        ("--num_few_shot -1", "--num_few_shot must not be negative, got -1"),
        ("--few_shot_file x.jsonl", "--few_shot_file is not read without --num_few_shot"),
        ("--few_shot_as text", "--few_shot_as is not read without --num_few_shot"),
        ("--few_shot_choice random", "--few_shot_choice is not read without --num_few_shot"),
    ],
)
def test_flags_that_are_not_read_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        evaluate.check_few_shot(parse(evaluate.Config, argv.split()))

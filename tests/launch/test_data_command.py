"""python -m launch.data: what it counts is what a training takes; likeness and overlap against their definitions."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config import parse
from engine.data import cuts, read_conversations, read_pairs
from engine.errors import UserError
from engine.model import open_model
from engine.world import start
from launch import data, dpo, sft
from launch.inspection import likeness, page, report, tally
from launch.inspection.likeness import EvaluationSet, near_duplicates, sketch_of, words_of
from launch.inspection.look import COLUMNS, REST_UNREAD, Lens
from launch.inspection.opened import opened, stage_of

ASK, SAY = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is one."}
SYSTEM = {"role": "system", "content": "Be brief."}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def talk(question: str, answer: str, **more: Any) -> dict:
    return {"messages": [ASK | {"content": question}, SAY | {"content": answer}], **more}


def pair(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def problem(question: str, truth: str) -> dict:
    return {"messages": [ASK | {"content": question}], "ground_truth": truth, "dataset": "gsm8k"}


@pytest.fixture
def screen(embedded_dir, tmp_path, capsys):
    """Runs the command on the embedded tokenizer; the lines that it prints."""

    def run(*words: object) -> list[str]:
        data.inspect([str(word) for word in words] + ["--model_name_or_path", str(embedded_dir.model)])
        return capsys.readouterr().out.splitlines()

    return run


def said(lines: list[str], name: str) -> str:
    """What stands behind a name, the lines that continue it included."""
    start_ = next((i for i, line in enumerate(lines) if line.startswith(f"{name} ")), None)
    assert start_ is not None, "\n".join(lines)
    more = [line for line in lines[start_ + 1 :]]
    end = next((i for i, line in enumerate(more) if not line.startswith(" ")), len(more))
    return "\n".join([lines[start_], *more[:end]])


# --- what is counted is what is trained -------------------------------------------------------------------------------


def rows_of(stage: str) -> list[Any]:
    """Rows of many lengths: some cut, some that keep nothing, some bad, some twice."""
    generator = np.random.Generator(np.random.Philox(key=3))
    rows: list[Any] = []
    for i in range(60):
        question, answer = (" ".join(["word"] * int(generator.integers(1, 40))) + f" {i % 50}" for _ in range(2))
        if stage == "sft":
            row = talk(question, answer, source=f"s{i % 2}")
            row["messages"] = [SYSTEM, *row["messages"]] if i % 5 == 0 else row["messages"]
        else:
            row = pair(question, answer, answer + " more" * int(generator.integers(1, 9)))
        rows.append(row)
    return [*rows[:20], "{", *rows[20:], {"messages": [SAY | {"content": 7}], "prompt": 8}]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("amount", ["", "0.5", "1.5", "7"])
def test_the_table_is_what_a_training_takes(stage, amount, embedded_dir, tmp_path):
    """Lengths, trained tokens and order of the examples that the stage itself reads, under a limit that cuts."""
    name = jsonl(tmp_path / "rows.jsonl", rows_of(stage))
    named = ["--mixer_list", name, amount] if amount else ["--dataset_name", name]
    words = [*named, "--model_name_or_path", str(embedded_dir.model), "--max_seq_length", "64"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--seed", "5", "--max_bad_rows", "2"]
    world = start()
    with opened(stage, parse(data.CONFIGS[stage], words), world) as found:
        datasets = data.look(found)
        table = tally.Table.of(datasets, 5, [of for of, _ in found.names])
    config = parse({"sft": sft.Config, "dpo": dpo.Config}[stage], words)
    base = open_model(config, world)
    if stage == "sft":
        examples, _ = read_conversations(config, base.chat, world, rows=config)
    else:
        examples, _ = read_pairs(config, "last", base.chat, world, rows=config)
    every = np.arange(len(examples))
    tokens, left = (table.columns[of][table.taken] for of in ("tokens", "left"))
    assert len(table.taken) == len(examples) > 5
    assert (np.minimum(tokens, 64).sum(1) - tokens.shape[1] == examples.tokens).all()
    assert (left == examples.counts(every)).all()
    assert (table.columns["trained"] > table.columns["left"]).any() and (tokens > 64).any()
    f = datasets[0].found
    assert f.rows == 62 and f.num_bad == 2 and [place for _, place, _ in f.bad] == [":21", ":62"]


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize("beyond", [True, False])
def test_a_row_whose_rest_cannot_be_tokenised(stage, beyond, embedded_dir, tmp_path, monkeypatch):
    """Behind the limit it is no bad row for the stage, and none here; before it, it is one for both."""
    for name, value in (("LONG", 500), ("PART", 100), ("MAX_WHOLE", 2000)):
        monkeypatch.setattr(cuts, name, value)
    text = "a word " * (200 if beyond else 1) + "x" * 3000
    row = {"sft": talk("Who?", text), "dpo": pair("Who?", text, "It is I."), "ppo": problem(text, "2")}[stage]
    good = {"sft": talk("Who?", "I."), "dpo": pair("Who?", "I.", "We."), "ppo": problem("1 + 1", "2")}[stage]
    name = jsonl(tmp_path / "rows.jsonl", [good, row])
    words = ["--dataset_name", name, "--model_name_or_path", str(embedded_dir.model), "--max_seq_length", "128"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--max_bad_rows", "2", "--dataset_num_proc", "1"]
    words += ["--response_length", "8"] if stage == "ppo" else []
    world = start()
    with opened(stage, parse(data.CONFIGS[stage], words), world) as found:
        (dataset,) = data.look(found)
        shown = found.readers[0].shown(row if beyond else good)
    if stage != "ppo":
        config = parse({"sft": sft.Config, "dpo": dpo.Config}[stage], words)
        chat = open_model(config, world).chat
        read = read_conversations(config, chat, world, rows=config) if stage == "sft" else None
        examples, _ = read or read_pairs(config, "last", chat, world, rows=config)
        assert len(examples) == 1 + beyond
        assert dataset.found.columns["left"][0].tolist() == examples.counts(np.arange(len(examples))).tolist()
    assert dataset.found.num_bad == (not beyond) and len(shown) == 1 and 0 < len(shown[0][0][0]) < 200
    assert dataset.found.notes[REST_UNREAD, ""] == beyond


def test_memory_of_an_example_is_bounded():
    """Whatever its length: numbers and hashes alone. The documented 150 bytes hold for a pair as well."""
    width = sum(np.dtype(dtype).itemsize * (2 if by_sequence else 1) for dtype, by_sequence in COLUMNS.values())
    assert width + likeness.PLACES * 2 <= 150


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_worker_counts_the_same(stage, embedded_dir, tmp_path):
    """A lens goes to processes as bytes."""
    name = jsonl(tmp_path / "rows.jsonl", rows_of(stage))
    words = ["--dataset_name", name, "--model_name_or_path", str(embedded_dir.model)]
    with opened(stage, parse(data.CONFIGS[stage], words), start()) as found:
        lens = Lens(found.readers[0], (EvaluationSet.of("e", [(":1", "word " * 9)]),))
        rows = [*found.sources[0].rows()]
        here, there = lens(rows), pickle.loads(pickle.dumps(lens))(rows)
    for name in COLUMNS:
        assert (here.columns[name][0] == there.columns[name][0]).all(), name
    assert here.overlaps == there.overlaps and here.overlaps


# --- the screen -------------------------------------------------------------------------------------------------------


def test_conversations(screen, tmp_path):
    rows = [
        *(talk(f"Question {i}?", f"Answer {i}.", id=i) for i in range(8)),
        talk("Question 0?", "Answer 0.", id=9),
        talk("Question 1?", "Another answer.", id=10),
        {"messages": [SYSTEM, ASK, SAY, ASK, SAY]},
        talk("Long?", "word " * 400),
        {"messages": [ASK]},
        "<!doctype html>",
    ]
    lines = screen("sft", "--dataset_name", jsonl(tmp_path / "x.jsonl", rows), "--max_seq_length", 128)
    assert "x.jsonl: 14 rows, 12 kept, 1 dropped (no turn that is trained), 1 bad" in said(lines, "rows")
    assert said(lines, "columns").endswith("messages") and said(lines, "not used").endswith("id")
    assert "x.jsonl:14: expected JSON" in said(lines, "bad rows")
    assert "more than one in 8.3 %, at most 2" in said(lines, "turns")
    assert "8.3 % begin" in said(lines, "system")
    assert "(x.jsonl:12)" in said(lines, "tokens")
    assert "1 of 12 conversations (8.3 %), longer than --max_seq_length 128" in said(lines, "cut")
    assert "1 of 12 repeat" in said(lines, "duplicates") and "x.jsonl:9 as x.jsonl:1" in said(lines, "duplicates")
    assert "1 repeat another's question" in said(lines, "questions")
    assert "x.jsonl:10 as x.jsonl:2" in said(lines, "questions")
    assert re.match(r"next +the cut loses \d+ % of the trained tokens; --max_seq_length \d+ would", lines[-1])


def test_pairs(screen, tmp_path):
    rows = [
        pair("One?", "A long answer to it.", "No."),
        pair("One?", "No.", "Yes."),
        pair("Two?", "Two.", "Two."),
        pair("Three?", "3", "A long answer, which is worse."),
    ]
    lines = screen("--dataset_name", jsonl(tmp_path / "x.jsonl", rows))
    assert said(lines, "stage").startswith("stage       dpo, guessed from chosen and rejected")
    assert "chosen is longer than rejected in 33 %" in said(lines, "pairs") and "1 identical" in said(lines, "pairs")
    assert "1 pairs choose an answer that another one rejects" in said(lines, "against")
    assert "x.jsonl:2 chooses what x.jsonl:1 rejects" in said(lines, "against")
    assert "x.jsonl:3: rejected: expected another answer than chosen" in said(lines, "bad rows")


def test_problems(screen, tmp_path):
    rows = [problem("One and one?", "2"), problem("One and one?", "3"), problem("Two and one?", "three")]
    rows += [problem("Two and two?", "4"), problem("Two and two?", "4"), problem("word " * 300, "1")]
    rows += [problem(f"{i} and none?", str(i)) for i in range(6)]
    words = ("--max_seq_length", 128, "--response_length", 16)
    lines = screen("--dataset_name", jsonl(tmp_path / "x.jsonl", rows), *words)
    assert said(lines, "stage") == "stage       ppo, whose flags and rows are grpo's too; `launch.data ppo` says it"
    assert "12 rows, 10 kept, 1 dropped (nothing left within 112 tokens), 1 bad" in said(lines, "rows")
    assert "gsm8k 11" in said(lines, "verifiers")
    assert "1 prompts stand there again with another ground truth" in said(lines, "questions")
    assert "x.jsonl:2 as x.jsonl:1" in said(lines, "questions")
    assert "1 of 10 repeat" in said(lines, "duplicates") and "x.jsonl:5 as x.jsonl:4" in said(lines, "duplicates")
    assert lines[-1].startswith("next        keep one ground truth for each prompt")


def test_the_stages_that_sample_read_the_same(screen, tmp_path):
    """All but the stage's name; and a flag of one of them says which."""
    name = jsonl(tmp_path / "x.jsonl", [problem(f"{i} and one?", str(i + 1)) for i in range(4)])
    words = ("--dataset_name", name, "--max_seq_length", 128, "--response_length", 16)
    of_ppo, of_grpo = screen("ppo", *words), screen("grpo", *words)
    assert of_ppo[-1].startswith("next        python -m launch.ppo ")
    assert [line.replace("grpo", "ppo") for line in of_grpo] == of_ppo != of_grpo
    only = screen(*words, "--advantage", "rloo")
    assert said(only, "stage") == "stage       grpo, the only one that has these flags"
    assert said(only, "not read") == "not read    advantage: the training's"


def test_plain_text_trains_all_but_its_first_token(screen, tmp_path):
    """The embedded tokenizer puts nothing before a text: its first token is nobody's target."""
    name = jsonl(tmp_path / "x.jsonl", [{"text": "abc" * 40}, {"text": "x" * 9}])
    lines = screen("sft", "--dataset_name", name, "--text_column", "text")
    numbers = re.search(r"\(([\d,]+) of ([\d,]+)\)", said(lines, "trained"))
    trained, fed = (int(n.replace(",", "")) for n in numbers.groups())
    assert fed - trained == 2


def test_rows_of_every_chunk_are_named(screen, tmp_path):
    """Rows are read in chunks of 256."""
    rows = [talk(f"Question {i}?", f"Answer {i}.") for i in range(600)]
    rows[599], rows[400] = talk("Long?", "word " * 50), rows[300]
    lines = screen("sft", "--dataset_name", jsonl(tmp_path / "x.jsonl", rows))
    assert "(x.jsonl:600)" in said(lines, "tokens")
    assert "x.jsonl:401 as x.jsonl:301" in said(lines, "duplicates")


def test_a_mixture_by_source(screen, tmp_path):
    one = jsonl(tmp_path / "one.jsonl", [talk(f"One {i}?", "Yes.", source=f"s{i % 2}") for i in range(8)])
    two = jsonl(tmp_path / "two.jsonl", [talk(f"Two {i}?", "word " * 20) for i in range(8)])
    lines = screen("sft", "--mixer_list", one, "1.0", two, 4)
    table = said(lines, "sources").splitlines()[1:]
    counts = [(line[: line.rindex(")") + 1].split()[-2:] if "(" in line else line.split()[:1]) for line in table]
    assert sorted(map(" ".join, counts)) == ["one.jsonl (s0)", "one.jsonl (s1)", "two.jsonl"]
    assert all(re.search(r" 4 +\d", line) for line in table)
    assert "not read" not in "\n".join(lines)


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo", "grpo"])
@pytest.mark.parametrize("rows", [[], ["{"], [{"n": 1}] * 30])
def test_nothing_that_can_be_trained(stage, rows, screen, tmp_path):
    words = ("--max_seq_length", 128, "--response_length", 16) if stage in ("ppo", "grpo") else ()
    name = jsonl(tmp_path / "x.jsonl", rows)
    lines = screen(stage, "--dataset_name", name, "--page", tmp_path / "x.html", "--examples", 2, *words)
    assert f"{len(rows)} rows, 0 kept" in said(lines, "rows")
    what = "no row can be trained: mend the first bad row" if rows else "the dataset is empty"
    assert lines[-1].startswith(f"next        {what}")
    if len(rows) > 10:
        bad = said(lines, "bad rows")
        assert bad.startswith("bad rows    30 as x.jsonl:1: ") and "and others" not in bad and "\n" not in bad


def test_the_trainings_flags_are_named_as_not_read(screen, tmp_path):
    name = jsonl(tmp_path / "x.jsonl", [talk("One?", "Two.")])
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1.0e-5\nmax_seq_length: 64\n")
    lines = screen("sft", "--dataset_name", name, "--config", tmp_path / "recipe.yaml", "--use_lora", "true")
    assert said(lines, "not read") == "not read    learning_rate, use_lora: the training's"
    assert "--max_seq_length 64" in said(lines, "cut")
    assert lines[-1].startswith("next        python -m launch.sft --model_name_or_path ")


def test_examples_are_printed_without_what_moves_a_cursor(screen, tmp_path):
    name = jsonl(tmp_path / "x.jsonl", [talk("One?\x1b[2J", "Two.")])
    text = "\n".join(screen("sft", "--dataset_name", name, "--examples", 1))
    assert "<|assistant|>\n[[Two.<|end|>]]" in text and "One?\\x1b[2J" in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        (talk("One?", "Two."), "sft"),
        ({"question": "One?", "answer": "Two."}, "sft"),
        (pair("One?", "a", "b"), "dpo"),
        ({"prompt": "One?", "response_a": "a", "response_b": "b"}, "dpo"),
        (problem("One?", "1"), "ppo"),
        ({"problem": "One?", "solution": "\\boxed{1}"}, "ppo"),
        ({"prompt": "One?", "reward_model": {"ground_truth": "1"}, "data_source": "openai/gsm8k"}, "ppo"),
        ({"prompt": "One?", "answer": "1"}, "ppo"),
    ],
)
def test_the_stage_is_guessed(row, stage):
    assert stage_of(row)[0] == stage


def test_a_flag_of_one_stage_says_which(screen, tmp_path):
    rows = [{"prompt": "One?", "response_a": "a", "response_b": "b", "better": "A"}]
    lines = screen("--dataset_name", jsonl(tmp_path / "x.jsonl", rows), "--preference_column", "better")
    assert said(lines, "stage") == "stage       dpo, the only one that has these flags"


HELD = ("sft", "--dataset_name", "{}/x.jsonl")
REFUSED = {
    "no stage": (("grop",), "'grop' is not a stage: sft, dpo, ppo, grpo (did you mean grpo?)"),
    "no stage's flags": (("--beta", "1", "--reduce_loss", "sum"), "command line: --beta belongs to launch.dpo"),
    "no file": ((*HELD[:2], "{}/y.jsonl"), "{}/y.jsonl: no such file or directory (did you mean x.jsonl?)"),
    "nothing to compare": ((*HELD, "--drop_overlap", "{}/z"), "--drop_overlap is not read without --against"),
    "no folder": ((*HELD, "--page", "{}/no/x.html"), "--page {}/no/x.html: no such directory"),
    "a folder": ((*HELD, "--page", "{}"), "--page {}: is a directory"),
    "itself": (
        (*HELD, "--against", "a", "--drop_overlap", "{}/x.jsonl"),
        "--drop_overlap {}/x.jsonl: is the dataset itself",
    ),
    "nothing asked": (
        (*HELD, "--against", "{}/bad.jsonl"),
        "--against {}/bad.jsonl: no row says what is asked, the first row is :1: columns",
    ),
    "no stage reads it": (
        ("--dataset_name", "{}/bad.jsonl"),
        "{}/bad.jsonl:1: no stage reads it (columns: expected messages",
    ),
    "examples": (("sft", "--examples", "-1"), "--examples must not be negative"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, screen, tmp_path):
    jsonl(tmp_path / "x.jsonl", [talk("One?", "Two.")])
    jsonl(tmp_path / "bad.jsonl", [{"n": 1}])
    words, expected = REFUSED[case]
    with pytest.raises(UserError) as error:
        screen(*(word.replace("{}", str(tmp_path)) for word in words))
    assert str(error.value).startswith(expected.replace("{}", str(tmp_path))), str(error.value)


# --- likeness ---------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from([f"w{i}" for i in range(6)]), max_size=40)
PARTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 24)), max_size=4)


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS | PARTS, min_size=1, max_size=3))
@example([[f"w{i}" for i in range(16)]], [[f"w{i}" for i in range(8)]])
@example([[f"w{i}" for i in range(30)]], [[f"w{i}" for i in (*range(11), *range(20, 30))]])
@settings(max_examples=150, deadline=None)
def test_overlap_is_that_of_the_definition(prompts, row):
    """Word by word: covered if it stands in 8 words in a row that the training row holds too. Rows hold parts of
    prompts, half of one as well.
    """
    row = [
        [w for part in message for w in (prompts[part[0] % len(prompts)][part[1] : part[1] + part[2]])]
        if message and isinstance(message[0], tuple)
        else message
        for message in row
    ]
    evaluation = EvaluationSet.of("e", [(f":{i}", " ".join(prompt)) for i, prompt in enumerate(prompts)])
    training = [word for message in row for word in message]
    grams = {tuple(training[i : i + 8]) for i in range(len(training) - 7)}
    expected = {}
    for p, prompt in enumerate(prompts):
        if 0 < len(prompt) < 8 and prompt in row:
            expected[p] = 1.0
        covered = {i + k for i in range(len(prompt) - 7) if tuple(prompt[i : i + 8]) in grams for k in range(8)}
        if len(covered) * 2 > len(prompt) >= 8:
            expected[p] = len(covered) / len(prompt)
    found = dict(evaluation.covered_by([words_of(" ".join(message)) for message in row]))
    assert found == pytest.approx(expected)


@given(st.integers(0, 120), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_sketch_estimates_jaccard(shared, seed):
    """The mean of 32 places is off by sqrt(J (1 - J) / 32), at most 0.09; five of these is never seen."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    texts = [generator.integers(0, 2**40, 124).astype(np.uint64) for _ in range(2)]
    texts[1][:shared] = texts[0][:shared]
    sets = [{tuple(t[i : i + 5]) for i in range(120)} for t in texts]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert abs(likeness.likeness(*map(sketch_of, texts)) - jaccard) < 5 * 0.09


def test_near_duplicates_are_found_and_others_are_not():
    generator = np.random.Generator(np.random.Philox(key=1))
    texts = [" ".join(f"w{n}" for n in generator.integers(0, 9999, 120)) for _ in range(200)]
    changed = [re.sub(r"^\S+ \S+", "other words", text.upper()) + "!" for text in texts[:50]]
    groups = near_duplicates(np.array([sketch_of(words_of(text)) for text in texts + changed]))
    assert (groups[:200] == np.arange(200)).all()
    assert (groups[200:] == np.arange(50)).mean() > 0.95


def test_rows_that_share_a_part_are_no_duplicates():
    """A third in common: some agree in a band of four places, and none in 80 % of all."""
    generator = np.random.Generator(np.random.Philox(key=2))
    texts = generator.integers(0, 2**40, (300, 120)).astype(np.uint64)
    texts[:, :70] = texts[0, :70]
    sketches = np.array([sketch_of(text) for text in texts])
    assert any(len(np.unique(band)) < 300 for band in sketches.view(np.uint64).T)
    assert (near_duplicates(sketches) == np.arange(300)).all()


def test_the_order_of_words_counts():
    words = words_of("the dog bit the man and then it ran away from him over the old wall")
    assert likeness.likeness(sketch_of(words), sketch_of(words[::-1])) < 0.2


def test_words_of_scripts_without_spaces():
    assert len(words_of("Das ist 1_2, oder?")) == 5
    assert len(words_of("日本語 テキスト")) == 7
    assert not len(words_of(" ... "))


def test_overlap_is_said_and_dropped(screen, tmp_path):
    long = "how many apples does the gardener carry home on a rainy day in may"
    rows = [talk(long.upper() + "?!", "Two."), talk("Short one?", "Yes."), talk("Another thing entirely?", "No.")]
    others = [talk(f"A question of its own, {i}?", "No.") for i in range(8)]
    name = jsonl(tmp_path / "x.jsonl", [*rows, talk("Tell me", f"They asked: {long}"), *others, "{"])
    test = jsonl(tmp_path / "test.jsonl", [problem(long, "2"), problem("short ONE", "1"), problem("never seen", "1")])
    clean = tmp_path / "clean.jsonl"
    lines = screen("sft", "--dataset_name", name, "--against", test)
    assert "2 (67 %) are contaminated by 3 training rows" in said(lines, "overlap")
    assert "100 % of test.jsonl:1 in x.jsonl:1" in said(lines, "overlap")
    assert "100 % of test.jsonl:2 in x.jsonl:2" in said(lines, "overlap")
    assert lines[-1].startswith("next        more than 2 % of an evaluation are contaminated")
    lines = screen("sft", "--dataset_name", name, "--eval_dataset_name", test, "--drop_overlap", clean)
    assert "9 rows, 3 that overlap left out, 1 that are no rows left out" in said(lines, "written")
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [rows[2], *others]


def test_histogram_counts_everything():
    lengths = np.array([1, 4, 5, 64, 65, 96, 97, 3000])
    lines = report.histogram(lengths, 80)
    counted = {int(m[1].replace(",", "")): int(m[2]) for m in (re.match(r"<= +([\d,]+) #* +(\d+) ", x) for x in lines)}
    assert {edge: n for edge, n in counted.items() if n} == {4: 2, 6: 1, 64: 1, 96: 2, 128: 1, 3072: 1}
    assert [line.split()[1] for line in lines if "cut from here" in line] == ["96"]


# --- the page ---------------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Texts by class, tags, and what stands in script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.stack = Counter[str](), []
        self.texts: dict[str, str] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag != "meta":
            self.stack.append(dict(attrs).get("class") or tag)

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, text):
        for name in set(self.stack):
            self.texts[name] = self.texts.get(name, "") + text


def test_the_page_shows_masks_and_runs_nothing_of_the_rows(screen, tmp_path):
    hostile = "</span></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    rows = [talk(hostile, f"Ça va 日本 😀 {hostile}", source=hostile), talk("One?", "Two.", source="b"), "<html>"]
    name, out = jsonl(tmp_path / "x.jsonl", rows), tmp_path / "x.html"
    lines = screen("sft", "--dataset_name", name, "--page", out)
    assert "2 examples, 1 bad rows" in said(lines, "page")
    text = out.read_text()
    parsed = Parsed(text)
    assert parsed.tags["script"] == parsed.tags["style"] == 1 and not parsed.tags["img"]
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href", "style")]
    policy = next(value for name, value in parsed.attributes if name == "content" and "default-src" in str(value))
    for of in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parsed.texts[of].encode()).digest()).decode()
        assert f"{of}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert parsed.texts["trained"].replace("trained", "", 1) in (
        f"Ça va 日本 😀 {hostile}<|end|>Two.<|end|>",
        f"Two.<|end|>Ça va 日本 😀 {hostile}<|end|>",
    )
    assert hostile in parsed.texts["context"] and "x.jsonl:3" in parsed.texts["bad"]
    assert parsed.texts["option"].count(hostile) == 1


def test_pieces_are_the_text(embedded_dir):
    """End to end they are the decoded sequence, whatever the tokens are."""
    base = open_model(
        parse(sft.Config, ["--model_name_or_path", str(embedded_dir.model), "--dataset_name", "x"]), start()
    )

    @given(st.text(alphabet="ab é日😀\n", max_size=30), st.integers(0, 40))
    @settings(max_examples=60, deadline=None)
    def check(text, limit):
        ids, mask = base.chat.encode([ASK, SAY | {"content": text}], 10**6, False)
        shown = [*page.pieces(base.chat, ids, mask, limit)]
        assert "".join(piece.text for piece in shown) == base.chat.tokenizer.decode(ids)
        assert " ".join(piece.ids for piece in shown) == " ".join(map(str, ids))
        assert [piece.control for piece in shown].count(True) == 1
        trained = "".join(piece.text for piece in shown if piece.trained)
        assert trained == text + "<|end|>"
        assert sum(len(piece.ids.split()) for piece in shown if not piece.cut) >= min(limit, len(ids))
        assert all(piece.cut for piece in shown[limit:]) and (limit >= len(shown) or shown[-1].cut)

    check()

"""Supervised fine-tuning: the loss against scalar loops, the forms of its data, the default, and real input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from engine.data.conversations import ConversationEncoder, conversation, first_form, form_of
from engine.data.files import Source
from engine.data.rows import BadRow
from losses.sft import denominator, sft, token_weights
from tests.families import save_family
from tests.launch.test_equivalence import Runs, rows
from tests.ranks import launch

RECIPES = sorted((Path(__file__).resolve().parents[2] / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("reduce", ["token", "sum", "mean"])
def test_reductions_against_scalar_loops(reduce):
    sequences = [[-0.5, -1.5], [-2.0], [-0.1, -0.2, -0.3, -4.0]]
    counts = torch.tensor([len(s) for s in sequences])
    logprobs = torch.tensor([x for s in sequences for x in s])
    expected = {
        "token": sum(-x for s in sequences for x in s) / 7,
        "sum": sum(-x for s in sequences for x in s) / 3,
        "mean": sum(sum(-x for x in s) / len(s) for s in sequences) / 3,
    }[reduce]
    n = denominator(7, 3, reduce)
    assert (sft(logprobs, token_weights(counts, reduce)) / n).item() == pytest.approx(expected, rel=1e-6)
    # in any two parts, as micro-batches would cut it
    parts = [
        sft(logprobs[:2], token_weights(counts[:1], reduce)) / n,
        sft(logprobs[2:], token_weights(counts[1:], reduce)) / n,
    ]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-6)


def test_an_unknown_reduction():
    with pytest.raises(ValueError, match="token, sum, mean"):
        token_weights(torch.tensor([1]), "max")


USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}
FORMS = [
    ({"messages": [USER, ANSWER]}, "messages"),
    ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]}, "conversations"),
    ({"prompt": "a?", "completion": "b."}, "prompt"),
    ({"prompt": [USER], "completion": [ANSWER]}, "prompt"),
    ({"instruction": "a?", "input": "", "output": "b."}, "instruction"),
    ({"instruction": "a?", "output": "b."}, "instruction"),
]


@pytest.mark.parametrize("row, form", FORMS)
def test_every_form_is_the_same_conversation(row, form):
    assert form_of(row) == form and conversation(row, form).messages == [USER, ANSWER]


def test_the_input_follows_the_instruction():
    assert (
        conversation({"instruction": "Add.", "input": "1 2", "output": "3"}, "instruction").messages[0]["content"]
        == "Add.\n\n1 2"
    )


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "x"}, "columns: expected"),
        ({"messages": [USER], "conversations": [USER]}, "got messages and conversations"),
        ({"query": "a", "response": "b", "prompt": "a", "completion": "b"}, "got prompt, completion and query"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": "hello"}, "messages: expected"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0].content"),
        ({"conversations": ["x"]}, "conversations[0]"),
        ({"prompt": 3, "completion": "x"}, "prompt: expected"),
        ({"instruction": "x", "output": ["y"]}, "output[0]: expected"),
    ],
)
def test_bad_rows_name_the_field(row, said):
    with pytest.raises(BadRow) as bad:
        conversation(row, form_of(row))
    assert said in str(bad.value)


def test_two_forms_in_one_file(embedded_dir):
    from engine.data.chat import load_tokenizer

    encode = ConversationEncoder(load_tokenizer(embedded_dir.model, 512), 100, "messages")
    with pytest.raises(BadRow, match="the file begins with messages, this row has prompt, completion"):
        encode({"prompt": "a?", "completion": "b."})
    source = Source("x", "", lambda: iter([(":1", BadRow("torn")), (":2", {"prompt": "a", "completion": "b"})]))
    assert first_form(source) in (None, "prompt")


def test_a_conversation_without_an_assistant_is_dropped(embedded_dir):
    from engine.data.chat import load_tokenizer

    encode = ConversationEncoder(load_tokenizer(embedded_dir.model, 512), 100, "messages")
    assert encode({"messages": [USER]}) == "no turn that is trained"
    ((ids, mask),) = encode({"messages": [USER, ANSWER, USER, ANSWER]})
    assert encode.chat.tokenizer.decode(ids[mask]) == "b.<|end|>b.<|end|>"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_parse(recipe):
    import importlib

    from engine.config import as_dict, parse

    stage = importlib.import_module(f"launch.{recipe.stem.rsplit('_', 1)[1]}")
    config = parse(stage.Config, ["--config", str(recipe)])
    assert all(as_dict(config)[name] is not None for name in yaml.safe_load(recipe.read_text()))


def test_published_values():
    """Facts section 0: what a reader of the paper would check first."""
    read = {p.stem: yaml.safe_load(p.read_text()) for p in RECIPES}
    assert [read[f"tulu3_{n}"]["learning_rate"] for n in ("8b_sft", "70b_sft", "8b_dpo", "70b_dpo")] == [
        5e-6,
        2e-6,
        5e-7,
        2e-7,
    ]
    assert {read[f"tulu3_{n}"]["batch_size"] for n in ("8b_sft", "70b_sft", "8b_dpo", "70b_dpo")} == {128}
    assert {read[f"tulu3_{n}"]["max_seq_length"] for n in ("8b_sft", "70b_sft")} == {4096}
    assert {(read[f"tulu3_{n}"]["beta"], read[f"tulu3_{n}"]["warmup_ratio"]) for n in ("8b_dpo", "70b_dpo")} == {
        (5.0, 0.1)
    }


# --- through the entry point ------------------------------------------------------------------------------------------


def test_no_argument_at_all(tmp_path):
    result = launch(["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"], 2, "launch.sft")
    assert result.ok, result.output
    before, *_, after = (row for row in rows(tmp_path / "out") if "eval/loss" in row)
    assert after["eval/loss"] < 1.5 < 5 < before["eval/loss"] and after["eval/token_accuracy"] > 0.6
    assert (
        all(f"greedy sample after step {row['step']}:" in result.output for row in (before, after))
        and after["step"] > 100
    )


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_other_reductions_do_not_depend_on_the_layout(reduce, tmp_path, embedded_dir):
    flags = {
        "model_name_or_path": save_family("llama", tmp_path / "model", embedded_dir.model),
        "dataset_name": embedded_dir.train_conversations,
        "cache_dir": tmp_path / "cache",
        "batch_size": 9,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "sample_tokens": 0,
        "reduce_loss": reduce,
    }
    runs = Runs("sft", tmp_path, flags)
    a, b = rows(runs.run("one", 1, micro_batch_tokens=9999)), rows(runs.run("two", 2, micro_batch_tokens=100))
    for x, y in zip(a, b, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5) and y["grad_norm"] == pytest.approx(
            x["grad_norm"], rel=1e-4
        )


def test_real_conversations_and_a_mixture(shared_data, tmp_path, embedded_dir):
    """Real GSM8K beside the embedded conversations, 2 ranks, a few steps (an epoch is `make slow-tests`)."""
    flags = {
        "model_name_or_path": save_family(
            "llama", tmp_path / "model", embedded_dir.model, max_position_embeddings=1024
        ),
        "cache_dir": tmp_path / "cache",
        "batch_size": 16,
        "max_steps": 3,
        "max_seq_length": 400,
        "sample_tokens": 0,
    }
    mixture = [
        "--mixer_list",
        shared_data / "sft" / "gsm8k_train.jsonl",
        "0.1",
        embedded_dir.train_conversations,
        "200",
    ]
    result = launch([*Runs("sft", tmp_path, flags).command("out"), *mixture], 2, "launch.sft")
    assert result.ok and "7472 rows" in result.output and " 944 conversations, " in result.output, result.output
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "out"))


@pytest.mark.drill
def test_an_epoch_of_real_conversations(shared_data, tmp_path, embedded_dir):
    flags = {
        "model_name_or_path": save_family(
            "llama", tmp_path / "model", embedded_dir.model, max_position_embeddings=2048, initializer_range=0.02
        ),
        "dataset_name": shared_data / "sft" / "gsm8k_train.jsonl",
        "cache_dir": tmp_path / "cache",
        "num_train_epochs": 1,
        "learning_rate": 5e-3,
    }
    result = launch(Runs("sft", tmp_path, flags).command("out"), 2, "launch.sft", timeout=3600)
    assert result.ok, result.output
    found = rows(tmp_path / "out")
    assert len(found) == math.ceil(7472 / 128) and found[-1]["loss"] < 0.8 * found[0]["loss"]

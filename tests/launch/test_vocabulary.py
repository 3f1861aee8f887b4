"""Tokens for a base model, through the real entry points: trained, resumed, exported, on one rank and on several."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.planner import plans, report, search
from tests.families import save_family
from tests.launch.test_equivalence import digest, rows, trajectory
from tests.ranks import launch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LORA = ("--use_lora", "true", "--lora_rank", 2, "--lora_modules_to_save", "embed_tokens", "lm_head")


class Place:
    """A directory with a tied model, a template, and the runs that share them."""

    def __init__(self, root: Path, embedded_dir) -> None:
        self.root = root
        self.model = save_family("llama_biased", root / "model", embedded_dir.model, initializer_range=0.05)
        self.data = {"sft": embedded_dir.train_conversations, "dpo": embedded_dir.train_pairs}
        (root / "chatml.jinja").write_text(CHATML)

    def run(self, stage: str, name: str, *words, ranks: int = 1, model: bool = True) -> str:
        """What the run printed."""
        argv = ["--add_special_tokens", "<|im_start|>", "<|im_end|>", "--chat_template", self.root / "chatml.jinja"]
        argv += ["--cache_dir", self.root / "cache", "--output_dir", self.root / name]
        argv += ["--batch_size", 8, "--learning_rate", 2e-3, *(("--sample_tokens", 0) if stage == "sft" else ())]
        if model:
            argv += ["--model_name_or_path", self.model, "--dataset_name", self.data[stage]]
        result = launch([*argv, *words], ranks, f"launch.{stage}", self.root / f"{name}.log")
        assert result.ok, result.output
        return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory, embedded_dir) -> Place:
    return Place(tmp_path_factory.mktemp("vocabulary"), embedded_dir)


def identity_of(output: str) -> str:
    return re.search(r"weights ([0-9a-f]{16})", output)[1]


def test_two_steps_and_what_is_left(place):
    """On the embedded model; what is exported is a ChatML model."""
    said = place.run("sft", "embedded", "--max_steps", 2, model=False)
    assert "embedding and head grow from 512 to 514 rows" in said
    assert "chatml.jinja; a turn ends with '<|im_end|>'" in said
    final = place.root / "embedded" / "final"
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert lm.config.vocab_size == len(lm.get_input_embeddings().weight) == len(tokenizer) == 514
    assert tokenizer.chat_template == CHATML
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi."}], add_generation_prompt=True, return_dict=True
    )
    assert list(ids["input_ids"]).count(512) == 2
    assert lm.generation_config.eos_token_id[0] == 513 and not lm.config.tie_word_embeddings
    rows_VD = lm.get_input_embeddings().weight
    assert not torch.equal(rows_VD[512], rows_VD[513])  # equal rows part at the first step


def test_any_number_of_ranks_and_a_resumption(place):
    """The same weights on 1 and 3 ranks (514 rows are no multiple of 3), to the bit; a resumed run ends in the bits of
    one that was not stopped; tied stays tied.
    """
    words = ("--max_steps", 4, "--save_steps", 2)
    one, three = place.run("sft", "one", *words), place.run("sft", "three", *words, ranks=3)
    assert identity_of(one) == identity_of(three)
    losses = [[row["loss"] for row in rows(place.root / name)] for name in ("one", "three")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    before, ended = trajectory(place.root / "one"), digest(place.root / "one")
    shutil.rmtree(place.root / "one" / "final")
    assert "resuming after step 2" in place.run("sft", "one", *words)
    assert (trajectory(place.root / "one"), digest(place.root / "one")) == (before, ended)
    config = json.loads((place.root / "one" / "final" / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["vocab_size"] == 514
    assert "lm_head.weight" not in load_file(place.root / "one" / "final" / "model.safetensors")


def test_adapters_with_a_trained_vocabulary_against_the_base_without(place):
    """DPO against the frozen base (its step 0 checks that they are the same), resumed; then from the adapter; tied
    weights have parted, and the export says so.
    """
    words = (*LORA, "--max_steps", 3, "--save_steps", 2)
    said = place.run("dpo", "base", *words, "--reference", "base", ranks=2)
    assert "embed_tokens and lm_head, beside the adapters; embedding and head, one tensor" in said
    assert "step 0: margins" in said
    final = place.root / "base" / "final"
    lm = AutoModelForCausalLM.from_pretrained(final)
    config = json.loads((final / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["vocab_size"] == 514
    assert not torch.equal(lm.get_input_embeddings().weight, lm.get_output_embeddings().weight)
    before, ended = trajectory(place.root / "base"), digest(place.root / "base")
    shutil.rmtree(final)
    place.run("dpo", "base", *words, "--reference", "base", ranks=2)
    assert (trajectory(place.root / "base"), digest(place.root / "base")) == (before, ended)
    start = ("--use_lora", "true", "--adapter_name_or_path", final / "adapter", "--reference", "adapter")
    said = place.run("dpo", "again", *start, "--max_steps", 1, "--export_adapter", "true")
    assert "step 0: margins" in said and "embed_tokens and lm_head, beside the adapters" in said
    assert len(AutoTokenizer.from_pretrained(place.root / "again" / "final")) == 514


def test_the_plan_knows_the_vocabulary(place):
    """A dry run's plan has the trained numbers of the run itself: adapters, and both copies of 514 rows."""
    said = place.run("sft", "dry", *LORA, "--dry_run", "true")
    planned = int(re.search(r"plan: .* parameters, ([\d,]+) trained", said)[1].replace(",", ""))
    run = place.run("sft", "wet", *LORA, "--max_steps", 1)
    assert planned == int(re.search(r"policy: .* parameters, ([\d,]+) trained", run)[1].replace(",", ""))
    assert planned > 2 * 514 * 32
    assert "<|im_start|>assistant\n[[" in said


def test_a_plan_suggests_adapters_that_train_new_tokens():
    """Else what it suggests would be refused."""
    plan: Any = SimpleNamespace(
        stage="sft",
        ranks=1,
        device=SimpleNamespace(name="cpu"),
        seen=SimpleNamespace(gradient_sync=("every", ""), vocabulary=("embed_tokens", "lm_head")),
    )
    saved = {"lora_modules_to_save": ("embed_tokens", "lm_head")}
    for flags, brought in (
        ({"add_special_tokens": ("<a>",)}, saved),
        ({}, {}),
        ({"add_special_tokens": ("<a>",), "use_lora": True} | saved, {}),
    ):
        plan.config = plans.SftPlan(model_name_or_path="m", dataset_name="d", **flags)
        found = [change for kind in search.changes(plan) for change in kind if "use_lora" in change]
        assert found
        for change in found:
            assert {name: value for name, value in change.items() if name in saved} == brought
    assert report.as_words(saved["lora_modules_to_save"]) == " embed_tokens lm_head"
    assert (report.as_words(True), report.as_words(4)) == ("", " 4")

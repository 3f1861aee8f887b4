"""Ten minutes of a real chat model on real data: what is sampled is what the library's own generation gives, the loss
falls, and what is exported is better at what it was trained on. The model is made by ../shared/tools/real_model.py.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import terminal
from launch import demo, evaluate, sft
from tests.needs import matplotlib

pytestmark = pytest.mark.drill
TOOL = Path(__file__).resolve().parents[3] / "shared" / "tools" / "real_model.py"
TRAINED = 48  # conversations
MARGIN = 0.15  # nats a token that the loss on them must fall by


@pytest.fixture(scope="module")
def real_model(tmp_path_factory) -> Path:
    if not TOOL.is_file():
        pytest.skip("the maker of a real model (../shared/tools) is not here")
    directory = tmp_path_factory.mktemp("real") / "model"
    done = subprocess.run([sys.executable, TOOL, directory], capture_output=True, text=True, check=False)
    if not (directory / "config.json").is_file():
        pytest.skip(f"the real model could not be made: {done.stderr[-200:]}")
    return directory


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_greedy_answers_are_the_librarys(real_model, shared_data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "answers.jsonl"
    evaluate.evaluate(
        evaluate.Config(
            model_name_or_path=str(real_model),
            dataset_name=str(shared_data / "rlvr" / "gsm8k_test.jsonl"),
            num_prompts=4,
            response_length=48,
            temperature=0.0,
            output=str(output),
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    for row in rows(output):
        ids = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            theirs = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["response"] == tokenizer.decode(theirs, skip_special_tokens=True)


def test_the_loss_falls_and_what_is_exported_is_better_at_it(real_model, shared_data, tmp_path):
    lines = (shared_data / "sft" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:TRAINED]
    data = tmp_path / "conversations.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    flags = {
        "dataset_name": str(data),
        "batch_size": 8,
        "learning_rate": 5e-5,
        "sample_tokens": 0,
        "max_seq_length": 512,
    }
    sft.train(sft.Config(model_name_or_path=str(real_model), output_dir=str(tmp_path / "run"), **flags))
    losses = [row["loss"] for row in rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2 * math.ceil(TRAINED / 8)
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - MARGIN

    def loss_of(model: Path, name: str) -> float:
        """On the same conversations, before the first of no steps worth the name."""
        held_out = flags | {"eval_dataset_name": str(data), "max_steps": 1, "learning_rate": 1e-9}
        sft.train(sft.Config(model_name_or_path=str(model), output_dir=str(tmp_path / name), **held_out))
        return next(row["eval/loss"] for row in rows(tmp_path / name / "metrics.jsonl") if "eval/loss" in row)

    assert loss_of(tmp_path / "run" / "final", "after") < loss_of(real_model, "before") - MARGIN


@matplotlib
def test_a_look_at_the_whole_recipe(real_model, shared_data, tmp_path):
    with terminal.subdued():
        demo.demo(
            demo.Config(
                model_name_or_path=str(real_model),
                conversations=str(shared_data / "sft" / "gsm8k_train.jsonl"),
                pairs=str(shared_data / "preferences" / "gsm8k_model_solutions.jsonl"),
                output_dir=str(tmp_path),
                cache_dir=str(tmp_path / "cache"),
                scale=0.04,
            )
        )
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results["rows"]] == ["base", "SFT", "DPO", "PPO", "GRPO"]
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in results["rows"])
    assert (tmp_path / "report.html").is_file()

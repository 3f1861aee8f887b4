"""launch.export: a step's model is that of a run stopped there, by any ranks and under adapters; cards; crashes; and
refusals.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine import world
from engine.config import flags_of
from engine.data.batch import micro_batch
from engine.errors import UserError
from engine.model import export as exporting
from engine.train import card
from launch import grpo
from launch.export import size
from tests import needs, ranks
from tests.families import load, save_family
from tests.launch.test_equivalence import Runs

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def here():
    return world.start()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, embedded_dir) -> Runs:
    root = tmp_path_factory.mktemp("export")
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, **WIDE),
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_conversations,
        "batch_size": 8,
        "max_steps": 3,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "save_steps": 2,
        "sample_tokens": 0,
    }
    return Runs("sft", root, flags)


@pytest.fixture(scope="module")
def whole(runs):
    """A run of three steps on one rank."""
    return runs.run("whole")


def run(root: Path, *argv, count=1, hook="") -> ranks.Result:
    return ranks.launch([*argv], count, module="launch.export", log=root / "export.log", hook=hook)


def weights(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def copied(run_directory: Path, to: Path) -> Path:
    """An unfinished run: without its final/."""
    shutil.copytree(run_directory, to, ignore=shutil.ignore_patterns("final"))
    return to


def test_a_step_is_the_model_of_a_run_that_stopped_there(runs, whole, tmp_path):
    stopped = runs.run("stopped", max_steps=2)
    result = run(tmp_path, whole, "--step", 2, "--output_dir", tmp_path / "out")
    assert result.ok and "done: step 2 of" in result.output, result.output
    assert weights(tmp_path / "out") == weights(stopped / "final") != weights(whole / "final")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (stopped / "final" / name).read_bytes()
    newest = copied(whole, tmp_path / "unfinished")
    for place in (newest, newest / "checkpoints" / "step-000002"):
        assert run(tmp_path, place).ok and weights(newest / "step-2") == weights(stopped / "final")
        shutil.rmtree(newest / "step-2")


def test_two_ranks_checkpoint_is_exported_by_one(runs, tmp_path):
    stopped, both = runs.run("stopped_2", 2, max_steps=2), runs.run("whole_2", 2)
    for count in (1, 2):
        out = tmp_path / str(count)
        assert run(tmp_path, both, "--step", 2, "--output_dir", out, count=count).ok
        assert weights(out) == weights(stopped / "final")


def test_the_export_says_what_the_policy_says(whole, here, tmp_path):
    assert run(tmp_path, whole, "--step", 2, "--output_dir", tmp_path / "out", "--max_shard_size", "100KB").ok
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored: dict = {}
    for path in (whole / "checkpoints" / "step-000002").glob("*.safetensors"):
        stored |= load_file(path)
    assert all(torch.equal(stored[f"policy.master.lm.{name}"], p) for name, p in model.named_parameters())
    policy = load(tmp_path / "out", here, dtype=torch.float32)
    ids, mask = np.arange(2, 20), np.arange(18) > 0
    with torch.no_grad():
        ours = policy.logprobs(micro_batch([(ids, mask)], (0,), here.device))
        theirs = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].log_softmax(-1)
    assert torch.allclose(ours, theirs.gather(1, torch.from_numpy(ids[1:])[:, None])[:, 0], atol=1e-5)


@pytest.fixture(scope="module", params=["false", pytest.param("true", marks=needs.bitsandbytes)])
def adapted(request, runs):
    flags = {"use_lora": "true", "load_in_4bit": request.param, "lora_rank": 4}
    return request.param, flags, runs.run(f"lora_{request.param}", **flags)


def test_adapters_are_merged_or_alone(adapted, runs, tmp_path):
    four_bit, flags, trained = adapted
    stopped = runs.run(f"lora_stopped_{four_bit}", **flags, max_steps=2)
    assert run(tmp_path, trained, "--step", 2, "--output_dir", tmp_path / "merged").ok
    assert weights(tmp_path / "merged") == weights(stopped / "final")
    result = run(tmp_path, trained, "--step", 2, "--output_dir", tmp_path / "alone", "--adapter_only")
    assert result.ok and "for --adapter_name_or_path or PeftModel.from_pretrained" in result.output
    adapter = "adapter_model.safetensors"
    ours = [(tmp_path / name / adapter).read_bytes() for name in ("alone", "merged/adapter")]
    assert ours == [(stopped / "final" / "adapter" / adapter).read_bytes()] * 2
    assert "library_name: peft" in (tmp_path / "alone" / "README.md").read_text()
    refused = run(
        tmp_path, trained, "--step", 2, "--output_dir", tmp_path / "x", "--adapter_only", "--dtype", "float16"
    )
    assert refused.codes == [2] and "--dtype is not read with an adapter alone" in refused.output

    # and without a run: the adapter that was just written, merged into its base
    argv = ["--model_name_or_path", runs.root / "model", "--adapter_name_or_path", tmp_path / "alone"]
    argv += ["--load_in_4bit"] * (four_bit == "true")
    result = run(tmp_path, *argv, "--output_dir", tmp_path / "again")
    assert result.ok and weights(tmp_path / "again") == weights(stopped / "final"), result.output
    assert not (tmp_path / "again" / "adapter").exists() and "warning" not in result.output
    assert "with the adapter" in (tmp_path / "again" / "README.md").read_text()


def test_an_adapter_on_another_base_is_one_line(adapted, runs, embedded_dir, tmp_path):
    _, _, trained = adapted
    other = save_family("llama", tmp_path / "other", embedded_dir.model, **WIDE, initializer_range=0.3)
    adapter = trained / "final" / "adapter"
    result = run(
        tmp_path, "--model_name_or_path", other, "--adapter_name_or_path", adapter, "--output_dir", tmp_path / "o"
    )
    assert result.codes == [2] and "the adapter was trained on other weights" in result.output
    result = run(tmp_path, trained, "--step", 2, "--model_name_or_path", other, "--output_dir", tmp_path / "o")
    assert result.codes == [2] and "is another model" in result.output and not (tmp_path / "o").exists()


def test_a_model_in_another_dtype(whole, tmp_path):
    argv = ["--model_name_or_path", whole / "final", "--dtype"]
    result = run(tmp_path, *argv, "bfloat16", "--output_dir", tmp_path / "b")
    assert result.ok and "bfloat16 rounds " in result.output
    before, after = (load_file(d / "model.safetensors") for d in (whole / "final", tmp_path / "b"))
    assert all(torch.equal(after[name], t.bfloat16()) for name, t in before.items())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    again = ["--model_name_or_path", tmp_path / "b", "--output_dir", tmp_path / "f", "--dtype", "float32"]
    result = run(tmp_path, *again)
    assert result.ok and "rounds" not in result.output  # every bfloat16 is a float32


# --- what goes wrong while it is written ------------------------------------------------------------------------------


def policy_of(embedded_dir, here, tmp_path):
    directory = save_family("llama", tmp_path / "model", embedded_dir.model)
    return directory, load(directory, here, dtype=torch.float32)


def test_numbers_beyond_the_dtype_are_refused(embedded_dir, here, tmp_path):
    directory, policy = policy_of(embedded_dir, here, tmp_path)
    with torch.no_grad():
        policy.lm.lm_head.weight[3, 1] = 1e5
    options = {"end_ids": (1,), "notes": []}
    tokenizer = exporting_tokenizer(directory)
    with pytest.raises(UserError, match=r"is not written: lm_head\.weight holds numbers beyond the range of float16"):
        exporting.save_model(policy.lm, tokenizer, directory, tmp_path / "o", here, dtype=torch.float16, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"] and options["notes"] == []
    exporting.save_model(policy.lm, tokenizer, directory, tmp_path / "o", here, dtype=torch.bfloat16, **options)
    assert options["notes"][0].startswith("bfloat16 rounds")


def exporting_tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("place", ["save_file", "_save_configs"])
def test_a_full_disk_is_one_line_and_leaves_nothing(place, embedded_dir, here, tmp_path, monkeypatch):
    directory, policy = policy_of(embedded_dir, here, tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, place, full)
    with pytest.raises(UserError, match=r"o is not written: .*: No space left on device: free some"):
        tokenizer = exporting_tokenizer(directory)
        exporting.save_model(policy.lm, tokenizer, directory, tmp_path / "o", here, dtype=torch.float32, end_ids=(1,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_crash_leaves_nothing_that_looks_finished(whole, tmp_path):
    argv = [whole, "--step", 2, "--output_dir", tmp_path / "out"]
    assert not run(tmp_path, *argv, hook="tests.faults:kill_while_exporting").ok
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, *argv).ok and (tmp_path / "out" / "config.json").is_file()


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_card_says_what_the_run_was(runs, whole, tmp_path):
    assert run(tmp_path, whole, "--step", 2, "--output_dir", tmp_path / "out").ok
    said, final = ((d / "README.md").read_text() for d in (tmp_path / "out", whole / "final"))
    head = yaml.safe_load(said.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["triptych", "sft"]}
    assert "by supervised fine-tuning, after 2 of 3 steps" in said and "after 3 of 3 steps" in final
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert (
        f"| loss of step 2 | {rows[1]['loss']:.4g} |" in said and f"| loss of step 3 | {rows[2]['loss']:.4g} |" in final
    )
    flags = yaml.safe_load(said.split("```yaml\n")[1].split("```")[0])
    assert flags["learning_rate"] == 2e-3 and flags["reduce_loss"] == "token" and "output_dir" not in flags
    assert f"- dataset_name: `{runs.flags['dataset_name']}`" in said and "1,184 examples; fingerprint " in said
    state = json.loads((whole / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["identity"]["dataset"][:16] in said and state["identity"]["model"] in said
    assert "\n- commit: " in said and "eval_split" not in said


def test_a_card_invents_nothing():
    said = card.text(card.Facts({}, "org/model", "abc123", "", "LlamaForCausalLM"))
    head = yaml.safe_load(said.split("---")[1])
    assert head["base_model"] == "org/model" and head["tags"] == ["triptych"]
    assert "No figures are recorded." in said and "Flags not recorded." in said and "Names not recorded." in said
    assert said.count("not recorded") == 8 and "steps" not in said and "revision abc123" in said


def test_a_cards_accuracy_has_its_interval(tmp_path):
    lines = [
        {"step": 1, "loss": 0.5},
        {"step": 1, "eval/accuracy": 0.25, "eval/low": 0.125, "eval/high": 0.5, "eval/length": 7.0},
        {"step": 2, "loss": 0.375},
        {"step": 3, "loss": 0.1},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    facts = card.Facts({"vf_coef": 0.1}, "m", "local", "w", "X", step=2, metrics=card.metrics_in(path, 2))
    said = card.text(facts)
    assert "held out, after step 1: accuracy | 0.25 (95 % interval 0.125 to 0.5) |" in said
    assert "held out, after step 1: length | 7 |" in said and "loss of step 2 | 0.375" in said and "low" not in said
    assert "after 2 iterations" in said and card.metrics_in(tmp_path / "none") == ()
    assert len(card.metrics_in(path)) == 4


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {},
            "The advantage is a reward less its group's mean, over the group's deviation; a group is 8 responses to a"
            " prompt. The surrogate is the clipped ratio of a token, from 1 - 0.2 to 1 + 0.28; in the mean every token"
            " counts alike; no KL term.",
        ),
        (
            {"advantage": "rloo", "surrogate": "gspo", "aggregate": "sequence", "kl_coef": 0.01, "clip_low": 0.0003},
            "The advantage is a reward less the mean of the others of its group; a group is 8 responses to a prompt."
            " The surrogate is the clipped ratio of a response, from 1 - 0.0003 to 1 + 0.28; in the mean every response"
            " counts alike; 0.01 times the KL to the reference (k3) in the loss.",
        ),
    ],
)
def test_a_card_says_in_words_what_grpo_descended(flags, line):
    given = {"advantage": "grpo", "surrogate": "clip", "clip_low": 0.2, "clip_high": 0.28, "aggregate": "token"}
    given |= {"kl_coef": 0.0, "kl_in": "loss", "kl_estimator": "k3", "num_samples_per_prompt": 8} | flags
    said = card.text(card.Facts(given, "m", "local", "w", "X", step=2, total=4))
    assert "by reinforcement learning with verifiable rewards (GRPO), after 2 of 4 iterations" in said
    assert f"\n\n{line}\n\n" in said and "after launch.grpo" in said
    assert "The advantage" not in card.text(card.Facts({"vf_coef": 0.1}, "m", "local", "w", "X"))


def test_every_choice_of_grpo_has_its_words():
    flags = flags_of(grpo.Config)
    for name, words in (("advantage", card.ADVANTAGES), ("surrogate", card.SURROGATES), ("aggregate", card.AGGREGATES)):
        assert words.keys() == set(flags[name].choices)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_sizes():
    assert [size(text) for text in ("5GB", "500 MB", "2GiB", "1000", "1.5kb")] == [5e9, 5e8, 2**31, 1000, 1500]
    for text in ("", "GB", "-1", "0", "5TB", "1e9", "9" * 400):
        with pytest.raises(UserError, match="--max_shard_size: expected a size like 5GB"):
            size(text)


def test_what_cannot_be_is_one_line(runs, whole, tmp_path):
    broken = copied(whole, tmp_path / "broken")
    (broken / "checkpoints" / "step-000002" / "COMPLETE").unlink()
    damaged = copied(whole, tmp_path / "damaged")
    (damaged / "checkpoints" / "step-000002" / "state.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    model, out = runs.root / "model", tmp_path / "out"
    cases = [
        ([], "RUN is missing"),
        ([whole.with_name("whol")], f"no such directory (did you mean {whole}?)"),
        ([model], "is no run's directory: expected config.yaml and checkpoints/ in it; it is a model"),
        ([whole, "--step", "7"], "--step 7: none is of this step; there are 2"),
        ([broken], "holds no complete checkpoint"),
        ([broken / "checkpoints" / "step-000002"], "step-000002: it is incomplete"),
        ([damaged], "state.json is damaged"),
        ([damaged / "checkpoints" / "step-000002", "--step", 2], "is one checkpoint already"),
        ([whole, "--step", 2, "--output_dir", tmp_path / "full"], "full: is not empty"),
        ([whole, "--step", 2, "--adapter_only"], "trained no adapter"),
        ([whole, "--step", 2, "--value_model"], "has none, only launch.ppo trains one"),
        ([whole, "--step", 2, "--adapter_name_or_path", "x"], "--adapter_name_or_path is not read with RUN"),
        (["--model_name_or_path", model], "--output_dir is missing"),
        (["--model_name_or_path", model, "--step", 2, "--output_dir", out], "--step is not read without RUN"),
        (["--model_name_or_path", model, "--load_in_4bit", "--output_dir", out], "is not read without --adapter_name"),
    ]
    for argv, line in cases:
        result = run(tmp_path, *argv)
        errors = [text for text in result.output.splitlines() if text.startswith("error: ")]
        assert result.codes == [2] and len(errors) == 1 and line in errors[0], (argv, result.output)
    result = run(tmp_path, whole)
    assert result.ok and "final is the model after the last step already: nothing to do" in result.output

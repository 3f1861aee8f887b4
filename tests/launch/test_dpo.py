"""launch.dpo through its real entry point: losses, damaged checkpoints, refusals, faults, the default, real input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.families import save_family
from tests.launch.test_equivalence import Runs, digest, rows
from tests.ranks import launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory, embedded_dir) -> Runs:
    root = tmp_path_factory.mktemp("dpo")
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, initializer_range=0.05),
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_pairs,
        "batch_size": 12,
        "max_steps": 10,
        "learning_rate": 2e-3,
        "micro_batch_tokens": 500,
    }
    return Runs("dpo", root, flags)


@pytest.fixture(scope="module")
def uninterrupted(runs):
    return runs.run("uninterrupted", 2, save_steps=2)


@pytest.mark.parametrize("loss_type", ["dpo_norm", "dpo", "simpo", "ipo", "wpo"])
def test_every_loss_trains(loss_type, runs):
    out = runs.run(loss_type, loss_type=loss_type, rpo_alpha=0.1)
    first, last = rows(out)[0], rows(out)[-1]
    assert last["loss"] < first["loss"] and last["rewards/margins"] > first["rewards/margins"]
    saved = (out / "config.yaml").read_text()
    assert ("gamma_beta_ratio" in saved) == (loss_type == "simpo") and "beta:" in saved


def test_it_starts_at_log_two(uninterrupted):
    first = rows(uninterrupted)[0]
    assert abs(first["loss"] - math.log(2)) < 1e-6 and abs(first["rewards/margins"]) < 1e-6


def test_damaged_checkpoints_are_named_and_passed_over(runs, uninterrupted):
    """A flipped bit, a missing manifest, a leftover: each time the one before is taken, and the end is the same."""
    runs.launch("damaged", 2, "kill_between_steps_7_and_8", save_steps=2, save_total_limit=9)
    checkpoints = runs.root / "damaged" / "checkpoints"
    shard = next((checkpoints / "step-000006").glob("shard-00002-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    (checkpoints / "step-000004" / "COMPLETE").unlink()
    (checkpoints / "tmp-000008").mkdir()
    result = runs.launch("damaged", 2, log="damaged.2", save_steps=2, save_total_limit=9)
    assert result.ok and f"{shard.name} is damaged" in result.output and "resuming after step 2" in result.output
    assert digest(runs.root / "damaged") == digest(uninterrupted) and not (checkpoints / "tmp-000008").exists()


def test_old_checkpoints_are_removed_by_number(uninterrupted):
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_a_full_disk_does_not_end_the_run(runs, uninterrupted):
    result = runs.launch("full", 2, "fill_the_disk", save_steps=2)
    assert result.ok and "No space left on device" in result.output
    assert digest(runs.root / "full") == digest(uninterrupted) and not list(
        (runs.root / "full" / "checkpoints").iterdir()
    )


def test_a_finished_run_says_so(runs, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    result = runs.launch("uninterrupted", 2, log="finished", save_steps=2)
    assert result.ok and "is finished" in result.output
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"learning_rate": 1e-4}, "--learning_rate 0.002, now it is 0.0001"),
        ({"beta": 0.5}, "--beta"),
        ({"resume": "never"}, "is not empty"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(changes, said, runs, uninterrupted):
    result = runs.launch("uninterrupted", 2, log="refused", **changes)
    assert result.codes == [2, 2] and said in result.output


def test_a_nan_on_one_rank_stops_all_ranks_in_the_same_step(runs):
    result = runs.launch("nan", 2, "poison_gradients_of_rank_1_at_step_3", micro_batch_tokens=100_000)
    assert result.codes == [2, 2] and "step 3: gradient norm nan, in a gradient, of the pairs [" in result.output
    assert len(rows(runs.root / "nan")) == 2


@pytest.mark.drill
def test_ranks_wait_for_slow_tokenisation_without_a_collective(runs):
    result = runs.launch("slow", 2, "tokenise_slowly", max_seq_length=777, max_steps=1)
    assert result.ok, result.output


def test_an_older_checkpoint_starts_another_branch(runs, uninterrupted):
    """--resume PATH to step 2 of a run that has 2, 4, 6: what is saved then is kept, what came after is put aside, and
    the end is the same.
    """
    runs.launch("branch", 2, "kill_between_steps_7_and_8", save_steps=2, save_total_limit=9)
    older = runs.root / "branch" / "checkpoints" / "step-000002"
    result = runs.launch("branch", 2, log="branch.2", save_steps=1, save_total_limit=2, resume=older)
    assert result.ok and "resuming after step 2" in result.output
    assert digest(runs.root / "branch") == digest(uninterrupted)
    names = sorted(p.name for p in older.parent.iterdir())
    assert names == ["abandoned-step-000004", "abandoned-step-000006", "step-000008", "step-000009"]


def test_a_checkpoint_of_other_flags_is_refused_from_another_directory(runs, uninterrupted):
    older = uninterrupted / "checkpoints" / "step-000006"
    result = runs.launch("elsewhere", 2, resume=older, learning_rate=0.5)
    assert result.codes == [2, 2] and "is of a run with --learning_rate 0.002, now it is 0.5" in result.output
    result = runs.launch("nowhere", 2, resume=runs.root / "nothing")
    assert (
        result.codes == [2, 2]
        and "expected auto, never or the path of a checkpoint" in result.output
        and "policy:" not in result.output
    )


def test_a_save_under_way_is_finished_before_an_error_ends_the_run(runs):
    result = runs.launch("slow_save", 2, "write_slowly_and_poison_step_3", save_steps=2, micro_batch_tokens=100_000)
    assert result.codes == [2, 2] and "step 3: gradient norm nan" in result.output and "Connection" not in result.output
    assert [p.name for p in (runs.root / "slow_save" / "checkpoints").iterdir()] == ["step-000002"]


def test_an_error_of_one_rank_is_said_by_that_rank(runs):
    result = runs.launch("rank_1", 2, "fail_on_rank_1_alone")
    assert not result.ok and "error: this rank's disk is damaged" in result.output


def test_control_c_is_one_line(runs):
    result = runs.launch("interrupted", 2, "interrupt_at_step_5", save_steps=2)
    assert (
        result.codes == [130, 130]
        and "interrupted; the same command goes on" in result.output
        and "Traceback" not in result.output
    )
    again = runs.launch("interrupted", 2, log="interrupted.2", save_steps=2)
    assert again.ok and "resuming after step" in again.output


def test_filling_the_cache_first_is_the_same_run(runs):
    runs.run("cache_first", cache_logprobs_only="true")
    result = runs.launch("cache_first", log="cache_first.2")
    assert result.ok and "hit, all" in result.output


def test_a_directory_that_cannot_be_made_is_one_line(runs):
    result = launch([*runs.command("x")[:-2], "--output_dir", "/proc/nothing/here"], 2)
    assert set(result.codes) == {2} and result.output.count("error: ") == 1 and "/proc/nothing" in result.output, (
        result.output
    )


def test_export_keeps_the_inputs_dtype_and_a_sampling_config(runs, embedded_dir, tmp_path):
    """A bfloat16 model whose generation config samples without saying so, as many on the hub do."""
    import json

    import torch
    from transformers import AutoModelForCausalLM

    source = save_family("llama", tmp_path / "bf16", embedded_dir.model)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [7]}))
    out = runs.run("bf16", model_name_or_path=source, max_steps=1)
    lm = AutoModelForCausalLM.from_pretrained(out / "final")
    assert lm.dtype == torch.bfloat16 and lm.config.dtype == torch.bfloat16
    assert (
        lm.generation_config.temperature == 0.6
        and lm.generation_config.do_sample
        and lm.generation_config.eos_token_id == [1, 7]
    )


# --- the default, and real input --------------------------------------------------------------------------------------


def test_no_argument_at_all(tmp_path):
    """The embedded default on 2 ranks: held-out preference accuracy goes up, final/ loads and ends its turns."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = launch(["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"], 2)
    assert result.ok, result.output
    before, *_, after = (row for row in rows(tmp_path / "out") if "eval/loss" in row)
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval/logps/accuracies"] < 0.65 and after["eval/logps/accuracies"] > 0.95
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "final")
    assert lm.generation_config.eos_token_id == [tokenizer.eos_token_id] and "<|assistant|>" in tokenizer.chat_template


def test_real_preferences(shared_data, tmp_path, embedded_dir):
    """The real GSM8K pairs unchanged, 2 ranks, a few steps (the 30M model and 100 steps are `make slow-tests`)."""
    real_preferences(
        shared_data,
        tmp_path,
        save_family("qwen3", tmp_path / "model", embedded_dir.model, max_position_embeddings=2048),
        steps=3,
    )


@pytest.mark.drill
def test_a_hundred_steps_of_a_30m_llama_on_real_preferences(shared_data, tmp_path, embedded_dir):
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 64,
        "vocab_size": 4096,
    }
    source = save_family(
        "llama", tmp_path / "model", embedded_dir.model, max_position_embeddings=2048, initializer_range=0.02, **sizes
    )
    out = real_preferences(shared_data, tmp_path, source, steps=100, learning_rate=1e-4)
    assert rows(out)[-1]["rewards/margins"] > 0 and len(rows(out)) == 100


def real_preferences(shared_data: Path, tmp_path: Path, source: Path, steps: int, **changes) -> Path:
    data = shared_data / "preferences" / "gsm8k_model_solutions.jsonl"
    flags = {
        "model_name_or_path": source,
        "dataset_name": data,
        "batch_size": 8,
        "cache_dir": tmp_path / "cache",
        "max_seq_length": 600,
    }
    runs = Runs("dpo", tmp_path, flags | {"max_steps": steps} | changes)
    result = launch(runs.command("out"), 2, timeout=3600)
    assert result.ok and "966 rows" in result.output, result.output
    assert abs(rows(tmp_path / "out")[0]["loss"] - math.log(2)) < 1e-6
    return tmp_path / "out"

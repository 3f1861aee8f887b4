"""launch.dpo through its real entry point: one baseline, one change at a time; kills; real input."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.families import save_family
from tests.ranks import launch, start

STEPS = 10


@pytest.fixture(scope="module")
def world_of_runs(tmp_path_factory, embedded_dir):
    """(root, flags of the baseline): a small random Llama on embedded pairs, its cache shared by the runs of this module."""
    root = tmp_path_factory.mktemp("dpo")
    source = save_family("llama", root / "model", embedded_dir[0], initializer_range=0.05)
    flags = {
        "model_name_or_path": source, "dataset_name": embedded_dir[1], "cache_dir": root / "cache", "batch_size": 12, "max_steps": STEPS,
        "learning_rate": 2e-3, "micro_batch_tokens": 500,
    }  # fmt: skip
    return root, flags


def command(flags: dict, output_dir: Path, **changes) -> list:
    return [word for name, value in (flags | {"output_dir": output_dir} | changes).items() for word in (f"--{name}", value)]


def run(world_of_runs, name: str, ranks: int = 1, **changes) -> Path:
    root, flags = world_of_runs
    result = launch(command(flags, root / name, **changes), ranks, log=root / f"{name}.log")
    assert result.ok, result.output
    return root / name


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def final_weights(output_dir: Path) -> torch.Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(load_file(output_dir / "final" / "model.safetensors").items())])


def trajectory(output_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(output_dir)]


@pytest.fixture(scope="module")
def baseline(world_of_runs):
    return run(world_of_runs, "baseline")


@pytest.fixture(scope="module")
def start_weights(world_of_runs):
    return torch.cat([t.double().flatten() for _, t in sorted(load_file(world_of_runs[1]["model_name_or_path"] / "model.safetensors").items())])


CHANGES = {
    "two_ranks": (2, {}),
    "three_ranks": (3, {}),
    "tiny_micro_batches": (1, {"micro_batch_tokens": 60}),
    "one_micro_batch": (1, {"micro_batch_tokens": 100_000}),
    "naive_head": (1, {"head": "naive"}),
    "eager_attention": (1, {"attention": "eager"}),
    "gradients_reduced_once": (2, {"gradient_sync": "last", "micro_batch_tokens": 200}),
    "all_at_once": (3, {"micro_batch_tokens": 130, "head": "naive", "attention": "eager", "gradient_sync": "last"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_but_rounding_depends_on_the_layout(name, world_of_runs, baseline, start_weights):
    ranks, changes = CHANGES[name]
    changed = run(world_of_runs, name, ranks, **changes)
    for a, b in zip(rows(baseline), rows(changed), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["rewards/margins"] == pytest.approx(a["rewards/margins"], rel=1e-4, abs=1e-5)
        assert (b["num_tokens"], b["learning_rate"]) == (a["num_tokens"], a["learning_rate"])
    w, w0, w1 = final_weights(baseline), start_weights, final_weights(changed)
    assert (w1 - w).norm() <= 1e-3 * (w - w0).norm()


def test_it_learns_and_starts_at_log_two(baseline):
    first, last = rows(baseline)[0], rows(baseline)[-1]
    assert abs(first["loss"] - math.log(2)) < 1e-6 and abs(first["rewards/margins"]) < 1e-6
    assert last["loss"] < 0.4 and last["rewards/accuracies"] > 0.9
    assert len(rows(baseline)) == STEPS and first["learning_rate"] == 0.0


@pytest.mark.parametrize("loss_type", ["dpo", "simpo", "ipo", "wpo"])
def test_every_loss_trains(loss_type, world_of_runs):
    out = run(world_of_runs, loss_type, loss_type=loss_type, rpo_alpha=0.1)
    first, last = rows(out)[0], rows(out)[-1]
    assert last["loss"] < first["loss"] and last["rewards/margins"] > first["rewards/margins"]
    saved = (out / "config.yaml").read_text()
    assert ("gamma_beta_ratio" in saved) == (loss_type == "simpo") and "beta:" in saved


# --- resume -------------------------------------------------------------------------------------------------------------------


def digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(world_of_runs):
    return run(world_of_runs, "uninterrupted", 2, save_steps=2)


@pytest.mark.parametrize(
    "hook", ["kill_before_publishing_step_4", "kill_rank_1_while_writing_step_4", "kill_between_steps_7_and_8", "kill_while_exporting"]
)
def test_a_killed_run_ends_in_the_same_bits(hook, world_of_runs, uninterrupted):
    root, flags = world_of_runs
    argv = command(flags, root / hook, save_steps=2)
    killed = launch(argv, 2, log=root / f"{hook}.log", hook=f"tests.hooks:{hook}", timeout=60)
    assert not killed.ok and not (root / hook / "final").exists()
    again = launch(argv, 2, log=root / f"{hook}.2.log")
    assert again.ok, again.output
    assert digest(root / hook) == digest(uninterrupted)
    assert trajectory(root / hook) == trajectory(uninterrupted)
    resumed_from = {"kill_between_steps_7_and_8": 6, "kill_while_exporting": 8}.get(hook, 2)
    assert f"resuming after step {resumed_from}" in again.output


def test_killed_twice_at_any_moment(world_of_runs, uninterrupted):
    import time

    root, flags = world_of_runs
    argv = command(flags, root / "twice", save_steps=2)
    for attempt, step in enumerate((2, 6)):
        processes = start("launch.dpo", argv, 2, root / f"twice.{attempt}.log")
        deadline = time.monotonic() + 60
        while not (root / "twice" / "checkpoints" / f"step-{step:06d}").is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    assert launch(argv, 2, log=root / "twice.log").ok
    assert digest(root / "twice") == digest(uninterrupted)
    assert trajectory(root / "twice") == trajectory(uninterrupted)


def test_resume_on_another_world_size_is_the_same_to_rounding(world_of_runs, uninterrupted, start_weights):
    root, flags = world_of_runs
    argv = command(flags, root / "reshard", save_steps=4)
    launch(argv, 2, log=root / "reshard.log", hook="tests.hooks:kill_between_steps_7_and_8", timeout=60)
    result = launch(argv, 3, log=root / "reshard.2.log")
    assert result.ok and "resuming a run of 2 ranks on 3" in result.output
    w, w0, w1 = final_weights(uninterrupted), start_weights, final_weights(root / "reshard")
    assert (w1 - w).norm() <= 1e-3 * (w - w0).norm()
    for a, b in zip(rows(uninterrupted), rows(root / "reshard"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_damaged_checkpoints_are_named_and_passed_over(world_of_runs, uninterrupted):
    """A flipped bit, a truncated file, a missing file: each time the one before is taken, and the end is the same."""
    root, flags = world_of_runs
    argv = command(flags, root / "damaged", save_steps=2, save_total_limit=9)
    launch(argv, 2, log=root / "damaged.log", hook="tests.hooks:kill_between_steps_7_and_8", timeout=60)
    checkpoints = root / "damaged" / "checkpoints"
    shard = next((checkpoints / "step-000006").glob("shard-00002-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    (checkpoints / "step-000004" / "COMPLETE").unlink()
    (checkpoints / "tmp-000008").mkdir()
    result = launch(argv, 2, log=root / "damaged.2.log")
    assert result.ok and f"{shard.name} is damaged" in result.output and "resuming after step 2" in result.output
    assert digest(root / "damaged") == digest(uninterrupted) and not (checkpoints / "tmp-000008").exists()


def test_old_checkpoints_are_removed_by_number(world_of_runs, uninterrupted):
    names = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step-000006", "step-000008"]


def test_a_full_disk_does_not_end_the_run(world_of_runs, uninterrupted):
    root, flags = world_of_runs
    result = launch(command(flags, root / "full", save_steps=2), 2, log=root / "full.log", hook="tests.hooks:fill_the_disk")
    assert result.ok and "No space left on device" in result.output
    assert digest(root / "full") == digest(uninterrupted) and not list((root / "full" / "checkpoints").iterdir())


def test_a_finished_run_says_so(world_of_runs, baseline):
    root, flags = world_of_runs
    before = (baseline / "metrics.jsonl").read_bytes()
    result = launch(command(flags, baseline), log=root / "finished.log")
    assert result.ok and "is finished" in result.output
    assert (baseline / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changes, said",
    [({"learning_rate": 1e-4}, "--learning_rate 0.002, now it is 0.0001"), ({"beta": 0.5}, "--beta"), ({"resume": "never"}, "is not empty")],
)
def test_another_run_in_the_same_directory_is_refused(changes, said, world_of_runs, baseline):
    root, flags = world_of_runs
    result = launch(command(flags, baseline, **changes), 2, log=root / "refused.log")
    assert result.codes == [2, 2] and said in result.output


def test_a_nan_on_one_rank_stops_all_ranks_in_the_same_step(world_of_runs):
    root, flags = world_of_runs
    result = launch(command(flags, root / "nan", micro_batch_tokens=100_000), 2, log=root / "nan.log", hook="tests.hooks:poison_gradients_of_rank_1_at_step_3")
    assert result.codes == [2, 2] and "step 3: loss" in result.output and "gradient norm nan" in result.output
    assert len(rows(root / "nan")) == 2


def test_ranks_wait_for_slow_tokenisation_without_a_collective(world_of_runs):
    root, flags = world_of_runs
    argv = command(flags, root / "slow", max_seq_length=777, max_steps=1)
    result = launch(argv, 2, log=root / "slow.log", hook="tests.hooks:tokenise_slowly")
    assert result.ok, result.output


# --- the default, and real input -----------------------------------------------------------------------------------------------


def test_no_argument_at_all(tmp_path, tmp_path_factory):
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
    """The real GSM8K pairs unchanged, 2 ranks, a few steps (the 30M model and 100 steps are a drill in benchmarks/)."""
    source = save_family("qwen3", tmp_path / "model", embedded_dir[0], max_position_embeddings=2048)
    flags = {"model_name_or_path": source, "dataset_name": shared_data / "preferences" / "gsm8k_model_solutions.jsonl", "max_steps": 3,
             "batch_size": 8, "cache_dir": tmp_path / "cache", "max_seq_length": 600}  # fmt: skip
    result = launch(command(flags, tmp_path / "out"), 2)
    assert result.ok and "966 rows" in result.output, result.output
    assert abs(rows(tmp_path / "out")[0]["loss"] - math.log(2)) < 1e-6

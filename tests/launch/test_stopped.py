"""Runs that are asked to end, through the real entry point: status 85, one line, and the same bits in the end."""

from __future__ import annotations

import re

import pytest

from tests.families import save_family
from tests.launch.test_equivalence import Runs, digest, trajectory

SAID = "stopped: "


@pytest.fixture(scope="module")
def runs(tmp_path_factory, embedded_dir) -> Runs:
    """Of DPO, whose reference pass can be asked as well."""
    root = tmp_path_factory.mktemp("stopped")
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
    return runs.run("uninterrupted", 2)


def lines(output: str) -> list[str]:
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith((SAID, "error: ", "warning: "))]


STOPS = {
    "terminate_rank_1_at_step_5": (5, "SIGTERM, after step 5 of 10"),
    "terminate_all_at_step_5": (5, "SIG(USR1|TERM), after step 5 of 10"),
    "terminate_rank_0_at_step_10": (10, "SIGTERM, after step 10 of 10"),
}


@pytest.mark.parametrize("hook", STOPS)
def test_a_run_that_is_told_to_end_goes_on_in_the_same_bits(hook, runs, uninterrupted):
    """Every rank ends after the same step, whichever was told, without --save_steps too."""
    step, said = STOPS[hook]
    stopped = runs.launch(hook, 2, hook)
    assert stopped.codes == [85, 85], stopped.output
    (line,) = lines(stopped.output)
    assert re.fullmatch(f"{SAID}{said}; the same command goes on from its checkpoint", line), line
    assert not (runs.root / hook / "final").exists()
    again = runs.launch(hook, 2, log=f"{hook}.2")
    assert again.ok and f"resuming after step {step}" in again.output, again.output
    assert digest(runs.root / hook) == digest(uninterrupted)
    assert trajectory(runs.root / hook) == trajectory(uninterrupted)


def test_a_second_signal_ends_at_once(runs):
    """Also in the middle of an operation of the main thread, which lasts half a minute here."""
    ended = runs.launch("twice_told", 1, "terminate_in_an_operation_at_step_3")
    assert ended.codes == [128 + 15] and "ended at once by a second signal (SIGTERM)" in ended.output


def test_a_signal_that_comes_when_all_is_done_changes_nothing(runs):
    ended = runs.launch("late", 1, "terminate_when_all_is_done", max_steps=2)
    assert ended.codes == [0] and (runs.root / "late" / "final").is_dir(), ended.output


def test_the_reference_pass_keeps_its_whole_segments(runs, uninterrupted):
    hook, cache = "terminate_rank_0_in_the_reference_pass", runs.root / "another_cache"
    stopped = runs.launch(hook, 2, hook, cache_dir=cache)
    assert stopped.codes == [85, 85], stopped.output
    assert lines(stopped.output) == ["stopped: SIGTERM, before the first step was over; the same command begins again"]
    assert len(list((cache / "reference").rglob("rows-*.safetensors"))) == 2
    again = runs.launch(hook, 2, log=f"{hook}.2", cache_dir=cache)
    assert again.ok and "partial hit (32 of" in again.output, again.output
    assert digest(runs.root / hook) == digest(uninterrupted)


def test_tokenising_ends_on_all_ranks(runs, tmp_path):
    hook = "terminate_rank_1_while_rank_0_tokenises"
    stopped = runs.launch(hook, 2, hook, cache_dir=tmp_path)
    assert stopped.codes == [85, 85], stopped.output
    assert lines(stopped.output) == ["stopped: SIGTERM, while data was tokenised; the same command begins again"]
    assert [p.name for p in (tmp_path / "tokens").iterdir() if p.is_dir()] == []
    assert runs.launch(hook, 2, log=f"{hook}.2", cache_dir=tmp_path, max_steps=1).ok


def test_a_rollout_is_given_up_and_the_step_before_it_kept(tuned, tmp_path):
    flags = {
        "cache_dir": tuned,
        "max_steps": 4,
        "batch_size": 8,
        "num_samples_per_prompt": 2,
        "response_length": 16,
        "eval_samples": 4,
        "num_ppo_epochs": 1,
    }
    runs = Runs("ppo", tmp_path, flags)
    whole = runs.run("whole", 2)
    stopped = runs.launch("stopped", 2, "terminate_rank_1_in_the_third_rollout")
    assert stopped.codes == [85, 85], stopped.output
    assert lines(stopped.output) == [
        "stopped: SIGTERM, after step 2 of 4; the same command goes on from its checkpoint"
    ]
    again = runs.launch("stopped", 2, log="stopped.2")
    assert again.ok and "resuming after step 2" in again.output, again.output
    assert digest(tmp_path / "stopped") == digest(whole)


def test_a_run_ends_before_its_time_is_over(runs, uninterrupted):
    """Again and again, each time as far as it comes."""
    codes = []
    for attempt in range(12):
        ended = runs.launch("timed", 2, "slow_steps", log=f"timed.{attempt}", max_hours=6 / 3600)
        codes.append(set(ended.codes))
        if ended.ok:
            break
        assert set(ended.codes) == {85} and "stopped: --max_hours, " in ended.output, ended.output
    assert codes[-1] == {0} and len(codes) > 1
    assert digest(runs.root / "timed") == digest(uninterrupted)

"""--rollout_ahead through the real entry points: the weights that draw, pi_old, threads, checkpoints, refusals."""

from __future__ import annotations

import json
import math

import pytest

from engine.errors import UserError
from launch import grpo, ppo
from tests.launch.test_equivalence import Runs, digest, rows

FLAGS = {
    "max_steps": 4,
    "batch_size": 6,
    "num_samples_per_prompt": 2,
    "response_length": 12,
    "eval_samples": 2,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "rollout_ahead": 1,
}
STAGES = {"ppo": {}, "grpo": {"num_samples_per_prompt": 3, "dynamic_sampling": 2, "kl_coef": 0.05, "kl_in": "reward"}}


@pytest.fixture(scope="module", params=STAGES)
def runs(request, tuned, tmp_path_factory) -> Runs:
    flags = {"cache_dir": tuned} | FLAGS | STAGES[request.param]
    return Runs(request.param, tmp_path_factory.mktemp(request.param), flags)


@pytest.fixture(scope="module")
def whole(runs):
    return runs.run("whole", 2)


def numbers(directory) -> list[dict]:
    """The rows of a run, without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "time/"))} for row in rows(directory)]


def responses(directory) -> list[dict]:
    return [json.loads(line) for line in directory.with_name(f"{directory.name}.responses").read_text().splitlines()]


@pytest.mark.parametrize("hook", ["draw_ahead_in_turn", "learn_late"])
def test_a_thread_changes_when_and_not_what(hook, runs, whole):
    """Against the twin that has none, to the bit; and where learning takes longer than drawing."""
    result = runs.launch(hook, 2, hook)
    assert result.ok, result.output
    assert digest(runs.root / hook) == digest(whole) and numbers(runs.root / hook) == numbers(whole)


def test_it_is_drawn_by_the_weights_of_one_update_ago(runs):
    """The second step's responses are those of a policy that has not moved; the first step is on-policy."""
    ahead, still = runs.root / "recorded", runs.root / "still"
    hook = "record_responses"
    assert runs.launch("recorded", 1, hook, max_steps=3).ok
    assert runs.launch("still", 1, hook, max_steps=3, rollout_ahead=0, learning_rate=1e-30).ok
    found, expected = responses(ahead), responses(still)
    assert [step["age"] for step in found] == [0, 1, 1] and [step["age"] for step in expected] == [0, 0, 0]
    assert found[0]["responses"] == expected[0]["responses"] and found[1]["responses"] == expected[1]["responses"]
    assert found[2]["responses"] != expected[2]["responses"]


def test_pi_old_is_what_the_sampler_wrote_down(runs, whole):
    """Before the update of a later step the policy has moved away from it; in the first it has not."""
    learnt = [row for row in rows(whole) if "rollout/age" in row]
    assert [row["rollout/age"] for row in learnt] == [0, 1, 1, 1]
    off = [abs(row["sampler/ratio_max"] - 1) for row in learnt]
    assert off[0] < 1e-4 and all(x > 1e-3 for x in off[1:])
    assert all(math.isfinite(row["loss"]) and row["val/ratio"] > 0 for row in learnt)


def test_the_first_update_of_a_step_begins_at_that_ratio(runs):
    """Where there is but one, its mean ratio is the policy's to the sampler; on-policy it is 1."""
    for row in rows(runs.run("once", num_ppo_epochs=1, num_mini_batches=1, eval_samples=1)):
        if "rollout/age" in row:
            assert row["val/ratio"] == pytest.approx(row["sampler/ratio"], rel=1e-5)
            assert (abs(row["val/ratio"] - 1) > 1e-6) == bool(row["rollout/age"])


def test_a_policy_that_stands_still_learns_what_it_learns_on_policy(runs):
    """pi_old by the sampler and by the trainer are the same numbers then."""
    flags = {"learning_rate": 1e-30, "max_steps": 3}
    a, b = (runs.run(f"standing_{ahead}", rollout_ahead=ahead, **flags) for ahead in (0, 1))
    for x, y in zip(rows(a), rows(b), strict=True):
        for name in ("loss", "objective/scores", "val/ratio", "objective/kl", "grad_norm", "policy/clipfrac"):
            if name in x:
                assert y[name] == pytest.approx(x[name], rel=1e-3, abs=2e-5), name


def test_a_run_that_is_told_to_end_keeps_what_is_drawn_ahead(runs, whole):
    hook = "terminate_rank_1_while_responses_are_drawn_ahead"
    stopped = runs.launch(hook, 2, hook)
    assert stopped.codes == [85, 85] and "Traceback" not in stopped.output, stopped.output
    (kept,) = (runs.root / hook / "checkpoints").glob("step-*/beside.json")
    assert len(json.loads(kept.read_text())["responses"]) > 0
    again = runs.launch(hook, 2, log=f"{hook}.2")
    assert again.ok and "resuming after step" in again.output, again.output
    assert digest(runs.root / hook) == digest(whole) and numbers(runs.root / hook) == numbers(whole)


def test_what_fails_in_the_thread_is_one_line(runs):
    failed = runs.launch("failed", 2, "fail_in_the_thread_that_draws_ahead")
    assert failed.codes == [2, 2] and "Traceback" not in failed.output, failed.output
    assert "error: no page is left" in failed.output


REFUSED = {
    "top_k": ({"top_k": 5}, "--rollout_ahead 1 takes pi_old from the sampler"),
    "top_p": ({"top_p": 0.9}, "--rollout_ahead 1 takes pi_old from the sampler"),
    "greedy": ({"temperature": 0}, "--rollout_ahead 1 takes pi_old from the sampler"),
    "teams": ({"rollout_tensor_parallel": 2}, "--rollout_ahead 1 does not go with --rollout_tensor_parallel"),
    "two": ({"rollout_ahead": 2}, "--rollout_ahead must be between 0 and 1, got 2"),
    "capped": ({"tis_cap": 2.0}, "--tis_cap is not read with --rollout_ahead 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_it_is_refused(name):
    changes, said = REFUSED[name]
    for stage in (grpo,) if "tis_cap" in changes else (ppo, grpo):
        with pytest.raises(UserError, match=said):
            stage.Config(**{"rollout_ahead": 1} | changes).check()

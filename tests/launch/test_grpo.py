"""launch.grpo through its real entry point: an iteration is the paper's, it learns, it does not depend on the layout,
it survives kills, it names bad input.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.config import parse
from engine.data import Prompt
from launch import grpo
from rollout import Drawn, Experience, Rollout, groups, rewards
from tests.launch import iteration
from tests.launch.test_equivalence import Runs, digest, rows, trajectory, weights_of
from verifiers import Verdict


@pytest.fixture(scope="module")
def runs(tuned, tmp_path_factory) -> Runs:
    flags = {
        "cache_dir": tuned,
        "max_steps": 4,
        "batch_size": 6,
        "num_samples_per_prompt": 4,
        "eval_samples": 1,
        "micro_batch_tokens": 500,
    }
    return Runs("grpo", tmp_path_factory.mktemp("grpo"), flags)


@pytest.fixture(scope="module")
def baseline(runs):
    return runs.run("baseline", kl_coef=0.01)


def iterations(output_dir: Path) -> list[dict]:
    return [row for row in rows(output_dir) if "loss" in row]


def timeless(output_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in trajectory(output_dir)]


# --- an iteration is the paper's --------------------------------------------------------------------------------------

# each with several updates, so that ratios leave 1
VARIANTS = {
    "grpo": {"aggregate": "sequence", "kl_coef": 0.1, "num_mini_batches": 2},
    "dapo": {"clip_high": 0.28, "overlong_buffer": 8, "overlong_penalty": 0.5, "num_mini_batches": 4},
    "dr_grpo": {"advantage": "dr_grpo", "aggregate": "dr_grpo", "num_ppo_epochs": 2, "mask_truncated": "true"},
    "rloo": {"advantage": "rloo", "kl_coef": 0.05, "kl_in": "reward", "num_ppo_epochs": 3, "dual_clip": 1.1},
    "reinforce_pp": {"advantage": "reinforce_pp", "kl_coef": 0.05, "kl_in": "reward", "num_ppo_epochs": 2},
    "gspo": {"surrogate": "gspo", "clip_low": 0.01, "clip_high": 0.02, "num_ppo_epochs": 2, "tis_cap": 1.0},
    "cispo": {"surrogate": "cispo", "clip_high": 0.1, "num_ppo_epochs": 2, "entropy_coef": 0.02},
    "unbiased": {"kl_coef": 0.5, "kl_estimator": "unbiased", "num_ppo_epochs": 2, "head": "naive"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_iteration_is_that_of_a_float64_loop(name, runs):
    """Responses are recorded as they were sampled; all that comes after is written out in the test. On two ranks."""
    flags = {"max_steps": 1, "learning_rate": 2e-3, "adam_epsilon": 1e-4, "response_length": 20, "top_k": 8, "seed": 5}
    result = runs.launch(f"of_{name}", 2, "record_experience", **flags, **VARIANTS[name])
    assert result.ok, result.output
    out = runs.root / f"of_{name}"
    start = next(Path(runs.flags["cache_dir"]).glob("embedded-v*/tuned_on_sums/final"))
    truth, losses = iteration.replay(out, start)
    found, before = weights_of(out / "final"), weights_of(start)
    assert (truth - before).norm() > 1e-2
    assert (found - truth).norm() <= 1e-4 * (truth - before).norm()
    assert iterations(out)[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)


# --- it learns --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tuned, tmp_path_factory):
    """A function of advantage, its mean and the seed: the rows of the embedded default, in fewer iterations than its
    30, to save time.
    """
    root = tmp_path_factory.mktemp("learnt")

    def run(advantage: str, aggregate: str, seed: int) -> list[dict]:
        flags = {"cache_dir": tuned, "seed": seed, "max_steps": 12, "advantage": advantage, "aggregate": aggregate}
        return rows(Runs("grpo", root, flags).run(f"{advantage}-{seed}", 2))

    return functools.cache(run)


KINDS = {"grpo": "token", "dr_grpo": "dr_grpo", "rloo": "token"}
LEARNT = [pytest.param(kind, seed, marks=pytest.mark.drill) for kind in KINDS for seed in (1, 2, 3)]
LEARNT[0] = pytest.param("grpo", 1)


@pytest.mark.parametrize("kind, seed", LEARNT)
def test_held_out_accuracy_rises_by_more_than_its_interval(kind, seed, learnt):
    before, *_, after = (row for row in learnt(kind, KINDS[kind], seed) if "eval/accuracy" in row)
    assert after["eval/low"] > before["eval/high"]


# --- layouts ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "two_ranks": (2, {}),
    "three_ranks": (3, {"micro_batch_tokens": 200}),
    "tiny_micro_batches": (1, {"micro_batch_tokens": 60}),
    "naive_and_eager": (1, {"head": "naive", "attention": "eager"}),
    "compiled": (1, {"compile": "true"}),
}
SLOW = ("naive_and_eager", "compiled")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.drill) if n in SLOW else n for n in CHANGES])
def test_nothing_but_rounding_depends_on_the_layout(name, runs, baseline):
    ranks, changes = CHANGES[name]
    changed = runs.run(name, ranks, kl_coef=0.01, **changes)
    for a, b in zip(iterations(baseline)[:2], iterations(changed)[:2], strict=True):
        assert b["objective/scores"] == a["objective/scores"] and b["rollout/length"] == a["rollout/length"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_the_first_iteration_is_on_policy(baseline):
    first, last = iterations(baseline)[0], iterations(baseline)[-1]
    assert first["objective/kl"] == 0 and abs(first["val/ratio"] - 1) < 1e-6 and first["policy/clipfrac"] == 0
    assert first["loss/kl"] == pytest.approx(0, abs=1e-7) and last["loss/kl"] > 1e-4
    assert abs(first["sampler/ratio"] - 1) < 1e-4 and 0 < first["objective/entropy"] < 2
    assert first["groups/drawn"] == 6 and 0 < first["groups/signal"] <= 1


def test_without_a_weight_there_is_no_reference(runs):
    out = runs.run("free", max_steps=1)
    assert not [name for row in rows(out) for name in row if name == "objective/kl"]
    assert not (out / "final" / "value").exists()


def test_a_runs_own_configuration_is_read_again(runs, baseline):
    """What was filled in is nothing that the flags refuse: with a KL divergence, and without one."""
    again = [
        parse(grpo.Config, ["--config", str(out / "config.yaml")]) for out in (baseline, runs.run("no_kl", max_steps=1))
    ]
    for config in again:
        config.check()
    assert [(c.kl_in, c.kl_estimator, c.reference) for c in again] == [("loss", "k3", "copy"), ("none", None, "auto")]


# --- resume and adapters ----------------------------------------------------------------------------------------------


def test_a_killed_run_ends_in_the_same_bits(runs):
    """With groups that are drawn again, which must be the same ones."""
    flags = {"save_steps": 2, "dynamic_sampling": 2, "max_steps": 6, "num_ppo_epochs": 2}
    whole = runs.run("whole", 2, **flags)
    killed = runs.launch("killed", 2, "kill_before_publishing_step_4", **flags)
    assert not killed.ok
    again = runs.launch("killed", 2, log="killed.2", **flags)
    assert again.ok and "resuming after step 2" in again.output, again.output
    assert digest(runs.root / "killed") == digest(whole) and timeless(runs.root / "killed") == timeless(whole)
    assert max(row["groups/drawn"] for row in iterations(whole)) > 6


@pytest.mark.parametrize("form", ["lora", pytest.param("nf4", marks=pytest.mark.drill)])
def test_adapters(form, runs):
    changes = {"use_lora": "true", "lora_rank": 4, "kl_coef": 0.01, "max_steps": 2, "learning_rate": 5e-3}
    changes |= {"load_in_4bit": "true"} if form == "nf4" else {}
    result = runs.launch(form, 2, **changes)
    assert result.ok, result.output
    first, last = iterations(runs.root / form)
    assert first["objective/kl"] == 0 and abs(last["objective/kl"]) > 1e-4 and last["loss/kl"] > 0


# --- groups and rewards -----------------------------------------------------------------------------------------------


def collect(scores: dict[int, list[float]]):
    """A collector whose responses to a prompt are judged so; it notes what it was asked for."""
    asked: list[list[int]] = []

    def sample(prompts, chosen, samples, step, shown=""):
        asked.append([int(e) for e in chosen])
        ids = np.array([1])
        pairs = [
            (Rollout(int(e), k, ids, ids, np.zeros(1), np.zeros(1), "stop"), Verdict(scores[int(e)][k], ""))
            for e in chosen
            for k in range(samples)
        ]
        return Drawn([rollout for rollout, _ in pairs], [verdict for _, verdict in pairs])

    return sample, asked


def drawn_groups(scores: dict[int, list[float]], wanted: list[int], redraws: int):
    sample, asked = collect(scores)
    flags = SimpleNamespace(num_samples_per_prompt=2, seed=1)
    prompts = [Prompt(np.array([1]), "1", "gsm8k")] * len(scores)
    drawn = groups.sample_groups(sample, prompts, np.array(wanted), flags, 3, redraws)
    return [r.example for r in drawn.rollouts[::2]], drawn.row, asked


EASY, HARD, MIXED = [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]


def test_groups_without_a_signal_make_place_for_others():
    scores = {0: EASY, 1: MIXED, 2: HARD, **dict.fromkeys(range(3, 40), MIXED)}
    kept, tally, asked = drawn_groups(scores, [0, 1, 2], 5)
    assert kept[0] == 1 and len(kept) == 3 and len(set(kept)) == 3 and len(asked) == 2
    assert set(asked[1]).isdisjoint(asked[0]) and len(asked[1]) == 2
    assert tally == {
        "groups/drawn": 5,
        "groups/signal": pytest.approx(3 / 5),
        "groups/all_right": pytest.approx(1 / 5),
        "groups/pass_at_2": pytest.approx(4 / 5),
    }
    assert drawn_groups(scores, [0, 1, 2], 5)[2] == asked  # a function of seed and step


def test_redrawing_ends_at_its_bound_and_at_the_last_prompt():
    hard = dict.fromkeys(range(20), HARD)
    kept, tally, asked = drawn_groups(hard | {4: MIXED}, [3, 4], 2)
    assert kept == [4] and [len(part) for part in asked] == [2, 1, 1] and tally["groups/drawn"] == 4
    kept, tally, asked = drawn_groups(hard, [3, 4], 2)
    assert kept == [3, 4] and tally["groups/signal"] == 0  # nothing to learn from: the step's own stay
    few = drawn_groups({0: HARD, 1: HARD, 2: MIXED}, [0, 1], 9)
    assert few[0] == [2] and [len(part) for part in few[2]] == [2, 1]
    assert drawn_groups(hard, [3, 4], 0)[0] == [3, 4]


def test_a_verdict_that_failed_is_no_difference():
    pairs = [(None, Verdict(1.0, "")), (None, Verdict(0.0, "killed", "error"))]
    assert not groups.differs(pairs) and groups.differs([*pairs, (None, Verdict(0.0, ""))])


def score(length: int, text: str = "", right: float = 0.0, ended: bool = True, **flags) -> float:
    reason = "stop" if ended else "length"
    rollout = SimpleNamespace(response_ids=np.zeros(length), finish_reason=reason)
    return rewards.score_of(rollout, Verdict(right, ""), grpo.Config(**flags), 20, lambda ids: text)


@pytest.mark.parametrize("length, cost", [(10, 0), (12, 0), (13, 0.125), (16, 0.5), (20, 1.0)])
def test_the_end_of_the_limit_costs_linearly(length, cost):
    assert score(length, overlong_buffer=8, overlong_penalty=2.0) == pytest.approx(-2 * cost)
    assert score(length, right=1.0, overlong_buffer=8) == pytest.approx(1 - cost)
    assert score(length, right=1.0, ended=False, missing_eos_penalty=0.0, overlong_buffer=8) == pytest.approx(-cost)


def test_a_form_is_rewarded_beside_the_answer():
    assert score(3, "<think>a</think> <answer>4</answer>", 1.0, format_reward=0.25) == 1.25
    assert score(3, "<answer>4</answer>", 1.0, format_reward=0.25) == 1
    assert score(3, "<plan>a</plan> 4", format_reward=1.0, format_tags=("plan",)) == 1


def experience(counts: list[int], scores: list[float], cut: tuple[int, ...] = ()) -> Experience:
    """Two responses to each prompt, of these lengths; those in `cut` have no end."""
    ids = [np.arange(n) for n in counts]
    rollouts = [
        Rollout(i // 2, i % 2, np.array([1]), x, np.zeros(len(x)), np.zeros(len(x)), "length" if i in cut else "stop")
        for i, x in enumerate(ids)
    ]
    return Experience(rollouts, scores, slot_after_end=False, response_length=8)


def test_responses_without_an_end_count_nowhere():
    """Neither in the mean nor among the updates; what they scored stays in their group's mean."""
    cut = experience([2, 8, 3, 8], [1.0, 0.0, 1.0, 1.0], cut=(1, 3))
    assert grpo.learnt_from(cut, grpo.Config(mask_truncated=True)).tolist() == [0, 2]
    assert grpo.learnt_from(cut, grpo.Config()).tolist() == [0, 1, 2, 3]
    flags = grpo.Config(advantage="dr_grpo").with_loss()
    old = torch.zeros(21, dtype=torch.float64)
    found = grpo.advantages_of(cut, old, old, flags)
    assert found.tolist() == [0.5] * 2 + [-0.5] * 8 + [0.0] * 11
    assert grpo.has_gradient(cut, found, flags).tolist() == [True, True, False, False]
    with_kl = grpo.Config(kl_coef=0.1).with_loss()
    assert grpo.has_gradient(cut, found, with_kl).all()


def test_a_kl_in_the_reward_is_a_sum_over_the_response():
    two = experience([2, 3], [1.0, 1.0])
    old, ref = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0, -1, -2, -2, -2], [-2.0, -1, -2, -3, -4]))
    flags = grpo.Config(advantage="dr_grpo", kl_coef=0.1, kl_in="reward").with_loss()
    rewards = [1 - 0.1 * 1, 1 - 0.1 * 3]
    mean = sum(rewards) / 2
    expected = [rewards[0] - mean] * 2 + [rewards[1] - mean] * 3
    assert grpo.advantages_of(two, old, ref, flags).tolist() == pytest.approx(expected)


def test_where_all_are_wrong_nothing_moves(runs, tmp_path):
    """No group teaches anything, drawn again or not: the weights stay, and the run ends well. On two ranks."""
    row = {"messages": [{"role": "user", "content": "2?"}], "ground_truth": "987654321", "dataset": "gsm8k"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    changes = {"dataset_name": tmp_path / "rows.jsonl", "max_steps": 2, "dynamic_sampling": 1}
    start = next(Path(runs.flags["cache_dir"]).glob("embedded-v*/tuned_on_sums/final"))
    out = runs.run("hopeless", 2, model_name_or_path=start, response_length=24, **changes)
    assert [row["grad_norm"] for row in iterations(out)] == [0, 0]
    assert all(row["groups/signal"] == 0 for row in iterations(out))
    assert [row["groups/drawn"] for row in iterations(out)] == [6 + 2, 2 + 2]  # of 8 prompts, the last 2 a short batch
    assert (weights_of(out / "final") == weights_of(start)).all()


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "one_sample": ({"num_samples_per_prompt": 1}, "--num_samples_per_prompt 1: --advantage grpo compares"),
    "mini_batches": ({"num_mini_batches": 5}, "--num_mini_batches 5 does not divide the 24 responses of an iteration"),
    "kl_without_a_weight": ({"kl_in": "loss"}, "--kl_in loss needs a --kl_coef greater than 0"),
    "kl_nowhere": ({"kl_coef": 0.1, "kl_in": "none"}, "--kl_coef 0.1 is not read with --kl_in none"),
    "reference": ({"reference": "copy"}, "--reference is not read without --kl_coef"),
    "estimator": ({"kl_estimator": "k3"}, "--kl_estimator is not read without --kl_coef"),
    "k1": ({"kl_coef": 0.1, "kl_estimator": "k1"}, "--kl_estimator k1 has no gradient on average in the loss"),
    "unbiased": ({"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "unbiased"}, "unbiased is a loss"),
    "dual_clip": ({"dual_clip": 0.5}, "--dual_clip must be greater than 1, got 0.5"),
    "dual_clip_of_cispo": ({"dual_clip": 3, "surrogate": "cispo"}, "--dual_clip is not read by --surrogate cispo"),
    "overlong": ({"overlong_buffer": 24}, "--overlong_buffer must be less than --response_length 24"),
    "penalty": ({"overlong_penalty": 2}, "--overlong_penalty is not read without --overlong_buffer"),
    "tags": ({"format_tags": "plan"}, "--format_tags is not read without --format_reward"),
    "a_tag": ({"format_tags": "<plan>", "format_reward": 1}, "--format_tags: "),
    "a_flag_of_ppo": ({"lam": 0.9}, "--lam belongs to launch.ppo"),
    "cliprange": ({"cliprange": 0.1}, "--cliprange"),
    "a_name": ({"advantage": "grop"}, "grpo"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name, runs):
    changes, said = BAD[name]
    result = runs.launch(f"bad_{name}", **changes)
    assert set(result.codes) == {2} and said in result.output and "Traceback" not in result.output, result.output
    assert result.output.count("error: ") == 1 and not (runs.root / f"bad_{name}").exists()


def test_one_response_to_a_prompt_is_enough_without_groups(runs):
    out = runs.run("alone", num_samples_per_prompt=1, advantage="reinforce_pp", max_steps=1)
    assert iterations(out)[0]["groups/signal"] == 0 and iterations(out)[0]["grad_norm"] > 0
    assert json.loads((out / "samples.jsonl").read_text().splitlines()[0])["step"] == 0

"""What the stages make of a chunk, a response and a flag, by hand: parts of losses, scores, orders, defaults."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import log, world
from engine.data import Prompt
from engine.errors import UserError
from launch import dpo, ppo, resolve, sft
from rollout import Drawn, Experience, Rollout, experience_of, held_out_accuracy, minibatches, of_responses
from tests import oracles
from verifiers import Verdict


def chunks(logprobs: torch.Tensor, counts: list[int], groups: list[slice]):
    """A policy whose log-probs are given, and handed over in chunks of these groups of sequences."""
    cuts = [0, *np.cumsum(counts).tolist()]

    def loss(batch, loss_of_logprobs, sequences_per_group=None):
        n = sequences_per_group or 1
        rows = cuts[::n] if sequences_per_group else range(len(logprobs) + 1)
        return sum(loss_of_logprobs(logprobs[rows[g.start] : rows[g.stop]], g) for g in groups)

    return SimpleNamespace(loss=loss)


def batch_of(counts: list[int]) -> SimpleNamespace:
    cuts = (0, *np.cumsum(counts).tolist())
    return SimpleNamespace(counts_S=torch.tensor(counts), cuts=cuts, examples=(0,), ids_T=torch.zeros(1))


# --- sft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["token", "sum", "mean"])
def test_sfts_part_of_a_step_in_chunks_of_tokens(reduce):
    counts, n = [3, 1, 2], 7
    logprobs = -torch.arange(1.0, 7.0)
    weights = [1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2] if reduce == "mean" else [1.0] * 6
    totals = log.Totals(world.start())
    policy = chunks(logprobs, counts, [slice(0, 2), slice(2, 5), slice(5, 6)])
    loss = sft.sft_loss(policy, batch_of(counts), reduce, n, totals)
    expected = sum(w * x for w, x in zip(weights, range(1, 7), strict=True)) / n
    assert loss.item() == pytest.approx(expected) == totals.reduce(("loss",))["loss"]


# --- dpo --------------------------------------------------------------------------------------------------------------


def test_dpos_part_of_a_step_in_chunks_of_pairs():
    """Three pairs of a step of five, in two chunks: each with its own references and lengths."""
    counts, reference = [2, 1, 3, 2, 1, 4], [-1.0, -2.0, -5.0, -1.0, -0.5, -9.0]
    logprobs = -torch.linspace(0.3, 2.5, 13)
    _, objective = dpo.resolve_loss(dpo.Config())
    totals = log.Totals(world.start())
    policy = chunks(logprobs, counts, [slice(0, 1), slice(1, 3)])
    found = dpo.preference_loss(policy, batch_of(counts), lambda b: torch.tensor(reference), objective, 5, totals)
    sums = [part.sum().item() for part in logprobs.split(counts)]
    pairs = [(*sums[i : i + 2], *reference[i : i + 2], *counts[i : i + 2]) for i in (0, 2, 4)]
    assert found.item() == pytest.approx(sum(oracles.dpo_norm(*pair, 5.0) for pair in pairs) / 5, rel=1e-5)
    margins = sum(5 * ((cw - rw) / nw - (cl - rl) / nl) for cw, cl, rw, rl, nw, nl in pairs)
    found = totals.reduce(("rewards/margins", "logps/chosen"))
    assert found["rewards/margins"] == pytest.approx(margins, rel=1e-5)
    assert found["logps/chosen"] == pytest.approx(sum(sums[::2]), rel=1e-6)


REFUSED = [
    ({"loss_type": "dpo", "gamma_beta_ratio": 0.5}, "--gamma_beta_ratio is not read by --loss_type dpo"),
    ({"loss_type": "ipo", "label_smoothing": 0.1}, "--label_smoothing is not read by --loss_type ipo"),
    ({"label_smoothing": 0.5}, "--label_smoothing must be in"),
    ({"label_smoothing": -0.1}, "--label_smoothing must be in"),
    ({"beta": 0.0}, "--beta must be greater than 0"),
    ({"rpo_alpha": -1.0}, "--rpo_alpha must not be negative"),
    ({"loss_type": "dpo_nrom"}, "did you mean dpo_norm"),
    ({"loss_type": "simpo", "reference": "copy"}, "--reference is not read by --loss_type simpo"),
]


@pytest.mark.parametrize("flags, said", REFUSED, ids=str)
def test_flags_that_a_loss_does_not_take(flags, said):
    with pytest.raises(UserError, match=said):
        dpo.resolve_loss(dpo.Config(**flags))


@pytest.mark.parametrize(
    "flags, loss_type, hyper",
    [
        ({}, "dpo_norm", {"beta": 5.0, "label_smoothing": 0.0}),
        ({"loss_type": "sigmoid_norm"}, "dpo_norm", {"beta": 5.0, "label_smoothing": 0.0}),
        ({"loss_type": "sigmoid", "beta": 0.3}, "dpo", {"beta": 0.3, "label_smoothing": 0.0}),
        ({"loss_type": "simpo"}, "simpo", {"beta": 2.5, "gamma_beta_ratio": 0.3, "label_smoothing": 0.0}),
        ({"loss_type": "ipo", "beta": 0.2}, "ipo", {"beta": 0.2}),
        ({"label_smoothing": 0.1}, "dpo_norm", {"beta": 5.0, "label_smoothing": 0.1}),
    ],
)
def test_a_loss_by_any_name_has_its_own_defaults(flags, loss_type, hyper):
    config, objective = dpo.resolve_loss(dpo.Config(**flags))
    assert config.loss_type == objective.loss_type == loss_type and objective.hyper == hyper


# --- ppo --------------------------------------------------------------------------------------------------------------


def rollouts(*reasons: str) -> list[Rollout]:
    ids = np.array([5, 6])
    return [Rollout(i // 2, i % 2, ids, ids, np.zeros(2), np.zeros(2), reason) for i, reason in enumerate(reasons)]


@pytest.mark.parametrize(
    "penalty, expected", [(None, [10.0, 10.0, 0.0]), (-10.0, [10.0, -10.0, 0.0]), (0.0, [10.0, 0.0, 0.0])]
)
def test_a_response_without_an_end_gets_the_penalty_in_place_of_its_score(penalty, expected):
    config = ppo.Config(response_length=8, verification_reward=10.0, missing_eos_penalty=penalty)
    verdicts = [Verdict(1.0, ""), Verdict(1.0, ""), Verdict(0.0, "")]
    found = experience_of(Drawn(rollouts("stop", "length", "stop"), verdicts), config, str)
    assert found.scores_S.tolist() == expected


def test_every_pass_of_every_iteration_has_an_order_of_its_own():
    config = ppo.Config(num_ppo_epochs=2, num_mini_batches=3)
    passes = [minibatches(np.arange(40), config, step) for step in (0, 1)]
    orders = []
    for parts in passes:
        assert [len(part) for part in parts] == [14, 13, 13] * 2
        orders += [np.concatenate(parts[:3]).tolist(), np.concatenate(parts[3:]).tolist()]
    assert len(set(map(tuple, orders))) == 4 and all(sorted(order) == list(range(40)) for order in orders)


def test_the_value_model_has_a_rate_of_its_own():
    config = ppo.Config(learning_rate=1e-3, value_learning_rate=5e-3, lr_scheduler_type="constant")
    assert ppo.learning_rates(config, 3, 9) == {"policy": 1e-3, "value": 5e-3}
    assert ppo.learning_rates(ppo.Config(learning_rate=1e-3, lr_scheduler_type="linear"), 3, 6)["value"] == 5e-4


def test_ppos_parts_of_a_mini_batch_in_chunks_of_tokens():
    new, old = -torch.tensor([1.0, 2.0, 0.5, 0.1]), -torch.tensor([1.2, 1.0, 0.5, 0.9])
    advantages, totals = torch.tensor([1.0, -2.0, 0.5, 3.0]), log.Totals(world.start())
    policy = chunks(new, [4], [slice(0, 1), slice(1, 4)])
    loss = ppo.policy_loss(policy, batch_of([4]), [old, advantages], 10, 0.2, totals)
    expected = 0.0
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
        rho = math.exp(n - o)
        expected += max(-a * rho, -a * min(max(rho, 0.8), 1.2))
    assert loss.item() == pytest.approx(expected / 10, rel=1e-5)
    assert totals.reduce(("loss/policy",))["loss/policy"] == pytest.approx(expected, rel=1e-5)
    values, old_values, returns = torch.tensor([0.5, 2.0]), torch.tensor([0.4, 1.0]), torch.tensor([1.0, 4.0])
    loss = ppo.value_loss(lambda batch: values, None, [old_values, returns], 10, 0.2, totals)
    assert loss.item() == pytest.approx(((0.5 - 1) ** 2 + (1.2 - 4) ** 2) / 2 / 10, rel=1e-5)


def test_a_row_of_metrics_is_of_tokens_slots_and_verdicts():
    responses = rollouts("stop", "length", "stop", "stop")
    verdicts = [Verdict(1.0, "a"), Verdict(0.0, "a"), Verdict(0.0, "killed", "error"), Verdict(1.0, "b")]
    judged = Experience([responses[i] for i in (0, 1, 3)], [1.0, 0.0, 1.0], slot_after_end=False, response_length=8)
    prompts = [SimpleNamespace(verifier="gsm8k"), SimpleNamespace(verifier="math")]
    sums = dict.fromkeys(ppo.METRICS, 0.0) | {"loss/policy": 6.0, "loss/value": 12.0, "tokens": 3.0, "slots": 4.0}
    row = ppo.means(sums) | of_responses(judged, Drawn(responses, verdicts), prompts)
    assert (row["loss/policy"], row["loss"], row["loss/value"]) == (2.0, 2.0, 3.0)
    assert (row["verified/gsm8k"], row["verified/math"], row["rollout/errors"]) == (0.5, 1.0, 1)
    assert (row["rollout/stop_rate"], row["rollout/length"]) == (0.75, 2.0)


def held_out(verdicts: list[Verdict], samples: int) -> dict:
    written = {}
    collect = lambda prompts, chosen, samples, step, seed, shown: Drawn(rollouts(*["stop"] * len(verdicts)), verdicts)
    tokenizer = SimpleNamespace(decode=lambda ids: "")
    run = SimpleNamespace(
        base=SimpleNamespace(chat=SimpleNamespace(tokenizer=tokenizer)),
        write_evaluation=lambda done, row, *lines: written.update(row),
        write_samples=lambda done, rows: None,
    )
    prompts = [Prompt(np.array([1]), "1", "gsm8k")] * (len(verdicts) // samples)
    sample = SimpleNamespace(collect=collect, run=run, load=lambda: None)
    held_out_accuracy(sample, prompts, ppo.Config(eval_samples=samples), 0)
    return written


def test_held_out_accuracy_is_of_prompts_with_verdicts():
    right, wrong, error = Verdict(1.0, ""), Verdict(0.0, ""), Verdict(0.0, "killed", "error")
    assert held_out([right, wrong, right, error], 1)["accuracy"] == pytest.approx(2 / 3)
    assert held_out([right, right, wrong, wrong, wrong, error], 2)["accuracy"] == pytest.approx(1 / 2)
    alike = held_out([right] * 16 + [wrong] * 16, 2)  # samples that agree say what one of them says
    alone = held_out([right] * 8 + [wrong] * 8, 1)
    assert (alike["low"], alike["high"]) == pytest.approx((alone["low"], alone["high"]))
    with pytest.raises(UserError, match="no held-out prompt could be verified, the first: killed"):
        held_out([error, error], 1)


# --- what flags mean here ---------------------------------------------------------------------------------------------


def resolved(tmp_path, **flags) -> sft.Config:
    defaults = {"learning_rate": 5e-6, "batch_size": 128}
    embedded_defaults = {"learning_rate": 3e-3}
    config = sft.Config(cache_dir=str(tmp_path), **flags)
    return resolve.resolve(
        config, world.start(), defaults=defaults, embedded_defaults=embedded_defaults, data="conversations"
    )


def test_without_a_model_the_embedded_one_is_trained_on_what_is_named(tmp_path):
    found = resolved(tmp_path)
    assert (found.learning_rate, found.batch_size) == (3e-3, 128)
    assert found.dataset_name.endswith("train_conversations.jsonl")
    assert found.eval_dataset_name.endswith("held_out_conversations.jsonl")
    named = resolved(tmp_path, dataset_name="mine.jsonl", learning_rate=1e-2)
    assert (named.dataset_name, named.eval_dataset_name, named.learning_rate) == ("mine.jsonl", None, 1e-2)


def test_a_home_is_a_home_in_a_recipe_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = resolved(tmp_path, model_name_or_path="~/model", dataset_name="x", output_dir="~/out")
    assert (found.model_name_or_path, found.output_dir) == (str(tmp_path / "model"), str(tmp_path / "out"))
    assert (found.learning_rate, found.dataset_name) == (5e-6, "x")

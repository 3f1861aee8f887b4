"""Group-relative advantages, surrogates and weights against scalar loops in float64, written from the papers."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import group, ppo

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 10.0, -10.0]), min_size=1, max_size=8)
NUMBERS = st.lists(
    st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-3, 0), st.floats(-2, 2)), min_size=1, max_size=12
)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- advantages -------------------------------------------------------------------------------------------------------


def of_groups(groups: list[list[float]], seed: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(scores, groups, places): the responses in an order of their own, groups under any numbers."""
    pairs = [(score, 7 * g + 3) for g, scores in enumerate(groups) for score in scores]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return tensor([pairs[i][0] for i in order]), torch.tensor([pairs[i][1] for i in order]), order


def in_place(found: torch.Tensor, order: list[int]) -> list[float]:
    back = [0.0] * len(order)
    for value, i in zip(found.tolist(), order, strict=True):
        back[i] = value
    return back


def deviation(scores: list[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


LOOPS = {
    "grpo_advantages": lambda r, i: (r[i] - statistics.fmean(r)) / (deviation(r) + 1e-6) if deviation(r) else 0.0,
    "dr_grpo_advantages": lambda r, i: r[i] - statistics.fmean(r),
    "rloo_advantages": lambda r, i: r[i] - statistics.fmean(r[:i] + r[i + 1 :]) if len(r) > 1 else 0.0,
}


@pytest.mark.parametrize("name", LOOPS)
@given(st.lists(SCORES, min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_advantages_against_a_loop_over_every_group(name, groups, seed):
    scores, numbers, order = of_groups(groups, seed)
    expected = [LOOPS[name](r, i) for r in groups for i in range(len(r))]
    found = in_place(getattr(group, name)(scores, numbers), order)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", LOOPS)
@given(st.floats(-1e3, 1e3), st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_equals_have_an_advantage_of_exactly_0(name, score, n):
    """Three 0.1 have a mean of 0.10000000000000002: nothing may be made of that."""
    assert (getattr(group, name)(tensor([score] * n), torch.zeros(n, dtype=torch.int64)) == 0).all()
    assert (getattr(group, name)(tensor([0.1] * 3), torch.zeros(3, dtype=torch.int64)) == 0).all()


@given(st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=6), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_reinforce_pp_against_a_loop(rewards):
    returns = [sum(r[t:]) for r in rewards for t in range(len(r))]
    found = group.reinforce_pp_advantages(
        tensor([x for r in rewards for x in r]), torch.tensor(list(map(len, rewards)))
    )
    if len(returns) > 1:
        mean, scale = statistics.fmean(returns), math.sqrt(statistics.variance(returns) + 1e-8)
        returns = [(x - mean) / scale for x in returns]
    assert found.tolist() == pytest.approx(returns, abs=1e-6)


# --- surrogates -------------------------------------------------------------------------------------------------------


def clipped(a: float, rho: float, low: float, high: float, dual: float | None) -> float:
    loss = -min(a * rho, a * min(max(rho, 1 - low), 1 + high))
    return min(loss, -a * dual) if dual is not None and a < 0 else loss


@given(NUMBERS, st.sampled_from([(0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4), (1.0, 4.0)]), st.sampled_from([None, 1.5, 3.0]))
@settings(deadline=None, max_examples=60)
def test_clipping_against_a_loop(numbers, clips, dual):
    new, old, _, advantages = (tensor(column) for column in zip(*numbers, strict=True))
    expected = [clipped(a, math.exp(n - o), *clips, dual) for n, o, _, a in numbers]
    found = group.clipped_surrogate(new, old, advantages, *clips, dual)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    if clips == (0.2, 0.2) and dual is None:
        torch.testing.assert_close(found, ppo.ppo_policy(new, old, advantages, 0.2), rtol=0, atol=0)


@given(NUMBERS)
@settings(deadline=None, max_examples=60)
def test_cispo_weighs_the_gradient_of_every_token(numbers):
    new, old, _, advantages = (tensor(column) for column in zip(*numbers, strict=True))
    new.requires_grad_()
    group.cispo(new, old, advantages, 1.0, 0.5).sum().backward()
    expected = [-a * min(math.exp(n - o), 1.5) for n, o, _, a in numbers]
    assert new.grad.tolist() == pytest.approx(expected, abs=1e-9)


@given(NUMBERS, st.integers(1, 4), st.floats(-2, 2))
@settings(deadline=None, max_examples=60)
def test_gspo_is_one_ratio_a_response(numbers, responses, a):
    """Value and gradient of its equation, the mean over a response of what every token is given."""
    counts = [len(part) for part in torch.arange(len(numbers)).tensor_split(responses)]
    new, old = (tensor(column) for column in list(zip(*numbers, strict=True))[:2])
    new.requires_grad_()
    moved = group.gspo_logprobs(new, old, torch.tensor(counts))
    loss = group.clipped_surrogate(moved, old, torch.full_like(old, a), 0.2, 0.3)
    weights = torch.tensor(counts).double().clamp(min=1).reciprocal().repeat_interleave(torch.tensor(counts))
    (weights * loss).sum().backward()
    total, gradient, start = 0.0, [], 0
    for n in counts:
        rows, start = numbers[start : start + n], start + n
        s = math.exp(sum(x[0] - x[1] for x in rows) / n) if n else 1.0
        total += clipped(a, s, 0.2, 0.3, None) if n else 0.0
        free = -a * s > -a * min(max(s, 0.8), 1.3) or 0.8 <= s <= 1.3
        gradient += [-a * s / max(n, 1) if free else 0.0] * n
    assert (weights * loss).sum().item() == pytest.approx(total, abs=1e-9)
    assert new.grad.tolist() == pytest.approx(gradient, abs=1e-9)


def test_ratios_to_the_sampler_are_bounded_from_above_alone():
    found = group.truncated_ratio(tensor([-1.0, -1.0, -3.0]), tensor([-3.0, -1.5, -1.0]), 2.0)
    assert found.tolist() == pytest.approx([2.0, math.exp(0.5), math.exp(-2.0)])


# --- KL and weights ---------------------------------------------------------------------------------------------------


@given(NUMBERS)
@settings(deadline=None, max_examples=60)
def test_kl_in_the_loss_and_its_gradient_against_a_loop(numbers):
    for name in group.KL_LOSSES:
        new, old, ref, _ = (tensor(column) for column in zip(*numbers, strict=True))
        new.requires_grad_()
        loss = group.kl_loss(new, old, ref, name)
        loss.sum().backward()
        values, gradients = [], []
        for n, o, r, _ in numbers:
            d, rho = n - r, math.exp(n - o)
            k3, slope = math.exp(-d) - 1 + d, 1 - math.exp(-d)
            values.append({"k2": d * d / 2, "k3": k3, "unbiased": rho * k3}[name])
            gradients.append({"k2": d, "k3": slope, "unbiased": rho * (k3 + slope)}[name])
        assert loss.tolist() == pytest.approx(values, abs=1e-8)
        assert new.grad.tolist() == pytest.approx(gradients, abs=1e-8)


@pytest.mark.parametrize(
    "estimator, is_exact, is_exact_at_old", [("k2", False, True), ("k3", False, False), ("unbiased", True, True)]
)
def test_which_kl_has_the_gradient_of_the_divergence(estimator, is_exact, is_exact_at_old):
    """The expectation over a vocabulary of five, under pi_old, of the gradient with respect to logits; in closed form
    d KL(pi || ref) / d z_v = p_v ( log p_v - log q_v - KL ).
    """
    g = torch.Generator().manual_seed(3)
    logits, moved, ref = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(3))
    for old, exact in ((moved, is_exact), (logits, is_exact_at_old)):
        z = logits.clone().requires_grad_()
        loss = group.kl_loss(z.log_softmax(0), old.log_softmax(0), ref.log_softmax(0), estimator)
        (old.softmax(0) * loss).sum().backward()
        p, d = logits.softmax(0), logits.log_softmax(0) - ref.log_softmax(0)
        truth = p * (d - (p * d).sum())
        assert torch.allclose(z.grad, truth, atol=1e-12) == exact


def test_k1_is_no_loss():
    with pytest.raises(ValueError, match="must be one of k2, k3, unbiased, got 'k1'"):
        group.kl_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), "k1")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(9, 40))
@settings(deadline=None, max_examples=60)
def test_weights_against_their_equations(counts, longest):
    n, total = len(counts), sum(counts)
    found = {name: group.token_weights(torch.tensor(counts), name, longest).tolist() for name in group.AGGREGATES}
    assert found["token"] == pytest.approx([1 / total] * n)
    assert found["sequence"] == pytest.approx([1 / (n * c) for c in counts])
    assert found["dr_grpo"] == pytest.approx([1 / (n * longest)] * n)
    for name in ("token", "sequence"):
        assert sum(w * c for w, c in zip(found[name], counts, strict=True)) == pytest.approx(1)
    with pytest.raises(ValueError, match="aggregate must be one of"):
        group.token_weights(torch.tensor(counts), "mean", longest)

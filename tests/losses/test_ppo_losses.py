"""PPO's parts against scalar loops in float64, and the worked example of the original."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import ppo


def test_the_originals_worked_example():
    """T = 6, beta .05, gamma 1, lambda .95; the score stands one slot after the end of A, and in the last slot of B."""
    counts = torch.tensor([4, 6])
    logprobs = torch.tensor([-0.5, -1.0, -0.2, 0.0] + [-0.1] * 6, dtype=torch.float64)
    # A's fourth slot holds no token: KL 0
    reference = torch.tensor([-0.7, -0.8, -0.2, 0.0] + [-0.3] * 6, dtype=torch.float64)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0] + [0.5] * 6, dtype=torch.float64)
    rewards = ppo.token_rewards(ppo.kl(logprobs, reference), torch.tensor([10.0, -10.0]), counts, 0.05)
    torch.testing.assert_close(
        rewards, torch.tensor([-0.01, 0.01, 0.0, 10.0] + [-0.01] * 5 + [-10.01], dtype=torch.float64)
    )
    advantages, returns = ppo.gae(rewards, values, counts, 1.0, 0.95)
    a = [7.99625, 7.375, 6.7, 6.0]
    b = [-8.177681, -8.597559, -9.039536, -9.504775, -9.9945, -10.51]
    assert advantages.tolist() == pytest.approx(a + b, abs=1e-6)
    assert returns.tolist() == pytest.approx([8.99625, 9.375, 9.7, 10.0] + [x + 0.5 for x in b], abs=1e-6)
    tokens = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9])
    white = [1.404191, 1.329927, 1.249237, -0.529251, -0.579443, -0.632277, -0.687892, -0.746434, -0.808057]
    assert ppo.whiten(advantages[tokens]).tolist() == pytest.approx(white, abs=1e-5)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=6), st.floats(0.5, 1.0), st.floats(0.0, 1.0), st.integers(0, 99)
)
@settings(deadline=None, max_examples=60)
def test_gae_against_the_recurrence(counts, gamma, lam, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(counts), generator=g, dtype=torch.float64)
    advantages, returns = ppo.gae(rewards, values, torch.tensor(counts), gamma, lam)
    expected, start = [], 0
    for n in counts:
        r, v, running, column = rewards[start : start + n].tolist(), values[start : start + n].tolist(), 0.0, []
        for t in reversed(range(n)):
            running = r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] + gamma * lam * running
            column.append(running)
        expected += column[::-1]
        start += n
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values)


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    """The closed form at gamma = lambda = 1: what is still to come, minus what was expected."""
    rewards, values = torch.randn(2, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages, _ = ppo.gae(rewards, values, torch.tensor([500]), 1.0, 1.0)
    torch.testing.assert_close(advantages, rewards.flip(0).cumsum(0).flip(0) - values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator):
    """Against the definitions; k1 and k3 are unbiased on samples of p, k3 never negative."""
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    estimates = ppo.kl(p.log(), q.log(), estimator)
    for i in range(3):
        d = math.log(p[i] / q[i])
        assert estimates[i].item() == pytest.approx(
            {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator], rel=1e-12
        )
    if estimator != "k2":
        assert (p * estimates).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-12)
    assert estimator == "k1" or (estimates >= 0).all()
    with pytest.raises(ValueError, match="k1, k2, k3"):
        ppo.kl(p, q, "k4")


def test_policy_loss_against_scalar_loop():
    g = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 200, generator=g, dtype=torch.float64)
    expected = []
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(n - o)
        expected.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
    assert ppo.ppo_policy(new, old, advantages, 0.2).tolist() == pytest.approx(expected, rel=1e-12)


def test_policy_gradient_vanishes_only_where_clipping_says_so():
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    ppo.ppo_policy(new, old, advantages, 0.2).sum().backward()
    assert new.grad.tolist() == pytest.approx([0.0, math.exp(0.5), -math.exp(-0.5), 0.0])


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_against_scalar_loop(clip):
    g = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 200, generator=g, dtype=torch.float64)
    expected = []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        loss = (v - r) ** 2
        if clip is not None:
            loss = max(loss, (min(max(v, o - clip), o + clip) - r) ** 2)
        expected.append(loss / 2)
    assert ppo.ppo_value(values, old, returns, clip).tolist() == pytest.approx(expected, rel=1e-12)


def test_whitening_leaves_a_single_row_and_centres_the_rest():
    one = torch.tensor([3.0])
    assert torch.equal(ppo.whiten(one), one)
    white = ppo.whiten(torch.randn(999, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 + 3)
    assert white.mean().item() == pytest.approx(0, abs=1e-12) and white.std().item() == pytest.approx(1, rel=1e-8)
    assert torch.equal(ppo.whiten(torch.full((5,), 2.0)), torch.zeros(5))


def test_diagnostics_and_explained_variance():
    new, old = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.9])
    found = ppo.diagnostics(new, old, 0.2)
    assert found["ratio"].tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-0.1)])
    assert found["clipfrac"].tolist() == [False, True, False]
    assert (found["approxkl"] >= 0).all() and found["approxkl"][0] == 0
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns, returns) == 1 and ppo.explained_variance(torch.zeros(3), returns) == 0
    assert ppo.explained_variance(torch.zeros(3), torch.ones(3)) == 0


def test_the_score_of_an_empty_response_is_nowhere():
    rewards = ppo.token_rewards(torch.zeros(3), torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0, 2, 1]), 0.1)
    assert rewards.tolist() == [0.0, 1.0, 2.0]


def test_the_share_that_is_clipped_is_of_both_sides():
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0], dtype=torch.float64)
    seen = ppo.diagnostics(ratios.log(), torch.zeros(7, dtype=torch.float64), 0.2)
    assert seen["clipfrac"].tolist() == [True, True, False, False, False, True, True]
    assert seen["approxkl"].tolist() == pytest.approx([r - 1 - math.log(r) for r in ratios.tolist()], abs=1e-12)

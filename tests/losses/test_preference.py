"""Every preference loss against a scalar loop in float64, at the numbers that Tülu's data gives: sums of hundreds,
ratios near 0.
"""

from __future__ import annotations

import math

import pytest
import torch

import losses
from tests import oracles


def pairs(n=64, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 400, (2, n), generator=g)
    reference = -torch.rand(2, n, generator=g, dtype=torch.float64) * 3 * lengths
    policy = reference + torch.randn(2, n, generator=g, dtype=torch.float64) * lengths.sqrt()
    return [x.to(dtype) for x in (*policy, *reference)] + list(lengths)


LOSSES = {
    "dpo": (
        losses.dpo,
        lambda p, **k: oracles.dpo(*p[:4], k.get("beta", 0.1), k.get("label_smoothing", 0.0)),
        {"beta", "label_smoothing"},
    ),
    "dpo_norm": (
        losses.dpo_norm,
        lambda p, **k: oracles.dpo_norm(*p, k.get("beta", 5.0), k.get("label_smoothing", 0.0)),
        {"beta", "label_smoothing"},
    ),
    "simpo": (
        losses.simpo,
        lambda p, **k: oracles.simpo(
            p[0], p[1], p[4], p[5], k.get("beta", 2.5), k.get("gamma_beta_ratio", 0.3), k.get("label_smoothing", 0.0)
        ),
        {"beta", "gamma_beta_ratio", "label_smoothing"},
    ),
    "ipo": (losses.ipo, lambda p, **k: oracles.ipo(*p, k.get("beta", 0.1)), {"beta"}),
    "wpo": (losses.wpo, lambda p, **k: oracles.wpo(*p, k.get("beta", 0.1)), {"beta"}),
}
HYPER = [{}, {"beta": 0.03}, {"label_smoothing": 0.1}, {"gamma_beta_ratio": 1.0}]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("hyper", HYPER, ids=str)
def test_against_scalar_loop(name, hyper):
    loss, oracle, reads = LOSSES[name]
    if not hyper.keys() <= reads:
        pytest.skip(f"{name} does not read {hyper.keys()}")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
        args = pairs(dtype=dtype)
        expected = torch.tensor(
            [oracle(p, **hyper) for p in zip(*(a.tolist() for a in args), strict=True)], dtype=torch.float64
        )
        actual, _, _ = loss(*args, **hyper)
        assert actual.shape == (64,)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_by_finite_differences(name):
    args = [a.requires_grad_() if a.is_floating_point() else a for a in pairs(4, torch.float64)]
    if name == "wpo":  # its weight is a constant of the step, which a finite difference would move
        loss, _, _ = losses.wpo(*args)
        weight = (args[0] / args[4] + args[1] / args[5]).exp().clamp(max=1).detach()
        expected = torch.autograd.grad((weight * losses.dpo(*args)[0]).sum(), args[0])[0]
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), args[0])[0], expected)
        return
    assert torch.autograd.gradcheck(lambda c, r: LOSSES[name][0](c, r, *args[2:])[0], args[:2])


@pytest.mark.parametrize("name", ["dpo", "dpo_norm"])
def test_policy_equal_to_reference_is_log_two_exactly(name):
    chosen, rejected, _, _, nc, nr = pairs()
    loss, chosen_rewards, rejected_rewards = LOSSES[name][0](chosen, rejected, chosen, rejected, nc, nr)
    assert torch.equal(loss, torch.full_like(loss, math.log(2)))
    assert not chosen_rewards.any() and not rejected_rewards.any()


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_constants_and_their_margin_orders_the_loss(name):
    args = [a.requires_grad_() if a.is_floating_point() else a for a in pairs()]
    loss, chosen_rewards, rejected_rewards = LOSSES[name][0](*args)
    assert loss.requires_grad and not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    if name in ("dpo", "dpo_norm", "simpo"):
        order = (chosen_rewards - rejected_rewards).argsort()
        assert (loss.detach()[order].diff() <= 1e-6).all()


def test_wpo_weight_is_of_the_mean_log_prob():
    """The original multiplies sums by the mask and gets a weight of practically 0; here it is 0.0498 for means of -1
    and -2.
    """
    one = torch.ones(1)
    weighted, _, _ = losses.wpo(-10 * one, -20 * one, -10 * one, -20 * one, 10 * one.long(), 10 * one.long())
    torch.testing.assert_close(weighted, math.exp(-3) * math.log(2) * one)


def test_chosen_nll():
    torch.testing.assert_close(
        losses.chosen_nll(torch.tensor([-6.0, -1.0]), torch.tensor([3, 4])), torch.tensor([2.0, 0.25])
    )

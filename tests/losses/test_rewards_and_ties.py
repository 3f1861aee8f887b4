"""What losses report and leave alone, by their formulas in float64: rewards, ties, temperature, rows without loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import losses
from engine import log, world
from launch import dpo
from losses.logprobs import LogitTransform, linear_logprobs, linear_loss
from tests import oracles

# policy (chosen, rejected), reference (chosen, rejected), tokens (chosen, rejected)
PAIRS = [(-12.5, -40.0, -15.0, -31.0, 9, 30), (-3.0, -2.5, -2.0, -4.0, 2, 4), (-90.0, -10.0, -95.0, -12.5, 45, 10)]


def columns() -> list[torch.Tensor]:
    values = torch.tensor(PAIRS, dtype=torch.float64)
    return [*values[:, :4].unbind(1), *values[:, 4:].long().unbind(1)]


def preference_step(
    chosen: list[float],
    rejected: list[float],
    ref_chosen: list[float],
    ref_rejected: list[float],
    lengths: list[int],
    **flags,
):
    """(loss, its derivatives by every answer's first log-prob (P, 2), metrics) of launch.dpo, given mean log-probs.

    The policy's log-probs are given in place of a model's; all that is launch.dpo's is its own.
    """
    _, objective = dpo.resolve_loss(dpo.Config(**flags))
    counts = torch.tensor(lengths)
    interleave = lambda a, b: torch.tensor([x for pair in zip(a, b, strict=True) for x in pair], dtype=torch.float32)
    logprobs = interleave(chosen, rejected).repeat_interleave(counts).requires_grad_()
    batch = SimpleNamespace(counts_S=counts, ids_T=torch.zeros(1), examples=tuple(range(len(chosen))))
    reference = interleave(ref_chosen, ref_rejected) * counts
    totals = log.Totals(world.start())
    whole = lambda batch, loss_of_logprobs, sequences_per_group: loss_of_logprobs(logprobs, slice(0, len(chosen)))
    policy = SimpleNamespace(loss=whole)
    loss = dpo.preference_loss(policy, batch, lambda batch: reference, objective, len(chosen), totals)
    loss.backward()
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
    sums = {name: total / len(chosen) for name, total in totals.reduce(dpo.METRICS).items()}
    return loss.item(), logprobs.grad[first].view(-1, 2), sums


# --- the reported rewards ---------------------------------------------------------------------------------------------

REWARDS = {  # of (policy's sum, reference's sum, tokens)
    "dpo": lambda beta, policy, reference, n: beta * (policy - reference),
    "dpo_norm": lambda beta, policy, reference, n: beta * (policy / n - reference / n),
    "simpo": lambda beta, policy, reference, n: beta * policy / n,
    "ipo": lambda beta, policy, reference, n: beta * (policy / n - reference / n),
    "wpo": lambda beta, policy, reference, n: beta * (policy - reference),
}


@pytest.mark.parametrize("beta", [0.3, 7.0])
@pytest.mark.parametrize("name", REWARDS)
def test_the_reported_rewards_are_the_formulas(name, beta):
    """ipo's has its beta, simpo's has no margin: a reward is of one answer."""
    _, chosen, rejected = dpo.LOSSES[name](*columns(), beta=beta)
    for i, (cw, cl, rw, rl, nw, nl) in enumerate(PAIRS):
        assert chosen[i].item() == pytest.approx(REWARDS[name](beta, cw, rw, nw), rel=1e-12)
        assert rejected[i].item() == pytest.approx(REWARDS[name](beta, cl, rl, nl), rel=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 2.0])
def test_simpos_margin_is_in_its_loss_and_in_no_reward(ratio):
    loss, chosen, rejected = losses.simpo(*columns(), beta=2.0, gamma_beta_ratio=ratio)
    for i, (cw, cl, _, _, nw, nl) in enumerate(PAIRS):
        assert loss[i].item() == pytest.approx(oracles.simpo(cw, cl, nw, nl, 2.0, ratio), rel=1e-12)
        assert (chosen[i].item(), rejected[i].item()) == pytest.approx((2.0 * cw / nw, 2.0 * cl / nl), rel=1e-12)


# --- launch.dpo's step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dpo_norm", "simpo"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 2.0])
def test_rpo_alpha_adds_the_chosen_answers_nll(alpha, loss_type):
    """To the loss, to its gradient by the chosen answer alone, and to the metric; the nll is reported without it."""
    chosen, rejected, ref_chosen, ref_rejected, lengths = (
        [-1.0, -0.5],
        [-1.5, -2.0],
        [-1.25, -0.75],
        [-1.0, -2.0],
        [4, 2, 3, 5],
    )
    loss, gradient, metrics = preference_step(
        chosen, rejected, ref_chosen, ref_rejected, lengths, loss_type=loss_type, rpo_alpha=alpha
    )
    nll = sum(-m for m in chosen) / 2
    if loss_type == "simpo":
        margins = [2.5 * (c - r) - 0.3 * 2.5 for c, r in zip(chosen, rejected, strict=True)]
        beta = 2.5
    else:
        margins = [
            5 * ((c - rc) - (r - rr)) for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
        ]
        beta = 5.0
    expected = sum(-oracles.log_sigmoid(m) for m in margins) / 2 + alpha * nll
    assert loss == pytest.approx(expected, rel=1e-6) and metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["nll"] == pytest.approx(nll, rel=1e-6)
    for pair, margin in enumerate(margins):
        slope = beta / (1 + math.exp(margin))  # - d loss / d margin
        nw, nl = lengths[2 * pair : 2 * pair + 2]
        assert gradient[pair].tolist() == pytest.approx([-(slope + alpha) / nw / 2, slope / nl / 2], rel=1e-5)


def test_a_tie_is_not_counted_as_right():
    """Of three pairs one wins, one ties, one loses: a third is right, by log-prob per token as by reward."""
    *_, metrics = preference_step(
        [-1.0, -2.0, -3.0], [-2.0, -2.0, -1.0], [-1.5, -2.5, -1.0], [-1.5, -2.5, -1.0], [4, 2, 2, 4, 3, 5]
    )
    assert metrics["logps/accuracies"] == pytest.approx(1 / 3) and metrics["rewards/accuracies"] == pytest.approx(1 / 3)


def test_a_policy_equal_to_its_reference_is_never_right():
    """All rewards are 0: an accuracy of 1 before the first update would be of ties."""
    *_, metrics = preference_step([-1.0, -2.0], [-2.0, -1.0], [-1.0, -2.0], [-2.0, -1.0], [4, 2, 3, 3])
    assert metrics["rewards/accuracies"] == 0 and metrics["logps/accuracies"] == 0.5


def test_the_two_accuracies_are_of_two_numbers():
    """Log-probs are compared per token and without a reference, rewards with it."""
    *_, metrics = preference_step(
        [-2.0, -2.0, -1.0], [-1.0, -1.0, -2.0], [-4.0, -4.0, -0.5], [-1.0, -1.0, -3.0], [2, 9, 2, 9, 9, 2]
    )
    assert metrics["logps/accuracies"] == pytest.approx(1 / 3) and metrics["rewards/accuracies"] == pytest.approx(2 / 3)


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "transform",
    [LogitTransform(softcap=2.0), LogitTransform(scale=0.25, softcap=1.5), LogitTransform(scale=3.0)],
    ids=str,
)
def test_the_temperature_divides_what_the_softcap_leaves(transform, temperature):
    """log softmax of c tanh(s z / c) / T, by scalar loops."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 9))
    targets = torch.tensor([0, 8, 3, 3, 5, 1])
    found = linear_logprobs(hidden, weight, targets, transform=transform.at(temperature))
    for h, target, logprob in zip(hidden.tolist(), targets.tolist(), found.tolist(), strict=True):
        logits = [z / temperature for z in oracles.row_logits(h, weight.tolist(), transform.scale, transform.softcap)]
        assert logprob == pytest.approx(oracles.log_softmax_at(logits, target)[0], rel=1e-12)


@pytest.fixture
def uninitialised_is_nan():
    """Under deterministic algorithms torch fills new memory with NaN, so that what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("without_loss", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}], ids=str)
def test_rows_without_loss_have_a_gradient_of_zero(without_loss, uninitialised_is_nan):
    """Where the loss of a chunk depends on no log-prob (every token of it weighs nothing), and only there."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (6, 7))
    targets = torch.tensor([6, 0, 2, 2, 5, 1])

    def loss_of_logprobs(logprobs, groups):
        return torch.zeros((), dtype=torch.float64) if groups.start in without_loss else -logprobs.sum()

    linear_loss(hidden, weight, targets, loss_of_logprobs, cuts=[0, 2, 4, 6], chunk_rows=2).backward()
    counted = torch.tensor([row // 2 not in without_loss for row in range(6)])[:, None]
    probabilities = (hidden @ weight.T).detach().softmax(1)
    dlogits = (probabilities - torch.nn.functional.one_hot(targets, 7)) * counted
    assert not hidden.grad[~counted[:, 0]].any()
    torch.testing.assert_close(hidden.grad, dlogits @ weight.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weight.grad, dlogits.T @ hidden.detach(), rtol=1e-12, atol=1e-14)

"""Proximal policy optimisation on token sequences, in the order of the algorithm: KL, rewards, GAE, whitening, the two
losses.

A response of n tokens has n slots (states in which a token was chosen); its rows follow each other in a flat stream,
and `counts_S` says where one sequence ends. Functions are elementwise or per sequence and reduce nothing: the launch
file sums over the whole batch and divides once.

S sequences · R rows (slots of all sequences, end to end) · L slots of the longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")
GAE_BLOCK = 128


def kl(logprobs_R: Tensor, ref_logprobs_R: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) at tokens drawn from pi, (R,). With d = log pi - log pi_ref:

    k1 = d (unbiased, any sign) · k2 = d^2 / 2 (biased, low variance) · k3 = exp(-d) - 1 + d (unbiased, never negative)

    Schulman, "Approximating KL divergence" (2020). As a penalty inside the reward, which takes no gradient, k1 is the
    usual one.
    """
    d_R = logprobs_R - ref_logprobs_R
    if estimator == "k1":
        return d_R
    if estimator == "k2":
        return d_R**2 / 2
    if estimator == "k3":
        return torch.expm1(-d_R) + d_R
    raise ValueError(f"estimator must be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")


def token_rewards(kl_R: Tensor, scores_S: Tensor, counts_S: Tensor, kl_coef: float) -> Tensor:
    """r_t = - kl_coef KL_t, plus the sequence's score in its last slot, (R,). A slot without a token (after the end)
    has KL 0.
    """
    rewards_R = -kl_coef * kl_R
    filled_S = counts_S > 0
    return rewards_R.index_add(0, (counts_S.cumsum(0) - 1)[filled_S], scores_S[filled_S].to(rewards_R.dtype))


def gae(rewards_R: Tensor, values_R: Tensor, counts_S: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation within each sequence: (advantages, returns), both (R,), returns = advantages +
    values.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   V and A are 0 beyond the end

    Schulman et al. (arXiv 1506.02438, eq. 16). A_t = sum_k (gamma lam)^k delta_{t+k} is taken in blocks of 128 slots by
    a triangular matrix product, with A carried from block to block: 128 times fewer steps than slots.
    """
    delta_SL, place = _pad(rewards_R - values_R + gamma * _next(values_R, counts_S), counts_S)
    length = delta_SL.shape[1]
    decay = gamma * lam
    power = torch.arange(GAE_BLOCK, dtype=delta_SL.dtype, device=delta_SL.device)
    # M[j, i] = decay^(j - i) for j >= i: (delta M)_i = sum over j >= i of decay^(j - i) delta_j
    exponent = power[:, None] - power[None, :]
    matrix = torch.where(exponent >= 0, decay ** exponent.clamp(min=0), torch.zeros_like(exponent))
    carry_decay = decay ** (GAE_BLOCK - power)
    advantages_SL, carry_S = torch.empty_like(delta_SL), delta_SL.new_zeros(len(delta_SL))
    for start in range(length - GAE_BLOCK, -1, -GAE_BLOCK):
        block = slice(start, start + GAE_BLOCK)
        advantages_SL[:, block] = delta_SL[:, block] @ matrix + carry_S[:, None] * carry_decay
        carry_S = advantages_SL[:, start]
    advantages_R = advantages_SL[place]
    return advantages_R, advantages_R + values_R


def _next(values_R: Tensor, counts_S: Tensor) -> Tensor:
    """The next slot's value, 0 in a sequence's last slot."""
    following_R = torch.cat([values_R[1:], values_R.new_zeros(1)]) if len(values_R) else values_R
    last = (counts_S.cumsum(0) - 1)[counts_S > 0]
    return following_R.index_fill(0, last, 0.0)


def _pad(x_R: Tensor, counts_S: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(x as (S, L) with L rounded up to blocks and zeros behind each sequence, the place of every row in it)."""
    starts_S = counts_S.cumsum(0) - counts_S
    sequence_R = torch.arange(len(counts_S), device=x_R.device).repeat_interleave(counts_S)
    slot_R = torch.arange(len(x_R), device=x_R.device) - starts_S[sequence_R]
    longest = int(counts_S.max()) if len(counts_S) else 0
    padded = x_R.new_zeros(len(counts_S), -(-max(longest, 1) // GAE_BLOCK) * GAE_BLOCK)
    padded[sequence_R, slot_R] = x_R
    return padded, (sequence_R, slot_R)


def whiten(x_R: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all rows given, var unbiased; fewer than two rows have no variance and are
    left.

    The caller gives the rows of the whole batch, of every rank (the original whitens on each rank apart).
    """
    if len(x_R) < 2:
        return x_R
    return (x_R - x_R.mean()) * torch.rsqrt(x_R.var() + 1e-8)


def ppo_policy(logprobs_R: Tensor, old_logprobs_R: Tensor, advantages_R: Tensor, cliprange: float) -> Tensor:
    """The clipped surrogate, per token, (R,): max( - A rho, - A clip(rho, 1 - eps, 1 + eps) ),  rho = pi / pi_old.

    Schulman et al. (arXiv 1707.06347, eq. 7), negated to be minimised.
    """
    ratio_R = (logprobs_R - old_logprobs_R).exp()
    return torch.maximum(-advantages_R * ratio_R, -advantages_R * ratio_R.clamp(1 - cliprange, 1 + cliprange))


def ppo_value(values_R: Tensor, old_values_R: Tensor, returns_R: Tensor, cliprange_value: float | None) -> Tensor:
    """(V - G)^2 / 2 per slot, (R,); with a clip range, the larger of that and of V kept within it around the old value.

    The clipping is Baselines' (openai/baselines ppo2), not the paper's. From a value head that starts at 0 it forbids
    to follow a reward larger than the range, so None is the default of everything but the reproduction of Tülu 3.
    """
    loss_R = (values_R - returns_R) ** 2
    if cliprange_value is not None:
        clipped_R = old_values_R + (values_R - old_values_R).clamp(-cliprange_value, cliprange_value)
        loss_R = torch.maximum(loss_R, (clipped_R - returns_R) ** 2)
    return loss_R / 2


def diagnostics(
    logprobs_R: Tensor, old_logprobs_R: Tensor, clip_low: float, clip_high: float | None = None
) -> dict[str, Tensor]:
    """Per token, (R,), without gradient: the ratio, whether it was outside the clip range (None: as far above 1 as
    below), and k3 as the distance travelled.
    """
    d_R = (logprobs_R - old_logprobs_R).detach()
    ratio_R = d_R.exp()
    high = clip_low if clip_high is None else clip_high
    clipped_R = (ratio_R < 1 - clip_low) | (ratio_R > 1 + high)
    return {"ratio": ratio_R, "clipfrac": clipped_R, "approxkl": torch.expm1(d_R) - d_R}


def explained_variance(values_R: Tensor, returns_R: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G): 1 for a perfect critic, 0 for a constant; 0 where the returns do not vary."""
    variance = returns_R.var() if len(returns_R) > 1 else returns_R.new_zeros(())
    return torch.where(
        variance > 0, 1 - (returns_R - values_R).var() / variance.clamp(min=1e-12), torch.zeros_like(variance)
    )

"""Group-relative policy optimisation: advantages from the other responses to a prompt, in place of a value model.

    advantages   what a response's score is above its group's          grpo, dr_grpo, rloo, reinforce_pp
    surrogate    how far an update may go on old responses             clipped_surrogate, cispo, gspo_logprobs
    KL           the distance to pi_ref in the loss                    kl_loss
    weights      what a token counts in the mean                       token_weights
    correction   where the sampler is not the policy                   truncated_ratio

Responses follow each other in a flat stream of tokens; `counts_S` says how many each has, `groups_S` which prompt it
answers (any whole numbers, in any order). Nothing is reduced but what an equation sums over: the launch file sums over
the batch, with weights that were known before the first forward.

S responses · G groups · R rows (tokens of all responses, end to end).
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ppo import gae, kl, whiten

AGGREGATES = ("token", "sequence", "dr_grpo")
KL_LOSSES = ("k2", "k3", "unbiased")


# --- advantages -------------------------------------------------------------------------------------------------------


def grpo_advantages(scores_S: Tensor, groups_S: Tensor, epsilon: float = 1e-6) -> Tensor:
    """A_i = ( r_i - mean(r) ) / ( std(r) + epsilon ) over the group of i, std unbiased, (S,).

    Shao et al., "DeepSeekMath" (arXiv 2402.03300, section 4.1.2); the epsilon is the implementations'. In a group of
    equals, or of one, every advantage is exactly 0: there is no deviation to divide by, and none is made of rounding.
    """
    centred_S, size_S, place_S = _centred(scores_S, groups_S)
    square_G = torch.zeros_like(size_S).index_add(0, place_S, centred_S**2)
    std_S = (square_G[place_S] / (size_S - 1).clamp(min=1)).sqrt()
    return centred_S / (std_S + epsilon)


def dr_grpo_advantages(scores_S: Tensor, groups_S: Tensor) -> Tensor:
    """A_i = r_i - mean(r) over the group of i, (S,).

    Liu et al., "Understanding R1-Zero-like training" (arXiv 2503.20783): the division by the deviation weighs prompts
    that are nearly always or nearly never solved above the others.
    """
    return _centred(scores_S, groups_S)[0]


def rloo_advantages(scores_S: Tensor, groups_S: Tensor) -> Tensor:
    """A_i = r_i - mean of the others' r, = K / (K - 1) ( r_i - mean(r) ) in a group of K; 0 in a group of one, (S,).

    Kool et al. (2019); Ahmadian et al., "Back to basics" (arXiv 2402.14740, eq. 8). A baseline without the response
    itself, so that the estimate of the gradient is unbiased.
    """
    centred_S, size_S, _ = _centred(scores_S, groups_S)
    return centred_S * size_S / (size_S - 1).clamp(min=1)


def reinforce_pp_advantages(rewards_R: Tensor, counts_S: Tensor) -> Tensor:
    """A_t = sum over k >= t of r_k within the response, whitened over all tokens of the batch, (R,).

    Hu, "REINFORCE++" (arXiv 2501.03262, eqs. 7 and 8): no group, one baseline and one scale for the whole batch.
    `rewards_R` are the token's, such as `token_rewards` makes them; the caller gives those of every rank.
    """
    returns_R, _ = gae(rewards_R, torch.zeros_like(rewards_R), counts_S, gamma=1.0, lam=1.0)
    return whiten(returns_R)


def _centred(scores_S: Tensor, groups_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r_i less its group's mean, the size of i's group in the dtype of scores, the number of i's group).

    A mean of equals is off by a rounding (the mean of three 0.1 is not 0.1), which a deviation of the same size would
    blow up to an advantage; so equals are set to 0.
    """
    _, place_S, size_G = groups_S.unique(return_inverse=True, return_counts=True)
    zeros_G = scores_S.new_zeros(len(size_G))
    mean_G = zeros_G.index_add(0, place_S, scores_S) / size_G
    lowest_G = zeros_G.scatter_reduce(0, place_S, scores_S, "amin", include_self=False)
    highest_G = zeros_G.scatter_reduce(0, place_S, scores_S, "amax", include_self=False)
    are_equal_S = (lowest_G == highest_G)[place_S]
    centred_S = (scores_S - mean_G[place_S]).masked_fill(are_equal_S, 0.0)
    return centred_S, size_G[place_S].to(scores_S.dtype), place_S


# --- surrogates -------------------------------------------------------------------------------------------------------


def clipped_surrogate(
    logprobs_R: Tensor,
    old_logprobs_R: Tensor,
    advantages_R: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """max( - A rho, - A clip(rho, 1 - low, 1 + high) ) per token, (R,),  rho = pi / pi_old; with a dual clip c > 1, for
    A < 0 no more than - A c.

    Yu et al., "DAPO" (arXiv 2503.14476, eq. 8): a ceiling higher than the floor lets unlikely tokens become likely. The
    dual clip is Ye et al.'s (arXiv 1912.09729, eq. 5): else a bad token that became likely has no bound.
    """
    ratio_R = (logprobs_R - old_logprobs_R).exp()
    loss_R = torch.maximum(-advantages_R * ratio_R, -advantages_R * ratio_R.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss_R
    return torch.where(advantages_R < 0, torch.minimum(loss_R, -advantages_R * dual_clip), loss_R)


def cispo(
    logprobs_R: Tensor, old_logprobs_R: Tensor, advantages_R: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """- A sg( clip(rho, 1 - low, 1 + high) ) log pi per token, (R,), where sg takes no gradient.

    MiniMax, "MiniMax-M1" (arXiv 2506.13585, eq. 4): the weight is clipped, not the update, so every token keeps its
    gradient. Its value is no measure of anything; its gradient is what counts.
    """
    ratio_R = (logprobs_R - old_logprobs_R).exp().clamp(1 - clip_low, 1 + clip_high)
    return -advantages_R * ratio_R.detach() * logprobs_R


def gspo_logprobs(logprobs_R: Tensor, old_logprobs_R: Tensor, counts_S: Tensor) -> Tensor:
    """log pi_old + mean over t of log rho_t, (R,): log-probs that give every token of a response its one ratio

        s_i = ( pi(y_i) / pi_old(y_i) )^(1 / |y_i|)

    so that `clipped_surrogate` of them is GSPO's. Zheng et al. (arXiv 2507.18071, eqs. 5 and 7). `counts_S` are the
    responses that the rows are of, whole; their sum is deterministic on every device.
    """
    sum_S = torch.segment_reduce(logprobs_R - old_logprobs_R, "sum", lengths=counts_S, unsafe=True, initial=0.0)
    mean_S = sum_S / counts_S.clamp(min=1)
    return old_logprobs_R + mean_S.repeat_interleave(counts_S, output_size=len(logprobs_R))


def truncated_ratio(logprobs_R: Tensor, sampled_logprobs_R: Tensor, cap: float) -> Tensor:
    """min( pi_old / mu, cap ) per token, (R,), where mu is what the sampler says it drew from: a factor on advantages.

    Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025). Where sampler and
    trainer are one, as here without top-k and top-p, it is 1 up to rounding.
    """
    return (logprobs_R - sampled_logprobs_R).exp().clamp(max=cap)


# --- KL and means -----------------------------------------------------------------------------------------------------


def kl_loss(logprobs_R: Tensor, old_logprobs_R: Tensor, ref_logprobs_R: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(pi || pi_ref) per token whose gradient means something, (R,). With d = log pi - log pi_ref:

    k2 = d^2 / 2           its gradient is that of KL(pi || pi_ref) where tokens are pi's own
    k3 = exp(-d) - 1 + d   GRPO's; its gradient is that of KL(pi_ref || pi)
    unbiased = rho k3      value and gradient are those of KL(pi || pi_ref), also where tokens are pi_old's

    k1 has no place here: its gradient is that of log pi, which is 0 on average. DeepSeekMath (arXiv 2402.03300, eq. 4);
    the weight rho is DeepSeek-V3.2's (arXiv 2512.02556, section 3.1).
    """
    if estimator not in KL_LOSSES:
        raise ValueError(f"estimator of the KL in the loss must be one of {', '.join(KL_LOSSES)}, got {estimator!r}")
    if estimator == "unbiased":
        return (logprobs_R - old_logprobs_R).exp() * kl(logprobs_R, ref_logprobs_R, "k3")
    return kl(logprobs_R, ref_logprobs_R, estimator)


def token_weights(counts_S: Tensor, aggregate: str, response_length: int) -> Tensor:
    """What each token of a response counts in the mean over a batch of responses, (S,) float64:

    token      1 / N, N the tokens of all          DAPO, eq. 8: every token alike
    sequence   1 / (S |y_i|)                       GRPO, eq. 3: every response alike, so that in a long wrong one each
                                                   token is blamed less
    dr_grpo    1 / (S response_length)             Dr. GRPO: a constant, so that length plays no part

    `counts_S` are the responses of the whole mini-batch, over all ranks: so no result depends on how it is cut.
    """
    ones_S = torch.ones(len(counts_S), dtype=torch.float64)
    if aggregate == "token":
        return ones_S / counts_S.sum().clamp(min=1)
    if aggregate == "sequence":
        return ones_S / (len(counts_S) * counts_S.clamp(min=1))
    if aggregate == "dr_grpo":
        return ones_S / (len(counts_S) * response_length)
    raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")

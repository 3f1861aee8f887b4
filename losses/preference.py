"""Preference losses on one page: length-normalised DPO, DPO, SimPO.

A pair has a chosen answer w and a rejected answer l to one prompt. For an answer y of |y| counted tokens

    L(y) = sum_t log pi(y_t | y_<t)                   what the arguments `chosen`, `rejected` hold, under the policy
    L_ref(y)                                          the same under the reference: a constant, cached
    M(y) = L(y) / |y|                                 mean log-prob per token

Every function takes (P,) fp32 tensors for P pairs and returns three (P,) tensors: the loss of each pair (not reduced:
the launch file divides the sum by the number of pairs of the whole step) and the implicit rewards of both answers,
detached. Hyper-parameters are keyword-only, and their defaults are the published ones; a loss has no others.

P pairs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_norm(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    chosen_len_P: Tensor,
    rejected_len_P: Tensor,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Length-normalised DPO: DPO with mean instead of summed log-probs, under policy and reference alike.

    loss = - log sigma( beta [ (M(w) - M_ref(w)) - (M(l) - M_ref(l)) ] ),   reward(y) = beta (M(y) - M_ref(y))

    Tülu 3 (arXiv 2411.15124, "length-normalized DPO", beta 5). Its scale of beta is not DPO's: mean log-ratios are some
    |y| times smaller.
    """
    return _logistic(
        beta * (chosen_P - ref_chosen_P) / chosen_len_P,
        beta * (rejected_P - ref_rejected_P) / rejected_len_P,
        label_smoothing,
    )


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    chosen_len_P: Tensor,
    rejected_len_P: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation.

    loss = - log sigma( beta [ (L(w) - L_ref(w)) - (L(l) - L_ref(l)) ] ),   reward(y) = beta (L(y) - L_ref(y))

    Rafailov et al. (arXiv 2305.18290, eq. 7). Label smoothing e (a label is flipped with probability e):
    (1 - e) of the loss plus e of the loss of the swapped pair (Mitchell, "A note on DPO with noisy preferences").
    """
    return _logistic(beta * (chosen_P - ref_chosen_P), beta * (rejected_P - ref_rejected_P), label_smoothing)


def simpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    chosen_len_P: Tensor,
    rejected_len_P: Tensor,
    *,
    beta: float = 2.5,
    gamma_beta_ratio: float = 0.3,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """SimPO: no reference, mean log-probs, and a margin gamma that the chosen answer must win by.

    loss = - log sigma( beta [ M(w) - M(l) ] - gamma ),   gamma = gamma_beta_ratio * beta,   reward(y) = beta M(y)

    Meng et al. (arXiv 2405.14734, eq. 6). The reference arguments are not read: the launch file passes zeros and
    computes none.
    """
    chosen_rewards_P, rejected_rewards_P = beta * chosen_P / chosen_len_P, beta * rejected_P / rejected_len_P
    gamma = gamma_beta_ratio * beta
    loss_P, _, _ = _logistic(chosen_rewards_P - gamma, rejected_rewards_P, label_smoothing)
    return loss_P, chosen_rewards_P.detach(), rejected_rewards_P.detach()


def _logistic(
    chosen_rewards_P: Tensor, rejected_rewards_P: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The Bradley-Terry negative log-likelihood of 'chosen beats rejected', smoothed."""
    margin_P = chosen_rewards_P - rejected_rewards_P
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)
    return loss_P, chosen_rewards_P.detach(), rejected_rewards_P.detach()

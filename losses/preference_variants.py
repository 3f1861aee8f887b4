"""Further preference losses, with the signature of losses/preference.py: IPO, WPO, and an NLL term to add.

P pairs.
"""

from __future__ import annotations

from torch import Tensor

from losses.preference import dpo


def ipo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    chosen_len_P: Tensor,
    rejected_len_P: Tensor,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Identity preference optimisation: regress the log-ratio gap to 1 / (2 beta) instead of pushing it for ever.

    loss = ( h - 1 / (2 beta) )^2,   h = (M(w) - M_ref(w)) - (M(l) - M_ref(l)),   reward(y) = beta (M(y) - M_ref(y))

    Azar et al. (arXiv 2310.12036, eq. 17; beta is their tau), on mean log-probs: the target 1 / (2 beta) is one number
    for answers of every length only if h is, as the authors have since clarified. Summed log-probs (OpenRLHF's) are
    left out.
    """
    chosen_ratio_P = (chosen_P - ref_chosen_P) / chosen_len_P
    rejected_ratio_P = (rejected_P - ref_rejected_P) / rejected_len_P
    loss_P = (chosen_ratio_P - rejected_ratio_P - 1 / (2 * beta)) ** 2
    return loss_P, beta * chosen_ratio_P.detach(), beta * rejected_ratio_P.detach()


def wpo(
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
    """Weighted preference optimisation: DPO with every pair weighted by how likely the policy would have written it.

    loss = w * dpo,   w = min(1, exp( M(w) + M(l) )), a constant of the step (no gradient)

    Zhou et al. (arXiv 2406.11827), on mean log-probs. open-instruct multiplies the summed log-prob by the token mask,
    so its weight is exp of a sum, next to 0. Left out: the paper's 'sampled alignment', which needs sum_v p_v^2 per
    token.
    """
    weight_P = (chosen_P / chosen_len_P + rejected_P / rejected_len_P).detach().exp().clamp(max=1.0)
    loss_P, chosen_rewards_P, rejected_rewards_P = dpo(
        chosen_P,
        rejected_P,
        ref_chosen_P,
        ref_rejected_P,
        chosen_len_P,
        rejected_len_P,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    return weight_P * loss_P, chosen_rewards_P, rejected_rewards_P


def chosen_nll(chosen_P: Tensor, chosen_len_P: Tensor) -> Tensor:
    """- M(w): the mean negative log-likelihood of the chosen answer, to be added with a coefficient alpha.

    Pang et al., iterative reasoning preference optimisation (arXiv 2404.19733, eq. 1); 'RPO' elsewhere. It keeps the
    chosen answer's own log-prob from falling, which the contrast alone allows.
    """
    return -chosen_P / chosen_len_P

"""The two passes in torch operations, a block of rows at a time so that the temporaries stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**19


def _blocks(logits_CV: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS // logits_CV.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits_CV), rows)]


def logits_statistics(logits_CV: Tensor, targets_C: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    lse_C = torch.empty_like(logits_CV[:, 0])
    entropy_C = torch.empty_like(lse_C)
    for block in _blocks(logits_CV):
        z_BV = logits_CV[block]
        lse_C[block] = lse_B = z_BV.logsumexp(1)
        if entropy:
            logp_BV = z_BV - lse_B[:, None]
            entropy_C[block] = -torch.linalg.vecdot(logp_BV.exp(), logp_BV)
    return lse_C, logits_CV.gather(1, targets_C[:, None]).squeeze(1) - lse_C, entropy_C if entropy else None


def logits_gradient_(
    logits_CV, lse_C, targets_C, logprob_grad_C, entropy_C, entropy_grad_C, softcap, scale=1.0, into_CV=None
) -> None:
    for block in _blocks(logits_CV):
        z_BV, coef_B = logits_CV[block], logprob_grad_C[block]
        derivative_BV = None if softcap is None else 1 - (z_BV / softcap) ** 2
        z_BV.sub_(lse_C[block, None])  # log p
        if entropy_grad_C is None:
            z_BV.exp_().mul_(-coef_B[:, None])
        else:
            p_BV = z_BV.exp()
            z_BV.add_(entropy_C[block, None]).mul_(-entropy_grad_C[block, None]).sub_(coef_B[:, None]).mul_(p_BV)
        z_BV.scatter_add_(1, targets_C[block, None], coef_B[:, None])
        if derivative_BV is not None:
            z_BV.mul_(derivative_BV)
        if scale != 1.0:
            z_BV.mul_(scale)
        if into_CV is not None:
            into_CV[block] = z_BV

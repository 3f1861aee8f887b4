"""Two passes over a chunk of logits: statistics of every row, and the gradient written over the logits.

Each exists twice with one signature: in torch operations (any device) and as a Triton kernel (one read of the chunk for
the statistics, one read and one write for the gradient). CUDA tensors in fp32 take the kernels where triton is
installed (the kernels compute in fp32: fp64 must not pass through them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.kernels import eager


def _module(logits_CV: Tensor):
    if logits_CV.is_cuda and logits_CV.dtype == torch.float32:
        from losses.kernels import fused

        if fused.AVAILABLE:
            return fused
    return eager


def logits_statistics(logits_CV: Tensor, targets_C: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log sum exp, log-prob of the target, entropy or None) of every row; the logits are left as they are."""
    return _module(logits_CV).logits_statistics(logits_CV, targets_C, entropy)


def logits_gradient_(
    logits_CV,
    lse_C,
    targets_C,
    logprob_grad_C,
    entropy_C=None,
    entropy_grad_C=None,
    softcap=None,
    scale=1.0,
    into_CV=None,
) -> None:
    """Overwrites (soft-capped) logits with the gradient of the loss with respect to the logits before scale and
    soft-cap.

    dL/dz_v = scale [dL/dlogp (1[v = y] - p_v) - dL/dH p_v (log p_v + H)],  times 1 - (z_v / softcap)^2 where there is a soft-cap.
    Given `into_CV`, the gradient goes there, in its dtype, and the logits may hold anything afterwards.
    """
    _module(logits_CV).logits_gradient_(
        logits_CV, lse_C, targets_C, logprob_grad_C, entropy_C, entropy_grad_C, softcap, scale, into_CV
    )

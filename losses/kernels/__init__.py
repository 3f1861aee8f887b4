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
    lse_C, logprobs_C, entropy_C = _statistics(logits_CV, targets_C, entropy)
    return lse_C, logprobs_C, entropy_C if entropy else None


def logits_gradient_(
    logits_CV: Tensor,
    lse_C: Tensor,
    targets_C: Tensor,
    logprob_grad_C: Tensor,
    entropy_C: Tensor | None = None,
    entropy_grad_C: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    into_CV: Tensor | None = None,
) -> None:
    """Overwrites (soft-capped) logits with the gradient of the loss with respect to the logits before scale and
    soft-cap.

    dL/dz_v = scale [dL/dlogp (1[v = y] - p_v) - dL/dH p_v (log p_v + H)]

    times 1 - (z_v / softcap)^2 where there is a soft-cap. Given `into_CV`, the gradient goes there, in its dtype, and
    the logits may hold anything afterwards.
    """
    entropies = entropy_C, entropy_grad_C
    _gradient_(logits_CV, lse_C, targets_C, logprob_grad_C, *entropies, softcap, scale, into_CV)


# As operators, so that they have a shape without numbers: `launch.plan` runs on fake tensors.


@torch.library.custom_op("triptych::logits_statistics", mutates_args=())
def _statistics(logits_CV: Tensor, targets_C: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    lse_C, logprobs_C, entropy_C = _module(logits_CV).logits_statistics(logits_CV, targets_C, entropy)
    return lse_C, logprobs_C, logits_CV.new_empty(0) if entropy_C is None else entropy_C


@_statistics.register_fake
def _(logits_CV: Tensor, targets_C: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    C = len(logits_CV)
    return logits_CV.new_empty(C), logits_CV.new_empty(C), logits_CV.new_empty(C if entropy else 0)


@torch.library.custom_op("triptych::logits_gradient_", mutates_args=("logits_CV", "into_CV"))
def _gradient_(
    logits_CV: Tensor,
    lse_C: Tensor,
    targets_C: Tensor,
    logprob_grad_C: Tensor,
    entropy_C: Tensor | None,
    entropy_grad_C: Tensor | None,
    softcap: float | None,
    scale: float,
    into_CV: Tensor | None,
) -> None:
    of_entropy = entropy_C, entropy_grad_C
    how = softcap, scale, into_CV
    _module(logits_CV).logits_gradient_(logits_CV, lse_C, targets_C, logprob_grad_C, *of_entropy, *how)


@_gradient_.register_fake
def _(logits_CV, *others) -> None:
    return None

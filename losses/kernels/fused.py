"""The two passes as Triton kernels: one program a row, online softmax, fp32 arithmetic.

Bytes moved per logit: 4 read (statistics), 4 read and 2 or 4 written (gradient); torch operations move five times that.
They also run under TRITON_INTERPRET=1 on a CPU, which is how the CPU suite tests them.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # no triton (a CPU machine): the eager passes serve
    AVAILABLE = False

BLOCK = 4096

if AVAILABLE:

    @triton.jit
    def _statistics_kernel(
        logits, targets, lse, logprobs, entropy, V, stride, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        z_row = logits + row * stride
        running_max = float("-inf")
        running_sum = 0.0  # sum exp(z - max)
        running_dot = 0.0  # sum (z - max) exp(z - max)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_row + column, mask=column < V, other=float("-inf")).to(tl.float32)
            new_max = tl.maximum(running_max, tl.max(z, 0))
            e = tl.exp(z - new_max)
            rescale = tl.exp(running_max - new_max)
            if WITH_ENTROPY:
                # moving the maximum by d turns sum (z - m) e^(z - m) into e^d (dot + d sum); skip it while nothing was
                # summed
                shift = tl.where(running_sum > 0.0, running_max - new_max, 0.0)
                shifted = tl.where(column < V, z - new_max, 0.0)
                running_dot = rescale * (running_dot + shift * running_sum) + tl.sum(shifted * e, 0)
            running_sum = running_sum * rescale + tl.sum(e, 0)
            running_max = new_max
        row_lse = running_max + tl.log(running_sum)
        target = tl.load(targets + row)
        tl.store(lse + row, row_lse)
        tl.store(logprobs + row, tl.load(z_row + target).to(tl.float32) - row_lse)
        if WITH_ENTROPY:
            tl.store(entropy + row, tl.log(running_sum) - running_dot / running_sum)

    @triton.jit
    def _gradient_kernel(
        logits,
        out,
        targets,
        lse,
        logprob_grad,
        entropy,
        entropy_grad,
        V,
        stride,
        out_stride,
        softcap,
        scale,
        WITH_ENTROPY: tl.constexpr,
        WITH_SOFTCAP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < V
        z = tl.load(logits + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        logp = z - tl.load(lse + row)
        p = tl.exp(logp)
        coef = tl.load(logprob_grad + row)
        grad = coef * (tl.where(column == tl.load(targets + row), 1.0, 0.0) - p)
        if WITH_ENTROPY:
            grad -= tl.load(entropy_grad + row) * p * (logp + tl.load(entropy + row))
        if WITH_SOFTCAP:
            grad *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(out + row * out_stride + column, (grad * scale).to(out.dtype.element_ty), mask=inside)


def logits_statistics(logits_CV: Tensor, targets_C: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    C, V = logits_CV.shape
    lse_C, logprobs_C = (torch.empty(C, dtype=torch.float32, device=logits_CV.device) for _ in range(2))
    entropy_C = torch.empty_like(lse_C) if entropy else None
    if C:
        _statistics_kernel[(C,)](
            logits_CV,
            targets_C,
            lse_C,
            logprobs_C,
            entropy_C if entropy else lse_C,
            V,
            logits_CV.stride(0),
            entropy,
            BLOCK,
        )
    return lse_C, logprobs_C, entropy_C


def logits_gradient_(
    logits_CV, lse_C, targets_C, logprob_grad_C, entropy_C, entropy_grad_C, softcap, scale=1.0, into_CV=None
) -> None:
    C, V = logits_CV.shape
    out_CV = logits_CV if into_CV is None else into_CV
    with_entropy = entropy_grad_C is not None
    entropies = (entropy_C, entropy_grad_C.contiguous()) if with_entropy else (lse_C, lse_C)
    if C:
        _gradient_kernel[(C, triton.cdiv(V, BLOCK))](
            logits_CV,
            out_CV,
            targets_C,
            lse_C,
            logprob_grad_C.contiguous(),
            *entropies,
            V,
            logits_CV.stride(0),
            out_CV.stride(0),
            softcap or 1.0,
            scale,
            with_entropy,
            softcap is not None,
            BLOCK,
        )

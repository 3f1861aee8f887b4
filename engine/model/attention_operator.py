"""Packed attention as one operator of a graph, for backends that are none already.

`flash4` always is, with the library's own backward kernel; `sdpa` and `eager` are while torch.compile traces a layer,
with the gradient written out below.

T tokens of the stream · N query heads · K key/value heads · G = N / K · H head size · L tokens of one sequence.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.data.packing import Packing
from engine.model.attention_backends import Attend, eager, flash4_kernels, flash4_options, sdpa, window_LL

SCORES = 2**24  # elements of the score matrices that a written-out gradient holds at a time, or one key head's


def as_operator(backend: str) -> Attend:
    def attend(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
        return packed_attention(
            q_TNH, k_TKH, v_TKH, sinks_N, packing.cu_seqlens, packing.bounds, backend, scale, window, softcap
        )[0]

    return attend


def operator_while_compiling(backend: str) -> Attend:
    attend, operator = {"sdpa": sdpa, "eager": eager}[backend], as_operator(backend)
    return lambda *inputs, **options: (operator if torch.compiler.is_compiling() else attend)(*inputs, **options)


@torch.library.custom_op("triptych::packed_attention", mutates_args=())
def packed_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    sinks_N: Tensor | None,
    cu_seqlens: Tensor,
    bounds: Tensor,
    backend: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (N, T) fp32 where the backend's backward kernel needs it, else empty)."""
    packing = Packing.at(cu_seqlens, bounds)
    if backend == "flash4":
        out_TNH, lse_NT, *_ = flash4_kernels()[0](
            q_TNH, k_TKH, v_TKH, return_lse=True, **flash4_options(packing, scale, window, softcap, sinks_N)
        )
        return out_TNH, lse_NT
    attend = {"sdpa": sdpa, "eager": eager}[backend]
    out_TNH = attend(q_TNH, k_TKH, v_TKH, packing, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)
    return out_TNH.contiguous(), q_TNH.new_empty(0, dtype=torch.float32)


@packed_attention.register_fake
def _(q_TNH, k_TKH, v_TKH, sinks_N, cu_seqlens, bounds, backend, scale, window, softcap) -> tuple[Tensor, Tensor]:
    T, N, _ = q_TNH.shape
    return q_TNH.new_empty((T, N, v_TKH.shape[2])), q_TNH.new_empty(
        (N, T) if backend == "flash4" else (0,), dtype=torch.float32
    )


@torch.library.custom_op("triptych::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    sinks_N: Tensor | None,
    cu_seqlens: Tensor,
    bounds: Tensor,
    backend: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks (empty without)."""
    if backend == "flash4":
        options = flash4_options(Packing.at(cu_seqlens, bounds), scale, window, softcap, sinks_N)
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        grads = flash4_kernels()[1](q_TNH, k_TKH, v_TKH, out_TNH, grad_TNH.contiguous(), lse_NT, **options)
        return (*grads[:3], grads[3].float() if sinks_N is not None else q_TNH.new_zeros(0, dtype=torch.float32))
    return _written_out(grad_TNH, q_TNH, k_TKH, v_TKH, sinks_N, bounds, scale, window, softcap)


def _written_out(
    grad_TNH, q_TNH, k_TKH, v_TKH, sinks_N, bounds, scale, window, softcap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by sequences, and by as many key heads at a time as SCORES allows."""
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    dq_TNH, dk_TKH, dv_TKH = (x.new_empty(x.shape) for x in (q_TNH, k_TKH, v_TKH))
    dsinks_N = q_TNH.new_zeros(0 if sinks_N is None else len(sinks_N), dtype=wide)
    for start, end in pairwise(bounds.tolist()):
        if end == start:
            continue
        visible_LL = window_LL(end - start, window, q_TNH.device)
        at_once = max(1, SCORES // (groups * (end - start) ** 2))
        for first in range(0, k_TKH.shape[1], at_once):
            last = min(first + at_once, k_TKH.shape[1])
            rows, heads = slice(start, end), slice(first * groups, last * groups)
            g_KGLH, q_KGLH = (
                x[rows, heads].transpose(0, 1).unflatten(0, (-1, groups)).to(wide) for x in (grad_TNH, q_TNH)
            )
            k_KLH, v_KLH = (x[rows, first:last].transpose(0, 1).to(wide) for x in (k_TKH, v_TKH))
            sinks_KG = None if sinks_N is None else sinks_N[heads].to(wide).view(-1, groups)
            dq_KGLH, dk_KLH, dv_KLH, dsinks_KG = _gradients(
                g_KGLH, q_KGLH, k_KLH, v_KLH, sinks_KG, visible_LL, scale, softcap
            )
            dq_TNH[rows, heads] = dq_KGLH.flatten(0, 1).transpose(0, 1).to(dq_TNH.dtype)
            dk_TKH[rows, first:last], dv_TKH[rows, first:last] = (
                x.transpose(0, 1).to(dk_TKH.dtype) for x in (dk_KLH, dv_KLH)
            )
            if dsinks_KG is not None:
                dsinks_N[heads] += dsinks_KG.flatten()
    return dq_TNH, dk_TKH, dv_TKH, dsinks_N


def _gradients(
    g_KGLH, q_KGLH, k_KLH, v_KLH, sinks_KG, visible_LL, scale, softcap
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsinks) of one sequence, K key heads and the G query heads of each, in fp32 or more.

    With z = scale q k^T, c = cap(z), p = softmax(c, sink), delta_t = sum_s p_ts (g_t . v_s), the gradient's part along
    the output:
    dv = p^T g,   dc = p (g v^T - delta),   dz = dc (1 - (c / softcap)^2),   dq = scale dz k,
    dk = scale dz^T q,   dsink = - sum_t p_sink delta_t
    """
    length = k_KLH.shape[1]
    c_KGLL = torch.einsum("kgth,ksh->kgts", q_KGLH, k_KLH) * scale
    c_KGLL = c_KGLL if softcap is None else softcap * torch.tanh(c_KGLL / softcap)
    p_KGLX = c_KGLL.masked_fill(~visible_LL, float("-inf"))
    if sinks_KG is not None:
        p_KGLX = torch.cat([p_KGLX, sinks_KG[..., None, None].expand(-1, -1, length, 1)], -1)
    p_KGLX = p_KGLX.softmax(-1)
    p_KGLL = p_KGLX[..., :length]
    dc_KGLL = torch.einsum("kgth,ksh->kgts", g_KGLH, v_KLH)
    delta_KGL1 = (p_KGLL * dc_KGLL).sum(-1, keepdim=True)
    dz_KGLL = p_KGLL * (dc_KGLL - delta_KGL1) * scale
    dz_KGLL = dz_KGLL if softcap is None else dz_KGLL * (1 - (c_KGLL / softcap).square())
    dk_KLH, dv_KLH = (
        torch.einsum("kgts,kgth->ksh", w_KGLL, x_KGLH) for w_KGLL, x_KGLH in ((dz_KGLL, q_KGLH), (p_KGLL, g_KGLH))
    )
    dsinks_KG = None if sinks_KG is None else -(p_KGLX[..., -1:] * delta_KGL1).sum((2, 3))
    return torch.einsum("kgts,ksh->kgth", dz_KGLL, k_KLH), dk_KLH, dv_KLH, dsinks_KG


@packed_attention_backward.register_fake
def _(
    grad_TNH, q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, sinks_N, cu_seqlens, bounds, backend, scale, window, softcap
) -> tuple[Tensor, ...]:
    sinks = 0 if sinks_N is None else len(sinks_N)
    return (
        *(x.new_empty(x.shape) for x in (q_TNH, k_TKH, v_TKH)),
        q_TNH.new_empty(sinks, dtype=torch.promote_types(q_TNH.dtype, torch.float32)),
    )


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q_TNH, k_TKH, v_TKH, sinks_N, cu_seqlens, bounds, *options = inputs
    ctx.save_for_backward(q_TNH, k_TKH, v_TKH, *output, sinks_N, cu_seqlens, bounds)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_TNH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *grads, dsinks_N = packed_attention_backward(grad_TNH, *ctx.saved_tensors, *ctx.options)
    sinks_N = ctx.saved_tensors[5]
    return (*grads, None if sinks_N is None else dsinks_N.to(sinks_N.dtype), *(None,) * 6)


packed_attention.register_autograd(_differentiate, setup_context=_keep)

"""The functions behind the names of attention backends: each attends within the sequences of one packed stream.

    attend(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> (T, N, H)

`eager` is the formula written out, which the others equal.

T tokens of the stream · N query heads · K key/value heads · H head size · L tokens of one sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.data.packing import Packing
from engine.errors import UserError

Attend = Callable[..., Tensor]
BROKEN = "is installed and cannot be used"


def eager(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    """The formula, sequence by sequence."""
    outs, groups = [], q_TNH.shape[1] // k_TKH.shape[1]
    for q_LNH, k_LKH, v_LKH in zip(*(x.split(packing.lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        k_LNH, v_LNH = (x.repeat_interleave(groups, dim=1) for x in (k_LKH, v_LKH))
        scores_NLL = torch.einsum("qnh,knh->nqk", q_LNH, k_LNH).float() * scale
        if softcap is not None:
            scores_NLL = softcap * torch.tanh(scores_NLL / softcap)
        scores_NLL = scores_NLL.masked_fill(~window_LL(len(q_LNH), window, q_TNH.device), float("-inf"))
        if sinks_N is not None:  # a sink is one more score per head, whose value is zero
            sinks_NL1 = sinks_N.float()[:, None, None].expand(-1, len(q_LNH), 1)
            weights_NLL = torch.cat([scores_NLL, sinks_NL1], -1).softmax(-1)[..., :-1]
        else:
            weights_NLL = scores_NLL.softmax(-1)
        outs.append(torch.einsum("nqk,knh->qnh", weights_NLL.to(v_LNH.dtype), v_LNH))
    return torch.cat(outs)


def window_LL(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where query t (row) may see key s (column)."""
    visible_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible_LL if window is None else visible_LL.triu(1 - window)


def sdpa(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    """One call per sequence: on a CPU four to six times faster than one call with a block mask."""
    if softcap is not None or sinks_N is not None:
        return eager(q_TNH, k_TKH, v_TKH, packing, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)
    outs = []
    for q_LNH, k_LKH, v_LKH in zip(*(x.split(packing.lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        banded = window is not None and window < len(q_LNH)
        mask_LL = window_LL(len(q_LNH), window, q_TNH.device) if banded else None
        q_1NLH, k_1KLH, v_1KLH = (x.transpose(0, 1)[None] for x in (q_LNH, k_LKH, v_LKH))
        gqa = q_TNH.shape[1] != k_TKH.shape[1]
        out_1NLH = scaled_dot_product_attention(
            q_1NLH, k_1KLH, v_1KLH, attn_mask=mask_LL, is_causal=not banded, scale=scale, enable_gqa=gqa
        )
        outs.append(out_1NLH[0].transpose(0, 1))
    return torch.cat(outs)


@lru_cache
def _varlen_options() -> dict[str, Any]:
    """torch 2.13 wants to be told that query heads share keys; 2.11 has no such argument. The kernel below both takes
    such heads as they are.
    """
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None or sinks_N is not None:
        raise UserError(
            "--attention varlen has neither soft-caps nor sinks, which this model needs: use --attention eager"
        )
    visible = (-1 if window is None else window - 1, 0)
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    options = {"scale": scale, "window_size": visible} | _varlen_options()
    out_TNH: Any = varlen_attn(q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out_TNH


def flash(backend: str) -> Callable:
    """flash-attention's varlen function of version 2 or 3, called with the arguments that its signature has."""
    if backend == "flash3":
        from flash_attn_interface import flash_attn_varlen_func
    elif backend == "flash2":
        from flash_attn import flash_attn_varlen_func
    else:
        raise ValueError(f"unknown attention backend {backend}")
    parameters = inspect.signature(flash_attn_varlen_func).parameters

    def attend(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
        options["cu_seqlens_q"] = options["cu_seqlens_k"] = packing.cu_seqlens
        options["max_seqlen_q"] = options["max_seqlen_k"] = packing.max_seqlen
        if window is not None:
            options["window_size"] = (window - 1, 0)
        if softcap is not None:
            options["softcap"] = softcap
        if sinks_N is not None:
            options["learnable_sink"] = sinks_N
        if "deterministic" in parameters:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        missing = options.keys() - parameters.keys()
        if missing:
            raise UserError(
                f"--attention {backend} has no {', '.join(sorted(missing))}, which this model needs: use --attention"
                " eager"
            )
        out = flash_attn_varlen_func(q_TNH, k_TKH, v_TKH, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


@lru_cache
def flash4_kernels() -> tuple[Callable, Callable]:
    """flash-attention 4's forward and backward call, of which its public function is made."""
    from flash_attn.cute import interface

    return interface._flash_attn_fwd, interface._flash_attn_bwd


def flash4_lacks() -> str:
    """What of these two calls an installed release has not, or ''."""
    from flash_attn.cute import interface

    for name, needed in FLASH4.items():
        kernel = getattr(interface, name, None)
        missing = [name] if kernel is None else sorted(needed - inspect.signature(kernel).parameters.keys())
        if missing:
            return f"the package flash_attn.cute {BROKEN} (another release: no {', '.join(missing)} in its interface)"
    return ""


_BOTH = {"softmax_scale", "causal", "softcap", "window_size_left", "window_size_right", "learnable_sink"}
_STREAM = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
FLASH4 = {
    "_flash_attn_fwd": {"q", "k", "v", "return_lse"} | _BOTH | _STREAM,
    "_flash_attn_bwd": {"q", "k", "v", "out", "dout", "lse", "deterministic"} | _BOTH | _STREAM,
}


def flash4_options(
    packing: Packing, scale: float, window: int | None, softcap: float | None, sinks_N: Tensor | None
) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "causal": True,
        "softcap": softcap or 0.0,
        "learnable_sink": sinks_N,
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
        "cu_seqlens_q": packing.cu_seqlens,
        "cu_seqlens_k": packing.cu_seqlens,
        "max_seqlen_q": packing.max_seqlen,
        "max_seqlen_k": packing.max_seqlen,
    }

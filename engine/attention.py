"""Packed causal attention: one flat stream of tokens, and no token sees another sequence.

    out_t = sum_{s in window(t)} softmax_s( cap(scale q_t . k_s) ) v_s,   window(t) = { s <= t, s > t - W, same sequence as t }

Registered with transformers' AttentionInterface under the name NAME, so every decoder of the library that mixes tokens
only through attention runs on it unmodified; no mask is ever built. The stream's boundaries arrive as keyword arguments
that the decoder passes through: `packing`, whatever has `cu_seqlens` (int32, S + 1), `max_seqlen` and `lengths` (the same as
Python ints): a MicroBatch, or `Packing` where there is none.

While torch.compile traces a layer, backends that are not one operation of a graph already (`sdpa`, `eager`, `flash4`) become the operator
triptych::packed_attention, whose boundaries are a tensor alone and whose backward pass computes its weights again.

Backends: flash-attention 4, 3 or 2 where installed, torch's own varlen kernel on CUDA, scaled_dot_product_attention
per sequence (any device), and `eager`, the formula written out, which the others equal.

T tokens of the stream · N query heads · K key/value heads · H head size · L tokens of one sequence · W window.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from engine.errors import UserError

NAME = "triptych"
BACKENDS = ("flash4", "flash3", "flash2", "varlen", "sdpa", "eager")
OPAQUE = ("flash4", "sdpa", "eager")  # to torch.compile: loops over lengths, or kernels that it cannot look into


def choose_backend(requested: str, device: torch.device, config: Any, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, why) for `--attention`. Raises UserError for one that is not there or cannot run this model."""
    needs_eager = [name for name in ("attn_logit_softcapping",) if getattr(config, name, None)]
    if getattr(config, "model_type", "") == "gpt_oss":
        needs_eager.append("attention sinks")
    if requested != "auto":
        if why_not := _unavailable(requested, device, dtype):
            raise UserError(f"--attention {requested}: {why_not}; --attention auto picks one that runs here")
        return requested, "as asked"
    if needs_eager:
        softcap_flash = needs_eager == ["attn_logit_softcapping"] and not _unavailable("flash2", device, dtype)
        return ("flash2" if softcap_flash else "eager"), f"the model has {' and '.join(needs_eager)}"
    for backend in BACKENDS:
        if not _unavailable(backend, device, dtype):
            return backend, "first that runs here, in the order " + " > ".join(BACKENDS)
    raise AssertionError("eager runs everywhere")


def _unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run here, or ''."""
    if backend in ("sdpa", "eager"):
        return ""
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs --dtype bfloat16"
    module = {"flash4": "flash_attn.cute", "flash3": "flash_attn_interface", "flash2": "flash_attn.flash_attn_interface"}.get(backend)
    if backend == "varlen":
        return "" if _installed("torch.nn.attention.varlen") else "this torch has no torch.nn.attention.varlen"
    if backend in ("flash3", "flash4") and torch.cuda.get_device_capability(device)[0] < 9:
        return "needs a Hopper GPU or newer"
    return "" if _installed(module) else f"the package {module} is not installed"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def register(backend: str) -> str:
    """Registers packed attention on `backend` and returns the name for a model's `attn_implementation`."""
    AttentionInterface.register(NAME, packed(backend))
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    return NAME


def packed(backend: str) -> Callable:
    """Packed attention on `backend` as a function of AttentionInterface's signature, for who registers it within another."""
    attend = {"sdpa": _sdpa, "eager": _eager, "varlen": _varlen}.get(backend) or _flash(backend)
    return _packed(_while_compiling(backend, attend) if backend in OPAQUE else attend)


class Packing(NamedTuple):
    """The boundaries of a stream."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Of sequences of these lengths, end to end."""
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        return cls(tuple(lengths), cu_seqlens, max(lengths))

    @classmethod
    def at(cls, cu_seqlens: Tensor) -> Packing:
        """With these boundaries; sequences of length 0 are left out. Waits for the device."""
        lengths = tuple(n for n in cu_seqlens.diff().tolist() if n)
        return cls(lengths, cu_seqlens, max(lengths))


def _packed(attend: Callable) -> Callable:
    def attention(
        module, query_1NTH, key_1KTH, value_1KTH, attention_mask, scaling=None, dropout=0.0,
        sliding_window=None, softcap=None, s_aux=None, packing=None, **others,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if packing is None or attention_mask is not None or dropout:
            raise ValueError("packed attention takes a packing, no mask and no dropout")
        q_TNH, k_TKH, v_TKH = (x[0].transpose(0, 1) for x in (query_1NTH, key_1KTH, value_1KTH))
        scale = scaling if scaling is not None else q_TNH.shape[-1] ** -0.5
        out_TNH = attend(q_TNH, k_TKH, v_TKH, packing, scale=scale, window=sliding_window, softcap=softcap, sinks_N=s_aux)
        return out_TNH[None], None

    return attention


def _eager(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    """The formula, sequence by sequence."""
    outs, groups = [], q_TNH.shape[1] // k_TKH.shape[1]
    for q_LNH, k_LKH, v_LKH in zip(*(x.split(packing.lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        k_LNH, v_LNH = (x.repeat_interleave(groups, dim=1) for x in (k_LKH, v_LKH))
        scores_NLL = torch.einsum("qnh,knh->nqk", q_LNH, k_LNH).float() * scale
        if softcap is not None:
            scores_NLL = softcap * torch.tanh(scores_NLL / softcap)
        scores_NLL = scores_NLL.masked_fill(~_window_LL(len(q_LNH), window, q_TNH.device), float("-inf"))
        if sinks_N is not None:  # a sink is one more score per head, whose value is zero
            sinks_NL1 = sinks_N.float()[:, None, None].expand(-1, len(q_LNH), 1)
            weights_NLL = torch.cat([scores_NLL, sinks_NL1], -1).softmax(-1)[..., :-1]
        else:
            weights_NLL = scores_NLL.softmax(-1)
        outs.append(torch.einsum("nqk,knh->qnh", weights_NLL.to(v_LNH.dtype), v_LNH))
    return torch.cat(outs)


def _window_LL(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where query t (row) may see key s (column)."""
    visible_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible_LL if window is None else visible_LL.triu(1 - window)


def _sdpa(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    """One call per sequence: on a CPU four to six times faster than one call with a block mask."""
    if softcap is not None or sinks_N is not None:
        return _eager(q_TNH, k_TKH, v_TKH, packing, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)
    outs = []
    for q_LNH, k_LKH, v_LKH in zip(*(x.split(packing.lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        banded = window is not None and window < len(q_LNH)
        mask_LL = _window_LL(len(q_LNH), window, q_TNH.device) if banded else None
        q_1NLH, k_1KLH, v_1KLH = (x.transpose(0, 1)[None] for x in (q_LNH, k_LKH, v_LKH))
        gqa = q_TNH.shape[1] != k_TKH.shape[1]
        out_1NLH = scaled_dot_product_attention(
            q_1NLH, k_1KLH, v_1KLH, attn_mask=mask_LL, is_causal=not banded, scale=scale, enable_gqa=gqa
        )
        outs.append(out_1NLH[0].transpose(0, 1))
    return torch.cat(outs)


def _varlen(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None or sinks_N is not None:
        raise UserError("--attention varlen has neither soft-caps nor sinks, which this model needs: use --attention eager")
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale} if "scale" in parameters else {}
    if "window_size" in parameters:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise UserError("this torch's varlen attention has no sliding window: use --attention sdpa")
    if q_TNH.shape[1] != k_TKH.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k_TKH, v_TKH = (x.repeat_interleave(q_TNH.shape[1] // k_TKH.shape[1], dim=1) for x in (k_TKH, v_TKH))
    if "scale" not in parameters:
        q_TNH = q_TNH * (scale * q_TNH.shape[-1] ** 0.5)
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    return varlen_attn(q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, longest, longest, **options)


def _flash(backend: str) -> Callable:
    """flash-attention's varlen function of the version asked for, called with the arguments that its signature has."""
    if backend == "flash4":
        from flash_attn.cute import flash_attn_varlen_func
    elif backend == "flash3":
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
            raise UserError(f"--attention {backend} has no {', '.join(sorted(missing))}, which this model needs: use --attention eager")
        out = flash_attn_varlen_func(q_TNH, k_TKH, v_TKH, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


# --- as one operator, for compiled layers -------------------------------------------------------------------------------------


def _while_compiling(backend: str, attend: Callable) -> Callable:
    """`attend`, and in a graph the operator of that backend."""

    def attend_or_trace(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
        if not torch.compiler.is_compiling():
            return attend(q_TNH, k_TKH, v_TKH, packing, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)
        return _operator(q_TNH, k_TKH, v_TKH, sinks_N, packing.cu_seqlens, backend, scale, window, softcap)

    return attend_or_trace


@torch.library.custom_op("triptych::packed_attention", mutates_args=())
def _operator(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, sinks_N: Tensor | None, cu_seqlens: Tensor, backend: str, scale: float, window: int | None, softcap: float | None
) -> Tensor:  # fmt: skip
    attend = {"sdpa": _sdpa, "eager": _eager}.get(backend) or _flash(backend)
    return attend(q_TNH, k_TKH, v_TKH, Packing.at(cu_seqlens), scale=scale, window=window, softcap=softcap, sinks_N=sinks_N).contiguous()


@_operator.register_fake
def _(q_TNH, k_TKH, v_TKH, sinks_N, cu_seqlens, backend, scale, window, softcap) -> Tensor:
    return q_TNH.new_empty((q_TNH.shape[0], q_TNH.shape[1], v_TKH.shape[2]))


@torch.library.custom_op("triptych::packed_attention_backward", mutates_args=())
def _operator_backward(
    grad_TNH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, sinks_N: Tensor | None, cu_seqlens: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the sinks (empty without), by sequences and key heads: a score matrix exists of one group of query heads."""
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    dq_TNH, dk_TKH, dv_TKH = (x.new_empty(x.shape) for x in (q_TNH, k_TKH, v_TKH))
    dsinks_N = q_TNH.new_zeros(0 if sinks_N is None else len(sinks_N), dtype=torch.promote_types(q_TNH.dtype, torch.float32))
    for start, end in pairwise(cu_seqlens.tolist()):
        visible_LL = _window_LL(end - start, window, q_TNH.device)
        for head in range(k_TKH.shape[1] if end > start else 0):
            rows, heads = slice(start, end), slice(head * groups, (head + 1) * groups)
            g_GLH, q_GLH = (x[rows, heads].transpose(0, 1).to(dsinks_N.dtype) for x in (grad_TNH, q_TNH))
            k_LH, v_LH = (x[rows, head].to(dsinks_N.dtype) for x in (k_TKH, v_TKH))
            sinks_G = None if sinks_N is None else sinks_N[heads].to(dsinks_N.dtype)
            dq_GLH, dk_TKH[rows, head], dv_TKH[rows, head], dsinks_G = _gradients(g_GLH, q_GLH, k_LH, v_LH, sinks_G, visible_LL, scale, softcap)
            dq_TNH[rows, heads] = dq_GLH.transpose(0, 1)
            if dsinks_G is not None:
                dsinks_N[heads] += dsinks_G
    return dq_TNH, dk_TKH, dv_TKH, dsinks_N


def _gradients(g_GLH, q_GLH, k_LH, v_LH, sinks_G, visible_LL, scale, softcap) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsinks) of one sequence and the G query heads of one key head, in fp32 or more.

    With z = scale q k^T, c = cap(z), p = softmax(c, sink), delta_t = sum_s p_ts (g_t . v_s), the gradient's part along the output:
    dv = p^T g,   dc = p (g v^T - delta),   dz = dc (1 - (c / softcap)^2),   dq = scale dz k,   dk = scale dz^T q,   dsink = - sum_t p_sink delta_t
    """
    c_GLL = q_GLH @ k_LH.T * scale
    c_GLL = c_GLL if softcap is None else softcap * torch.tanh(c_GLL / softcap)
    p_GLX = c_GLL.masked_fill(~visible_LL, float("-inf"))
    if sinks_G is not None:
        p_GLX = torch.cat([p_GLX, sinks_G[:, None, None].expand(-1, len(k_LH), 1)], -1)
    p_GLX = p_GLX.softmax(-1)
    p_GLL = p_GLX[..., : len(k_LH)]
    dc_GLL = g_GLH @ v_LH.T
    delta_GL1 = (p_GLL * dc_GLL).sum(-1, keepdim=True)
    dz_GLL = p_GLL * (dc_GLL - delta_GL1) * scale
    dz_GLL = dz_GLL if softcap is None else dz_GLL * (1 - (c_GLL / softcap).square())
    dk_LH, dv_LH = (torch.einsum("gts,gth->sh", weights_GLL, x_GLH) for weights_GLL, x_GLH in ((dz_GLL, q_GLH), (p_GLL, g_GLH)))
    dsinks_G = None if sinks_G is None else -(p_GLX[..., -1:] * delta_GL1).sum((1, 2))
    return dz_GLL @ k_LH, dk_LH, dv_LH, dsinks_G


@_operator_backward.register_fake
def _(grad_TNH, q_TNH, k_TKH, v_TKH, sinks_N, cu_seqlens, scale, window, softcap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = 0 if sinks_N is None else len(sinks_N)
    return (*(x.new_empty(x.shape) for x in (q_TNH, k_TKH, v_TKH)), q_TNH.new_empty(sinks, dtype=torch.promote_types(q_TNH.dtype, torch.float32)))


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[6:]


def _differentiate(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
    *grads, dsinks_N = _operator_backward(grad_TNH, *ctx.saved_tensors, *ctx.options)
    sinks_N = ctx.saved_tensors[3]
    return (*grads, None if sinks_N is None else dsinks_N.to(sinks_N.dtype), None, None, None, None, None)


_operator.register_autograd(_differentiate, setup_context=_keep)

"""Packed causal attention: one flat stream of tokens, and no token sees another sequence.

    out_t = sum_{s in window(t)} softmax_s( cap(scale q_t . k_s) ) v_s,   window(t) = { s <= t, s > t - W, same sequence as t }

Registered with transformers' AttentionInterface under the name NAME, so every decoder of the library that mixes tokens
only through attention runs on it unmodified; no mask is ever built. The stream's boundaries arrive as keyword arguments
that the decoder passes through: `packing`, whatever has `cu_seqlens` (int32, S + 1, on the device), `bounds` (the same
on the host), `max_seqlen` and `lengths` (Python ints): a MicroBatch, or `Packing` where there is none. Nothing here
waits for the device.

Backends that are not one operation of a graph already become the operator triptych::packed_attention: `flash4` always,
with the library's own backward kernel, `sdpa` and `eager` while torch.compile traces a layer, with the gradient written
out below.

Backends: flash-attention 4, 3 or 2 where installed, torch's own varlen kernel on CUDA, scaled_dot_product_attention
per sequence (any device), and `eager`, the formula written out, which the others equal.

T tokens of the stream · N query heads · K key/value heads · G = N / K · H head size · L tokens of one sequence · W
window.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine.data.packing import Packing
from engine.errors import UserError

NAME = "triptych"
BACKENDS = ("flash4", "flash3", "flash2", "varlen", "sdpa", "eager")
BY_LENGTHS = ("sdpa", "eager")  # loops over sequences, which torch.compile would trace anew for all lengths
BROKEN = "is installed and cannot be used"
Attend = Callable[..., Tensor]  # (q, k, v, packing, *, scale, window, softcap, sinks_N) -> (T, N, H)
_ADDED: dict[str, Callable[[], Attend]] = {}
SCORES = 2**24  # elements of the score matrices that a written-out gradient holds at a time, or one key head's


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
    broken = []
    for backend in BACKENDS:
        why_not = _unavailable(backend, device, dtype)
        if not why_not:
            return backend, "; ".join(["first that runs here, in the order " + " > ".join(BACKENDS), *broken])
        if BROKEN in why_not:  # installed by somebody who wants it used
            broken.append(f"{backend}: {why_not}")
    raise AssertionError("eager runs everywhere")


def _unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run here, or ''."""
    if backend in ("sdpa", "eager"):
        return ""
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs --dtype bfloat16"
    module = {
        "flash4": "flash_attn.cute",
        "flash3": "flash_attn_interface",
        "flash2": "flash_attn.flash_attn_interface",
    }.get(backend)
    if backend == "varlen":
        return _cannot_import("torch.nn.attention.varlen")
    if backend in ("flash3", "flash4") and torch.cuda.get_device_capability(device)[0] < 9:
        return "needs a Hopper GPU or newer"
    return _cannot_import(module) or (_flash4_lacks() if backend == "flash4" else "")


@lru_cache
def _cannot_import(module: str) -> str:
    """Why a module cannot be used, or ''. It is imported to see: half an installation is found and not usable."""
    try:
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
    except ModuleNotFoundError:
        return f"the package {module} is not installed"
    try:
        importlib.import_module(module)
    except (
        Exception
    ) as error:  # a library that is missing, of another torch or CUDA: whatever it raises, another backend serves
        return f"the package {module} {BROKEN} ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    return ""


def register(backend: str) -> str:
    """Registers packed attention on `backend` and returns the name for a model's `attn_implementation`.

    Nothing is registered with AttentionMaskInterface: for a name unknown there the library builds no mask. For a known
    one it would first look at the position ids for packed sequences, and with that wait for the device in every forward
    pass.
    """
    AttentionInterface.register(NAME, packed(backend))
    return NAME


def packed(backend: str) -> Callable:
    """Packed attention on `backend` as a function of AttentionInterface's signature, for who registers it within another."""
    if backend in _ADDED:
        return _packed(_ADDED[backend]())
    if backend == "flash4":
        return _packed(_as_operator(backend))
    if backend in BY_LENGTHS:
        return _packed(_operator_while_compiling(backend))
    return _packed(_varlen if backend == "varlen" else _flash(backend))


def add_backend(name: str, attend: Callable[[], Attend]) -> None:
    """Another backend for `packed` and `register`, which `choose_backend` does not choose: the planner's."""
    _ADDED[name] = attend


def _packed(attend: Callable) -> Callable:
    def attention(
        module,
        query_1NTH,
        key_1KTH,
        value_1KTH,
        attention_mask,
        scaling=None,
        dropout=0.0,
        sliding_window=None,
        softcap=None,
        s_aux=None,
        packing=None,
        **others,
    ) -> tuple[Tensor, None]:
        if packing is None or attention_mask is not None or dropout:
            raise ValueError("packed attention takes a packing, no mask and no dropout")
        q_TNH, k_TKH, v_TKH = (x[0].transpose(0, 1) for x in (query_1NTH, key_1KTH, value_1KTH))
        scale = scaling if scaling is not None else q_TNH.shape[-1] ** -0.5
        out_TNH = attend(
            q_TNH, k_TKH, v_TKH, packing, scale=scale, window=sliding_window, softcap=softcap, sinks_N=s_aux
        )
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


@lru_cache
def _varlen_options() -> dict[str, Any]:
    """torch 2.13 wants to be told that query heads share keys; 2.11 has no such argument. The kernel below both takes
    such heads as they are.
    """
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _varlen(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None or sinks_N is not None:
        raise UserError(
            "--attention varlen has neither soft-caps nor sinks, which this model needs: use --attention eager"
        )
    visible = (-1 if window is None else window - 1, 0)
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    return varlen_attn(
        q_TNH,
        k_TKH,
        v_TKH,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=visible,
        **_varlen_options(),
    )


def _flash(backend: str) -> Callable:
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


def _flash4_lacks() -> str:
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


def _flash4_options(
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


# --- as one operator
# ------------------------------------------------------------------------------------------------------------


def _as_operator(backend: str) -> Callable:
    def attend(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
        return _operator(
            q_TNH, k_TKH, v_TKH, sinks_N, packing.cu_seqlens, packing.bounds, backend, scale, window, softcap
        )[0]

    return attend


def _operator_while_compiling(backend: str) -> Callable:
    attend, operator = {"sdpa": _sdpa, "eager": _eager}[backend], _as_operator(backend)
    return lambda *inputs, **options: (operator if torch.compiler.is_compiling() else attend)(*inputs, **options)


@torch.library.custom_op("triptych::packed_attention", mutates_args=())
def _operator(
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
            q_TNH, k_TKH, v_TKH, return_lse=True, **_flash4_options(packing, scale, window, softcap, sinks_N)
        )
        return out_TNH, lse_NT
    attend = {"sdpa": _sdpa, "eager": _eager}[backend]
    out_TNH = attend(q_TNH, k_TKH, v_TKH, packing, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)
    return out_TNH.contiguous(), q_TNH.new_empty(0, dtype=torch.float32)


@_operator.register_fake
def _(q_TNH, k_TKH, v_TKH, sinks_N, cu_seqlens, bounds, backend, scale, window, softcap) -> tuple[Tensor, Tensor]:
    T, N, _ = q_TNH.shape
    return q_TNH.new_empty((T, N, v_TKH.shape[2])), q_TNH.new_empty(
        (N, T) if backend == "flash4" else (0,), dtype=torch.float32
    )


@torch.library.custom_op("triptych::packed_attention_backward", mutates_args=())
def _operator_backward(
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
        options = _flash4_options(Packing.at(cu_seqlens, bounds), scale, window, softcap, sinks_N)
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
        visible_LL = _window_LL(end - start, window, q_TNH.device)
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
    dv = p^T g,   dc = p (g v^T - delta),   dz = dc (1 - (c / softcap)^2),   dq = scale dz k,   dk = scale dz^T q,   dsink = - sum_t p_sink delta_t
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


@_operator_backward.register_fake
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
    *grads, dsinks_N = _operator_backward(grad_TNH, *ctx.saved_tensors, *ctx.options)
    sinks_N = ctx.saved_tensors[5]
    return (*grads, None if sinks_N is None else dsinks_N.to(sinks_N.dtype), *(None,) * 6)


_operator.register_autograd(_differentiate, setup_context=_keep)

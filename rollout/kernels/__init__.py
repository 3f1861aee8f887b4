"""Attention over pages, for decoding: one query a response over the keys and values that its pages hold.

    out_a = sum_s softmax_s( cap(scale q_a . k_as) ) v_as,   p_a - W < s <= p_a,
    k_as in row s % B of page tables[a, s // B]

It exists three times with one signature: by its definition in torch operations (any device), as Triton kernels (CUDA,
keys and values read once), and as flash-attention's call where that is installed (`flash_paged`, not chosen by
default). CUDA tensors of shapes and dtypes that the kernels take (`paged.takes`) go to them, others to the definition.

A active responses · N query heads · K key/value heads · P pages of the pool · B tokens of a page · J pages of a table's
row · H head size · Hv head size of the values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from rollout.kernels import eager

MULTIPROCESSORS = 132  # of an H100 and an H200; any number serves on any device, and gives the same bits


def paged_attention(
    q_ANH: Tensor,
    keys_PKBH: Tensor,
    values_PKBH: Tensor,
    tables_AJ: Tensor,
    positions_A: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> Tensor:
    """(A, N, Hv) in the query's dtype. No gradient, no wait for the device, no shape that depends on numbers: it can be
    captured in a CUDA graph after one call outside (which compiles).

    tables_AJ int32, positions_A int64: the query at position p sees positions s <= p, and s > p - window where there is
    a window; the key of p is already written. Entries of a table whose page holds no such s may be any number >= 0, and
    what stands in unowned pages, or in the unseen rows of owned ones, any number or none. A sink is one more score per
    head, whose value is zero.
    """
    return _paged_attention(
        q_ANH, keys_PKBH, values_PKBH, tables_AJ, positions_A, scale, window, softcap, sinks_N, multiprocessors
    )


# As an operator, so that it has a shape without numbers: `launch.plan` runs on fake tensors.


@torch.library.custom_op("triptych::paged_attention", mutates_args=())
def _paged_attention(
    q_ANH: Tensor,
    keys_PKBH: Tensor,
    values_PKBH: Tensor,
    tables_AJ: Tensor,
    positions_A: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
    multiprocessors: int,
) -> Tensor:
    tensors = q_ANH, keys_PKBH, values_PKBH, tables_AJ, positions_A
    how: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks_N": sinks_N}
    if q_ANH.is_cuda:
        from rollout.kernels import paged

        if paged.takes(q_ANH, keys_PKBH, values_PKBH):
            return paged.paged_attention(*tensors, **how, multiprocessors=multiprocessors)
    return eager.paged_attention(*tensors, **how)


@_paged_attention.register_fake
def _(q_ANH: Tensor, keys_PKBH: Tensor, values_PKBH: Tensor, *others) -> Tensor:
    return q_ANH.new_empty(*q_ANH.shape[:2], values_PKBH.shape[3])


def flash_paged(backend: str) -> Callable[..., Tensor]:
    """flash-attention's call on pages, of version 2 ('flash2') or 3 ('flash3'), with the signature of
    `paged_attention` (`multiprocessors` apart) and the arguments that the installed one has.

    Raises UserError where the package is missing, where pages are of a size that version 2 has not (multiples of 256),
    and where the model needs what the call lacks. Of rows that are masked it multiplies values by 0: a pool that holds
    NaN is not for it.
    """
    package, table = {"flash2": ("flash_attn", "block_table"), "flash3": ("flash_attn_interface", "page_table")}[
        backend
    ]
    try:
        if backend == "flash2":
            from flash_attn import flash_attn_with_kvcache
        else:
            from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        raise UserError(f"attention over pages by {backend} needs the package {package}, which is not here") from None
    parameters = inspect.signature(flash_attn_with_kvcache).parameters

    def attend(
        q_ANH, keys_PKBH, values_PKBH, tables_AJ, positions_A, *, scale, window=None, softcap=None, sinks_N=None
    ) -> Tensor:
        B = keys_PKBH.shape[2]
        if backend == "flash2" and B % 256:
            raise UserError(f"attention over pages by flash2 takes pages of multiples of 256 tokens, not of {B}")
        options: dict[str, Any] = {"cache_seqlens": (positions_A + 1).int(), table: tables_AJ}
        options |= {"softmax_scale": scale, "causal": True}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        if softcap is not None:
            options["softcap"] = softcap
        if sinks_N is not None:
            options["learnable_sink"] = sinks_N
        if missing := sorted(options.keys() - parameters.keys()):
            raise UserError(f"attention over pages by {backend} has no {', '.join(missing)}, which this model needs")
        k_PBKH, v_PBKH = keys_PKBH.transpose(1, 2), values_PKBH.transpose(1, 2)  # read by their strides, not copied
        out_A1NH = flash_attn_with_kvcache(q_ANH[:, None], k_PBKH, v_PBKH, **options)
        return out_A1NH[:, 0]

    return attend

"""Attention over pages by its definition, in torch operations on any device: what the other ways are tested against.

    out_a = sum_s softmax_s( cap(scale q_a . k_as) ) v_as,   p_a - W < s <= p_a,
    k_as in row s % B of page tables[a, s // B]

A responses · N query heads · K key/value heads · G = N / K · P pages of the pool · B tokens of a page · J pages of a
table's row · L = J B positions · H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    q_ANH: Tensor,
    keys_PKBH: Tensor,
    values_PKBH: Tensor,
    tables_AJ: Tensor,
    positions_A: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """Gathers every row of the tables to its full width; what a query may not see is replaced, since 0 times NaN is
    NaN. Computes in float32, or in float64 where the query is.
    """
    wide, B = torch.promote_types(q_ANH.dtype, torch.float32), keys_PKBH.shape[2]
    s_L = torch.arange(tables_AJ.shape[1] * B, device=q_ANH.device)
    visible_AL = s_L <= positions_A[:, None]
    if window is not None:
        visible_AL &= s_L > positions_A[:, None] - window
    pages_AL = tables_AJ.repeat_interleave(B, 1).where(visible_AL, 0)
    k_ALKH, v_ALKH = (
        pool[pages_AL, :, s_L % B].to(wide).masked_fill(~visible_AL[:, :, None, None], 0)
        for pool in (keys_PKBH, values_PKBH)
    )
    q_AKGH = q_ANH.to(wide).unflatten(1, (keys_PKBH.shape[1], -1))
    scores_ANL = torch.einsum("akgh,alkh->akgl", q_AKGH, k_ALKH).flatten(1, 2) * scale
    if softcap is not None:
        scores_ANL = softcap * torch.tanh(scores_ANL / softcap)
    scores_ANL = scores_ANL.masked_fill(~visible_AL[:, None], float("-inf"))
    if sinks_N is not None:  # a sink is one more score per head, whose value is zero
        sinks_AN1 = sinks_N.to(wide)[None, :, None].expand(len(q_ANH), -1, 1)
        scores_ANL = torch.cat([scores_ANL, sinks_AN1], -1)
    weights_AKGL = scores_ANL.softmax(-1)[..., : len(s_L)].unflatten(1, (keys_PKBH.shape[1], -1))
    return torch.einsum("akgl,alkh->akgh", weights_AKGL, v_ALKH).flatten(1, 2).to(q_ANH.dtype)

"""Attention of decoding over pages that are few: copied side by side, so that one call sees each response's whole past.

    out_a = sum_{s in window(p_a)} softmax_s( cap(scale q_a . k_as) ) v_as,  s over the columns of a's table

It takes a handful of operations where rows.py takes some forty, and copies every key and value, padded to the longest
response: the better way for the last responses of a stream. The query heads that share a key/value head are folded into
rows of one query, so that every key is read once.

A active responses · J pages of the longest · L = J B positions · K key/value heads · G query heads to each · H head
size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.world import on_device
from rollout.pages import Pages
from rollout.strips import weighted

FEW = 4096  # positions A L up to which this is the faster way (measured)


@dataclass(frozen=True)
class Dense:
    """Which pages are laid side by side, in one pass and for all layers of a kind."""

    pages_AJ: Tensor  # int64
    bias_A11L: Tensor  # fp32: -inf where a response does not see a position, or 0

    @classmethod
    def of(cls, pages: Pages, slots_A: np.ndarray, positions_A: np.ndarray, device: torch.device) -> Dense | None:
        """For the queries at `positions_A` of the responses in `slots_A`; None where that is too much to copy."""
        width, block = int(pages.end[slots_A].max(initial=0)), pages.block
        if len(slots_A) * width * block > FEW:
            return None
        places_L = np.arange(width * block)
        visible_AL = places_L <= positions_A[:, None]
        if pages.window is not None:
            visible_AL &= places_L > positions_A[:, None] - pages.window
        put = lambda x: on_device(torch.from_numpy(x), device)
        bias_AL = put(np.where(visible_AL, np.float32(0), np.float32("-inf")))
        return cls(put(pages.tables[slots_A, :width].astype(np.int64)), bias_AL[:, None, None])

    def attend(
        self,
        q_ANH: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float | None,
        sinks_N: Tensor | None,
    ) -> Tensor:
        """(A, N, Hv) of pools (pages, K, B, H) and (pages, K, B, Hv)."""
        kv_heads = keys.shape[1]
        heads_K1 = torch.arange(kv_heads, device=keys.device)[:, None]
        index_AKJ = self.pages_AJ[:, None] * kv_heads + heads_K1
        k_AKLH, v_AKLH = (
            pool.flatten(0, 1).index_select(0, index_AKJ.flatten()).view(*index_AKJ.shape[:2], -1, pool.shape[3])
            for pool in (keys, values)
        )
        q_AKGH = q_ANH.unflatten(1, (kv_heads, -1))
        out_AKGH, lse_AKG = weighted(q_AKGH, k_AKLH, v_AKLH, self.bias_A11L, scale, softcap)
        if sinks_N is not None:  # a sink is one more score per head, whose value is zero
            sinks_KG = sinks_N.float().view(kv_heads, -1)
            out_AKGH = out_AKGH * torch.sigmoid(lse_AKG - sinks_KG)[..., None]
        return out_AKGH.flatten(1, 2).to(q_ANH.dtype)

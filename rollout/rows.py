"""Attention of decoding over pages in plain tensor operations: every page in use is a row of one batched product, read
where it lies.

    s_p    = cap(scale q_a(p) . k_p)              a(p): whose page it is; of a shared page, all its users at once
    out_a  = sum_p exp(s_p - m_a) v_p / sum_p exp(s_p - m_a)      over the pages of a, in their order; m_a = max_p s_p

A page that G responses share is read once for all of them. Nothing is gathered but queries and partial sums, so that
the cost follows the tokens that are held, not the longest response. It is what runs on a CPU where there are more pages
than dense.py takes; kernels/ has the way of CUDA, and all equal kernels/eager.py.

P private pages · U pages of the shared end · M users of a shared page, at most · R partial sums: P + U M · B positions
of a page · A active responses · K key/value heads · G query heads to each · H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from engine.world import on_device
from rollout.pages import Pages

NOWHERE = 2**40  # the position of a page without an owner: beyond every query


@dataclass(frozen=True)
class Rows:
    """Which pages are read for whom, in one pass and for all layers of a kind."""

    owner_P: Tensor  # int64: the row of the batch that private page p belongs to
    hidden_PB: Tensor  # True where the owner does not see a position
    bottom: int  # the first page of the shared end
    users_UM: Tensor  # int64: rows of the batch
    hidden_UMB: Tensor | None  # None: all is seen
    owner_R: Tensor  # int64: of every partial sum
    is_padding_R: Tensor  # True for users of a shared page that there are not
    pieces: Tensor  # int64: the partial sums, response by response, in the order of their positions
    offsets_A: Tensor  # int64: where in `pieces` a response begins

    def attend(self, q_ANH: Tensor, keys: Tensor, values: Tensor, **how: Any) -> Tensor:
        """(A, N, Hv) of pools (pages, K, B, H) and (pages, K, B, Hv); `how`: scale, softcap, sinks_N."""
        return attend(q_ANH, keys, values, self, **how)


def rows_of(pages: Pages, slots_A: np.ndarray, positions_A: np.ndarray, device: torch.device) -> Rows:
    """For the queries at `positions_A` of the responses in `slots_A`."""
    block, window = pages.block, pages.window
    columns = np.arange(int(pages.end[slots_A].max(initial=0)))
    held = (columns >= pages.first[slots_A, None]) & (columns < pages.end[slots_A, None])
    is_shared = held & (columns < pages.shared[slots_A, None])
    own_a, own_j = np.nonzero(held & ~is_shared)
    their_a, their_j = np.nonzero(is_shared)
    own, theirs = pages.tables[slots_A[own_a], own_j], pages.tables[slots_A[their_a], their_j]

    top = int(own.max(initial=-1)) + 1
    owner_P, start_P = np.zeros(top, np.int64), np.full(top, NOWHERE)
    owner_P[own], start_P[own] = own_a, own_j * block
    hidden_PB = _hidden(start_P, positions_A[owner_P], block, window)

    bottom = int(theirs.min(initial=len(pages.users)))
    by_page = np.argsort(theirs, kind="stable")
    theirs, their_a, their_j = theirs[by_page] - bottom, their_a[by_page], their_j[by_page]
    users = np.bincount(theirs, minlength=len(pages.users) - bottom)
    number = np.arange(len(theirs)) - np.repeat(np.cumsum(users) - users, users)  # which of its page's users one is
    most = int(users.max(initial=0))
    users_UM, start_UM = np.zeros((len(users), most), np.int64), np.zeros((len(users), most), np.int64)
    users_UM[theirs, number], start_UM[theirs, number] = their_a, their_j * block
    hidden_UMB = None if window is None else _hidden(start_UM, positions_A[users_UM], block, window)
    is_padding_UM = np.arange(most) >= users[:, None]

    who, where = np.concatenate([own_a, their_a]), np.concatenate([own_j, their_j])
    rows = np.concatenate([own, top + theirs * most + number])
    counts = np.bincount(who, minlength=len(slots_A))
    put = lambda x: on_device(torch.from_numpy(x), device)
    return Rows(
        owner_P=put(owner_P),
        hidden_PB=put(hidden_PB),
        bottom=bottom,
        users_UM=put(users_UM),
        hidden_UMB=None if hidden_UMB is None else put(hidden_UMB),
        owner_R=put(np.concatenate([owner_P, users_UM.ravel()])),
        is_padding_R=put(np.concatenate([np.zeros(top, bool), is_padding_UM.ravel()])),
        pieces=put(rows[np.lexsort((where, who))]),
        offsets_A=put(np.cumsum(counts) - counts),
    )


def _hidden(start: np.ndarray, position: np.ndarray, block: int, window: int | None) -> np.ndarray:
    """True where a query at `position` does not see a position of the page that begins at `start`."""
    places = start[..., None] + np.arange(block)
    hidden = places > position[..., None]
    return hidden if window is None else hidden | (places <= position[..., None] - window)


def attend(
    q_ANH: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    *,
    scale: float,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """(A, N, Hv) of pools (pages, K, B, H) and (pages, K, B, Hv)."""
    active, kv_heads, own = len(q_ANH), keys.shape[1], len(rows.owner_P)
    q_AKGH = q_ANH.unflatten(1, (kv_heads, -1)) * scale
    scores_PKGB = _capped(q_AKGH[rows.owner_P] @ keys[:own].transpose(2, 3), softcap)
    scores_PKGB.masked_fill_(rows.hidden_PB[:, None, None], float("-inf"))
    users = rows.users_UM.shape[1]
    together = lambda x_UMKGX: x_UMKGX.transpose(1, 2).flatten(2, 3)  # the users' heads as rows of one product
    apart = lambda x: x.unflatten(2, (users, -1)).transpose(1, 2).flatten(0, 1)
    scores_UKQB = None
    if users:
        scores_UKQB = _capped(together(q_AKGH[rows.users_UM]) @ keys[rows.bottom :].transpose(2, 3), softcap)
        if rows.hidden_UMB is not None:
            hidden = rows.hidden_UMB.repeat_interleave(q_AKGH.shape[2], dim=1)[:, None]
            scores_UKQB.masked_fill_(hidden, float("-inf"))

    most_RKG = scores_PKGB.amax(-1)
    if scores_UKQB is not None:
        most_RKG = torch.cat([most_RKG, apart(scores_UKQB.amax(-1, keepdim=True)).squeeze(-1)])
        most_RKG.masked_fill_(rows.is_padding_R[:, None, None], float("-inf"))
    most_AKG = most_RKG.new_full((active, *most_RKG.shape[1:]), float("-inf"))
    if sinks_N is not None:  # a sink is one more score per head, whose value is zero
        most_AKG[:] = sinks_N.float().view(kv_heads, -1)
    index = rows.owner_R[:, None, None].expand_as(most_RKG)
    most_AKG.scatter_reduce_(0, index, most_RKG, "amax")

    parts = [_sums(scores_PKGB, most_AKG[rows.owner_P], values[:own])]
    if scores_UKQB is not None:
        most_UKQ1 = together(most_AKG[rows.users_UM].unsqueeze(-1))
        parts.append(apart(_sums(scores_UKQB, most_UKQ1.squeeze(-1), values[rows.bottom :])))
    sums_RKGX = torch.cat(parts) if len(parts) > 1 else parts[0]
    total = embedding_bag(rows.pieces, sums_RKGX.flatten(1), rows.offsets_A, mode="sum")
    total_AKGX = total.unflatten(1, sums_RKGX.shape[1:])
    weights_AKG1 = total_AKGX[..., -1:]
    if sinks_N is not None:
        weights_AKG1 = weights_AKG1 + (sinks_N.float().view(kv_heads, -1) - most_AKG).exp().unsqueeze(-1)
    return (total_AKGX[..., :-1] / weights_AKG1).flatten(1, 2).to(q_ANH.dtype)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    scores = scores.float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _sums(scores: Tensor, most: Tensor, values: Tensor) -> Tensor:
    """The weighted sum of a page's values, and in the last place the sum of its weights, fp32. Overwrites `scores`."""
    weights = scores.sub_(most.unsqueeze(-1)).exp_()
    weighted = weights.to(values.dtype) @ values
    return torch.cat([weighted.float(), weights.sum(-1, keepdim=True)], -1)

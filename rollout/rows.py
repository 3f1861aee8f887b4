"""Attention of decoding over pages in plain tensor operations: a page of a response is a row of one batched product,
read where it lies; a prompt that several responses share is read once for all of them.

    s_p    = cap(scale q_a(p) . k_p)              a(p): whose page p is
    t_g    = cap(scale q_a . k_g)                 k_g: the whole pages of the prompt of group g, side by side
    out_a  = ( exp(n_a - m_a) sum exp(t_g - n_a) v_g + sum_p exp(s_p - m_a) v_p ) / (the same sums without v)
             n_a = max t_g,  m_a = max(n_a, max_p s_p)

The cost follows the tokens that are held, not the longest response. It is what runs on a CPU where there are more pages
than dense.py takes; kernels/ has the way of CUDA, and all equal kernels/eager.py.

P pages of single responses · B positions of a page · S groups · M responses of a group, at most · L positions of the
longest shared prompt · A active responses · K key/value heads · G query heads to each · H head size.
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
NOTHING = -80.0  # exp of it is lost in any sum with a 1; of -inf, a CPU takes ten times as long for it


@dataclass(frozen=True)
class Shared:
    """The prompts that are shared, and by whom."""

    pages_SJ: Tensor  # int64
    users_SM: Tensor  # int64: rows of the batch; 0 where a group has fewer
    bias: Tensor  # (S, 1, 1, 1, L), or (S, 1, M, 1, L) under a window: -inf where a user does not see a position, or 0
    place_A: Tensor  # int64: which user a response is
    is_alone_A: Tensor  # True for those that share nothing, whose place is another's


@dataclass(frozen=True)
class Rows:
    """Which pages are read for whom, in one pass and for all layers of a kind."""

    owner_P: Tensor  # int64: the row of the batch that page p of the pool belongs to
    bias_P11B: Tensor  # fp32: -inf where the owner does not see a position, or 0
    pieces: Tensor  # int64: the pages, response by response, in the order of their positions
    offsets_A: Tensor  # int64: where in `pieces` a response begins
    shared: Shared | None

    def attend(self, q_ANH: Tensor, keys: Tensor, values: Tensor, **how: Any) -> Tensor:
        """(A, N, Hv) of pools (pages, K, B, H) and (pages, K, B, Hv); `how`: scale, softcap, sinks_N."""
        return attend(q_ANH, keys, values, self, **how)


# --- who reads what ---------------------------------------------------------------------------------------------------


def rows_of(pages: Pages, slots_A: np.ndarray, positions_A: np.ndarray, device: torch.device) -> Rows:
    """For the queries at `positions_A` of the responses in `slots_A`."""
    columns = np.arange(int(pages.end[slots_A].max(initial=0)))
    begins = np.maximum(pages.first[slots_A], pages.shared[slots_A])
    who, where = np.nonzero((columns >= begins[:, None]) & (columns < pages.end[slots_A, None]))
    own = pages.tables[slots_A[who], where]
    top = int(own.max(initial=-1)) + 1  # they lie at the pool's lower end
    owner_P, start_P = np.zeros(top, np.int64), np.full(top, NOWHERE)
    owner_P[own], start_P[own] = who, where * pages.block
    places_PB = start_P[:, None] + np.arange(pages.block)
    counts = np.bincount(who, minlength=len(slots_A))
    put = lambda x: on_device(torch.from_numpy(x), device)
    return Rows(
        owner_P=put(owner_P),
        bias_P11B=put(_bias(_hidden(places_PB, positions_A[owner_P], pages.window)))[:, None, None],
        pieces=put(own.astype(np.int64)),
        offsets_A=put(np.cumsum(counts) - counts),
        shared=_shared(pages, slots_A, positions_A, device),
    )


def _shared(pages: Pages, slots_A: np.ndarray, positions_A: np.ndarray, device: torch.device) -> Shared | None:
    """None where no response shares a page that it still sees. A prompt goes by the name of its last whole page."""
    first_A, shared_A = pages.first[slots_A], pages.shared[slots_A]
    sharing = np.flatnonzero(shared_A > first_A)
    if not len(sharing):
        return None
    _, group = np.unique(pages.tables[slots_A[sharing], shared_A[sharing] - 1], return_inverse=True)
    counts = np.bincount(group)
    by_group = np.argsort(group, kind="stable")
    number = np.empty(len(sharing), np.int64)
    number[by_group] = np.arange(len(sharing)) - np.repeat(np.cumsum(counts) - counts, counts)
    users_SM = np.zeros((len(counts), counts.max()), np.int64)
    users_SM[group, number] = sharing
    place_A = np.zeros(len(slots_A), np.int64)
    place_A[sharing] = group * counts.max() + number

    left, right = int(first_A[sharing].min()), int(shared_A[sharing].max())
    columns = np.arange(left, right)
    held = (columns >= first_A[sharing, None]) & (columns < shared_A[sharing, None])
    pages_SJ = np.zeros((len(counts), right - left), np.int64)
    np.maximum.at(pages_SJ, group, np.where(held, pages.tables[slots_A[sharing], left:right], 0))
    places_L = left * pages.block + np.arange(len(columns) * pages.block)
    hidden = (places_L >= shared_A[users_SM[:, :1]] * pages.block)[:, None]
    if pages.window is not None:
        hidden = hidden | _hidden(places_L, positions_A[users_SM], pages.window)
    put = lambda x: on_device(torch.from_numpy(x), device)
    bias = put(_bias(hidden))[:, None, :, None]
    return Shared(put(pages_SJ), put(users_SM), bias, put(place_A), put(shared_A <= first_A))


def _hidden(places: np.ndarray, position: np.ndarray, window: int | None) -> np.ndarray:
    """True where a query at `position` does not see the place, (..., places)."""
    hidden = places > position[..., None]
    return hidden if window is None else hidden | (places <= position[..., None] - window)


def _bias(hidden: np.ndarray) -> np.ndarray:
    return np.where(hidden, np.float32("-inf"), np.float32(0))


# --- what is read -----------------------------------------------------------------------------------------------------


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
    kv_heads, own = keys.shape[1], len(rows.owner_P)
    q_AKGH = q_ANH.unflatten(1, (kv_heads, -1)) * scale
    scores_PKGB = _capped(q_AKGH[rows.owner_P] @ keys[:own].transpose(2, 3), softcap)
    scores_PKGB += rows.bias_P11B
    most_PKG = scores_PKGB.amax(-1)
    theirs = None if rows.shared is None else _of_prompts(q_AKGH, keys, values, rows.shared, softcap)
    if theirs is not None:
        most_AKG = theirs[1].clone()
    else:
        most_AKG = most_PKG.new_full((len(q_ANH), *most_PKG.shape[1:]), float("-inf"))
    most_AKG.scatter_reduce_(0, rows.owner_P[:, None, None].expand_as(most_PKG), most_PKG, "amax")
    if sinks_N is not None:  # a sink is one more score per head, whose value is zero
        sinks_KG = sinks_N.float().view(kv_heads, -1)
        most_AKG = torch.maximum(most_AKG, sinks_KG)

    sums_PKGX = _sums(scores_PKGB.sub_(most_AKG[rows.owner_P].unsqueeze(-1)), values[:own])
    sums_AKGX = embedding_bag(rows.pieces, sums_PKGX.flatten(1), rows.offsets_A, mode="sum").unflatten(
        1, sums_PKGX.shape[1:]
    )
    if theirs is not None:
        sums_AKGX.addcmul_(theirs[0], (theirs[1] - most_AKG).exp_().unsqueeze(-1))
    weights_AKG1 = sums_AKGX[..., -1:]
    if sinks_N is not None:
        weights_AKG1 = weights_AKG1 + (sinks_KG - most_AKG).exp().unsqueeze(-1)
    return (sums_AKGX[..., :-1] / weights_AKG1).flatten(1, 2).to(q_ANH.dtype)


def _of_prompts(
    q_AKGH: Tensor, keys: Tensor, values: Tensor, shared: Shared, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Of every response over its shared prompt: (A, K, G, Hv + 1) sums as `_sums` gives them, (A, K, G) the largest
    score, -inf and sums of 0 where it shares none.
    """
    members, heads = shared.users_SM.shape[1], q_AKGH.shape[1:3]
    index_SKJ = shared.pages_SJ[:, None] * heads[0] + torch.arange(heads[0], device=keys.device)[:, None]
    k_SKLH, v_SKLH = (
        pool.flatten(0, 1).index_select(0, index_SKJ.flatten()).view(*index_SKJ.shape[:2], -1, pool.shape[3])
        for pool in (keys, values)
    )
    q_SKMGH = q_AKGH[shared.users_SM].transpose(1, 2)  # the users' heads as rows of one product
    scores_SKQL = _capped(q_SKMGH.flatten(2, 3) @ k_SKLH.transpose(2, 3), softcap)
    scores_SKMGL = scores_SKQL.unflatten(2, (members, -1))
    scores_SKMGL += shared.bias
    most_SKQ1 = scores_SKQL.amax(-1, keepdim=True).clamp_(min=-1e30)  # of a user that sees nothing, too
    sums_SKQX = _sums(scores_SKQL.sub_(most_SKQ1), v_SKLH)
    to_responses = lambda x: x.unflatten(2, (members, -1)).transpose(1, 2).flatten(0, 1)[shared.place_A]
    sums_AKGX, most_AKG = to_responses(sums_SKQX), to_responses(most_SKQ1).squeeze(-1)
    most_AKG.masked_fill_(shared.is_alone_A[:, None, None], float("-inf"))
    return sums_AKGX, most_AKG


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    scores = scores.float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _sums(scores: Tensor, values: Tensor) -> Tensor:
    """The weighted sum of values, and in the last place the sum of the weights, fp32, of scores less their largest.
    Overwrites them.
    """
    weights = scores.clamp_(min=NOTHING).exp_()
    weighted = weights.to(values.dtype) @ values
    return torch.cat([weighted.float(), weights.sum(-1, keepdim=True)], -1)

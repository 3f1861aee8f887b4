"""Attention of decoding where every response has a strip of the pool for its own pages, and every shared prompt too:
keys are read in place, neighbours of like length in one call, a prompt once for all its samples.

    o_a, l_a  = values weighted by the softmax of the scores, and log of the sum of their exponentials, over a's own
                positions
    o_g, l_g  = the same over the whole pages of the prompt that a shares
    out_a     = o_a + sigmoid(l_g - l_a) (o_g - o_a);  a sink s is one more score:  out_a sigmoid(l - s)

Neighbours are one call where that is cheaper than apart: a call costs as much as so many positions, each of its strips
as much as some more, and as the longest. It is what runs on a CPU whose memory holds a strip for every slot; where it
does not, and under a window, rows.py and dense.py read pages wherever they lie. All equal kernels/eager.py.

A active responses · R responses that a reading is of · S strips of a call, M responses to each · L positions · K
key/value heads · G query heads to each · H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.pages import PagesInStrips, Strip

CALL = 35_000  # elements of keys that could be read in the time that a call takes (measured)
STRIP = 4_000  # and that a head of a strip takes before it is read
Weighted = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Call:
    """Some strips side by side, as far as the longest of them is filled."""

    first_page: int
    count: int  # S
    step: int  # pages from one strip to the next
    lengths_S: np.ndarray  # positions; 1 of a strip of nobody, since 0 / 0 is slow
    members: int  # M

    @cached_property
    def longest(self) -> int:  # L
        return int(self.lengths_S.max())

    @cached_property
    def bias_S11L(self) -> Tensor | None:
        """fp32: -inf where a strip has no position, or 0; None where all are as long."""
        if int(self.lengths_S.min()) == self.longest:
            return None
        hidden_SL = np.arange(self.longest) >= self.lengths_S[:, None]
        return torch.from_numpy(np.where(hidden_SL, np.float32("-inf"), np.float32(0)))[:, None, None]

    def read(self, q_TKGH: Tensor, keys: Tensor, values: Tensor, weighted: Weighted) -> tuple[Tensor, Tensor]:
        """(T, K, G, Hv) and (T, K, G) of T = S M queries, strip by strip."""
        k_SKLH, v_SKLH = self._view(keys), self._view(values)
        if self.members == 1:
            return weighted(q_TKGH, k_SKLH, v_SKLH, self.bias_S11L)
        q_SKQH = q_TKGH.unflatten(0, (self.count, -1)).transpose(1, 2).flatten(2, 3)  # rows of one product
        apart = lambda x: x.unflatten(2, (self.members, -1)).transpose(1, 2).flatten(0, 1)
        out_SKQH, lse_SKQ = weighted(q_SKQH, k_SKLH, v_SKLH, self.bias_S11L)
        return apart(out_SKQH), apart(lse_SKQ)

    def _view(self, pool: Tensor) -> Tensor:
        """(S, K, L, H) of a pool (pages, K, B, H) whose heads lie apart in memory."""
        page, head, position, one = pool.stride()
        size = self.count, pool.shape[1], self.longest, pool.shape[3]
        return pool.as_strided(size, (self.step * page, head, position, one), self.first_page * page)


@dataclass(frozen=True)
class Reading:
    """Some responses and the strips that they read, one each."""

    calls: tuple[Call, ...]
    rows_T: Tensor | None  # int64: whose query, call by call; anybody's for a strip of nobody. None: all, in order
    place_R: Tensor | None  # int64: where a response is among these; None: all, in order

    @classmethod
    def of(
        cls,
        where: Strip,
        strips_R: np.ndarray,
        lengths_R: np.ndarray,
        rows_R: np.ndarray,
        active: int,
        keys: tuple[int, int],
    ) -> Reading:
        """The responses `rows_R` of the `active` ones read the first `lengths_R` positions of the strips `strips_R`,
        whose keys have so many heads of such a size.
        """
        heads, size = keys
        cost = CALL / (heads * size), STRIP / size
        order = np.argsort(strips_R, kind="stable")
        strips, begins, members = np.unique(strips_R[order], return_index=True, return_counts=True)
        lengths = lengths_R[order][begins]
        number = np.arange(len(order)) - np.repeat(begins, members)  # of a response, among those of its strip
        calls, rows, place_R, total = [], [], np.empty(len(order), np.int64), 0
        for begin, end in pairwise(_cuts(strips, lengths, *cost)):
            first, most = int(strips[begin]), int(members[begin:end].max())
            count = int(strips[end - 1]) - first + 1
            some = slice(int(begins[begin]), int(begins[end - 1] + members[end - 1]))
            at = (strips_R[order[some]] - first) * most + number[some]
            theirs = np.full(count * most, rows_R[order[some.start]])
            theirs[at] = rows_R[order[some]]
            place_R[order[some]] = total + at
            lengths_S = np.ones(count, np.int64)
            lengths_S[strips[begin:end] - first] = lengths[begin:end]
            calls.append(Call(where.first_page + first * where.pages, count, where.pages, lengths_S, most))
            rows.append(theirs)
            total += len(theirs)
        return cls(tuple(calls), _index(np.concatenate(rows), active), _index(place_R, total))

    def grown(self, by: int) -> Reading:
        """The same responses with so many positions more: it was cheapest to read them so, and it still is."""
        calls = tuple(replace(call, lengths_S=call.lengths_S + by) for call in self.calls)
        return Reading(calls, self.rows_T, self.place_R)

    def read(self, q_AKGH: Tensor, keys: Tensor, values: Tensor, weighted: Weighted) -> tuple[Tensor, Tensor]:
        """(R, K, G, Hv) and (R, K, G), fp32."""
        q_TKGH = q_AKGH if self.rows_T is None else q_AKGH[self.rows_T]
        parts = q_TKGH.split([call.count * call.members for call in self.calls])
        found = [call.read(q, keys, values, weighted) for call, q in zip(self.calls, parts, strict=True)]
        out_TKGH, lse_TKG = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        if self.place_R is None:
            return out_TKGH, lse_TKG
        return out_TKGH[self.place_R], lse_TKG[self.place_R]


@dataclass(frozen=True)
class Strips:
    """Which strips are read for whom, in one pass and for all layers of a kind."""

    own: Reading
    prompts: Reading | None
    sharing_R: Tensor | None  # int64: the responses that share one; None: all, in order
    made_of: tuple[int, np.ndarray, np.ndarray]  # slots that had been given back; slots and lengths of the responses

    @classmethod
    def of(
        cls,
        pages: PagesInStrips,
        slots_A: np.ndarray,
        positions_A: np.ndarray,
        keys: tuple[int, int],
        before: Strips | None = None,
    ) -> Strips:
        """For the queries at `positions_A` of the responses in `slots_A`; `keys`: heads and size of a position's.
        `before` is that of an earlier token: where nobody has come or gone since, and all have grown alike, the same
        strips are read together.
        """
        active, shared_A = len(slots_A), pages.shared[slots_A]
        lengths_A = positions_A - shared_A * pages.block + 1
        made_of = pages.ended, slots_A, lengths_A
        if before and before.made_of[0] == pages.ended and np.array_equal(before.made_of[1], slots_A):
            grown_A = lengths_A - before.made_of[2]
            if grown_A.min() == grown_A.max():
                return replace(before, own=before.own.grown(int(grown_A[0])), made_of=made_of)
        own = Reading.of(pages.layout.own, slots_A, lengths_A, np.arange(active), active, keys)
        sharing = np.flatnonzero(shared_A)
        if not len(sharing):
            return cls(own, None, None, made_of)
        of_prompts = pages.layout.prompts
        strips_R = (pages.tables[slots_A[sharing], 0] - of_prompts.first_page) // of_prompts.pages
        prompts = Reading.of(of_prompts, strips_R, shared_A[sharing] * pages.block, sharing, active, keys)
        return cls(own, prompts, _index(sharing, active), made_of)

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
        weigh = lambda q, k, v, bias: weighted(q, k, v, bias, scale, softcap)
        q_AKGH = q_ANH.unflatten(1, (keys.shape[1], -1))
        out_AKGH, lse_AKG = self.own.read(q_AKGH, keys, values, weigh)
        if self.prompts is not None:
            out_RKGH, lse_RKG = self.prompts.read(q_AKGH, keys, values, weigh)
            if self.sharing_R is None:
                out_AKGH, lse_AKG = _together((out_AKGH, lse_AKG), (out_RKGH, lse_RKG), sinks_N is not None)
            else:
                own = out_AKGH[self.sharing_R], lse_AKG[self.sharing_R]
                both = _together(own, (out_RKGH, lse_RKG), sinks_N is not None)
                out_AKGH = out_AKGH.index_copy(0, self.sharing_R, both[0])
                lse_AKG = lse_AKG.index_copy(0, self.sharing_R, both[1])
        out_ANH = out_AKGH.flatten(1, 2)
        if sinks_N is not None:
            out_ANH = out_ANH * torch.sigmoid(lse_AKG.flatten(1) - sinks_N.float())[..., None]
        return out_ANH.to(q_ANH.dtype)


def _together(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], with_sum: bool) -> tuple[Tensor, Tensor]:
    """Attention over the positions of both; the log of the sum of exponentials where it is wanted."""
    out = torch.lerp(one[0], other[0], torch.sigmoid(other[1] - one[1])[..., None])
    return out, torch.logaddexp(one[1], other[1]) if with_sum else one[1]


def weighted(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(values weighted by the softmax of the scores, log of the sum of their exponentials), fp32, of (S, K, Q, H)
    queries, (S, K, L, H) keys and (S, K, L, Hv) values.
    """
    if softcap is None and k.shape[-1] == v.shape[-1]:
        flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = flash(q, k, v, attn_mask=bias if bias is None else bias.to(q.dtype), scale=scale)
        return out.float(), lse
    scores = (q @ k.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp().to(v.dtype) @ v).float(), lse


# --- what is read together --------------------------------------------------------------------------------------------


def _cuts(strips: np.ndarray, lengths: np.ndarray, call: float, strip: float) -> list[int]:
    """Where calls begin, and the end, so that the sum of call + strips x (strip + longest) over the calls is the least.
    Example, with a call of 50 and a strip of 0: of strips 0, 1, 2 with lengths 100, 110, 900 the cuts are 0, 2, 3.
    """
    many = len(strips)
    longest = np.maximum.accumulate(np.triu(np.broadcast_to(lengths, (many, many))), 1)  # of begin .. end, both in it
    costs = call + (strips - strips[:, None] + 1) * (strip + longest)
    least, begins = np.zeros(many + 1), [0]
    for end in range(1, many + 1):
        so_far = least[:end] + costs[:end, end - 1]
        begins.append(int(so_far.argmin()))
        least[end] = so_far[begins[-1]]
    cuts = [many]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    return cuts[::-1]


def _index(places: np.ndarray, size: int) -> Tensor | None:
    """None where it is all of so many, in order."""
    return None if np.array_equal(places, np.arange(size)) else torch.from_numpy(places)

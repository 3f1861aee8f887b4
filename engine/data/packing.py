"""Packing: the boundaries of a flat stream of sequences, and which examples of a step share a micro-batch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.world import on_device


def pack(tokens: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """Packs the examples of one step into micro-batches: for every rank, the same number of lists of positions in
    `tokens`.

    Longest example first, each into the emptiest bin; the fewest bins a multiple of `ranks` in which none exceeds the
    budget; an example over the budget is a bin of its own. Bins then go to ranks fullest first, each to the rank with
    the least work, so that ranks carry equal loads. Deterministic; order of examples within a bin is ascending.
    """
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    oversized = [i for i in order if tokens[i] > budget]
    regular = order[len(oversized) :]
    volume = -(-sum(tokens[i] for i in regular) // budget)
    alone = sum(2 * tokens[i] > budget for i in regular)  # no two of these share a bin
    count = max(1, -(-(len(oversized) + max(volume, alone)) // ranks)) * ranks
    while (bins := _emptiest_first(regular, tokens, budget, count - len(oversized))) is None:
        count += max(1, count // (64 * ranks)) * ranks  # by 1.5 %: few attempts, also over a whole dataset
    bins = [[i] for i in oversized] + bins

    by_load = sorted(range(len(bins)), key=lambda b: (-sum(tokens[i] for i in bins[b]), b))
    per_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    free = [(0, rank) for rank in range(ranks)]
    for b in by_load:
        load, rank = heapq.heappop(free)
        per_rank[rank].append(sorted(bins[b]))
        if len(per_rank[rank]) < len(bins) // ranks:
            heapq.heappush(free, (load + sum(tokens[i] for i in bins[b]), rank))
    return per_rank


def _emptiest_first(order: list[int], tokens: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Each example into the emptiest of `count` bins, or None if one does not fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, b) for b in range(count)]
    for i in order:
        load, b = loads[0] if loads else (budget, -1)
        if load + tokens[i] > budget:
            return None
        bins[b].append(i)
        heapq.heapreplace(loads, (load + tokens[i], b))
    return bins


class Packing(NamedTuple):
    """The boundaries of a stream."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    bounds: Tensor  # `cu_seqlens` on the host
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Of sequences of these lengths, end to end."""
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(tuple(lengths), on_device(bounds, device), bounds, max(lengths))

    @classmethod
    def at(cls, cu_seqlens: Tensor, bounds: Tensor) -> Packing:
        """With these boundaries, on the device and on the host; sequences of length 0 are left out of `lengths`."""
        lengths = tuple(n for n in bounds.diff().tolist() if n)
        return cls(lengths, cu_seqlens, bounds, max(lengths))

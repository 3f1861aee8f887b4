"""Micro-batches: flat streams of tokens, and how the sequences of one step are packed into them.

The sequences of a step are drawn first and packed only within the step, so which examples share a step never depends on
lengths, on the number of ranks or on the memory budget. Every rank gets the same number of micro-batches (collectives
must pair up); one without work holds a single token that counts for nothing.

T tokens of the stream · S sequences · R rows that count (positions whose next token is trained).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.data.packing import Packing, pack
from engine.world import World, on_device

TILE, TILE_LESS = 128, 8  # of `rounded_up`


@dataclass
class Stream:
    """A micro-batch as compiled layers see it: no numbers on the host but one, which depends on little."""

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    bounds: Tensor  # `cu_seqlens` on the host
    max_seqlen: int  # or more

    @property
    def lengths(self) -> tuple[int, ...]:
        return Packing.at(self.cu_seqlens, self.bounds).lengths


@dataclass(frozen=True)
class MicroBatch:
    """A flat stream of sequences, shifted once, here: input t of a sequence predicts its token t + 1.

    Example: the sequences [5, 6, 7] and [8, 9] of which 7 and 9 count:
    ids [5, 6, 8] · positions [0, 1, 0] · cu_seqlens [0, 2, 3] · rows [1, 2] · targets [7, 9] · counts [1, 1].
    """

    ids_T: Tensor  # int64
    positions_T: Tensor  # int64, restart at 0 with every sequence
    cu_seqlens: Tensor  # int32, S + 1
    bounds: Tensor  # the same, on the host
    lengths: tuple[int, ...]  # of the S sequences, on the host
    rows_R: Tensor  # int64: indices into the stream of the positions that count, sequence by sequence
    targets_R: Tensor  # int64: the token that each of them predicts
    counts_S: Tensor  # int64: rows of each sequence
    cuts: tuple[int, ...]  # S + 1 offsets into the R rows, on the host
    examples: tuple[int, ...]  # dataset indices of the examples inside, in order

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model, those of an empty micro-batch's placeholder not counted."""
        return sum(self.lengths) if self.examples else 0

    def rounded_up(self) -> Stream:
        """The stream with a tail that counts for nothing, one more sequence, up to a length of 120, 248, 376, ...

        8 less than a multiple of 128: whole tiles of a matrix product, and never equal to a width of the model, which
        torch.compile would take for the same number. The boundaries are 2^n + 1, at least 65, the last ones equal: as
        many sequences of length 0.
        """
        tokens, device = len(self.ids_T), self.ids_T.device
        tail = -(tokens + TILE_LESS) % TILE
        bounds = 2 ** max(6, len(self.lengths).bit_length()) + 1
        longest = 2 ** max(7, (max(*self.lengths, tail) - 1).bit_length())
        ids_T = torch.cat([self.ids_T, torch.zeros(tail, dtype=torch.int64, device=device)])
        positions_T = torch.cat([self.positions_T, torch.arange(tail, device=device)])
        ends = [
            torch.full((bounds - len(x),), tokens + tail, dtype=torch.int32, device=x.device)
            for x in (self.cu_seqlens, self.bounds)
        ]
        return Stream(
            ids_T, positions_T, torch.cat([self.cu_seqlens, ends[0]]), torch.cat([self.bounds, ends[1]]), longest
        )


def sum_by_sequence(values_R: Tensor, counts_S: Tensor) -> Tensor:
    """sum of each sequence's rows, (S,); deterministic on every device, unlike a scatter-add."""
    return torch.segment_reduce(values_R, "sum", lengths=counts_S, unsafe=True, initial=0.0)


def micro_batch(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]], examples: Sequence[int], device: torch.device
) -> MicroBatch:
    """Packs (ids, mask) sequences; mask is True for tokens that count. None: the placeholder of a rank without work."""
    sequences = sequences or [(np.zeros(2, np.int64), np.zeros(2, bool))]
    masks = [np.asarray(mask[1:], bool) for _, mask in sequences]
    lengths = tuple(len(mask) for mask in masks)
    bounds = torch.as_tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    counts = [int(mask.sum()) for mask in masks]
    mask_T = np.concatenate(masks)

    def to_device(array) -> Tensor:
        return on_device(torch.as_tensor(np.ascontiguousarray(array), dtype=torch.int64), device)

    return MicroBatch(
        ids_T=to_device(np.concatenate([ids[:-1] for ids, _ in sequences])),
        positions_T=to_device(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=on_device(bounds, device),
        bounds=bounds,
        lengths=lengths,
        rows_R=to_device(np.flatnonzero(mask_T)),
        targets_R=to_device(np.concatenate([ids[1:] for ids, _ in sequences])[mask_T]),
        counts_S=to_device(counts),
        cuts=tuple(int(c) for c in np.concatenate([[0], np.cumsum(counts)])),
        examples=tuple(examples),
    )


class Batchable(Protocol):
    """What micro-batches are made of: numbered examples of one or more sequences, `engine.data.store.Examples` or
    rollouts.
    """

    @property
    def tokens(self) -> np.ndarray:
        """Of every example, fed to the model."""

    def sequences(self, example: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of each sequence of an example; mask is True for tokens that count."""


class MicroBatches:
    """This rank's micro-batches of one step after another; on CUDA each is built and copied by a thread of its own
    while the device works on the last.
    """

    def __init__(self, examples: Batchable, budget: int, world: World, ahead: bool | None = None) -> None:
        """`ahead` (default: on CUDA): build on a thread. Where the device is the host, that would take its cores."""
        self.examples, self.budget, self.world = examples, budget, world
        cuda = world.device.type == "cuda"
        ready: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (world.device,)} if cuda else {}
        self._thread = ThreadPoolExecutor(1, "micro-batches", **ready) if (cuda if ahead is None else ahead) else None
        self._begun: tuple[bytes, Callable[[], Any]] | None = None

    def __call__(self, chosen: np.ndarray, then: np.ndarray | None = None) -> Iterator[tuple[MicroBatch, bool]]:
        """(micro-batch, is it the last) of a step on the examples `chosen`; the same number on every rank. The next
        step takes `then`.
        """
        begun, self._begun = self._begun, None
        first = begun[1] if begun and begun[0] == chosen.tobytes() else self._soon(self._begin, chosen)
        plan, batch = first()
        for i in range(len(plan)):
            last = i == len(plan) - 1
            if not last:
                following = self._soon(self._build, plan[i + 1])
            elif then is not None:
                self._begun = (then.tobytes(), self._soon(self._begin, then))
            yield batch, last
            if not last:
                batch = following()

    def _soon(self, work: Callable, *arguments: Any) -> Callable[[], Any]:
        """What `work` returns, when it is asked for."""
        return self._thread.submit(work, *arguments).result if self._thread else lambda: work(*arguments)

    def _begin(self, chosen: np.ndarray) -> tuple[list[list[int]], MicroBatch]:
        """The examples of every micro-batch, and the first of them."""
        per_rank = pack(self.examples.tokens[chosen].tolist(), self.budget, self.world.size)[self.world.rank]
        plan = [[int(chosen[p]) for p in positions] for positions in per_rank]
        return plan, self._build(plan[0])

    def _build(self, mine: list[int]) -> MicroBatch:
        sequences = [sequence for example in mine for sequence in self.examples.sequences(example)]
        return micro_batch(sequences, mine, self.world.device)


def step_batches(
    examples: Batchable, chosen: np.ndarray, budget: int, world: World
) -> Iterator[tuple[MicroBatch, bool]]:
    """The `MicroBatches` of one step, or pass, alone."""
    return MicroBatches(examples, budget, world)(chosen)

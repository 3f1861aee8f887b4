"""Decoding in batches of a few sizes, each a CUDA graph.

    A active responses  ->  the next rung of the ladder 1 2 4 8 16 32 48 64 96 128 ... slots, filled with columns that
                            have ended: they read and write nobody's page

A step reads the state, the tables and the weights where they always lie, so a graph stays good when weights change; it
is captured again when the pools are made anew. Graphs share one memory pool: only one runs at a time.

A active responses · J pages that a response may have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.world import on_device
from rollout.cache import Decode, PagedCache, Window

TOKEN, POSITION, TAKEN, KEY, ENDED = range(5)  # rows of the state
RUNGS = (1, 2, 4, 8, 16, 32, 48)


def rungs(slots: int) -> list[int]:
    """Batch sizes up to `slots`. Example: rungs(100) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 100]."""
    sizes, size = list(RUNGS), 64
    while size < slots:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [size for size in sizes if size < slots] + [slots]


class Ladder:
    """Steps on tables of pages at fixed places, each as it comes."""

    def __init__(
        self, step: Callable[[Decode, int], Tensor], state: Tensor, cache: PagedCache, device: torch.device
    ) -> None:
        self._step, self.state, self.cache, self.device = step, state, cache, device
        self.rungs = rungs(cache.slots)
        self.tables: dict[Window, Tensor] = {
            window: torch.zeros(kind.tables.shape, dtype=torch.int32, device=device)
            for window, kind in cache.kinds.items()
        }

    def step(self, slots_A: np.ndarray) -> Tensor:
        """The results of a token of the responses in these slots, (3, A)."""
        active = len(slots_A)
        size = next(rung for rung in self.rungs if rung >= active)
        for window, kind in self.cache.kinds.items():
            filled = np.zeros((size, kind.tables.shape[1]), np.int32)
            filled[:active] = kind.tables[slots_A]
            self.tables[window][:size] = on_device(torch.from_numpy(filled), self.device)
        return self.run(size)[:, :active]

    def run(self, size: int) -> Tensor:
        """One token for the state's first `size` columns. Nothing in it depends on numbers."""
        tables = {window: table[:size] for window, table in self.tables.items()}
        return self._step(Decode.by_tables(self.cache, self.state[POSITION, :size], tables), size)


class Graphs(Ladder):
    """Each rung a CUDA graph, captured at its first use."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, size: int) -> Tensor:
        """As it is without graphs; the results are overwritten by the next step of this size."""
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, results_3A = self._graphs[size]
        graph.replay()
        return results_3A

    def _capture(self, size: int) -> tuple[Any, Tensor]:
        """On a state in which all have ended, and that is put back: what runs before a capture leaves no trace."""
        kept = self.state.clone(), {window: table.clone() for window, table in self.tables.items()}
        self.state.zero_()
        self.state[ENDED] = 1
        for table in self.tables.values():
            table.zero_()
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles kernels, makes workspaces: neither may happen while capturing
                super().run(size)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # another thread may train meanwhile (ahead.py): what it asks of the device is no part of this
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results_3A = super().run(size)
        self.state.copy_(kept[0])
        for window, table in self.tables.items():
            table.copy_(kept[1][window])
        return graph, results_3A

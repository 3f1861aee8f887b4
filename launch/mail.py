"""Lines from every rank to rank 0 while they come: one process writes, and nobody waits in a collective for the
slowest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from engine.world import FOREVER, World

_runs = itertools.count()  # names the keys of the store: every rank sends as many times as the others


class Mail:
    """Lines from every rank to rank 0, in any order. `send` on each rank; `end` once, after which rank 0 has all."""

    def __init__(self, world: World, take: Callable[[str], None]) -> None:
        """`take` is called on rank 0 with every line."""
        self.world, self.take, self.name = world, take, f"mail/{next(_runs)}"
        self._sent = 0
        self._read = dict.fromkeys(range(1, world.size), 0) if world.is_main else {}

    def send(self, line: str) -> None:
        if self.world.is_main:
            self.take(line)
            for rank in list(self._read):  # one that has ended goes
                self._empty(rank)
        else:
            self.world.store.set(self._key(self.world.rank, self._sent), line)
            self._sent += 1

    def end(self) -> None:
        """Rank 0 waits on the store for what the others still sample; they go on at once."""
        if not self.world.is_main:
            self.world.store.set(self._key(self.world.rank, self._sent), "")
        for rank in list(self._read):
            while rank in self._read:
                self.world.store.wait([self._key(rank, self._read[rank])], FOREVER)
                self._empty(rank)

    def _key(self, rank: int, number: int) -> str:
        return f"{self.name}/{rank}/{number}"

    def _empty(self, rank: int) -> None:
        """Takes the lines of a rank that are there; an empty one is its last."""
        while rank in self._read and self.world.store.check([self._key(rank, self._read[rank])]):
            key = self._key(rank, self._read[rank])
            line = self.world.store.get(key).decode()
            self.world.store.delete_key(key)
            if line:
                self._read[rank] += 1
                self.take(line)
            else:
                del self._read[rank]

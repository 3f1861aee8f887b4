"""Lines from every rank to rank 0 while they come: one process writes, and nobody waits in a collective for the
slowest. A rank that is asked to end gives up what it samples, and then all of them end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Self

from engine import signals
from engine.world import FOREVER, World

LINE, STOPPED = "=", "!"  # what begins with them
_runs = itertools.count()  # names the keys of the store: every rank sends as many times as the others


class Mail:
    """Lines from every rank to rank 0, in any order: `send` on each rank, in the body of `with`, after which rank 0 has
    all. The body may end by GivenUp, on any rank; then Stopped is raised on every rank, when all have ended.
    """

    def __init__(self, world: World, take: Callable[[str], None], kept: Path | None = None) -> None:
        """`take` is called on rank 0 with every line; `kept` is the file where they are."""
        self.world, self.take, self.name, self.kept = world, take, f"mail/{next(_runs)}", kept
        self._stopped = ""
        self._sent = 0
        self._read = dict.fromkeys(range(1, world.size), 0) if world.is_main else {}

    def send(self, line: str) -> None:
        self._send(f"{LINE}{line}")

    def _send(self, line: str) -> None:
        if self.world.is_main:
            self._take(line)
            for rank in list(self._read):  # one that has ended goes
                self._empty(rank)
        else:
            self.world.store.set(self._key(self.world.rank, self._sent), line)
            self._sent += 1

    def __enter__(self) -> Self:
        signals.rollouts_may_end(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        signals.rollouts_may_end(False)
        given_up = kind is not None and issubclass(kind, signals.GivenUp)
        if kind is not None and not given_up:
            return False
        if given_up:
            self._send(f"{STOPPED}{signals.asked()}")
        self.end()
        self.world.on_main("whether all was sampled", self._check)  # on the store: the others wait as long as it takes
        return given_up

    def _check(self) -> None:
        if self._stopped:
            kept = f"the same command goes on from {self.kept}" if self.kept else "nothing is kept without --output"
            raise signals.Stopped(f"{self._stopped}, while responses were sampled; {kept}")

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
                self._take(line)
            else:
                del self._read[rank]

    def _take(self, line: str) -> None:
        if line.startswith(STOPPED):
            self._stopped = self._stopped or line.removeprefix(STOPPED)
        else:
            self.take(line.removeprefix(LINE))

"""Which examples: of a mixture's sources, and of each step. All of it a function of names (seed, purpose, epoch)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from engine.errors import UserError


def permutation(n: int, *name: Any) -> np.ndarray:
    """A permutation of range(n) that is a function of its name (seed, purpose, epoch), on every machine and with every
    numpy the same.

    It sorts the raw stream of Philox, which numpy guarantees (what Generator.permutation makes of the stream, it does
    not).
    """
    key = int.from_bytes(hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


def mixture_index(n: int, amount: str, seed: int, name: str) -> np.ndarray:
    """`amount` of a source of n examples: a fraction (has a point; beyond 1.0 examples repeat) or a number of rows."""
    try:
        count = round(float(amount) * n) if "." in amount else int(amount)
    except (ValueError, OverflowError):
        count = -1
    if count < 0:
        raise UserError(f"--mixer_list {name} {amount}: expected a fraction such as 0.5 or a number of rows")
    whole, rest = divmod(count, n) if n else (0, 0)
    order = permutation(n, seed, "mixture", name)
    return np.sort(np.concatenate([np.tile(np.arange(n), whole), order[:rest]]).astype(np.int64))


class Steps:
    """Which examples each optimizer step trains on: a permutation per epoch, cut in order into batches; the short last
    one is kept.
    """

    def __init__(self, n: int, batch_size: int, epochs: int, max_steps: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.per_epoch = -(-n // batch_size)
        self.total = max_steps if max_steps > 0 else self.per_epoch * epochs
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def examples(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.n, self.seed, "order", epoch)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def after(self, step: int) -> np.ndarray | None:
        """The examples of the step after this one; None: it is the last."""
        return self.examples(step + 1) if step + 1 < self.total else None

    def used(self) -> np.ndarray:
        """The examples that the run takes at least once, ascending."""
        if self.total >= self.per_epoch:
            return np.arange(self.n)
        return np.sort(permutation(self.n, self.seed, "order", 0)[: self.total * self.batch_size])

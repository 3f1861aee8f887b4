"""What a suite of faults is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One fault. `run(directory)` plants it, in an empty directory of its own, and gives '' where all that is promised
    held, or one line on what did not.
    """

    name: str
    run: Callable[[Path], str]


Cases = Callable[[int, int], Iterator[Case]]
"""(count, seed) -> so many cases, each of which can be made again from its name alone."""


@dataclass(frozen=True)
class Suite:
    """Cases of one kind, the broken variants that they must catch, and the same faults against others.

    A control is a promise that was taken away on purpose (no random state restored, no fsync): at least one of its
    cases has to fail, or the suite is blind. A baseline is a peer in the place of the engine.
    """

    name: str
    unit: str  # what the cases are, in the plural
    promise: str  # the target, as the table prints it
    sizes: tuple[int, int]  # cases in `make drill`, and with --full
    cases: Cases
    controls: dict[str, Cases] = field(default_factory=dict)
    baselines: dict[str, Cases] = field(default_factory=dict)
    left_out: Sequence[str] = ()  # what cannot be tried on this machine, and why

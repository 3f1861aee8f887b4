"""What the main thread of this process is doing: its step, a few words, and a count that rises with every report.

Reported where work is counted anyway (micro-batches, tokens, rows, files); read by the thread that watches over ranks
(engine/watch.py), and by the line on memory that ran out.
"""

from __future__ import annotations

import math

LONGER = 12  # times patience, for work that is not counted: loading, compiling, writing a file


class _Progress:
    """One process does one thing."""

    count = 0
    step = 0  # 1-based; 0: before the first
    doing = "starting"
    is_counted = False  # reports come as work is done
    compiles = False  # --compile, and the first step is not over
    for_all = False  # what one rank does while the others wait: a download may take a day


_now = _Progress()


def note(doing: str = "", *, counted: bool | None = None) -> None:
    """The main thread goes on, with `doing` if that is something else. `counted`: whether it reports from now on."""
    _now.count += 1
    _now.doing = doing or _now.doing
    _now.is_counted = _now.is_counted if counted is None else counted


def at_step(step: int) -> None:
    """Step `step` begins, the first being 1."""
    _now.step = step
    note("computing", counted=True)


def compiles(yes: bool) -> None:
    """Whether any forward or backward pass may be the one that compiles."""
    _now.compiles = yes


def for_all(yes: bool) -> None:
    """Whether this rank does what the others wait for, however long it takes."""
    _now.for_all = yes
    note(counted=False)


def count() -> int:
    """Rises whenever the main thread reports."""
    return _now.count


def leniency() -> float:
    """How many times --patience the main thread may be silent."""
    if _now.is_counted and not _now.compiles:
        return 1
    return math.inf if _now.for_all and not _now.is_counted else LONGER


def words() -> str:
    """'step 12, sampling'; before the first step only what goes on."""
    return f"step {_now.step}, {_now.doing}" if _now.step else _now.doing

"""What the main thread of this process is doing: its step, a few words, and a count that rises with every report.

Reported where work is counted anyway (micro-batches, tokens, rows, files); read by the thread that watches over ranks
(engine/watch.py), and by the line on memory that ran out.
"""

from __future__ import annotations


class _Progress:
    """One process does one thing."""

    count = 0
    step = 0  # 1-based; 0: before the first
    doing = "starting"
    may_take_long = True  # no report is expected: loading, compiling, writing a file
    compiles = False  # --compile, and the first step is not over


_now = _Progress()


def note(doing: str = "", *, long: bool | None = None) -> None:
    """The main thread goes on, with `doing` if that is something else. `long`: whether it may be silent from now on."""
    _now.count += 1
    _now.doing = doing or _now.doing
    _now.may_take_long = _now.may_take_long if long is None else long


def at_step(step: int, *, compiles: bool = False) -> None:
    """Step `step` begins, the first being 1; in one that `compiles` the main thread may be silent for long."""
    _now.step, _now.compiles = step, compiles
    note("computing", long=False)


def count() -> int:
    """Rises whenever the main thread reports."""
    return _now.count


def may_take_long() -> bool:
    """Whether what goes on is work that is not counted."""
    return _now.may_take_long or _now.compiles


def words() -> str:
    """'step 12, sampling'; before the first step only what goes on."""
    return f"step {_now.step}, {_now.doing}" if _now.step else _now.doing

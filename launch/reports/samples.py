"""Responses over time, as a page can show them: few enough, short enough, and nothing in them but text.

A response is hostile input. It is escaped by the template; here what a reader could not see, or could be misled by, is
made visible: control characters, and those that turn the direction of writing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.reports.runs import Recorded, as_number

FOLDED = 420  # characters shown before 'show all'
LONGEST = 20_000  # characters of a text that are kept at all
BUDGET = 900_000  # characters of all samples of a stage
MOST = 1500  # rows of a stage
DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


@dataclass(frozen=True)
class Sample:
    """One row of the table. `rest`: what 'show all' opens."""

    step: int
    number: int  # of its run
    run: str
    prompt: str
    response: str
    rest: str
    cut: int  # characters that are not in the page at all
    score: float | None
    reason: str


def shown_text(text: Any) -> str:
    """The text with what is invisible made visible; a line break stays one."""
    return "".join(map(_shown, str(text)))


def _shown(c: str) -> str:
    code = ord(c)
    if c in "\n\t" or (0x20 <= code < 0x7F):
        return c
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if code in DIRECTIONS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or code in (0xFEFF, 0x200B, 0x2060):
        return f"⟨U+{code:04X}⟩"
    return c


def samples_of(runs: Sequence[Recorded]) -> tuple[list[Sample], str]:
    """(the rows of all runs by step, a line that says what is left out or why there are none)."""
    rows = [(row, number, run) for number, run in enumerate(runs) for row in run.samples]
    if not rows:
        return (
            [],
            "No samples were kept: launch.ppo and launch.grpo write samples.jsonl when they evaluate, the other stages"
            " write none.",
        )
    rows.sort(key=lambda item: as_step(item[0].get("step")))
    chosen = evenly(rows, min(MOST, len(rows)))
    while len(chosen) > 1 and sum(size_of(row) for row, _, _ in chosen) > BUDGET:
        chosen = evenly(rows, len(chosen) * 3 // 4)
    found = [sample(row, number, run) for row, number, run in chosen]
    if len(chosen) == len(rows):
        return found, f"{len(rows):,} responses."
    return found, f"{len(chosen):,} of {len(rows):,} responses, evenly over time."


def evenly(rows: list, n: int) -> list:
    """n of the rows, among them the first and the last."""
    if n < 2 or len(rows) <= n:
        return rows[:n]
    return [rows[i * (len(rows) - 1) // (n - 1)] for i in range(n)]


def size_of(row: dict[str, Any]) -> int:
    return sum(min(LONGEST, len(value)) for value in row.values() if isinstance(value, str))


def as_step(step: Any) -> int:
    return step if isinstance(step, int) and 0 <= step < 2**53 else 0


def sample(row: dict[str, Any], number: int, run: Recorded) -> Sample:
    response = row["response"]
    kept = response[:LONGEST]
    cut = FOLDED if len(kept) > FOLDED + 80 else len(kept)
    score = as_number(row["score"] if "score" in row else row.get("reward"))
    return Sample(
        as_step(row.get("step")),
        number,
        run.name,
        shown_text(str(row.get("prompt", ""))[:LONGEST]),
        shown_text(kept[:cut]),
        shown_text(kept[cut:]),
        len(response) - len(kept),
        score,
        shown_text(str(row.get("reason", ""))[:2000]),
    )

"""The bad rows of a dataset, counted by file and kind, and how many of them a run goes on with.

A row is skipped, counted and listed; a file of which no row can be used, or of which more are bad than --max_bad_rows
says, is refused whole: it is another stage's, or damaged, and what is left of it is not what was meant. Rows that are
dropped (too long, labelled false, a tie) are not bad.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

LISTED = 20  # bad rows that are named one by one
KINDS = 200  # of a file that are counted apart
SHOWN = 3  # kinds of a file on the screen
FILES_SHOWN = 10


def kind_of(why: str) -> str:
    """A reason without the numbers and words that differ from row to row."""
    return re.sub(r"'[^']*'|\[\d+\]|[\d,]*\d", lambda m: "[]" if m[0].startswith("[") else "…", why)[:120]


def file_of(place: str) -> str:
    """'/part.jsonl' of '/part.jsonl:8', '' of ':8'."""
    return place.rpartition(":")[0]


def allowed(rows: int, bound: float) -> int:
    """How many of a file's rows may be bad: below 1 a share of them, rounded up; else that number.

    Rounded up, so that no share above 0 lets a run die of a single bad row.
    """
    return math.ceil(rows * Fraction(str(bound))) if bound < 1 else int(min(bound, rows))


def too_many(bad: int, rows: int, bound: float) -> bool:
    """Whether a file is refused: it has no row but bad ones, or more of them than the bound allows."""
    return bad == rows > 0 or bad > allowed(rows, bound)


@dataclass
class BadRows:
    """Of one dataset: `rows` by file, `kinds` (kind → bad rows) and the `first` bad one of each file that has any."""

    rows: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(kinds.total() for kinds in self.kinds.values())

    def add(self, place: str, why: str) -> None:
        """A bad row; `rows` has it already, or will."""
        file, kind = file_of(place), kind_of(why)
        kinds = self.kinds.setdefault(file, Counter())
        kinds[kind if kind in kinds or len(kinds) < KINDS else "of another kind"] += 1
        self.first.setdefault(file, f"{place}: {why}")
        if len(self.listed) < LISTED:
            self.listed.append(f"{place}: {why}")

    def header(self) -> dict[str, Any]:
        """As JSON: what `lines` and `refusal` read."""
        files = {
            file: {"rows": self.rows[file], "bad": kinds.total(), "kinds": dict(kinds), "first": self.first[file]}
            for file, kinds in self.kinds.items()
        }
        return {"bad_rows": self.count, "bad_list": self.listed, "bad_files": files}


def lines(name: str, header: Mapping[str, Any]) -> Iterator[str]:
    """What a user should know of the bad rows of a dataset of this name."""
    several = [(file, of) for file, of in header["bad_files"].items() if of["bad"] > 1]
    for file, of in several[:FILES_SHOWN]:
        yield f"  {of['bad']:,} of {of['rows']:,} rows are bad in {name}{file}: {_shown(of['kinds'])}"
    if len(several) > FILES_SHOWN:
        yield f"  and bad rows in {len(several) - FILES_SHOWN:,} more files"
    yield from (f"  bad row {name}{line}" for line in header["bad_list"])
    if header["bad_rows"] > len(header["bad_list"]):
        yield f"  and {header['bad_rows'] - len(header['bad_list'])} more"


def refusal(name: str, header: Mapping[str, Any], bound: float) -> str | None:
    """Why a run does not go on with this dataset, in one line, or None: the first file that is beyond --max_bad_rows,
    or has no row but bad ones.
    """
    for file, of in header["bad_files"].items():
        if of["bad"] == of["rows"]:
            return f"{name}{file}: no usable row, the first bad one is {name}{of['first']}"
        if too_many(of["bad"], of["rows"], bound):
            most = allowed(of["rows"], bound)
            return (
                f"{name}{file}: {of['bad']:,} of {of['rows']:,} rows are bad, and --max_bad_rows {bound:g} lets"
                f" {most:,} pass: {_shown(of['kinds'])}; the first is {name}{of['first']}; mend them (python -m"
                f" launch.data lists them), or go on without them by --max_bad_rows {of['bad']}"
            )
    return None


def _shown(kinds: Mapping[str, int]) -> str:
    """'7 x one kind; 5 x another', the most frequent first."""
    shown: Iterable[tuple[str, int]] = sorted(kinds.items(), key=lambda item: -item[1])
    said = [f"{count:,} x {kind}" for kind, count in shown]
    return "; ".join(said[:SHOWN]) + (f"; and {len(said) - SHOWN} more kinds" if len(said) > SHOWN else "")

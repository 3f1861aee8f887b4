"""A dataset, or a mixture of some, as one table of examples; and what follows from the table.

Rows are addressed by (number of the dataset, number of the row in it); places in files are found when they are needed,
by reading the rows again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.data.files import Source
from engine.data.mixture import mixture_index
from engine.data.rows import BadRow
from engine.data.tokenise import Chunks
from launch.inspection.likeness import EvaluationSet, near_duplicates
from launch.inspection.look import COLUMNS, LISTED, Found, Lens

Ref = tuple[int, int]  # (dataset, row)
REASONS = 1000  # kinds of bad rows that are counted apart
SHOWN = 5  # examples of a finding
SOURCES = 12  # of which a typical example is shown


def look_at(source: Source, lens: Lens, workers: int) -> Found:
    """Everything that the rows of a source hold, in one pass."""
    whole = Found(lens.read.per_example)
    best: dict[tuple[int, int], tuple[int, float]] = {}  # (set, prompt) → (row, share): the row that covers it most
    with (
        Chunks(source.rows(), lens, workers) as chunks,
        tqdm(desc=f"reading {source.name[-40:]}", unit=" rows", delay=2, leave=False) as bar,
    ):
        for chunk in chunks:
            _add(whole, chunk)
            for row, s, prompt, share in chunk.overlaps:
                whole.overlapping.setdefault(s, set()).add(row + whole.rows)
                if share > best.get((s, prompt), (0, 0.0))[1]:
                    best[s, prompt] = (row + whole.rows, share)
            whole.rows += chunk.rows
            bar.update(chunk.rows)
    for name, (dtype, by_sequence) in COLUMNS.items():
        empty = np.zeros((0, whole.per_example) if by_sequence else 0, dtype)
        whole.columns[name] = [np.concatenate([empty, *whole.columns[name]])]
    whole.sketches = [np.concatenate([np.zeros((0, 32), np.uint16), *whole.sketches])]
    whole.overlaps = [(row, s, prompt, share) for (s, prompt), (row, share) in sorted(best.items())]
    return whole


def _add(whole: Found, chunk: Found) -> None:
    labels = np.array([whole.label(name) for name in chunk.labels] or [0], np.int16)
    for name in COLUMNS:
        values = chunk.columns[name][0]
        values = values + whole.rows if name == "row" else labels[values] if name == "label" else values
        whole.columns[name].append(values)
    whole.sketches += chunk.sketches
    whole.bad += [(row + whole.rows, place, why) for row, place, why in chunk.bad[: LISTED - len(whole.bad)]]
    whole.num_bad += chunk.num_bad
    for name in ("files", "bad_files", "dropped", "notes", "forms", "verifiers"):
        vars(whole)[name].update(vars(chunk)[name])
    for why, count in chunk.reasons.items():
        whole.reasons[why if why in whole.reasons or len(whole.reasons) < REASONS else "of another kind"] += count


@dataclass(frozen=True)
class Dataset:
    """One name of --dataset_name or --mixer_list, read. `shown` is the name that rows are called by."""

    shown: str
    amount: str
    source: Source
    found: Found

    def taken(self, seed: int, name: str) -> np.ndarray:
        """The examples that a training takes, as it chooses them; a number stands there as often as it is taken."""
        kept = np.flatnonzero((self.found.columns["left"][0] > 0).all(1))
        return kept[mixture_index(len(kept), self.amount, seed, name)] if self.amount else kept

    def again(self, wanted: Iterable[int]) -> Iterator[tuple[int, str, dict | BadRow]]:
        """(number, place, row) of these rows, read once more, up to the last of them."""
        numbers = set(wanted)
        for number, (place, row) in islice(enumerate(self.source.rows()), max(numbers, default=-1) + 1):
            if number in numbers:
                yield number, f"{self.shown}{place}", row


@dataclass(frozen=True, eq=False)
class Table:
    """The examples of all datasets: `taken` as a training takes them, `once` each of these once."""

    datasets: Sequence[Dataset]
    columns: dict[str, np.ndarray]
    sketches: np.ndarray
    taken: np.ndarray
    once: np.ndarray

    @classmethod
    def of(cls, datasets: Sequence[Dataset], seed: int, names: Sequence[str]) -> Table:
        """`names` are those that the mixture's draws are named after: as they were given."""
        sizes = [len(d.found.columns["row"][0]) for d in datasets]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        columns = {name: np.concatenate([d.found.columns[name][0] for d in datasets]) for name in COLUMNS}
        columns["dataset"] = np.repeat(np.arange(len(datasets)), sizes)
        taken = [d.taken(seed, name) + start for d, name, start in zip(datasets, names, starts, strict=False)]
        every = np.concatenate(taken)
        sketches = np.concatenate([d.found.sketches[0] for d in datasets])
        return cls(datasets, columns, sketches, every, np.unique(every))

    def ref(self, example: int) -> Ref:
        return int(self.columns["dataset"][example]), int(self.columns["row"][example])

    def label(self, example: int) -> str:
        """The source of an example: its dataset, and what the row's column `source` says."""
        dataset = self.datasets[self.columns["dataset"][example]]
        inner = [*dataset.found.labels][self.columns["label"][example]]
        return f"{dataset.shown} ({inner})" if inner else dataset.shown

    def groups(self) -> dict[str, np.ndarray]:
        """Source → the examples taken from it, largest first."""
        both = self.columns["dataset"][self.taken] * 2**16 + self.columns["label"][self.taken]
        found = [self.taken[both == which] for which in np.unique(both)]
        return {self.label(int(some[0])): some for some in sorted(found, key=len, reverse=True)}


@dataclass
class Duplicates:
    """Rows that others repeat: how many could go, in how many groups, and some groups as (first row, another)."""

    rows: int = 0
    groups: int = 0
    largest: int = 0
    shown: list[tuple[int, int]] = field(default_factory=list)


def grouped(examples: np.ndarray, of: np.ndarray) -> Duplicates:
    """Of examples, ascending, that share a value in `of` beside them."""
    _, first, index, counts = np.unique(of, return_index=True, return_inverse=True, return_counts=True)
    large = np.flatnonzero(counts > 1)
    found = Duplicates(int((counts[large] - 1).sum()), len(large), int(counts.max(initial=0)))
    for group in large[np.argsort(-counts[large], kind="stable")][:SHOWN]:
        second = np.flatnonzero(index == group)[1]
        found.shown.append((int(examples[first[group]]), int(examples[second])))
    return found


def exact(table: Table) -> Duplicates:
    """The same tokens with the same mask (of a problem, the same answer as well)."""
    keys = table.columns["key"][table.once]
    if table.datasets[0].found.verifiers:
        keys = _pairs_of(keys, table.columns["answers"][table.once, 0])
    return grouped(table.once, keys)


def alike(table: Table) -> Duplicates:
    """Near duplicates, exact ones left out."""
    _, first = np.unique(table.columns["key"][table.once], return_index=True)
    some = np.sort(table.once[first])
    some = some[table.columns["words"][some] > 0]
    return grouped(some, near_duplicates(table.sketches[some]))


def asked_again(table: Table) -> Duplicates:
    """Examples whose question another one has too, with another answer."""
    asked, answers = table.columns["asked"][table.once], table.columns["answers"][table.once, 0]
    _, first = np.unique(_pairs_of(asked, answers), return_index=True)
    first = np.sort(first)
    return grouped(table.once[first], asked[first])


def contradictions(table: Table) -> Duplicates:
    """Pairs whose chosen answer is the rejected one of another pair with the same prompt."""
    asked, answers = table.columns["asked"][table.once], table.columns["answers"][table.once]
    chosen, rejected = _pairs_of(asked, answers[:, 0]), _pairs_of(asked, answers[:, 1])
    both = np.intersect1d(chosen, rejected)
    found = Duplicates(int(np.isin(chosen, both).sum()), len(both))
    for key in both[:SHOWN]:
        pair = (np.flatnonzero(side == key)[0] for side in (chosen, rejected))
        found.shown.append(tuple(int(table.once[i]) for i in pair))  # type: ignore[arg-type]
    return found


def _pairs_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One 64-bit value for two."""
    return a * np.int64(-7046029254386353131) ^ (b + (a >> 7))


@dataclass(frozen=True)
class Overlap:
    """What an evaluation set and the training rows share: (prompt, row, share of the prompt's words), best first."""

    evaluation: EvaluationSet
    unread: int
    worst: list[tuple[int, Ref, float]]
    rows: int

    @property
    def share(self) -> float:
        return len(self.worst) / max(1, len(self.evaluation))


def overlaps(datasets: Sequence[Dataset], sets: Sequence[tuple[EvaluationSet, int]]) -> list[Overlap]:
    """For every evaluation set, with the number of its rows that could not be read."""
    found = []
    for s, (evaluation, unread) in enumerate(sets):
        best: dict[int, tuple[Ref, float]] = {}
        for d, dataset in enumerate(datasets):
            for row, of_set, prompt, share in dataset.found.overlaps:
                if of_set == s and share > best.get(prompt, ((0, 0), 0.0))[1]:
                    best[prompt] = ((d, row), share)
        worst = sorted(((p, ref, share) for p, (ref, share) in best.items()), key=lambda item: (-item[2], item[0]))
        found.append(Overlap(evaluation, unread, worst, sum(len(d.found.overlapping.get(s, ())) for d in datasets)))
    return found


def picks(table: Table, limit: int, seed: int, random: int) -> dict[int, str]:
    """Example → why it is shown: longest, shortest, most typical, the most cut, and some drawn by the seed."""
    some = table.once
    if not len(some):
        return {}
    tokens = table.columns["tokens"][some].sum(1)
    generator = np.random.Generator(np.random.Philox(key=seed))
    found: dict[int, str] = {}

    def add(i: Any, why: str) -> None:
        found.setdefault(int(some[int(i)]), why)

    add(np.argmin(abs(tokens - np.median(tokens))), "typical: of median length")
    add(tokens.argmax(), "longest")
    add(tokens.argmin(), "shortest")
    lost = (table.columns["trained"][some] - table.columns["left"][some]).sum(1)
    for i in np.argsort(-lost, kind="stable")[: min(2, int((lost > 0).sum()))]:
        add(i, f"cut at {limit} tokens")
    groups = [*table.groups().values()]
    for group in groups[:SOURCES] if len(groups) > 1 else []:
        of_group = np.searchsorted(some, np.unique(group))
        add(of_group[np.argsort(tokens[of_group], kind="stable")[len(of_group) // 2]], "typical of its source")
    for i in generator.permutation(len(some))[:random]:
        add(i, f"drawn with seed {seed}")
    return found

"""The screen: what was found, a line or two for each question, and what to do next as the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.data.bad_rows import kind_of, too_many
from engine.errors import on_one_line
from launch.inspection import tally
from launch.inspection.likeness import ALIKE, COVERED, GRAM, SHINGLE
from launch.inspection.opened import KINDS
from launch.inspection.tally import Dataset, Duplicates, Overlap, Ref, Table

WIDTH, BARS = 11, 40  # of a line's name, of the histogram's bars
BAD_SHOWN, SOURCES_SHOWN, WORST_SHOWN = 6, 20, 5
TULU_LIMIT = 0.02  # Tülu 3 drops a dataset that contaminates more of an evaluation than this
MUCH_LOST = 0.01  # of the trained tokens, by the cut
UNITS = {"conversations": "conversations", "pairs": "pairs", "problems": "prompts"}
SAME = "rejected: expected another answer than chosen, got the same"
Named = Callable[[Ref], str]


@dataclass(frozen=True, eq=False)
class Findings:
    """All that the screen says, in numbers; rows by reference."""

    stage: str
    table: Table
    limit: int  # tokens of a sequence, or of a prompt
    limit_flag: str  # how it is said
    overlaps: Sequence[Overlap]
    exact: Duplicates
    alike: Duplicates
    asked: Duplicates
    against: Duplicates = field(default_factory=Duplicates)  # pairs that contradict each other

    @classmethod
    def of(cls, stage: str, table: Table, limit: int, limit_flag: str, found: Sequence[Overlap]) -> Findings:
        against = tally.contradictions(table) if KINDS[stage] == "pairs" else Duplicates()
        likenesses = tally.exact(table), tally.alike(table), tally.asked_again(table)
        return cls(stage, table, limit, limit_flag, found, *likenesses, against)

    @property
    def kind(self) -> str:
        return KINDS[self.stage]

    @property
    def datasets(self) -> Sequence[Dataset]:
        return self.table.datasets

    @property
    def tokens(self) -> np.ndarray:
        """(taken, sequences of each)."""
        return self.table.columns["tokens"][self.table.taken]

    @property
    def longest(self) -> int:
        """The example with the longest sequence."""
        return int(self.table.taken[self.tokens.max(1).argmax()])

    @property
    def lost(self) -> tuple[int, float]:
        """(examples that are cut, the share of all trained tokens that is lost by it)."""
        tokens, trained, left = (self.table.columns[name] for name in ("tokens", "trained", "left"))
        return int((tokens > self.limit).any(1).sum()), 1 - left.sum() / max(1, trained.sum())

    def refs(self) -> set[Ref]:
        """The rows that the screen names."""
        groups = (self.exact, self.alike, self.asked, self.against)
        examples = {i for group in groups for pair in group.shown for i in pair}
        examples |= {self.longest} if len(self.table.taken) else set()
        worst = {ref for overlap in self.overlaps for _, ref, _ in overlap.worst[:WORST_SHOWN]}
        return {self.table.ref(i) for i in examples} | worst


def lines(found: Findings, named: Named) -> list[str]:
    """The screen without its last line."""
    shown = [*_rows(found), *_bad(found)]
    if len(found.table.taken):
        of_stage = {"conversations": _no_more, "pairs": _pairs, "problems": _problems}[found.kind]
        shown += [*_lengths(found, named), *_cut(found), *of_stage(found, named)]
        shown += [*_duplicates(found, named), *_sources(found)]
    return [*shown, *(line for overlap in found.overlaps for line in _overlap(overlap, found, named))]


def _line(name: str, text: str, *more: str) -> list[str]:
    return [f"{name:{WIDTH}} {on_one_line(text)}", *(f"{'':{WIDTH}}   {on_one_line(line)}" for line in more)]


def _share(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return "0 %" if not part else f"{share:.0f} %" if 10 <= share <= 90 or share == 100 else f"{share:.2g} %"


def _rows(found: Findings) -> list[str]:
    shown = []
    for dataset in found.datasets:
        f = dataset.found
        kept = len({*f.columns["row"][0][(f.columns["left"][0] > 0).all(1)].tolist()})
        cut = len({*f.columns["row"][0].tolist()}) - kept
        parts = [f"{f.rows:,} rows", f"{kept:,} kept"]
        parts += [f"{n:,} dropped ({why})" for why, n in sorted(f.dropped.items())]
        parts += [f"{cut:,} dropped (nothing left within {found.limit:,} tokens)"] if cut else []
        parts += [f"{f.num_bad:,} bad"] if f.num_bad else []
        shown += _line("rows" if dataset is found.datasets[0] else "", f"{dataset.shown}: {', '.join(parts)}")
        forms = f.forms.most_common(3)
        if forms:
            others = sum(f.forms.values()) - sum(count for _, count in forms)
            each = [form if len(f.forms) == 1 else f"{form} ({count:,} rows)" for form, count in forms]
            shown += _line("columns", "; ".join(each) + (f"; others ({others:,} rows)" if others else ""))
        unread = sorted(which for what, which in f.notes if what == "not used")
        shown += _line("not used", ", ".join(unread)) if unread else []
        for (what, _), count in sorted(f.notes.items()):
            shown += _line("", f"{count:,} {what}") if what != "not used" else []
    return shown


def _bad(found: Findings) -> list[str]:
    """A few bad rows as they are; of many, the first of each kind."""
    every = [(f"{dataset.shown}{place}", why) for dataset in found.datasets for _, place, why in dataset.found.bad]
    if not every:
        return []
    kinds = sum((dataset.found.reasons for dataset in found.datasets[1:]), found.datasets[0].found.reasons.copy())
    if kinds.total() <= BAD_SHOWN:
        first, *more = [f"{place}: {why}" for place, why in every]
    else:
        of_kind = {kind_of(why): (place, why) for place, why in reversed(every)}
        named = [(count, *of_kind[kind]) for kind, count in kinds.most_common() if kind in of_kind][:BAD_SHOWN]
        first, *more = [f"{count:,} as {place}: {why}" for count, place, why in named]
        more += [f"and others, of {len(kinds)} kinds in all"] if len(kinds) > len(named) else []
    return _line("bad rows", first) + [f"{'':{WIDTH}} {on_one_line(line)}" for line in more]


def _lengths(found: Findings, named: Named) -> list[str]:
    columns, taken = found.table.columns, found.table.taken
    turns = columns["turns"][taken]
    many = int((turns > 1).sum())
    several = f"; more than one in {_share(many, len(turns))}, at most {turns.max()}" if many else ""
    shown = _line("turns", f"{turns.mean():.3g} of the user on average{several}")
    with_system = int(columns["system"][taken].sum())
    shown += _line("system", f"{_share(with_system, len(taken))} begin with a system turn of their own")
    flat = found.tokens.reshape(-1)
    median, p90, p99 = (int(x) for x in np.percentile(flat, [50, 90, 99], method="higher"))
    what = {"conversations": "a sequence", "pairs": "a side of a pair", "problems": "a prompt"}[found.kind]
    shown += _line(
        "tokens",
        f"of {what}: mean {flat.mean():,.1f}, median {median:,}, p90 {p90:,}, p99 {p99:,}, max {flat.max():,}"
        f" ({named(found.table.ref(found.longest))}); {flat.sum():,} in all",
    )
    shown += [f"{'':{WIDTH}}   {line}" for line in histogram(flat, found.limit)]
    if found.kind != "problems":
        trained = int(columns["left"][taken].sum())
        fed = int(np.minimum(flat, found.limit).sum())
        shown += _line("trained", f"{_share(trained, fed)} of the tokens that are fed ({trained:,} of {fed:,})")
    return shown


def histogram(lengths: np.ndarray, limit: int) -> list[str]:
    """Bars of lengths in half octaves: 64, 96, 128, 192, ...; `limit` is marked where it falls."""
    edges = sorted(edge for k in range(2, 31) for edge in (2**k, 3 * 2 ** (k - 1)))
    behind = np.searchsorted(edges, lengths, side="left")  # the first edge that is not less
    counts = np.bincount(behind, minlength=behind.max() + 1)
    first = int(np.flatnonzero(counts)[0])
    shown = []
    for i in range(first, len(counts)):
        bar = "#" * max(int(counts[i] > 0), round(BARS * counts[i] / counts.max()))
        low = edges[i - 1] if i else 0
        mark = " <- cut from here on" if low < limit < edges[i] or limit == low else ""
        share = _share(int(counts[i]), len(lengths))
        shown.append(
            f"<= {edges[i]:>8,} {bar:{BARS}} {counts[i]:>10,} {share:>6}{mark if lengths.max() > limit else ''}"
        )
    return shown


def _cut(found: Findings) -> list[str]:
    cut, lost = found.lost
    if not cut:
        return _line("cut", f"none is longer than {found.limit_flag}")
    if found.kind == "problems":
        return _line("dropped", f"{cut:,} prompts are longer than {found.limit_flag}")
    gone = int((~(found.table.columns["left"] > 0).all(1)).sum())
    of = len(found.table.columns["row"])
    all_of_it = f"; {gone:,} keep nothing trained and are dropped" if gone else ""
    text = f"{cut:,} of {of:,} {UNITS[found.kind]} ({_share(cut, of)}), longer than {found.limit_flag}"
    return _line("cut", f"{text}: {100 * lost:.2g} % of all trained tokens are lost{all_of_it}")


def _no_more(found: Findings, named: Named) -> list[str]:
    asked = found.asked
    return _asked(f"{asked.rows:,} repeat another's question with another answer", asked, found, named)


def _asked(text: str, asked: Duplicates, found: Findings, named: Named) -> list[str]:
    pairs = [f"{named(found.table.ref(b))} as {named(found.table.ref(a))}" for a, b in asked.shown[:3]]
    return _line("questions", text, *pairs) if asked.rows else []


def _pairs(found: Findings, named: Named) -> list[str]:
    lengths = found.table.columns["trained"][found.table.taken]
    longer, equal = int((lengths[:, 0] > lengths[:, 1]).sum()), int((lengths[:, 0] == lengths[:, 1]).sum())
    apart = lengths[:, 0] - lengths[:, 1]
    same = sum(dataset.found.reasons[SAME] for dataset in found.datasets)
    ties = sum(n for d in found.datasets for why, n in d.found.dropped.items() if "tie" in why or "equal" in why)
    shown = _line(
        "pairs",
        f"chosen is longer than rejected in {_share(longer, len(lengths))} ({_share(equal, len(lengths))} equally"
        f" long), by {apart.mean():+,.1f} trained tokens on average (median {np.median(apart):+,.0f});"
        f" {same:,} identical, {ties:,} ties",
    )
    if found.against.rows:
        each = [
            f"{named(found.table.ref(a))} chooses what {named(found.table.ref(b))} rejects"
            for a, b in found.against.shown[:3]
        ]
        shown += _line("against", f"{found.against.rows:,} pairs choose an answer that another one rejects", *each)
    return shown


def _problems(found: Findings, named: Named) -> list[str]:
    verifiers = sum((d.found.verifiers for d in found.datasets[1:]), found.datasets[0].found.verifiers.copy())
    shown = _line("verifiers", ", ".join(f"{name} {count:,}" for name, count in verifiers.most_common()))
    text = f"{found.asked.rows:,} prompts stand there again with another ground truth: no answer is right for both"
    return shown + _asked(text, found.asked, found, named)


def _duplicates(found: Findings, named: Named) -> list[str]:
    def pairs(group: Duplicates) -> list[str]:
        return [f"{named(found.table.ref(b))} as {named(found.table.ref(a))}" for a, b in group.shown[:3]]

    exact, alike = found.exact, found.alike
    shown = _line(
        "duplicates", f"{exact.rows:,} of {len(found.table.once):,} repeat another to the token", *pairs(exact)
    )
    how = f"MinHash: of runs of {SHINGLE} words {100 * ALIKE:.0f} % are the same"
    text = f"{alike.rows:,} more resemble another, {alike.groups:,} groups, the largest of {alike.largest:,} ({how})"
    return shown + _line("alike", text if alike.rows else f"none more resembles another ({how})", *pairs(alike))


def _sources(found: Findings) -> list[str]:
    groups = found.table.groups()
    if len(groups) < 2:
        return []
    columns = found.table.columns
    whole = [int(columns[name][found.table.taken].sum()) for name in ("tokens", "left")]
    width = min(60, max(len(name) for name in [*groups][:SOURCES_SHOWN]))
    name_of = "" if found.kind == "problems" else "trained"
    shown = [f"{'sources':{WIDTH}} {'':{width}} {UNITS[found.kind]:>13} {'tokens':>7} {'mean':>8} {name_of:>8}"]
    for name, some in [*groups.items()][:SOURCES_SHOWN]:
        tokens, left = (int(columns[column][some].sum()) for column in ("tokens", "left"))
        mean = tokens / len(some) / columns["tokens"].shape[1]
        trained = _share(left, whole[1]) if name_of else ""
        shown.append(
            f"{'':{WIDTH}} {on_one_line(name)[-width:]:{width}} {len(some):>13,} {_share(tokens, whole[0]):>7}"
            f" {mean:>8,.1f} {trained:>8}"
        )
    return shown + _line("", f"and {len(groups) - SOURCES_SHOWN} more") * (len(groups) > SOURCES_SHOWN)


def _overlap(overlap: Overlap, found: Findings, named: Named) -> list[str]:
    evaluation, count = overlap.evaluation, len(overlap.worst)
    unread = f", {overlap.unread:,} unreadable" if overlap.unread else ""
    head = f"with {evaluation.name} ({len(evaluation):,} prompts{unread}): "
    how = f"runs of {GRAM} words cover over {100 * COVERED:.0f} % of a prompt"
    if not count:
        return _line("overlap", f"{head}none is contaminated ({how})")
    worst = [
        f"{100 * share:.0f} % of {evaluation.places[prompt]} in {named(ref)}"
        for prompt, ref, share in overlap.worst[:WORST_SHOWN]
    ]
    text = f"{count:,} ({_share(count, len(evaluation))}) are contaminated by {overlap.rows:,} training rows ({how})"
    return _line("overlap", head + text, *worst)


# --- what to do next --------------------------------------------------------------------------------------------------


def advice(found: Findings, flags: Iterable[str], drop: str | None, on_bad_row: str, max_bad_rows: float) -> str:
    """One line: the worst that was found and what to do about it, or the command that trains. `flags` are the words
    that name model and data.
    """
    return f"{'next':{WIDTH}} {_of_bad_rows(found, on_bad_row, max_bad_rows) or _advice(found, flags, drop)}"


def _of_bad_rows(found: Findings, on_bad_row: str, max_bad_rows: float) -> str:
    """What to do about rows that a training refuses, or ''."""
    bad, rows = (sum(of) for of in zip(*((d.found.num_bad, d.found.rows) for d in found.datasets), strict=True))
    if not rows:
        return "the dataset is empty: name one that has rows"
    if not len(found.table.taken):
        return f"no row can be trained: mend the first bad row, or name another stage ({', '.join(KINDS)})"
    if bad and on_bad_row == "error":
        return "--on_bad_row error stops a training at the first bad row: mend it, or skip bad rows"
    for dataset in found.datasets:
        for file, of in dataset.found.bad_files.items():
            if too_many(of, dataset.found.files[file], max_bad_rows):
                share = _share(of, dataset.found.files[file])
                return (
                    f"{dataset.shown}{file}: {share} of the rows are bad, which a training refuses: see whether this is"
                    f" the right stage, then mend them, or go on without them by --max_bad_rows {of}"
                )
    return ""


def _advice(found: Findings, flags: Iterable[str], drop: str | None) -> str:
    _, lost = found.lost
    if not drop and any(overlap.share > TULU_LIMIT for overlap in found.overlaps):
        return (
            f"more than {100 * TULU_LIMIT:.0f} % of an evaluation are contaminated, where Tülu 3 leaves a dataset out:"
            " its result would say little; --drop_overlap CLEAN.jsonl writes the rows that do not overlap"
        )
    if not drop and any(overlap.worst for overlap in found.overlaps):
        return "--drop_overlap CLEAN.jsonl writes the rows that do not overlap with the evaluation"
    if found.kind == "problems" and found.asked.rows:
        return "keep one ground truth for each prompt: one answer is rewarded in one row and not in the other"
    if found.kind != "problems" and lost > MUCH_LOST:
        p99 = int(np.percentile(found.tokens, 99, method="higher"))
        return f"the cut loses {100 * lost:.2g} % of the trained tokens; --max_seq_length {p99} would cut 1 %"
    if found.exact.rows > sum(dataset.found.rows for dataset in found.datasets) / 100:
        return f"leave out the {found.exact.rows:,} duplicates, unless they are meant to weigh twice"
    return f"python -m launch.{found.stage} {' '.join(flags)} --dry_run"

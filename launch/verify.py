"""Score a file of responses: a verdict with its reason for every row, totals per verifier.

    python -m launch.verify responses.jsonl
    python -m launch.verify responses.jsonl --mode reference --failures_only --output verdicts.jsonl

Each line of the file is a JSON object with `response` (the text to judge), `ground_truth` (the label or the
constraints) and `dataset` (the verifier, in any case: docs/verifiers.md); --dataset NAME gives the last to all rows.
Nothing is trained and nothing leaves the machine.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import parse
from engine.errors import UserError, in_one_line
from engine.flags import flag, require_positive
from launch import commands
from launch.judges import checker, pinned
from verifiers import MAX_ERROR_RATE, MODES, VERIFIERS, Checker, GroundTruthError, Pool, Verdict, verify
from verifiers.strings import nearest, shown

FEW_ROWS = 200  # are judged here: worker processes would take longer to start
MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Config:
    __doc__ = __doc__
    file: str = flag(None, "one JSON object a line", positional=True)
    dataset: str | None = flag(None, f"verifier of rows without `dataset`: {', '.join(VERIFIERS)}")
    mode: str = flag(
        "default",
        "default: what is right; reference: what open-instruct rewards; tulu3: what it rewarded when Tülu 3 was trained"
        " (docs/verifiers.md)",
        choices=MODES,
    )
    verifier_module: str | None = flag(
        None, "a Python file of your own with verify(response, ground_truth), for rows whose `dataset` is its name"
    )
    loose: bool = flag(False, "IFEval's loose metric")
    combine: str = flag(
        "fraction",
        "several constraints in one row: the fraction that is followed, or 1 only for all",
        choices=("fraction", "all"),
    )
    failures_only: bool = flag(False, "print only rows that do not score 1")
    quiet: bool = flag(False, "print only the totals")
    output: str | None = flag(None, "also write {line, dataset, score, reason, status} as JSON lines")
    on_bad_row: str = flag(
        "skip", "a row that cannot be judged is listed and left out, or stops the command", choices=("skip", "error")
    )
    workers: int | None = flag(None, "processes (without it one a core; files of a few rows use none)")


def judge(config: Config) -> int:
    """The command. Returns the exit status: 0, 1 if more than 1 % of the rows could not be judged, 2 for bad rows.
    Raises UserError.
    """
    if config.file is None:
        raise UserError("command line: FILE is missing, one JSON object a line (--help says which fields)")
    require_positive(config, "workers")
    config = replace(config, verifier_module=pinned(config.verifier_module))
    with checker(config.mode, config.verifier_module) as check:
        try:
            if config.dataset is not None:
                check.name(config.dataset)
            rows, bad = read(Path(config.file), config.dataset, check)
        except GroundTruthError as problem:
            raise UserError(f"--{problem}") from None
        except OSError as problem:
            raise UserError(f"{config.file}: {problem.strerror}") from None
    if config.verifier_module:
        print(f"verifier of your own: {config.verifier_module}")
    for line in bad[:MAX_LISTED]:
        print(line, file=sys.stderr)
    if len(bad) > MAX_LISTED:
        print(f"... and {len(bad) - MAX_LISTED} more bad rows", file=sys.stderr)
    if (bad and config.on_bad_row == "error") or not rows:
        why = "no row to judge" if not rows else "stopped by a bad row (--on_bad_row error)"
        print(f"{config.file}: {why}", file=sys.stderr)
        return 2
    verdicts = list(report(rows, judged(rows, config), config))
    if config.output:
        write(Path(config.output), rows, verdicts)
    errors = totals(rows, verdicts, len(bad))
    return 1 if errors > MAX_ERROR_RATE * len(rows) else 0


def read(path: Path, dataset: str | None, check: Checker) -> tuple[list[tuple[int, tuple]], list[str]]:
    """([(line number, (response, ground truth, dataset))], [one line for each bad row])."""
    rows, bad = [], []
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append((number, row_of(line, dataset, check)))
            except GroundTruthError as problem:
                bad.append(f"{path}:{number}: {problem}")
    return rows, bad


def row_of(line: str, dataset: str | None, check: Checker) -> tuple:
    """(response, ground truth, dataset) of a line. Raises GroundTruthError naming the field that is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise GroundTruthError(f"not JSON: {problem}") from None
    if not isinstance(row, dict):
        raise GroundTruthError(f"expected a JSON object, found {shown(row)}")
    for field in ("response", "ground_truth", *(() if dataset else ("dataset",))):
        if field not in row:
            raise GroundTruthError(f"field {field} is missing{nearest(field, row)}")
    if not isinstance(row["response"], str):
        raise GroundTruthError(f"field response: expected a text, found {shown(row['response'])}")
    name: Any = row.get("dataset", dataset)
    try:
        check(name, row["ground_truth"])
    except GroundTruthError as problem:
        raise GroundTruthError(f"field {problem}") from None
    return row["response"], row["ground_truth"], name


def judged(rows: list, config: Config) -> Iterator[Verdict]:
    """The verdicts in the order of the rows, here or by worker processes."""
    how: dict[str, Any] = {"mode": config.mode, "loose": config.loose, "combine": config.combine}
    few = (config.workers is None and len(rows) <= FEW_ROWS) or config.workers == 1
    if few and config.verifier_module is None:
        yield from (verify(*row, **how) for _, row in rows)
        return
    with Pool(config.workers, **how, module=config.verifier_module) as pool:
        yield from pool.imap(row for _, row in rows)


def report(rows: list, verdicts: Iterator[Verdict], config: Config) -> Iterator[Verdict]:
    """Print a line for each verdict as it comes, with a progress bar where there is a terminal."""
    with tqdm(total=len(rows), unit="row", disable=None) as bar:
        for (number, (_, _, name)), verdict in zip(rows, verdicts, strict=False):
            if not config.quiet and not (config.failures_only and verdict.status == "ok" and verdict.score >= 1):
                mark = "error" if verdict.status == "error" else f"{verdict.score:.2f}"
                bar.write(f"{config.file}:{number}  {label(name):10}  {mark:5}  {verdict.reason}", file=sys.stdout)
            bar.update()
            yield verdict


def label(name: str | list) -> str:
    """How a row's verifier is printed: 'gsm8k', or 'gsm8k+ifeval' for a list."""
    return name.lower() if isinstance(name, str) else "+".join(map(str.lower, name))


def totals(rows: list, verdicts: list[Verdict], skipped: int) -> int:
    """Print a table by verifier; return the number of errors."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for (_, (_, _, name)), verdict in zip(rows, verdicts, strict=False):
        groups[label(name)].append(verdict)
    print(f"{'verifier':16} {'rows':>8} {'full marks':>11} {'mean score':>11} {'errors':>7}")
    for name, group in sorted(groups.items()):
        fine = [verdict.score for verdict in group if verdict.status == "ok"]
        mean = f"{sum(fine) / len(fine):.4f}" if fine else "-"
        print(f"{name:16} {len(group):8} {sum(score >= 1 for score in fine):11} {mean:>11} {len(group) - len(fine):7}")
    if skipped:
        print(f"{skipped} bad rows left out")
    return sum(verdict.status == "error" for verdict in verdicts)


def write(path: Path, rows: list, verdicts: list[Verdict]) -> None:
    """Write {line, dataset, score, reason, status} for every row as JSON lines."""
    with path.open("w", encoding="utf-8") as out:
        for (number, (_, _, name)), verdict in zip(rows, verdicts, strict=False):
            out.write(json.dumps({"line": number, "dataset": name, **verdict._asdict()}) + "\n")


if __name__ == "__main__":
    in_one_line(lambda: judge(parse(Config, elsewhere=commands)))

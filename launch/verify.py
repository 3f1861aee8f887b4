"""Score a file of responses: a verdict with its reason for every row, totals per verifier.

    python -m launch.verify responses.jsonl
    python -m launch.verify responses.jsonl --mode reference --failures_only --output verdicts.jsonl

Each line of the file is a JSON object with `response` (the text to judge), `ground_truth` (the label or the
constraints) and `dataset` (the verifier: gsm8k, math, ifeval, ifeval_old, in any case); --dataset NAME gives the last
to all rows.
Nothing is trained and nothing leaves the machine.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from verifiers import MODES, VERIFIERS, GroundTruthError, Pool, Verdict, check, verify
from verifiers.strings import nearest, shown

FEW_ROWS = 200  # are judged here: worker processes would take longer to start
MAX_LISTED = 20


class Parser(argparse.ArgumentParser):
    """argparse that names the flag that was probably meant."""

    def parse_args(self, args=None, namespace=None):
        """As argparse's; exits with status 2 for a flag that is not known."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{nearest(unknown[0].partition('=')[0], known)}")
        return options


def parser() -> Parser:
    """The command's flags."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    flags = Parser(
        prog="python -m launch.verify",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("file", type=Path, metavar="FILE.jsonl", help="one JSON object a line")
    flags.add_argument("--dataset", metavar="NAME", help=f"verifier of rows without `dataset`: {', '.join(VERIFIERS)}")
    flags.add_argument(
        "--mode",
        choices=MODES,
        default="default",
        help="default: what is right; reference: what open-instruct rewards; tulu3: what it rewarded when Tülu 3 was "
        "trained (docs/verifiers.md)",
    )
    flags.add_argument("--loose", action="store_true", help="IFEval's loose metric")
    flags.add_argument(
        "--combine",
        choices=("fraction", "all"),
        default="fraction",
        help="several constraints in one row: the fraction that is followed, or 1 only for all",
    )
    flags.add_argument("--failures_only", action="store_true", help="print only rows that do not score 1")
    flags.add_argument("--quiet", action="store_true", help="print only the totals")
    flags.add_argument(
        "--output", type=Path, metavar="FILE", help="also write {line, dataset, score, reason, status} as JSON lines"
    )
    flags.add_argument(
        "--on_bad_row",
        choices=("skip", "error"),
        default="skip",
        help="a row that cannot be judged is listed and left out, or stops the command",
    )
    flags.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one a core; files of a few rows use none)"
    )
    return flags


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 if more than 1 % of the rows could not be judged, 2 for bad input."""
    flags = parser()
    options = flags.parse_args(arguments)
    if options.dataset is not None and options.dataset.lower() not in VERIFIERS:
        flags.error(f"--dataset: unknown verifier {options.dataset}{nearest(options.dataset.lower(), VERIFIERS)}")
    if options.workers is not None and options.workers < 1:
        flags.error(f"--workers must be 1 or more, found {options.workers}")
    try:
        rows, bad = read(options.file, options.dataset, options.mode)
    except OSError as problem:
        flags.error(f"{options.file}: {problem.strerror}")
    for problem in bad[:MAX_LISTED]:
        print(problem, file=sys.stderr)
    if len(bad) > MAX_LISTED:
        print(f"... and {len(bad) - MAX_LISTED} more bad rows", file=sys.stderr)
    if (bad and options.on_bad_row == "error") or not rows:
        print(
            f"{options.file}: {'no row to judge' if not rows else 'stopped by a bad row (--on_bad_row error)'}",
            file=sys.stderr,
        )
        return 2
    verdicts = list(report(rows, judged(rows, options), options))
    if options.output:
        write(options.output, rows, verdicts)
    errors = totals(rows, verdicts, len(bad))
    return 1 if errors > 0.01 * len(rows) else 0


def read(path: Path, dataset: str | None, mode: str) -> tuple[list[tuple[int, tuple]], list[str]]:
    """([(line number, (response, ground truth, dataset))], [one line for each bad row])."""
    rows, bad = [], []
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append((number, row_of(line, dataset, mode)))
            except GroundTruthError as problem:
                bad.append(f"{path}:{number}: {problem}")
    return rows, bad


def row_of(line: str, dataset: str | None, mode: str) -> tuple:
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
    name = row.get("dataset", dataset)
    try:
        check(name, row["ground_truth"], mode)
    except GroundTruthError as problem:
        raise GroundTruthError(f"field {problem}") from None
    return row["response"], row["ground_truth"], name


def judged(rows: list, options: argparse.Namespace) -> Iterator[Verdict]:
    """The verdicts in the order of the rows, here or by worker processes."""
    how = {"mode": options.mode, "loose": options.loose, "combine": options.combine}
    if (options.workers is None and len(rows) <= FEW_ROWS) or options.workers == 1:
        yield from (verify(*row, **how) for _, row in rows)
        return
    with Pool(options.workers, **how) as pool:
        yield from pool.imap(row for _, row in rows)


def report(rows: list, verdicts: Iterator[Verdict], options: argparse.Namespace) -> Iterator[Verdict]:
    """Print a line for each verdict as it comes, with a progress bar where there is a terminal."""
    with tqdm(total=len(rows), unit="row", disable=None) as bar:
        for (number, (_, _, name)), verdict in zip(rows, verdicts, strict=False):
            if not options.quiet and not (options.failures_only and verdict.status == "ok" and verdict.score >= 1):
                mark = "error" if verdict.status == "error" else f"{verdict.score:.2f}"
                bar.write(f"{options.file}:{number}  {label(name):10}  {mark:5}  {verdict.reason}", file=sys.stdout)
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
    print(f"{'verifier':12} {'rows':>8} {'full marks':>11} {'mean score':>11} {'errors':>7}")
    for name, group in sorted(groups.items()):
        fine = [verdict.score for verdict in group if verdict.status == "ok"]
        mean = f"{sum(fine) / len(fine):.4f}" if fine else "-"
        print(f"{name:12} {len(group):8} {sum(score >= 1 for score in fine):11} {mean:>11} {len(group) - len(fine):7}")
    if skipped:
        print(f"{skipped} bad rows left out")
    return sum(verdict.status == "error" for verdict in verdicts)


def write(path: Path, rows: list, verdicts: list[Verdict]) -> None:
    """Write {line, dataset, score, reason, status} for every row as JSON lines."""
    with path.open("w", encoding="utf-8") as out:
        for (number, (_, _, name)), verdict in zip(rows, verdicts, strict=False):
            out.write(json.dumps({"line": number, "dataset": name, **verdict._asdict()}) + "\n")


if __name__ == "__main__":
    sys.exit(main())

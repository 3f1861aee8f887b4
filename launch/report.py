"""One page that says what a run did: plots, health, configuration, samples.

    python -m launch.report output/ppo
    python -m launch.report output/sft output/dpo output/ppo --output recipe.html

Reads what a run's directory holds (metrics.jsonl, samples.jsonl, config.yaml), while it runs or after, and writes one
HTML file that needs no server and no network: open it, or send it to somebody. Runs of one stage are laid over each
other, runs of different stages stand one after the other. --evaluations adds files that launch.evaluate wrote with
--output, --results a table of your own. Needs matplotlib: pip install -e '.[report]'. See docs/report.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import parse
from engine.disk import write_new
from engine.errors import UserError, in_one_line, on_one_line
from engine.flags import flag
from engine.redact import redact
from launch import commands
from launch.reports.results import read_evaluations, read_results
from launch.reports.runs import read_runs


@dataclass(frozen=True, kw_only=True)
class Config:
    __doc__ = __doc__
    runs: tuple[str, ...] | None = flag(
        None, "directories of runs (--output_dir of a stage)", positional=True, many=True
    )
    output: str = flag("report.html", "the page")
    results: str | None = flag(
        None, "a JSON file with a table of results and side-by-side answers for the top of the page"
    )
    evaluations: tuple[str, ...] | None = flag(None, "files that launch.evaluate wrote with --output", many=True)
    plan: bool = flag(
        False, "put launch.plan's figures beside the measured ones; without it, those of a plan.json in the directory"
    )
    title: str | None = flag(None, "heading of the page")


def report(
    runs: Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    results: dict[str, Any] | list[Any] | str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
    plan: bool = False,
    title: str | None = None,
) -> list[str]:
    """Writes the page of these runs to `output`, replacing it at once; returns the lines to print.

    `runs` are directories (--output_dir), in the order in which they are to stand; stages are put in the order sft,
    dpo, ppo, grpo. A directory that cannot be shown is left out with a line. `results` stands at the top: the path of a
    JSON file, or what it would hold,

        {"title": "accuracy on held-out sums",                     (optional)
         "rows": [{"name": "base", "accuracy": 0.02, "low": 0.01, "high": 0.04, "n": 512}, ...],
         "answers": [{"prompt": "2 + 2 =", "truth": "4",           (optional)
                      "answers": {"base": "5", "ppo": {"text": "4", "score": 1.0}}}, ...]}

    or the list of rows alone. Shares are in [0, 1]; low and high may be missing; other keys of a row become columns.
    `evaluations` are JSONL files of launch.evaluate. `plan` runs the planner on each run's configuration. Raises
    UserError: matplotlib is missing, no run can be shown, a file of `results` or `evaluations` is damaged.
    """
    require_matplotlib()
    from launch.reports.page import render  # which draws; the other commands know this one's flags without matplotlib

    shown, left_out = read_runs([Path(run) for run in runs])
    top = read_results(results) if results is not None else None
    evaluated = read_evaluations([Path(path) for path in evaluations])
    if not shown and top is None and not evaluated:
        raise UserError("; ".join(left_out) if left_out else "command line: RUNS is missing, directories of runs")
    page = render(shown, left_out=left_out, results=top, evaluations=evaluated, plan=plan, title=title)
    write(Path(output), page)
    counts = f"{len(shown)} {'run' if len(shown) == 1 else 'runs'}, {len(page.encode()) / 2**20:.1f} MiB"
    return [*left_out, f"{output}: {counts}"]


def require_matplotlib() -> None:
    """Raises UserError."""
    try:
        import matplotlib  # noqa: F401
    except Exception:  # half an installation raises whatever it likes
        raise UserError("launch.report needs matplotlib: pip install -e '.[report]'") from None


def write(path: Path, page: str) -> None:
    """The whole page or the one before: never half a page. Raises UserError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_new(partial, redact(page))
        partial.replace(path)
    except OSError as problem:
        raise UserError(f"--output {path}: {problem.strerror}") from None


def run(config: Config) -> None:
    """The command. Raises UserError."""
    lines = report(
        config.runs or (),
        config.output,
        results=config.results,
        evaluations=config.evaluations or (),
        plan=config.plan,
        title=config.title,
    )
    for line in lines:
        print(on_one_line(line))


if __name__ == "__main__":
    in_one_line(lambda: run(parse(Config, elsewhere=commands)))

"""One HTML file of everything: the template filled with sections, each of plain values. What a model or a file said is
text in it, escaped, its control characters shown as what they are.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from launch.reports import catalogue, health, plots, verdict
from launch.reports.planned import Comparison, compare
from launch.reports.results import Results
from launch.reports.runs import RLVR, STAGES, Recorded, Series
from launch.reports.samples import Sample, samples_of, shown_text

HERE = Path(__file__).parent
MOST_PLOTS = 120  # of a stage; what is beyond stands in a table
PHASES = "time/"


@dataclass(frozen=True)
class Plot:
    """A card: the drawing, and the words around it. `values`: for each run, its number and its first and last."""

    name: str
    title: str
    caption: str
    svg: str
    values: list[tuple[int, str]]
    phases: list[str]


@dataclass(frozen=True)
class Act:
    """One stage: its runs, and all that is said of them."""

    stage: str
    title: str
    runs: list[dict[str, Any]]
    groups: list[tuple[str, list[Plot]]]
    tabled: list[tuple[str, list[str]]]
    differing: list[tuple[str, list[str]]]
    samples: list[Sample]
    samples_note: str


def render(
    runs: Sequence[Recorded],
    *,
    left_out: Sequence[str] = (),
    results: Results | None = None,
    evaluations: Sequence[Results] = (),
    plan: bool = False,
    title: str | None = None,
) -> str:
    """The page. The same directories give the same bytes, but for the time that it says it was written at."""
    by_stage = {stage: [run for run in runs if run.stage == stage] for stage in (*STAGES, "other")}
    acts = [act(stage, of, compare_all(of, plan)) for stage, of in by_stage.items() if of]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tables = [*([results] if results else []), *evaluations]
    drawn = [
        plots.intervals_plot([(r.name, r.accuracy, r.low, r.high) for r in table.rows], f"table{number}")
        if table.rows
        else ""
        for number, table in enumerate(tables)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"shown": shown_text, "when": when, "dashes": plots.dash, "percent": plots.percent}
    return environment.get_template("page.html.jinja").render(
        title=title or heading(acts, results),
        acts=acts,
        tables=[
            (table, svg, number < bool(results)) for number, (table, svg) in enumerate(zip(tables, drawn, strict=True))
        ],
        left_out=left_out,
        style=style,
        script=script,
        digest=digest,
        written=time.time(),
        colours=plots.COLOURS,
    )


def heading(acts: Sequence[Act], results: Results | None) -> str:
    """Stages in the order of the recipe; the two kinds of reinforcement learning stand for one another."""
    short = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO", "other": "runs"}
    if not acts:
        return results.title if results else "Evaluations"
    stages = [act.stage for act in acts]
    last = " and ".join(short[stage] for stage in stages if stage in RLVR)
    steps = [*(short[stage] for stage in STAGES if stage in stages and stage not in RLVR), *([last] if last else [])]
    steps += ["runs"] if "other" in stages else []
    if len(steps) > 1:
        return "From base to " + " → ".join(steps)
    names = [run["run"].name for act in acts for run in act.runs]
    return f"{steps[0]}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def compare_all(runs: Sequence[Recorded], plan: bool) -> list[Comparison | None]:
    return [compare(run, rehearse=plan) for run in runs]


def act(stage: str, runs: Sequence[Recorded], compared: Sequence[Comparison | None]) -> Act:
    groups, tabled = plots_of(stage, runs)
    samples, note = samples_of(runs)
    return Act(
        stage,
        verdict.NAMES[stage],
        [card(run, number, comparison) for number, (run, comparison) in enumerate(zip(runs, compared, strict=True))],
        groups,
        tabled,
        differing(runs),
        samples,
        note,
    )


def card(run: Recorded, number: int, comparison: Comparison | None) -> dict[str, Any]:
    """What the template shows of one run besides its plots."""
    marks = health.examine(run)
    tokens = run.series.get("num_tokens")
    return {
        "run": run,
        "number": number,
        "colour": number % plots.COLOURS,
        "described": verdict.described(run),
        "headline": verdict.headline(run),
        "metric": (h := verdict.headline(run)) and catalogue.metric_of(h.metric),
        "sentence": verdict.sentence(run),
        "marks": [mark for mark in marks if mark.level != health.OK],
        "fine": [mark for mark in marks if mark.level == health.OK],
        "worst": marks[0].level if marks else health.OK,
        "levels": [
            (n, level) for level in (health.BAD, health.WARNING) if (n := [m.level for m in marks].count(level))
        ],
        "tokens": plots.rounded(tokens.last) if tokens and len(tokens) and tokens.last else "",
        "duration": duration(run),
        "next": verdict.next_steps(run),
        "config": sorted((str(key), str(value)) for key, value in run.config.items()),
        "comparison": comparison,
    }


# --- plots ------------------------------------------------------------------------------------------------------------


def plots_of(stage: str, runs: Sequence[Recorded]) -> tuple[list[tuple[str, list[Plot]]], list[tuple[str, list[str]]]]:
    """(plots by group, a row for each metric that is too many to be drawn or has no finite value)."""
    xlabel = runs[0].unit
    names = {name for run in runs for name, s in run.series.items() if not (name.startswith(PHASES) and len(s))}
    bounds = {n for n in names if n.endswith(("/low", "/high")) and f"{n.rpartition('/')[0]}/accuracy" in names}
    groups: dict[str, list[Plot]] = {name: [] for name in catalogue.GROUPS[:3]}
    tabled = []
    for count, name in enumerate(catalogue.order_of(names - bounds)):
        metric = catalogue.RLVR_LOSS if stage in RLVR and name == "loss" else catalogue.metric_of(name)
        lines = [
            plots.Line(run.series[name], number, *bounds_of(run, name))
            for number, run in enumerate(runs)
            if name in run.series and len(run.series[name])
        ]
        is_unused = name in catalogue.ONLY_IF_USED and not any(line.series.values.any() for line in lines)
        if count >= MOST_PLOTS or not lines or is_unused:
            tabled.append((name, [ends(run.series[name], False) if name in run.series else "" for run in runs]))
            continue
        svg = plots.lines_plot(lines, metric.unit, share=metric.share, xlabel=xlabel, name=f"{stage}{count}")
        values = [(line.number, ends(line.series, metric.share)) for line in lines]
        groups.setdefault(metric.group, []).append(Plot(name, metric.title, metric.caption, svg, values, []))
    groups[catalogue.MACHINE] = [*phases_of(stage, runs), *groups[catalogue.MACHINE]]
    return [(name, of) for name, of in groups.items() if of], tabled


def phases_of(stage: str, runs: Sequence[Recorded]) -> list[Plot]:
    """Stacked bars of time/*, for each run that has any, in the order in which the phases are written."""
    found = []
    caption = "Seconds of each phase of an iteration. Healthy: even; growth means longer responses or less memory."
    for number, run in enumerate(runs):
        phases = {name[len(PHASES) :]: s for name, s in run.series.items() if name.startswith(PHASES) and len(s)}
        if phases:
            whose = f": {run.name}" if len(runs) > 1 else ""
            svg = plots.bars_plot(phases, xlabel=run.unit, name=f"{stage}time{number}")
            name, title = PHASES + "*" + whose, "Where the time goes" + whose
            found.append(Plot(name, title, caption, svg, [], list(phases)))
    return found


def bounds_of(run: Recorded, name: str) -> tuple[Series | None, Series | None]:
    """The series of an accuracy's interval."""
    prefix, _, last = name.rpartition("/")
    if last != "accuracy":
        return None, None
    return run.series.get(f"{prefix}/low"), run.series.get(f"{prefix}/high")


def ends(series: Series, share: bool) -> str:
    """First and last value, in words."""
    if not len(series):
        return f"never finite ({len(series.bad_steps):,} values)"
    word = lambda x: plots.percent(x) if share else f"{x:,.0f}" if 1e4 <= abs(x) < 1e12 else figure(x)
    return f"{word(series.first)} → {word(series.last)}" if len(series) > 1 else word(series.last)


def figure(x: float) -> str:
    """Four digits, an exponent without its zeros."""
    return re.sub(r"e([+-])0*", lambda e: "e" + e[1].strip("+"), f"{x:.4g}").replace("-", "−")


# --- words ------------------------------------------------------------------------------------------------------------


def differing(runs: Sequence[Recorded]) -> list[tuple[str, list[str]]]:
    """Flags whose values differ between the runs, with all values; an absent one is a dash."""
    if len(runs) < 2:
        return []
    keys = sorted({key for run in runs for key in run.config} - {"output_dir"})
    rows = [(key, [str(run.config[key]) if key in run.config else "–" for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def duration(run: Recorded) -> str:
    """From the start (of the last session, if it was resumed) to the last row, by the files' times."""
    if run.started is None or run.written is None or run.written < run.started:
        return ""
    return seconds_in_words(run.written - run.started)


def seconds_in_words(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def when(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))

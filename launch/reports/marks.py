"""A mark of health: what a rule of health.py or sampling.py found, and how it looks at a run."""

from __future__ import annotations

from dataclasses import dataclass

from launch.reports.runs import Recorded, Series

OK, WARNING, BAD = "ok", "warning", "bad"
FEW = 5  # rows below which a trend is noise


@dataclass(frozen=True)
class Mark:
    """What one rule found. `metric`: where to look, if there is a plot of it."""

    level: str
    title: str
    seen: str
    advice: str = ""
    metric: str = ""


def of(run: Recorded, name: str, at_least: int = 1) -> Series | None:
    """The metric's series, if it has so many finite values."""
    series = run.series.get(name)
    return series if series is not None and len(series) >= at_least else None


def level(value: float, warning: float, bad: float) -> str:
    """By two thresholds, ascending or descending."""
    beyond = (lambda bound: value >= bound) if bad >= warning else (lambda bound: value <= bound)
    return BAD if beyond(bad) else WARNING if beyond(warning) else OK


def found(of_level: str, titles: tuple[str, str], seen: str, advice: str, metric: str = "") -> Mark:
    """A mark under the first title if all is well, else under the second, with advice."""
    if of_level == OK:
        return Mark(OK, titles[0], seen, metric=metric)
    return Mark(of_level, titles[1], seen, advice, metric)

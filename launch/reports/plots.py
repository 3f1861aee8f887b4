"""matplotlib's lines as SVG in the page's own colours, which change with the reader's light or dark.

A colour is drawn as a placeholder and then written as a CSS variable: #00cc01 becomes var(--c1). Texts stay texts.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator, NullFormatter

from launch.reports.runs import Series

INK, FAINT, BAD_INK = "#00cc90", "#00cc91", "#00cc92"
VARIABLES = {INK: "--ink", FAINT: "--rule", BAD_INK: "--bad"}
COLOURS = 8  # --c0 to --c7 of page.css
DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2", "3 1", "9 3", "4 1 1 1 1 1", "2 3")
PHASES = 8  # --p0 to --p7
POINTS = 400  # of a line; more are bins
BARS = 60
SIZE = (5.2, 2.75)  # inches of 72 CSS pixels
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.linewidth": 0.8,
    "path.simplify": True,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """A series under the number that gives it its colour and dash, with a band around it where there is one."""

    series: Series
    number: int
    low: Series | None = None
    high: Series | None = None


def colour(number: int) -> str:
    return f"#00cc{number % COLOURS:02x}"


def phase_colour(number: int) -> str:
    return f"#00cc{0x40 + number % PHASES:02x}"


def dash(number: int) -> str:
    """As SVG writes it; runs beyond the last colour differ by it alone."""
    return DASHES[(number + number // COLOURS) % len(DASHES)]


# --- the numbers ------------------------------------------------------------------------------------------------------


def thinned(series: Series, points: int = POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, means, lowest, highest): as it is, or in bins of equal numbers of rows. Peaks stay, in the last two."""
    if len(series) <= points:
        return series.steps.astype(np.float64), series.values, series.values, series.values
    edges = np.linspace(0, len(series), points + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(series)])
    steps = np.add.reduceat(series.steps.astype(np.float64), edges) / counts
    means = np.add.reduceat(series.values / counts.max(), edges) * (counts.max() / counts)  # 1e300 does not overflow
    return steps, means, np.minimum.reduceat(series.values, edges), np.maximum.reduceat(series.values, edges)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred mean over a 25th of the line, narrower at its ends."""
    half = max(1, len(values) // 50)
    scale = max(1.0, float(np.abs(values).max(initial=0.0)))
    total = np.concatenate([[0.0], np.cumsum(values / scale)])
    n = len(values)
    reach = np.minimum(half, np.minimum(np.arange(n), np.arange(n)[::-1]))
    here = np.arange(n)
    return (total[here + reach + 1] - total[here - reach]) / (2 * reach + 1) * scale


def is_logarithmic(lines: Sequence[Line]) -> bool:
    """All positive, over more than two decades even without the outermost fiftieth, and not over more than matplotlib
    can find ticks for.
    """
    values = np.concatenate([line.series.values for line in lines])
    if len(values) < 5 or values.min() < 1e-100 or values.max() > 1e100:
        return False
    low, high = np.quantile(values, 0.02), np.quantile(values, 0.98)
    return bool(high / low > 200)


# --- drawing ----------------------------------------------------------------------------------------------------------


def lines_plot(lines: Sequence[Line], unit: str, *, share: bool, xlabel: str, name: str) -> str:
    """A metric of one or more runs over steps: faint as it was measured, and smoothed where there is much of it."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(unit, xlabel)
        logarithmic = not share and is_logarithmic(lines)
        if logarithmic:
            axes.set_yscale("log")
        for line in lines:
            _draw(axes, line, faint=0.22 if len(lines) == 1 else 0.1)
        _limits(axes, lines, share, logarithmic)
        _ticks(axes, share, logarithmic, unit)
        return _svg(figure, name)


def _draw(axes, line: Line, faint: float) -> None:
    ink, width = colour(line.number), 1.7
    dashes = tuple(map(float, dash(line.number).split()))
    style = {"linestyle": (0, tuple(d / width for d in dashes)) if dashes else "-", "linewidth": width}
    steps, means, lowest, highest = thinned(line.series)
    if line.low is not None and line.high is not None:
        both = np.intersect1d(line.low.steps, line.high.steps)
        low, high = (s.values[np.isin(s.steps, both)] for s in (line.low, line.high))
        axes.fill_between(both, low, high, color=ink, alpha=0.16, linewidth=0, zorder=1)
    if len(steps) > 40:
        if len(line.series) > POINTS:
            axes.fill_between(steps, lowest, highest, color=ink, alpha=faint, linewidth=0, zorder=1)
        else:
            axes.plot(steps, means, color=ink, alpha=0.3, linewidth=0.9, zorder=1.5)
        means = smoothed(means)
    marks = {"marker": "o", "markersize": 3.2} if len(steps) <= 12 else {}
    axes.plot(steps, means, color=ink, zorder=3, **style, **marks)
    if len(line.series.bad_steps):
        at = thinned(Series(line.series.bad_steps, line.series.bad_steps.astype(np.float64)), 100)[0]
        axes.plot(at, np.zeros(len(at)), "|", color=BAD_INK, markersize=9, transform=axes.get_xaxis_transform())


def bars_plot(phases: dict[str, Series], *, xlabel: str, name: str) -> str:
    """Seconds of every phase of an iteration, one above the other; many iterations are means of neighbours."""
    steps = np.unique(np.concatenate([s.steps for s in phases.values()]))
    width = max(1, math.ceil(len(steps) / BARS))
    groups = np.arange(len(steps)) // width
    places = np.bincount(groups, steps) / np.bincount(groups)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes("s", xlabel)
        below = np.zeros(len(places))
        gap = float(np.median(np.diff(places))) if len(places) > 1 else 1.0
        for number, series in enumerate(phases.values()):
            at = groups[np.searchsorted(steps, series.steps)]
            height = np.bincount(at, series.values, len(places)) / np.bincount(groups, minlength=len(places))
            axes.bar(places, height, 0.86 * gap, bottom=below, color=phase_colour(number), linewidth=0)
            below += height
        axes.set_ylim(0, max(float(below.max()) * 1.08, 1e-9))
        _ticks(axes, False, False)
        return _svg(figure, name)


def intervals_plot(rows: Sequence[tuple[str, float, float | None, float | None]], name: str) -> str:
    """A point with its 95 % interval for each (label, accuracy, low, high), under each other."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((6.4, 0.62 + 0.36 * len(rows)))
        axes = figure.add_axes((0.02, 0.42 / figure.get_figheight(), 0.96, 1 - 0.5 / figure.get_figheight()))
        for y, (_, accuracy, low, high) in enumerate(rows):
            ink = colour(y)
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=ink, linewidth=5, alpha=0.3, solid_capstyle="butt")
            axes.plot([accuracy], [y], "o", color=ink, markersize=6.5)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.015, 1.015), yticks=[])
        axes.grid(axis="x", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(INK)
        axes.tick_params(colors=INK, length=3, labelsize=9.5)
        axes.xaxis.set_major_formatter(Short(share=True))
        return _svg(figure, name)


def _axes(unit: str, xlabel: str):
    figure = Figure(SIZE)
    axes = figure.add_axes((0.115, 0.15, 0.865, 0.75))
    axes.set_title(unit, loc="left", fontsize=9.5, color=INK, pad=7, x=-0.11)
    axes.set_xlabel(xlabel, fontsize=9.5, color=INK, loc="right", labelpad=1)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    axes.tick_params(axis="both", colors=INK, length=3, width=0.8, labelsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _limits(axes, lines: Sequence[Line], share: bool, logarithmic: bool) -> None:
    """Of steps: all. Of values: all but the outermost thousandth of long lines, whose spikes would hide the rest; a
    level line, or one that is level but for rounding, gets room around it.
    """
    steps = np.concatenate([np.concatenate([s.series.steps, s.series.bad_steps]) for s in lines])
    first, last = (float(steps.min()), float(steps.max())) if len(steps) else (0.0, 1.0)
    room = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - room, last + room)
    values = np.concatenate(
        [s.values for line in lines for s in (line.series, line.low, line.high) if s is not None and len(s)]
        or [np.zeros(1)]
    )
    low, high = float(values.min()), float(values.max())
    if len(values) > 2000:
        low, high = (float(q) for q in np.quantile(values, (0.001, 0.999)))
    if logarithmic:
        axes.set_ylim(low / 1.3, high * 1.3)
        return
    room = 0.07 * (high - low) if high > low else 0.05 * abs(high) or 0.5
    if high - low < 1e-9 * max(abs(high), abs(low)):
        room = max(0.05 * abs(high), 1e-300)
    low, high = (low - room, high + room) if low or high else (-0.05, 1.05)
    least = (0.02 if share else 0.002) * max(abs(low), abs(high))  # what is closer together has no room for its digits
    more = max(0.0, least - (high - low)) / 2
    low, high = low - more, high + more
    if share and values.min() >= -1e-9 and values.max() <= 1 + 1e-9:
        low, high = max(low, -0.02), min(high, 1.02)
    axes.set_ylim(low, high)


def _ticks(axes, share: bool, logarithmic: bool, unit: str = "") -> None:
    """Few of them, in few characters: a power of ten that all have stands beside the unit."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(Short())
    scale = 1.0
    if logarithmic:
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        most = max(map(abs, axes.get_ylim()))
        if not share and (most < 1e-3 or most >= 1e12):
            exponent = math.floor(math.log10(most))
            scale, power = 10.0**exponent, str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
            axes.set_title(f"{unit} × 10{power}".strip(), loc="left", fontsize=9.5, color=INK, pad=7, x=-0.11)
    axes.yaxis.set_major_formatter(Short(share, scale))


class Short(Formatter):
    """Numbers of a few characters: 0.25, 12k, 3e−7, 40 %; in multiples of `scale`, with the digits that neighbours
    need.
    """

    def __init__(self, share: bool = False, scale: float = 1.0) -> None:
        self.share, self.scale = share, scale

    def __call__(self, x: float, pos: int | None = None) -> str:
        x, places = x / self.scale, np.unique(self.locs) / self.scale if len(self.locs) else np.array([x / self.scale])
        gap = float(np.diff(places).min()) if len(places) > 1 else 0.0
        logarithmic = len(places) > 2 and places[0] > 0 and places[-1] / places[0] >= 50
        return short(x, 0.0, abs(x), self.share) if logarithmic else short(x, gap, np.abs(places).max(), self.share)


UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(x: float, gap: float, most: float, share: bool = False) -> str:
    """`x` in the unit that suits the largest of its neighbours, in the digits of the gap between them (0: its own)."""
    if x == 0 or abs(x) < 1e-9 * gap:
        return percent(0, 0) if share else "0"
    if share:
        return percent(x, digits_of(100 * (gap or x), 2))
    if most < 1e-3 or most >= 1e12:
        exponent = math.floor(math.log10(most) + 1e-12)
        return f"{x / 10**exponent:.{digits_of((gap or x) / 10**exponent, 3)}f}e{exponent}".replace("-", "−")
    unit, word = next(((u, w) for u, w in UNITS if most >= 10 * u or (most >= u and not gap)), (1.0, ""))
    return f"{x / unit:.{digits_of((gap or x) / unit, 6)}f}".replace("-", "−") + word


def digits_of(gap: float, most: int) -> int:
    """Decimals in which the gap is written to a hundredth of itself."""
    return next((d for d in range(most) if abs(gap - round(gap, d)) < 0.01 * abs(gap)), most)


def rounded(x: float) -> str:
    """Three digits and a unit, for a headline."""
    unit, word = next(((u, w) for u, w in UNITS if abs(x) >= u), (1.0, ""))
    return f"{x / unit:.3g}{word}"


def percent(x: float, decimals: int = 1) -> str:
    return f"{100 * x:.{decimals}f}\u00a0%".replace("-", "−")


def _svg(figure: Figure, name: str) -> str:
    """The figure without what a page does not need, its colours as variables, its identifiers its own (`name`)."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r' id="[A-Za-z]+(?:2d)?(?:\.[a-z0-9]+)?_[0-9]+"', "", text)
    text = re.sub(r' (?:xmlns:xlink|version|width|height)="[^"]*"', "", text, count=4)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'<g>\s*<path d="[^"]*" style="fill: #ffffff"/>\s*</g>\s*', "", text)  # paper
    text = re.sub(r"<defs><style.*?</style></defs>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = re.sub(r"font(?:-size)?: ([0-9.]+)px[^;\"]*", r"font-size: \1px", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r' transform="rotate\(-?0[^"]*\)"', "", text)
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda m: re.sub(r"\s+", " ", re.sub(r"(\.\d)\d+", r"\1", m.group())), text)
    text = re.sub(r">\s+<", "><", text)
    text = re.sub(r"#00cc(9[0-2])", lambda m: f"var({VARIABLES[m.group()]})", text)
    text = re.sub(r"#00cc4([0-7])", r"var(--p\1)", text)
    text = re.sub(r"#00cc0([0-7])", r"var(--c\1)", text)
    return text.strip()

"""--seeds 1 2 3: a stage once for every seed, one after the other, and how much of a difference is the seed's.

Every run is the stage's own, in output_dir/seed-N, and is resumed as such: the same command skips what is finished and
goes on with what was interrupted. Compared are the last held-out figures of every run's metrics.jsonl; what was
computed stands in output_dir/seeds.json. docs/screen.md explains the table.

K seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine import terminal
from engine.errors import UserError
from engine.flags import StageFlags
from engine.train import interval
from engine.watch import guarded
from engine.world import World, start
from launch.shortage import of_memory, stage_of

Config = TypeVar("Config", bound=StageFlags)
# key of metrics.jsonl, what it is, whether it is a share; the first that is there is the headline
HELD_OUT = (
    ("eval/accuracy", "held-out verified accuracy", True),
    ("eval/rewards/accuracies", "held-out reward accuracy", True),
    ("eval/loss", "held-out loss", False),
)
TRAINING = (
    ("objective/scores", "mean score, last iteration", False),
    ("rewards/accuracies", "reward accuracy, last step", True),
    ("loss", "training loss, last step", False),
)


@dataclass(frozen=True)
class Figure:
    """One figure under every seed."""

    key: str
    name: str
    is_share: bool
    values_K: list[float]
    intervals_K: list[tuple[float, float]]  # 95 %, of each run's own evaluation; none where none was written

    def show(self, value: float) -> str:
        return f"{min(1.0, max(0.0, value)):.1%}" if self.is_share else f"{value:.4f}"

    def show_distance(self, value: float) -> str:
        return f"{100 * value:.1f} points" if self.is_share else f"{value:.4f}"


def each_seed(train: Callable[[Config], None], config: Config) -> None:
    """`train(config)`; or, with --seeds, that for each of them, and what they differ by. Ends early where it is asked
    to, or where a rank hangs. Collective. Raises UserError.
    """
    world = start(config.deterministic, config.quiet)
    with guarded(config, world, config.compile), of_memory(stage_of(train), config, world):
        _each_seed(train, config, world)


def _each_seed(train: Callable[[Config], None], config: Config, world: World) -> None:
    root = Path(config.output_dir).expanduser()
    if config.seeds is None:
        if (root / "seeds.json").is_file() and not config.dry_run:
            raise UserError(f"--output_dir {root} holds runs of several seeds (--seeds): give another")
        return train(config)
    seeds = _seeds(config.seeds)
    of = config.checkpoint_dir and Path(config.checkpoint_dir).expanduser()
    own = {
        n: dataclasses.replace(
            config,
            seed=n,
            seeds=None,
            output_dir=str(root / f"seed-{n}"),
            checkpoint_dir=str(of / f"seed-{n}") if of else None,
        )
        for n in seeds
    }
    if config.dry_run:
        train(own[seeds[0]])
        world.say(f"this is seed {seeds[0]}; each of the {len(seeds)} takes as much, one after the other")
        return
    world.agree("seeds", " ".join(map(str, seeds)))
    world.on_main("seeds", lambda: _prepare(root, config.resume, seeds))
    for number, (seed, flags) in enumerate(own.items()):
        world.say(f"seed {seed}: run {number + 1} of {len(seeds)}, in {flags.output_dir}", "")
        with terminal.subdued(all_but_the_bar=number > 0):
            train(flags)
        _free()
        world.say(f"seed {seed}: {_in_short(_figures(root, [seed]))}")
    if world.is_main:
        figures = _figures(root, seeds)
        _write(root, seeds, figures)
        world.say(*_table(root, seeds, figures))
        world.say(_sentence(seeds, figures[0]), last=True)


def _seeds(words: tuple[str, ...]) -> list[int]:
    """Raises UserError."""
    for word in words:
        if not word.removeprefix("-").isdecimal():
            raise UserError(f"--seeds: expected whole numbers, got {word!r}")
    seeds = [int(word) for word in words]
    if twice := [seed for i, seed in enumerate(seeds) if seed in seeds[:i]]:
        raise UserError(f"--seeds: {twice[0]} stands twice, and two runs of one seed are the same run")
    if len(seeds) < 2:
        raise UserError(f"--seeds compares at least two; one alone is --seed {seeds[0]}")
    return seeds


def _prepare(root: Path, resume: str, seeds: list[int]) -> None:
    """Makes the directory a comparison's. Raises UserError where it is something else's."""
    if (root / "config.yaml").is_file():
        raise UserError(f"--output_dir {root} holds a run of one seed: --seeds needs a directory of its own")
    if root.exists() and not root.is_dir():
        raise UserError(f"--output_dir {root}: is a file")
    if resume not in ("auto", "never"):
        raise UserError(f"--resume {resume} is one run's checkpoint; with --seeds it is auto or never")
    for seed in seeds if resume == "never" else ():
        directory = root / f"seed-{seed}"
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(f"--resume never: {directory} is not empty")
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "seeds.json").is_file():
        _save(root, {"seeds": seeds, "figures": {}})


def _free() -> None:
    """What the last run held, cycles included: the next needs as much."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- what they differ by ----------------------------------------------------------------------------------------------


def _figures(root: Path, seeds: list[int]) -> list[Figure]:
    """What every run has of HELD_OUT, else of TRAINING; the first is the headline. Raises UserError."""
    rows = [_last_rows(root / f"seed-{seed}" / "metrics.jsonl") for seed in seeds]
    for candidates in (HELD_OUT, TRAINING):
        found: list[Figure] = []
        for key, name, is_share in candidates:
            if all(key in row for row in rows):
                bounds = [(row["eval/low"], row["eval/high"]) for row in rows if "eval/low" in row]
                mine = bounds if not found and candidates is HELD_OUT and len(bounds) == len(rows) else []
                found.append(Figure(key, name, is_share, [row[key] for row in rows], mine))
        if found:
            return found
    raise UserError(f"{root}: the runs' metrics.jsonl hold no figure that they share: give another --output_dir")


def _last_rows(path: Path) -> dict[str, Any]:
    """Every key with its last value."""
    row: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a torn last line
            row |= json.loads(line)
    return row


def _in_short(figures: list[Figure]) -> str:
    shown = [f"{f.name} {f.show(f.values_K[0])}" for f in figures]
    if figures[0].intervals_K:
        low, high = map(figures[0].show, figures[0].intervals_K[0])
        shown[0] += f" (95 % interval of its evaluation {low} to {high})"
    return ", ".join(shown)


def _table(root: Path, seeds: list[int], figures: list[Figure]) -> list[str]:
    """A row for every seed, and what they have in common, for each figure."""
    lines = [""]
    for figure in figures:
        mean, sd, (low, high), (sd_low, sd_high) = interval.over_seeds(figure.values_K)
        lines.append(f"{figure.name + ', by seed':34}{'':>10}   95 % interval")
        for i, (seed, value) in enumerate(zip(seeds, figure.values_K, strict=True)):
            bounds = [*map(figure.show, figure.intervals_K[i])] if figure.intervals_K else []
            own = f"   {' to '.join(bounds)} (of its evaluation)" if bounds else ""
            lines.append(f"  {f'seed {seed}':32}{figure.show(value):>10}{own}")
        spread = max(figure.values_K) - min(figure.values_K)
        lines += [
            f"  {'mean':32}{figure.show(mean):>10}   {figure.show(low)} to {figure.show(high)} (over seeds)",
            f"  {'standard deviation':32}{figure.show_distance(sd):>10}   {figure.show_distance(sd_low)} to"
            f" {figure.show_distance(sd_high)} (it is known no better from {len(seeds)} seeds)",
            f"  {'range':32}{figure.show_distance(spread):>10}",
            "",
        ]
    return [*lines, *_comparison(figures[0]), f"written to {root / 'seeds.json'}"]


def _comparison(figure: Figure) -> list[str]:
    """Which of the two uncertainties is the larger."""
    if not figure.intervals_K:
        return []
    _, sd, _, _ = interval.over_seeds(figure.values_K)
    ours = 1.96 * sd
    theirs = sum(high - low for low, high in figure.intervals_K) / len(figure.intervals_K) / 2
    what = "more held-out rows" if theirs > ours else "more seeds"
    return [
        f"one run is uncertain by +- {figure.show_distance(theirs)} for the rows that were held out and by +-"
        f" {figure.show_distance(ours)} for its seed: {what} would say more"
    ]


def _sentence(seeds: list[int], figure: Figure) -> str:
    """What a reader may conclude."""
    if len(set(figure.values_K)) == 1:
        return (
            f"seeds: {figure.name} is {figure.show(figure.values_K[0])} under all {len(seeds)}: no difference is seen"
        )
    difference = figure.show_distance(_difference(figure.values_K))
    return (
        f"seeds: a difference in {figure.name} below {difference} between two such runs is within what the seed alone"
        f" does (2 sd x root 2, from {len(seeds)} seeds)"
    )


def _difference(values_K: list[float]) -> float:
    return 2 * math.sqrt(2) * interval.over_seeds(values_K)[1]


def _write(root: Path, seeds: list[int], figures: list[Figure]) -> None:
    summary = {}
    for f in figures:
        mean, sd, of_mean, of_sd = interval.over_seeds(f.values_K)
        summary[f.key] = {
            "values": f.values_K,
            "evaluation_intervals": f.intervals_K,
            "mean": mean,
            "mean_interval": of_mean,
            "sd": sd,
            "sd_interval": of_sd,
            "range": max(f.values_K) - min(f.values_K),
            "difference_of_two_runs": _difference(f.values_K),
        }
    _save(root, {"seeds": seeds, "figures": summary})


def _save(root: Path, content: dict[str, Any]) -> None:
    partial = root / ".seeds.json.partial"
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.rename(root / "seeds.json")

"""A run's directory as series of numbers: whatever is torn, doubled, infinite or unknown in it is counted, and said."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.errors import UserError, nearest

STAGES = ("sft", "dpo", "ppo", "grpo")
RLVR = ("ppo", "grpo")  # stages that sample, in iterations
OF_STAGE = {"reduce_loss": "sft", "loss_type": "dpo", "vf_coef": "ppo", "advantage": "grpo"}  # a flag of no other stage
MAX_STEP = 2**53  # larger ones are no steps
RECENT = 600.0  # seconds: a file written since belongs to a run that goes on
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Series:
    """One metric: finite values by ascending step, and the steps at which it was not finite."""

    steps: np.ndarray
    values: np.ndarray
    bad_steps: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def first(self) -> float:
        return float(self.values[0])

    @property
    def last(self) -> float:
        return float(self.values[-1])

    def ends(self, share: float = 0.1) -> tuple[float, float]:
        """Medians of the first and of the last tenth: what it was and what it is, without its noise."""
        n = max(1, round(len(self) * share))
        return float(np.median(self.values[:n])), float(np.median(self.values[-n:]))


@dataclass(frozen=True)
class Recorded:
    """What one run left in its directory."""

    directory: Path
    name: str
    stage: str  # one of STAGES, or 'other'
    status: str  # finished | running | stopped
    config: dict[str, Any]
    facts: dict[str, str]  # comments at the head of config.yaml
    series: dict[str, Series]
    samples: list[dict[str, Any]]
    notes: list[str]  # what was torn, doubled or not understood, one line each
    started: float | None = None  # seconds since 1970
    written: float | None = None
    plan: dict[str, Any] | None = None  # plan.json

    @property
    def unit(self) -> str:
        return "iteration" if self.stage in RLVR else "step"

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        taken = [s.steps[-1] for name, s in self.series.items() if len(s) and not name.startswith("eval/")]
        return int(max(taken, default=0))

    @property
    def total(self) -> int | None:
        """Steps that were to be taken; None where nothing says."""
        told = self.facts.get("total_steps", "")
        if told.isdigit():
            return int(told)
        most = self.config.get("max_steps")
        if isinstance(most, int) and most > 0:
            return most
        return self.steps if self.status == "finished" else None


def read_runs(directories: Sequence[Path]) -> tuple[list[Recorded], list[str]]:
    """(the runs, a line for every directory that cannot be shown). A directory given twice is shown once; one that
    holds runs (of several --seeds, of launch.demo) stands for them.
    """
    runs, left_out = [], []
    directories = list(dict.fromkeys(run for directory in directories for run in runs_in(directory)))
    names = names_of(directories)
    for directory, name in zip(directories, names, strict=True):
        try:
            runs.append(read_run(directory, name))
        except UserError as problem:
            left_out.append(str(problem))
    order = {stage: number for number, stage in enumerate((*STAGES, "other"))}
    return sorted(runs, key=lambda run: order[run.stage]), left_out


def runs_in(directory: Path) -> list[Path]:
    """The directory itself, or the runs in it where it is none: seed-2 before seed-10."""
    if not directory.is_dir() or any((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        return [directory]
    inside = [path for path in directory.iterdir() if (path / "metrics.jsonl").is_file()]
    return sorted(inside, key=lambda path: (len(path.name), path.name)) or [directory]


def names_of(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [directory.absolute().parts for directory in directories]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]


def read_run(directory: Path, name: str = "") -> Recorded:
    """Raises UserError: no such directory, no run in it, a run without a row."""
    config_file, metrics_file = directory / "config.yaml", directory / "metrics.jsonl"
    if not directory.is_dir():
        siblings = [str(p) for p in directory.parent.iterdir()] if directory.parent.is_dir() else []
        raise UserError(f"{directory}: no such directory{nearest(str(directory), siblings[:1000])}")
    if not config_file.is_file() and not metrics_file.is_file():
        raise UserError(f"{directory}: no run, neither config.yaml nor metrics.jsonl is in it")
    notes: list[str] = []
    config, facts = read_config(config_file, notes)
    series = read_metrics(metrics_file, notes) if metrics_file.is_file() else {}
    if not any(len(s) or len(s.bad_steps) for s in series.values()):
        raise UserError(f"{directory}: the run has no row in metrics.jsonl yet")
    stage = next((of for key, of in OF_STAGE.items() if key in config), "") or _stage_of(series)
    if stage == "other":
        notes.append("config.yaml names no stage that this version knows: the metrics are shown as they are")
    samples = read_samples(directory / "samples.jsonl", notes)
    times = {"started": _modified(config_file), "written": _modified(metrics_file)}
    plan = read_json(directory / "plan.json", notes)
    status = status_of(directory, times["written"])
    return Recorded(
        directory, name or directory.name, stage, status, config, facts, series, samples, notes, plan=plan, **times
    )


def _stage_of(series: dict[str, Series]) -> str:
    """By its metrics, where config.yaml is missing or foreign."""
    if "groups/signal" in series:
        return "grpo"
    if any(name.startswith("objective/") for name in series):
        return "ppo"
    return "dpo" if "rewards/margins" in series else "sft" if "trained_tokens" in series else "other"


def status_of(directory: Path, written: float | None) -> str:
    """finished: final/ is there. running: a process of this machine holds the lock, or a row came lately."""
    if any((directory / "final" / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "finished"
    locked = is_locked(directory / ".lock")
    if locked is None:
        locked = written is not None and time.time() - written < RECENT
    return "running" if locked else "stopped"


def is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the file's lock. None: this machine does not say. Looks, and takes no
    lock itself: a run that starts just now must not find its directory in use.
    """
    try:
        inode = str(path.stat().st_ino)
        held = Path("/proc/locks").read_text(encoding="ascii").split("\n")
    except OSError:
        return None
    return any(f":{inode} " in line for line in held if "FLOCK" in line)


def _modified(path: Path) -> float | None:
    return path.stat().st_mtime if path.is_file() else None


# --- files ------------------------------------------------------------------------------------------------------------


def read_config(path: Path, notes: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(flags, the comments at the file's head as `# key: value`)."""
    if not path.is_file():
        notes.append("config.yaml is missing")
        return {}, {}
    text = path.read_bytes()[:MAX_CONFIG_BYTES].decode("utf-8", errors="replace")
    facts = {}
    for line in text.splitlines():
        key, colon, value = line.removeprefix("#").partition(":")
        if line.startswith("#") and colon:
            facts[key.strip()] = value.strip()
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append("config.yaml is damaged")
        return {}, facts
    return {str(key): value for key, value in found.items()}, facts


def rows_of(path: Path, count: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. What is none is counted: a last line without its end is being written, any
    other is torn.
    """
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                count("torn" if line.endswith(b"\n") else "unfinished")


def read_metrics(path: Path, notes: list[str]) -> dict[str, Series]:
    """Metric → its series. The last value of a step counts: resumption may have written it twice."""
    found: dict[str, dict[int, float]] = {}
    counts: dict[str, int] = {}
    no_numbers: dict[str, int] = {}

    def count(kind: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1

    for row in rows_of(path, count):
        step = row.pop("step", None)
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < MAX_STEP:
            count("stepless")
            continue
        for key, value in row.items():
            if (number := as_number(value)) is None:
                no_numbers[key] = no_numbers.get(key, 0) + 1
            else:
                of_key = found.setdefault(key, {})
                counts["doubled"] = counts.get("doubled", 0) + (step in of_key)
                of_key[step] = number
    notes += [
        f"metrics.jsonl: {n:,} {'line' if n == 1 else 'lines'} {WORDS[kind]}"
        for kind in WORDS
        if (n := counts.get(kind, 0))
    ]
    if no_numbers:
        keys = ", ".join(f"{key} ({n:,})" for key, n in list(no_numbers.items())[:8])
        notes.append(f"metrics.jsonl: values that are no numbers are not drawn: {keys}")
    return {key: series_of(values) for key, values in found.items()}


WORDS = {
    "torn": "torn or no JSON object, left out",
    "unfinished": "without its end (it was being written), left out",
    "stepless": "without a step, left out",
    "doubled": "or values for a step that had one: the last counts",
}


def as_number(value: Any) -> float | None:
    """A float, also NaN and infinite ones; None for what is no number."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def series_of(values: dict[int, float]) -> Series:
    """By ascending step; what is not finite apart. Numbers beyond 1e300 cannot be drawn, and count as infinite."""
    steps = np.array(sorted(values), np.int64)
    numbers = np.array([values[step] for step in steps.tolist()], np.float64)
    finite = np.abs(numbers) < 1e300  # False for NaN
    return Series(steps[finite], numbers[finite], steps[~finite])


def read_samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows with a `response`, in the file's order."""
    if not path.is_file():
        return []
    counts: dict[str, int] = {}

    def count(kind: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1

    rows = list(rows_of(path, count))
    kept = [row for row in rows if isinstance(row.get("response"), str)]
    if bad := sum(counts.values()) + len(rows) - len(kept):
        notes.append(f"samples.jsonl: {bad:,} {'line' if bad == 1 else 'lines'} torn or without a response, left out")
    return kept


def read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is damaged")
        return None
    return found

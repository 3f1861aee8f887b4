"""Suites side by side: a process for each lane, which runs its suites one after the other."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faultdrill.suite import Suite
from benchmarks.faultdrill.table import Outcome

TAKES = {"kills": 160, "restarts": 140, "damage": 60, "storage": 55, "numerics": 50, "hangs": 45, "hostile_rows": 40}
ELSE = 20  # seconds in a short drill, roughly
ALONE = ("overhead",)  # what is measured there is a share of time


def split(suites: Sequence[Suite], jobs: int) -> tuple[list[list[str]], list[str]]:
    """(the names of each lane's suites, those that run alone afterwards): the longest first, to the lane that is done
    first. Example, with two lanes of suites that take 160, 140, 60 and 55 seconds: 160 + 55 beside 140 + 60.
    """
    lanes: list[list[str]] = [[] for _ in range(jobs)]
    taken = [0] * jobs
    beside = [suite for suite in suites if suite.name not in ALONE]
    for suite in sorted(beside, key=lambda suite: -TAKES.get(suite.name, ELSE)):
        first = taken.index(min(taken))
        lanes[first].append(suite.name)
        taken[first] += TAKES.get(suite.name, ELSE)
    return [lane for lane in lanes if lane], [suite.name for suite in suites if suite.name in ALONE]


def run(suites: Sequence[Suite], jobs: int, flags: Sequence[str]) -> tuple[list[Outcome], list[str]]:
    """(what came of the suites, in their order, and the lanes that came to no end). Ctrl-C reaches the lanes too, which
    tell what they have.
    """
    beside, alone = split(suites, jobs)
    with tempfile.TemporaryDirectory(prefix="faultdrill-lanes-") as directory:
        started = [_start(names, Path(directory, f"{i}.json"), flags) for i, names in enumerate(beside)]
        interrupted = not all([_ended(process) for process in started])
        if alone and not interrupted:
            started.append(_start(alone, Path(directory, "alone.json"), flags))
            _ended(started[-1])
        files = [path for path in sorted(Path(directory).glob("*.json"))]
        found = {of.name: of for path in files for of in map(Outcome.of, json.loads(path.read_text())["suites"])}
    lost = [suite.name for suite in suites if suite.name not in found]
    return [found[suite.name] for suite in suites if suite.name in found], lost


def _start(names: Sequence[str], out: Path, flags: Sequence[str]) -> subprocess.Popen:
    words = [word for name in names for word in ("--suite", name)]
    command = [sys.executable, "-m", __package__, "--lane", "--out", str(out), *words, *flags]
    return subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2])


def _ended(process: subprocess.Popen) -> bool:
    """False where Ctrl-C came meanwhile."""
    try:
        process.wait()
        return True
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
        return False

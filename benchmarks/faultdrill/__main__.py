"""Faults planted in real runs, suite by suite, and a table of what held.            python -m benchmarks.faultdrill

Every suite has cases (a fault, and what the engine promises of it), controls (the engine with a promise taken away on
purpose: at least one case of each must fail, or the suite is blind) and, for some, baselines (the same faults against a
peer; --baselines). The exit status is 1 when a case fails or a control is not caught. A case is a function of suite,
seed and name: --replay does it again and keeps its directory.

Without arguments: at most ten minutes on two cores, suites side by side (`make drill`). --full takes hours.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # not in who imports this
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; the processes of the drill inherit it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of semaphores whose processes were killed

import torch

import benchmarks.faultdrill as package
from benchmarks import measure
from benchmarks.faultdrill import lanes, table
from benchmarks.faultdrill.suite import Suite

# the modules with suites, in the order of the table; one that is not here is passed over, one that is not named comes
# last
ORDER = ("kills", "crash_points", "damage", "preemption", "restarts", "world_sizes", "numerics", "storage")
ORDER += ("rows", "hostile_rows", "configs", "hostile", "overhead")
LEFT_OUT = (
    "network file systems (renames and locks that lie): none here; what the engine does on one is untested",
    "power loss itself: it is played by cutting every file that no fsync had reached (crash_points, torn)",
)


def discover() -> tuple[list[Suite], list[str]]:
    """The suites that are here, and why others are not."""
    suites, absent = [], []
    there = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "__main__")
    for name in (*(n for n in ORDER if n in there), *(n for n in there if n not in ORDER)):
        try:
            module = importlib.import_module(f"{package.__name__}.{name}")
        except ImportError as error:
            absent.append(f"{name}: {error}")
            continue
        own = vars(module)
        suites += [*own.get("SUITES", ()), *([own["SUITE"]] if "SUITE" in own else ())]
    if not torch.cuda.is_available():
        absent.append("a GPU (its allocator, NCCL's watchdog, pinned staging of checkpoints): none here; `make gpu`")
    return suites, absent


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    lines = __doc__.split("\n")
    parser = argparse.ArgumentParser("python -m benchmarks.faultdrill", description=lines[0].split("   ")[0])
    parser.add_argument("--full", action="store_true", help="all cases: hours")
    parser.add_argument("--suite", action="append", metavar="NAME", help="this one alone; again for more")
    parser.add_argument("--seed", type=int, default=1, help="of which faults are drawn, and when they strike")
    parser.add_argument("--count", type=int, help="cases of a suite, instead of its own number")
    parser.add_argument("--replay", metavar="NAME:SEED:CASE", help="one case again; its directory is kept")
    parser.add_argument("--baselines", action="store_true", help="the same faults against peers, too")
    parser.add_argument("--out", metavar="FILE.json", help="all of it as JSON")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="suites side by side (%(default)s)"
    )
    parser.add_argument("--lane", action="store_true", help=argparse.SUPPRESS)  # one of them: no table
    parser.add_argument("--list", action="store_true", help="the suites, and how many cases they have")
    flags = parser.parse_args(argv)
    if flags.jobs < 1 or (flags.count is not None and flags.count < 1):
        sys.exit("error: --jobs and --count: expected 1 or more")
    return flags


def chosen(suites: list[Suite], names: list[str] | None) -> list[Suite]:
    known = [suite.name for suite in suites]
    for name in names or ():
        if name not in known:
            sys.exit(f"error: --suite {name}: there is none, expected one of {', '.join(known)}")
    return [suite for suite in suites if not names or suite.name in names]


def replay(suites: list[Suite], what: str) -> int:
    name, seed, wanted = ([*what.split(":", 2), "", ""])[:3]
    if not seed.lstrip("-").isdecimal() or not wanted:
        sys.exit(f"error: --replay {what}: expected SUITE:SEED:CASE, as a failure prints it")
    (suite,) = chosen(suites, [name])
    for case in _every(suite, int(seed)):
        if case.name == wanted:
            directory = Path(tempfile.mkdtemp(prefix="faultdrill-"))
            problem, _ = table.tried(case, directory)
            print(f"{suite.name} {case.name}: {problem or 'held'} ({directory})")
            return int(bool(problem))
    sys.exit(f"error: --replay {what}: {name} has no case of that name under this seed")


def _every(suite: Suite, seed: int) -> Iterator:
    for count in suite.sizes:
        yield from suite.cases(count, seed)


def main(argv: list[str] | None = None) -> int:
    flags = parse(argv)
    suites, absent = discover()
    if flags.list:
        for suite in suites:
            print(f"{suite.name}: {suite.sizes[0]} or {suite.sizes[1]} {suite.unit}; {suite.promise}")
        return 0
    if flags.replay:
        return replay(suites, flags.replay)
    facts = measure.machine(torch.device("cpu"))
    began, suites = time.monotonic(), chosen(suites, flags.suite)
    absent += [f"{suite.name}: {line}" for suite in suites for line in suite.left_out]
    if not flags.lane:
        say(", ".join(f"{name} {value}" for name, value in facts.items()) + f"; seed {flags.seed}")
    if flags.lane or flags.jobs == 1 or len(suites) == 1:
        outcomes, lost = in_turn(suites, flags), []
    else:
        passed_on = ["--seed", str(flags.seed), *(["--count", str(flags.count)] if flags.count else [])]
        passed_on += ["--full"] * flags.full + ["--baselines"] * flags.baselines
        outcomes, lost = lanes.run(suites, flags.jobs, passed_on)
    if not flags.lane:
        say("\n" + table.text(outcomes))
        say("\n".join(["", "left out here:", *(f"  {line}" for line in (*LEFT_OUT, *absent))]))
        say(f"{time.monotonic() - began:.0f} s" + (f"; came to no end: {', '.join(lost)}" if lost else ""))
    measure.write_json(
        flags.out,
        machine=facts,
        seed=flags.seed,
        seconds=time.monotonic() - began,
        suites=[outcome.as_json() for outcome in outcomes],
        left_out=[*LEFT_OUT, *absent],
    )
    return 0 if outcomes and not lost and all(outcome.ok for outcome in outcomes) else 1


def in_turn(suites: list[Suite], flags: argparse.Namespace) -> list[table.Outcome]:
    """What came of these, one after the other; of those that were done before Ctrl-C."""
    outcomes = []
    try:
        for suite in suites:
            outcome = table.run(suite, flags.count or suite.sizes[flags.full], flags.seed, flags.baselines, say)
            outcomes.append(outcome)
            _, passed, caught, peers, seconds = outcome.row()
            say(f"{suite.name}: {passed}; controls caught: {caught}; baselines: {peers}; {seconds} s")
    except KeyboardInterrupt:
        say("interrupted: what follows is of the suites that were done")
    return outcomes


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""SIGTERM and SIGUSR1 at random moments: every rank ends with status 85 and a checkpoint, and the same command ends in
the same bits.

The moments are those of the kills outside saves (before an optimizer step, a micro-batch, a row, a token, at a random
time after a step, inside a save), to one rank or to all. Status 85 and one line, unless the signal came so late that
final/ is written; what is lost is at most the step under way.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faultdrill import baseline_runs, lab
from benchmarks.faultdrill.suite import Case, Suite

STOPPED = 85
KINDS = ("report", "step", "time", "save")
SHORT = (("sft", "full", 2), ("grpo", "lora", 2), ("dpo", "full", 2), ("ppo", "full", 1), ("sft", "8bit", 1))


def plan(setup: lab.Setup, chance: random.Random, number: int) -> dict[str, Any]:
    kind, counts = KINDS[number % len(KINDS)], lab.uninterrupted(setup).counts[0]
    ranks = chance.choice([[rank] for rank in range(setup.ranks)] + [list(range(setup.ranks))])
    if kind == "save":
        which = chance.randrange(len(counts["saves"]))
        when: list[Any] = ["save", which + 1, chance.randint(1, counts["saves"][which])]
    else:
        when = ["step" if kind == "time" else kind, chance.randint(1, counts["step" if kind == "time" else kind])]
    delay = chance.random() * 0.3 if kind == "time" else 0.0
    number = int(chance.choice([signal.SIGTERM, signal.SIGUSR1]))
    return {"when": when, "delay": delay, "ranks": ranks, "signal": number}


def stop(setup: lab.Setup, planned: dict[str, Any], control: str, directory: Path) -> str:
    """Is told, ends, goes on."""
    run, name = directory / "run", signal.Signals(planned["signal"]).name
    words = f"{name} at {planned['when']} to {planned['ranks']}"
    ended = lab.launch(setup, run, planned | {"control": control})
    finished = (run / "final").is_dir()
    if set(ended.codes) != ({0} if finished else {STOPPED}):
        return f"{words}: {ended.tail()}"
    if "Traceback" in ended.output or len(re.findall("^stopped: ", ended.output, re.M)) != (not finished):
        return f"{words}: not one line: {ended.output[-300:]}"
    said, after = re.search(r"after step (\d+) of", ended.output), lab.newest(run)
    if said and not finished and int(said[1]) != after:
        return f"{words}: said to be kept after step {said[1]}, and the newest checkpoint is of {after}"
    again = lab.launch(setup, run, {"when": ["step", -1], "ranks": [], "control": control})
    problem = lab.went_on(setup, run, again, after)
    return f"{words}: {problem}" if problem else ""


def cases(count: int, seed: int) -> Iterator[Case]:
    """The second signal is not among them: tests/launch/test_stopped.py."""
    chosen = [lab.Setup(*of) for of in SHORT] if count <= len(SHORT) else lab.setups(seed)
    chosen = [setup for setup in chosen if setup.is_possible]
    for number, setup in enumerate(itertools.islice(itertools.cycle(chosen), count)):

        def run(directory: Path, setup: lab.Setup = setup, number: int = number) -> str:
            planned = plan(setup, random.Random(f"stop {seed} {number}"), number)
            return stop(setup, planned, "", directory)

        yield Case(f"{setup.name}.{number}", run)


def broken(count: int, seed: int, control: str) -> Iterator[Case]:
    """Told at a step in the middle, one rank alone."""
    setup = lab.Setup("sft", "full", 2)
    for step in range(5, 5 + count):
        planned = {"when": ["step", step], "ranks": [1], "signal": int(signal.SIGTERM)}
        yield Case(f"{control} {step}", functools.partial(stop, setup, planned, control))


CONTROLS = ("exits without a checkpoint", "no checkpoint at the end")
SUITE = Suite(
    name="preemption",
    unit="signals",
    promise="status 85, then the same bits",
    sizes=(5, 50),
    cases=cases,
    controls={name: functools.partial(broken, control=name) for name in CONTROLS},
    baselines=baseline_runs.SIGNALS,
)

"""kill -9 at random moments, and the same command until it finishes: the same bits as the uninterrupted run.

Of every stage, with all weights, LoRA, NF4 and 8-bit moments, on one and two ranks; weights, masters, moments, exports,
rows of metrics and samples are compared. Six in ten strike inside a save: before one of its changes to the file system,
in whichever rank and thread; the others before an optimizer step, a micro-batch, a row that is tokenised, a token that
is sampled, a change that the export makes, or at a random time after a step. All ranks die, or one. Every third case
is killed a second time while it goes on, and some have no caches yet.
"""

from __future__ import annotations

import functools
import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faultdrill import baseline_runs, lab
from benchmarks.faultdrill.suite import Case, Suite

IN_SAVES = 6  # of ten
CONFIGURATIONS = 8  # in a short drill: several kills each


def plan(setup: lab.Setup, chance: random.Random, number: int) -> dict[str, Any]:
    """Where the number-th kill strikes. Drawn from the moments that the uninterrupted run had."""
    together = setup.ranks == 1 or chance.random() < 0.5
    ranks = list(range(setup.ranks)) if together else [chance.randrange(setup.ranks)]
    counts = lab.uninterrupted(setup).counts[ranks[0]]
    if number % 10 < IN_SAVES:
        which = chance.randrange(len(counts["saves"]))
        when: list[Any] = ["save", which + 1, chance.randint(1, counts["saves"][which])]
    else:
        kind = ("report", "step", "export", "time")[number % 4]
        if kind == "export" and not counts["export"]:
            kind = "report"
        when = [kind, chance.randint(1, int(counts["step" if kind == "time" else kind]))]
    delay = 0.0
    if when[0] == "time":
        when, delay = ["step", when[1]], chance.random() * 0.3
    return {"when": when, "delay": delay, "ranks": ranks, "together": together}


def words(planned: dict[str, Any]) -> str:
    who = "all" if planned["together"] else f"rank {planned['ranks'][0]}"
    kind, *numbers = planned["when"]
    return f"{who} at {kind} {'.'.join(map(str, numbers))}" + (f" + {planned['delay']:.2f} s" * bool(planned["delay"]))


def kill(setup: lab.Setup, number: int, seed: int, directory: Path) -> str:
    """Kills once or twice, then lets it finish."""
    chance, run = random.Random(f"kill {seed} {number}"), directory / "run"
    cache = directory / "cache" if number % 10 in (6, 8) else None
    struck: list[str] = []
    for planned in [plan(setup, chance, number) for _ in range(2 if number % 3 == 2 else 1)]:
        ended = lab.launch(setup, run, planned, together=planned["together"], cache=cache)
        if ended.ok and not struck:  # its moment did not come: one that does
            shutil.rmtree(run)
            planned |= {"when": ["step", 1 + number % 5], "delay": 0.0}
            ended = lab.launch(setup, run, planned, together=planned["together"], cache=cache)
        if ended.ok and struck:  # nor did it on the way to the end
            break
        struck.append(words(planned))
        if problem := _unlike_a_kill(ended, planned):
            return f"{'; '.join(struck)}: {problem}"
    after = lab.newest(run)
    ended = lab.launch(setup, run, {"when": ["step", -1], "ranks": []}, cache=cache)
    problem = lab.went_on(setup, run, ended, after)
    return f"{'; '.join(struck)}: {problem}" if problem else ""


def _unlike_a_kill(ended: lab.Ended, planned: dict[str, Any]) -> str:
    """Who outlives a rank ends by itself, with one line."""
    if "Traceback" in ended.output:
        return f"a rank that was left printed a traceback: {ended.output[-200:]}"
    struck = {ended.codes[rank] for rank in planned["ranks"]}
    others = {code for rank, code in enumerate(ended.codes) if rank not in planned["ranks"]}
    if -9 not in struck or not others <= ({-9, 1} if planned["together"] else {1}):
        return f"not ended by the kill: {ended.tail()}"
    return ""


def cases(count: int, seed: int) -> Iterator[Case]:
    """Round and round over the configurations."""
    chosen = lab.setups(seed)[: CONFIGURATIONS if count <= 40 else None]
    for number, setup in enumerate(itertools.islice(itertools.cycle(chosen), count)):
        run = functools.partial(kill, setup, number, seed)
        yield Case(f"{setup.name}.{number}", run)


def spoiled(count: int, seed: int, control: str) -> Iterator[Case]:
    """After some checkpoints, so that there is something to lose."""
    setup = lab.Setup("sft", "full", 2)

    def run(step: int, directory: Path) -> str:
        planned = {"when": ["step", step], "ranks": [0, 1], "control": control}
        lab.launch(setup, directory / "run", planned, together=True)
        after = lab.newest(directory / "run")
        ended = lab.launch(setup, directory / "run", planned | {"ranks": []})
        return lab.went_on(setup, directory / "run", ended, after)

    for step in range(10, 10 - count, -1):
        yield Case(f"{control} {step}", functools.partial(run, step))


CONTROLS = ("position lost", "moments lost", "step count lost")
SUITE = Suite(
    name="kills",
    unit="kills",
    promise="0 wrong bits",
    sizes=(20, 200),
    cases=cases,
    controls={name: functools.partial(spoiled, control=name) for name in CONTROLS},
    baselines=baseline_runs.KILLS,
    left_out=["the kill of a whole machine, which is a rank that gives no sign: see the suite hangs"],
)

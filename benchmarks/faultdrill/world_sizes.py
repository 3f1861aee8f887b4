"""A run that goes on with another number of ranks, and where in the data one goes on.

position: a plan of steps is cut at any step, again and again, and taken up by 1, 2 or 3 ranks; every step must hold
the examples that it holds in a plan that was never cut, each once. This is what a run's loop does, without a model.

run: a run of W ranks is cut after any step and taken up by others, through the real entry point: every step's
examples over all ranks are those of the run that was not cut, and losses and weights are its own to rounding.

Rounding: on other ranks, sums have their N terms in another order. A sum in fp32 is then off by about u sqrt(N) of
its size, u = 2^-24, and a loss is some 64 sums deep in these models: 64 u sqrt(N), N being the step's tokens. Adam
divides a gradient by its own size, so an entry below that error moves by its whole step either way: of the way that
weights have come, a thousandth is allowed (as in tests/launch/test_equivalence.py).
"""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.faultdrill.scenes import Scene
from benchmarks.faultdrill.suite import Case, Suite
from engine.data import Steps
from engine.data.batch import step_batches
from engine.data.mixture import permutation
from tests.launch.test_equivalence import rows, weights_of

ROUNDING, DEEP, OF_THE_WAY = 2.0**-24, 64, 1e-3
STEPS = 4
FIRST = ("sft/1-2", "dpo/2-3", "dpo-lora/3-1", "sft/2-1", "ppo/2-1", "dpo/1-3", "grpo/1-2", "sft-lora/2-3", "sft/3-2")
OTHERS = ("1-2", "1-3", "2-1", "2-3", "3-1", "3-2")
STAGES = ("sft", "dpo", "ppo", "grpo", "dpo-lora", "sft-lora")
PAIRS = list(dict.fromkeys([*FIRST, *(f"{of}/{ranks}" for ranks in OTHERS for of in STAGES)]))
A_RUN_IN = 11  # cases


# --- where in the data ------------------------------------------------------------------------------------------------


class Lengths:
    """Examples that are nothing but long."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def sequences(self, example: int) -> list[tuple[np.ndarray, np.ndarray]]:
        n = int(self.tokens[example]) + 1
        return [(np.zeros(n, np.int64), np.ones(n, bool))]


def taken(examples: Lengths, steps: Steps, budget: int, start: int, end: int, ranks: int) -> list[Counter[int]]:
    """What all ranks together take in each of these steps."""
    found = []
    for step in range(start, end):
        counted: Counter[int] = Counter()
        for rank in range(ranks):
            world = SimpleNamespace(rank=rank, size=ranks, device=torch.device("cpu"))
            for batch, _ in step_batches(examples, steps.examples(step), budget, world):  # type: ignore[arg-type]
                counted.update(batch.examples)
        found.append(counted)
    return found


def position(name: str, lost: bool, directory: Path) -> str:
    """A plan of two epochs and more, cut where the name says; `lost`: by a run that has an iterator for each rank."""
    draw = random.Random(name)
    n, batch, budget = draw.randint(5, 40), draw.randint(1, 9), draw.choice((30, 60, 200))
    examples = Lengths(np.array([draw.randint(1, 40) for _ in range(n)]))
    plan = lambda: Steps(n, batch, 3, -1, seed=7)  # made again by every run
    total = plan().total
    whole = [Counter(plan().examples(step).tolist()) for step in range(total)]
    cuts = sorted(draw.sample(range(1, total), min(3, total - 1)))
    found: list[Counter[int]] = []
    ranks = 1
    for start, end in zip([0, *cuts], [*cuts, total], strict=True):
        before, ranks = ranks, draw.randint(1, 3)
        begin = start * before // ranks if lost else start
        found += taken(examples, plan(), budget, begin, begin + end - start, ranks)
    wrong = [step for step, (a, b) in enumerate(zip(whole, found, strict=True)) if a != b]
    return f"steps {wrong[:5]} of {total} hold other examples: cut at {cuts}" if wrong else ""


# --- runs -------------------------------------------------------------------------------------------------------------


@functools.cache
def scene(of: str, ranks: int) -> Scene:
    """A stage, its run on so many ranks with a checkpoint of every step, and what it took."""
    stage, _, form = of.partition("-")
    made = Scene(stage, form or "whole", save_steps=1, save_total_limit=9, max_steps=STEPS, micro_batch_tokens=60)
    made.whole("run", ranks, hook="record_examples")
    made.keep()
    return made


def run(name: str, hook: str, directory: Path) -> str:
    """The run of that name, run/stage/ranks-ranks/step, cut there and taken up."""
    _, of, ranks, cut = name.split("/")
    before, after = (int(n) for n in ranks.split("-"))
    made = scene(of, before)
    place = made.again()
    shutil.copytree(place / "run", place / "again")
    shutil.rmtree(place / "again" / "final")
    for path in (place / "again" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > int(cut):
            shutil.rmtree(path)
    result = made.launch("again", after, hook or "record_examples")
    wrong = _judged(place, int(cut), result)
    if wrong:
        shutil.copytree(place, directory, dirs_exist_ok=True)
    return wrong


def _judged(place: Path, cut: int, result) -> str:
    if not result.ok or "Traceback" in result.output:
        return f"exit statuses {result.codes}: {result.output[-300:]}"
    whole, found = _recorded(place, "run"), _recorded(place, "again")
    wanted = {key: counted for key, counted in whole.items() if key[0] > cut}
    if wrong := sorted({step for step, _ in wanted.keys() | found.keys() if _at(wanted, step) != _at(found, step)}):
        return f"steps {wrong} hold other examples"
    a, b = rows(place / "run"), rows(place / "again")
    if [row["step"] for row in a] != [row["step"] for row in b]:
        return f"steps {[row['step'] for row in b]} in metrics.jsonl"
    for x, y in zip(a, b, strict=True):
        allowed = DEEP * ROUNDING * math.sqrt(max(x["num_tokens"], 1)) * max(1.0, abs(x["loss"]))
        if not abs(x["loss"] - y["loss"]) <= allowed:
            return f"step {x['step']}: loss {y['loss']} and {x['loss']}, rounding allows {allowed:.1e}"
        if y["num_tokens"] != x["num_tokens"] or y["learning_rate"] != x["learning_rate"]:
            return f"step {x['step']}: other tokens, or another learning rate"
    w, w0, w1 = (weights_of(place / of) for of in ("run/final", "model", "again/final"))
    off, way = float((w1 - w).norm()), float((w - w0).norm())
    return "" if off <= OF_THE_WAY * way else f"weights are off by {off / way:.1e} of the way that they came"


def _recorded(place: Path, name: str) -> dict[tuple[int, str], Counter[int]]:
    """(step, what is trained) -> how often each example was taken, by any rank."""
    found: dict[tuple[int, str], Counter[int]] = {}
    for path in place.glob(f"{name}.examples.*"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault((row["step"], row["root"]), Counter()).update(row["examples"])
    return found


def _at(of: dict[tuple[int, str], Counter[int]], step: int) -> dict[str, Counter[int]]:
    return {root: counted for (at, root), counted in of.items() if at == step}


# --- the cases --------------------------------------------------------------------------------------------------------


def case(name: str, hook: str = "") -> Case:
    """That of a name: position/number, or run/stage/ranks-ranks/step."""
    if name.startswith("position/"):
        return Case(name, partial(position, name, bool(hook)))
    return Case(name, partial(run, name, hook))


def cases(count: int, seed: int) -> Iterator[Case]:
    """Ten positions and a run, by turns."""
    for number in range(count):
        turn, place = divmod(number, A_RUN_IN)
        if place < A_RUN_IN - 1:
            yield case(f"position/{seed}.{number}")
        else:
            again, pair = divmod(turn, len(PAIRS))
            cut = 1 + int(permutation(STEPS - 1, seed, "cut", pair)[again % (STEPS - 1)])
            yield case(f"run/{PAIRS[pair]}/{cut}")


def planted(hook: str, *names: str) -> Callable[[int, int], Iterator[Case]]:
    """A control: these cases, with a promise taken away."""
    return lambda count, seed: (case(name, hook) for name in names[:count])


SUITE = Suite(
    name="world-sizes",
    unit="cuts, taken up by 1, 2 or 3 ranks",
    promise="0 examples lost, 0 doubled; losses and weights to rounding",
    sizes=(66, 660),
    cases=cases,
    controls={
        "a position of each rank": planted("positions_are_of_a_rank", "position/0.0", "position/0.1", "run/sft/2-1/2"),
        "moments begin anew on other ranks": planted("moments_begin_anew_on_other_ranks", "run/sft/2-1/2"),
    },
    left_out=(
        "more than 3 ranks, and several machines",
        "moments of 8 bits: on other ranks their blocks are others, and they are rounded again (the run says so)",
    ),
)

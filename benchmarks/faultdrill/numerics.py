"""A number that is none (NaN, infinity), planted on one rank of two, in all that a step is made of.

All ranks must stop at the same step, in one line that names the step and either the rank with its examples or, where
a sum over ranks hides whose it was, the examples of the step; no checkpoint may hold such a number, and the last one
must be what it was.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.faultdrill import baseline_runs
from benchmarks.faultdrill.scenes import Scene, not_finite, numbers, refused, said
from benchmarks.faultdrill.suite import Case, Suite
from engine.data.mixture import permutation

STEP = 3  # of 4; a checkpoint after every step
ON_ALL = ("gradient",)  # what is summed over ranks before it is seen: of no rank alone
# in what, by stage and form, and which number; the rank is drawn
PLANTED = {
    "sft": ("weights:nan", "loss:nan", "loss:inf", "gradient:nan", "gradient:inf", "moments:nan"),
    "sft-lora": ("weights:inf", "gradient:nan"),
    "dpo": ("weights:inf", "loss:nan", "reference:nan", "reference:inf", "gradient:-inf", "moments:inf"),
    "ppo": ("loss:nan", "old:nan", "frozen:inf", "value:nan", "verdict:nan", "advantages:inf"),
    "grpo": ("verdict:inf", "advantages:nan"),
}
ALL = [f"{of}/{what}" for of, plants in PLANTED.items() for what in plants]


@functools.cache
def scene(of: str) -> Scene:
    """A stage on two ranks, its caches filled, with a run that nothing happened to."""
    stage, _, form = of.partition("-")
    made = Scene(stage, form or "whole", save_steps=1, save_total_limit=9, micro_batch_tokens=60)
    made.whole("run", 2)
    made.keep()
    return made


def run(name: str, directory: Path, checked: bool = True) -> str:
    """Plants it and judges how the ranks ended."""
    of, what, on = name.split("/")
    made, (where, value) = scene(of), what.split(":")
    rank = int(on.removeprefix("rank"))
    place = made.again()
    told = place / "planted.json"
    argv = {"plant": f"{made.stage}:{where}:{value}:{rank}:{STEP}", "planted": told}
    result = made.launch("spoiled", 2, "numbers_that_are_none" if checked else "numbers_that_nobody_checks", **argv)
    wrong = _judged(made, result, where, rank, told)
    if wrong:
        shutil.copytree(place, directory, dirs_exist_ok=True)
    return wrong


def _judged(made: Scene, result, where: str, rank: int, told: Path) -> str:
    spoiled, whole = made.now / "spoiled", made.now / "run"
    if bad := not_finite(spoiled):
        return f"written: {bad[0]} holds numbers that are none"
    if wrong := refused(result):
        return wrong
    if result.codes != [2, 2]:
        return f"the ranks ended each in its own way, {result.codes}: {said(result.output)}"
    newest = sorted((spoiled / "checkpoints").glob("step-*"))[-1]
    if numbers(newest) != numbers(whole / "checkpoints" / newest.name):
        return f"{newest.name} is not what it is without the plant"
    (line,) = (line for line in said(result.output) if line.startswith("error: "))
    named = re.search(r"step (\d+)", line)
    if not named or int(named[1]) not in (STEP, STEP + 1):
        return f"no step, or another: {line}"
    if where not in ON_ALL and f"rank {rank}" not in line:
        return f"not a word of rank {rank}: {line}"
    if where in ("weights", "moments"):
        return ""
    if where == "loss" and made.stage in ("ppo", "grpo"):  # planted in a response, of which the prompt is named
        return "" if re.search(r"prompts \[\d+", line) else f"no prompt: {line}"
    examples = json.loads(told.read_text()) if told.is_file() else []
    there = {int(n) for n in re.findall(r"\d+", line)}
    return "" if set(examples[:8]) <= there and re.search("pair|prompt|conversation", line) else f"{examples}? {line}"


def case(name: str, checked: bool = True) -> Case:
    """That of a name: stage/what:number/rank."""
    return Case(name, partial(run, name, checked=checked))


def cases(count: int, seed: int) -> Iterator[Case]:
    """All of them, each on a rank that is drawn; beyond, on the other."""
    for number in range(count):
        turn, of = divmod(number, len(ALL))
        rank = (int(permutation(2, seed, "numerics", of)[0]) + turn) % 2
        yield case(f"{ALL[of]}/rank{rank}")


def unchecked(count: int, seed: int) -> Iterator[Case]:
    """With what stops a run taken away."""
    yield from (case(f"{what}/rank1", checked=False) for what in ("sft/weights:nan", "dpo/reference:inf")[:count])


SUITE = Suite(
    name="numerics",
    unit="numbers that are none, on one rank of two",
    promise="all ranks stop at that step, nothing is written, the rank and the examples named",
    sizes=(22, 44),
    cases=cases,
    controls={"a run goes on with numbers that are not finite": unchecked},
    baselines=baseline_runs.NUMBERS,
    left_out=(
        "a wrong number that is finite: nothing tells it from a right one, but a checkpoint's sums once it is written",
        "a gradient whose rank is named: ranks share a gradient, so the examples of the step are",
    ),
)

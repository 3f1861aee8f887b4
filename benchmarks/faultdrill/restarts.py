"""A rank that dies under torchrun, and ranks that hang.

restarts   `torchrun --max-restarts 1`: a rank is killed, aborts or raises before a step of the first attempt; the
           second attempt recovers, from the last checkpoint, and ends in the bits of the uninterrupted run.
hangs      a rank is stopped, loops, stays in one call, or all wait for each other, at a random step: within --patience
           and what it takes to leave, every rank that can ends with 86, one line names who hung and at which step, and
           the stacks of the others are written.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faultdrill import lab
from benchmarks.faultdrill.planted import plan_of
from benchmarks.faultdrill.suite import Case, Suite

SETUP = lab.Setup("sft", "full", 2)
ROOT = Path(__file__).resolve().parents[2]
DEATHS = {"killed": int(signal.SIGKILL), "aborted": int(signal.SIGABRT), "raised": 0}
LIMIT = 180.0  # seconds for both attempts, on a busy machine
took: list[float] = []  # seconds of the recoveries so far
HUNG = 86
TO_BEGIN = 40.0  # seconds that a run may take, on a busy machine, besides the patience


# --- restarts ---------------------------------------------------------------------------------------------------------


def torchrun(output_dir: Path, plan: dict[str, Any], limit: float) -> tuple[int, str]:
    """(status, what was said) of a run whose first attempt the plan strikes."""
    plan_of(output_dir).write_text(json.dumps(plan))
    words = [str(w) for name, value in lab.flags(SETUP, output_dir).items() for w in (f"--{name}", value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", "1", "-m", "benchmarks.faultdrill.worker", *words]
    names = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | names, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        said, _ = process.communicate(timeout=60)
        return -1, said
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, said


def recover(step: int, rank: int, how: str, control: str, directory: Path) -> str:
    """One death. The broken variant waits for addresses that nobody answers at: it gets twice what recoveries took."""
    run = directory / "run"
    plan = {"when": ["step", step], "ranks": [rank], "signal": DEATHS[how], "first_attempt": True, "control": control}
    began = time.monotonic()
    status, said = torchrun(run, plan, 2 * max(took, default=LIMIT / 2) if control else LIMIT)
    words = f"rank {rank} {how} before step {step}"
    if status != 0:
        return f"{words}: not recovered at the first restart (status {status}): {_last_error(said)}"
    took.append(time.monotonic() - began)
    kept = 2 * ((step - 1) // 2)  # save_steps; the last may not have been written yet
    resumed = [int(found) for found in re.findall(r"resuming after step (\d+)", said)]
    if kept > 2 and (not resumed or resumed[-1] < kept - 2):
        return f"{words}: resumed after {resumed}, a checkpoint of step {kept - 2} was there"
    problem = lab.difference(lab.remains(run), lab.uninterrupted(SETUP).remains) or lab.leftovers(run)
    return f"{words}: {problem}" if problem else ""


def _last_error(said: str) -> str:
    lines = [line for line in said.splitlines() if "rror" in line]
    return (lines or said.splitlines() or [""])[-1][:200]


def deaths(count: int, seed: int) -> Iterator[Case]:
    chance = random.Random(f"restart {seed}")
    for number in range(count):
        how, rank, step = list(DEATHS)[number % 3], chance.randrange(2), chance.randint(1, 10)
        yield Case(f"{how}.{number}", functools.partial(recover, step, rank, how, ""))


def stale(count: int, seed: int) -> Iterator[Case]:
    """Ranks of the second attempt that read what the first left in torchrun's store."""
    for number in range(count):
        yield Case(f"stale.{number}", functools.partial(recover, 4 + number, 0, "killed", "stale store"))


RESTARTS = Suite(
    name="restarts",
    unit="deaths",
    promise="recovered at the first restart, in the same bits",
    sizes=(6, 30),
    cases=deaths,
    controls={"stale store": stale},
    left_out=["several machines: one here"],
)

# --- hangs ------------------------------------------------------------------------------------------------------------

HANGS = ("stopped", "loops", "in one call", "all wait")


def hang(what: str, step: int, rank: int, patience: float, control: str, directory: Path) -> str:
    run, words = directory / "run", f"rank {rank} {what} before step {step}"
    plan = {"hang": what, "when": ["step", step], "ranks": [rank] if what != "all wait" else [0, 1], "control": control}
    limit = 8 * patience if control else TO_BEGIN + 3 * patience
    ended = lab.launch(SETUP, run, plan | {"rank": rank}, patience=limit, more={"patience": patience / 60})
    if what == "stopped" and rank == 0:  # with it the store: the other says so, or that it was late before it stopped
        named = r"error: (the store that rank 0, or torchrun, keeps has not answered rank 1|"
        named += r"rank 0 has given no sign of life) for \d+ s"
    elif what == "all wait":
        named = rf"error: rank 0 has waited for \d+ s \(step {step}, .*; rank 1 has waited for"
    else:
        sign = "given no sign of life" if what == "stopped" else "not gone on"
        named = rf"error: rank {rank} has {sign} for \d+ s \(step {step}, "
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    if not errors:
        return f"{words}: nobody was named within {ended.seconds:.0f} s: {ended.tail()}"
    if len(errors) > 1 or not re.match(named, errors[0]):
        return f"{words}: {errors}"
    left = {code for other, code in enumerate(ended.codes) if what != "stopped" or other != rank}
    if left != {HUNG}:
        return f"{words}: {ended.tail()}"
    stacks = {path.name for path in (run / "crash").glob("rank-*.txt") if path.stat().st_size}
    expected = {f"rank-{other}.txt" for other in (0, 1) if what != "stopped" or other != rank}
    return "" if stacks == expected else f"{words}: stacks of {sorted(stacks)}, expected {sorted(expected)}"


def hangs(count: int, seed: int) -> Iterator[Case]:
    chance = random.Random(f"hang {seed}")
    for number in range(count):
        what = HANGS[(number + seed) % len(HANGS)]
        step, rank = chance.randint(2, 9), chance.randrange(2)
        yield Case(f"{what.replace(' ', '-')}.{number}", functools.partial(hang, what, step, rank, 3.0, ""))


def unwatched(count: int, seed: int) -> Iterator[Case]:
    for number in range(min(count, 1)):
        yield Case("nobody watches", functools.partial(hang, "loops", 4 + number, 1, 3.0, "nobody watches"))


HUNG_RANKS = Suite(
    name="hangs",
    unit="hangs",
    promise="named within patience, status 86, stacks written",
    sizes=(3, 10),
    cases=hangs,
    controls={"nobody watches": unwatched},
    left_out=["a hang on a GPU, which is NCCL's watchdog's"],
)
SUITES = (RESTARTS, HUNG_RANKS)

"""What surviving costs, as ratios within one run: the machinery around a step, and a save beside the steps.

machinery  a run of two ranks, of whose CPU seconds those of the threads that watch, listen for signals and talk to the
           store are counted apart (by the system's own clock of each thread), and with them the reports and votes of
           the main thread, whose number is counted and whose cost is measured. As a share of all CPU seconds of these
           steps. Steps with and without take turns in blocks: the ratio of their medians is printed beside it, and is
           no verdict, as it moves by some percent from run to run.
save       a checkpoint of some hundred MB: the seconds in which `save` holds the loop up, beside those that the whole
           save takes when nothing else runs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.faultdrill import lab
from benchmarks.faultdrill.suite import Case, Suite
from tests import ranks as forked

MACHINERY, SAVE = 0.01, 0.2  # the promises
STEPS, BLOCK = 160, 8  # steps with and without take turns in blocks
THREADS = ("signals", "watch _talk", "watch _look")
HOOK = "benchmarks.faultdrill.overhead:count"


# --- in a rank --------------------------------------------------------------------------------------------------------


def count(argv: list[str]) -> None:
    """The hook: at the last step, what the threads took and what steps took, into OUTPUT.overhead-RANK."""
    from engine import progress, signals, watch
    from engine.train import optim

    output_dir = Path(argv[argv.index("--output_dir") + 1])
    path = output_dir.with_name(f"{output_dir.name}.overhead-{os.environ['RANK']}")
    note, vote, step = progress.note, signals.vote, optim.step
    exchange = watch.Watch._exchange
    calls = {"note": 0, "vote": 0}
    seen: list[tuple[float, float]] = []  # CPU seconds of the process and of the threads, at each step
    on = lambda: is_on(len(seen))

    def noting(*args: Any, **options: Any) -> None:
        if on():
            calls["note"] += 1
            note(*args, **options)

    def voting() -> float:
        calls["vote"] += on()
        return vote() if on() else 0.0

    def stepping(*args: Any, **options: Any) -> Any:
        seen.append((time.process_time(), _of_threads()))
        if len(seen) == 1:
            calls.update(note=0, vote=0)
        if len(seen) == STEPS:
            costs = {"note": _cost(lambda: note("x", counted=True)), "vote": _cost(vote)}
            facts = {"seen": seen, "calls": calls, "costs": costs}
            path.write_text(json.dumps(facts))
        return step(*args, **options)

    progress.note, signals.vote, optim.step = noting, voting, stepping
    watch.Watch._exchange = lambda self, store: exchange(self, store) if on() else None


def is_on(steps: int) -> bool:
    """Whether so many steps after the first, the machinery works."""
    return max(0, steps - 1) // BLOCK % 2 == 0


def _of_threads() -> float:
    clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.name in THREADS and t.ident]
    return sum(time.clock_gettime(clock) for clock in clocks)


def _cost(call: Any, times: int = 20_000) -> float:
    began = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - began) / times


# --- cases ------------------------------------------------------------------------------------------------------------


def share_of(facts: dict[str, Any]) -> float:
    """Of the CPU seconds of the steps with it."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(facts["seen"])]
    every, threads = (sum(step[i] for n, step in enumerate(steps, start=1) if is_on(n)) for i in (0, 1))
    main = sum(facts["calls"][name] * facts["costs"][name] for name in facts["calls"])
    return (threads + main) / every


def ratio_of(facts: dict[str, Any]) -> float:
    """Median CPU seconds of a step with it over those of one without."""
    steps = [b[0] - a[0] for a, b in pairwise(facts["seen"])]
    with_it, without = ([s for n, s in enumerate(steps, start=1) if is_on(n) == on] for on in (True, False))
    return measure.median(with_it) / measure.median(without)


def machinery(directory: Path) -> str:
    setup, run = lab.Setup("sft", "full", 2), directory / "run"
    words = lab.flags(setup, run, max_steps=STEPS, save_steps=0)
    argv = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    ended = forked.launch(argv, setup.ranks, f"launch.{setup.stage}", directory / "log", HOOK, timeout=200)
    if not ended.ok:
        return f"the run did not end: {ended.output[-200:]}"
    facts = [json.loads((directory / f"run.overhead-{rank}").read_text()) for rank in range(setup.ranks)]
    shares, ratios = [share_of(of) for of in facts], [ratio_of(of) for of in facts]
    print(
        f"  machinery around a step: {', '.join(f'{share:.2%}' for share in shares)} of the ranks' CPU seconds; steps"
        f" with and without in turn: {', '.join(f'{ratio:.3f}' for ratio in ratios)}"
    )
    return "" if max(shares) <= MACHINERY else f"{max(shares):.2%} of a rank's CPU seconds, promised {MACHINERY:.0%}"


def blocked_share(directory: Path, waits: bool = False) -> float:
    """Seconds that `save` holds the loop up over those of the whole save, the median of five."""
    from engine import world
    from engine.flags import OptimizerFlags
    from engine.train import optim
    from engine.train.checkpoint import Checkpoints

    torch.set_num_threads(1)
    here, module = world.start(), nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    optimizer = optim.adamw(module, OptimizerFlags(), here)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optim.step(optimizer, here, lr=0.0, max_norm=1.0)
    checkpoints = Checkpoints(directory, here, {"policy": (module, optimizer)}, keep=1, identity={}, settings={})
    shares = []
    for step in range(1, 6):
        began = time.monotonic()
        checkpoints.save(step, {"num_tokens": 0})
        if waits:
            checkpoints.wait()
        held = time.monotonic() - began
        if problem := checkpoints.wait():
            raise RuntimeError(problem)
        shares.append(held / (time.monotonic() - began))
    return measure.median(shares)


def saving(directory: Path, waits: bool = False) -> str:
    share = measure.FreshProcesses()(blocked_share, directory, waits)
    print(f"  a save holds the loop up for {share:.0%} of the seconds that it takes")
    return "" if share <= SAVE else f"{share:.0%} of a synchronous save, promised {SAVE:.0%}"


def cases(count: int, seed: int) -> Iterator[Case]:
    yield Case("machinery", machinery)
    yield Case("save", saving)


def synchronous(count: int, seed: int) -> Iterator[Case]:
    yield Case("a save that waits", partial(saving, waits=True))


SUITE = Suite(
    name="overhead",
    unit="ratios",
    promise="1 % of a step's CPU seconds; 20 % of a synchronous save",
    sizes=(2, 2),
    cases=cases,
    controls={"a save that waits": synchronous},
    left_out=["pinned staging of a checkpoint, which needs CUDA"],
)

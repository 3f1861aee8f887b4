"""What is planted in a rank before its stage starts: a moment to die at, or a promise taken away.

A plan lies beside the run's directory (`OUTPUT.plan`, JSON):

    when      [kind, number]: before the number-th optimizer `step`, progress `report` (micro-batches, tokens, rows),
              change to the file system inside the number-th `save` ([.., .., nth]) or the `export` ([.., nth])
    delay     seconds after that moment
    ranks     which ranks it strikes
    signal    what strikes them; 0: an exception
    hang      how they hang, instead
    first_attempt  only before torchrun started them again
    control   a promise that is taken away in every rank, by name

Without `when` the moments are counted instead, into OUTPUT.counts-RANK.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faultdrill.events import Events


def plan_of(output_dir: Path) -> Path:
    return output_dir.with_name(f"{output_dir.name}.plan")


def counts_of(output_dir: Path, rank: int) -> Path:
    return output_dir.with_name(f"{output_dir.name}.counts-{rank}")


def arm(argv: list[str]) -> None:
    """The hook for tests/ranks.py."""
    output_dir = Path(argv[argv.index("--output_dir") + 1])
    plan, rank = json.loads(plan_of(output_dir).read_text()), int(os.environ["RANK"])
    if plan.get("control"):
        CONTROLS[plan["control"]]()
    if "when" not in plan:
        _count(counts_of(output_dir, rank))
    elif rank in plan["ranks"] and not _is_later_attempt(plan):
        kind, *numbers = plan["when"]
        MOMENTS[kind](_strike(plan), *numbers)


def _is_later_attempt(plan: dict[str, Any]) -> bool:
    return bool(plan.get("first_attempt")) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _strike(plan: dict[str, Any]) -> Callable[[], None]:
    if "hang" in plan:
        return HANGS[plan["hang"]]
    number, delay = plan.get("signal", int(signal.SIGKILL)), plan.get("delay", 0.0)

    def strike() -> None:
        if number == 0:
            raise RuntimeError("planted")
        if delay:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)

    return strike


# --- hangs ----------------------------------------------------------------------------------------------------------


def _stopped() -> None:
    """A second after it told of its step."""
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGSTOP)


def _loops() -> None:
    number = 0
    while True:
        number += 1


def _all_wait() -> None:
    """Each rank in another collective."""
    import torch
    import torch.distributed as dist

    other, mine = 1 - int(os.environ["RANK"]), 8 + int(os.environ["RANK"])
    dist.recv(torch.zeros(1), other, tag=mine)


HANGS: dict[str, Callable[[], None]] = {
    "stopped": _stopped,
    "loops": _loops,
    "in one call": lambda: time.sleep(1000),
    "all wait": _all_wait,
}

# --- moments ----------------------------------------------------------------------------------------------------------


def _before_step(strike: Callable[[], None], number: int) -> None:
    from engine.train import optim

    original, count = optim.step, iter(range(1, 10**9))

    def stepping(*args: Any, **options: Any) -> Any:
        if next(count) == number:
            strike()
        return original(*args, **options)

    optim.step = stepping


def _before_report(strike: Callable[[], None], number: int) -> None:
    from engine import progress

    original, count = progress.note, iter(range(1, 10**9))

    def noting(*args: Any, **options: Any) -> None:
        if next(count) == number:
            strike()
        original(*args, **options)

    progress.note = noting


def _in_save(strike: Callable[[], None], which: int, number: int) -> None:
    """Of the which-th save the number-th change, in whichever thread."""
    events = Events(lambda n: strike() if n == number else None)
    saves = iter(range(1, 10**9))
    _around_saves(lambda: events.begin() if next(saves) == which else None, events.end)


def _in_export(strike: Callable[[], None], number: int) -> None:
    events = Events(lambda n: strike() if n == number else None)
    _around_export(events.begin, events.end)


def _around_saves(before: Callable[[], object], after: Callable[[], object]) -> None:
    from engine.train.checkpoint import Checkpoints

    save, ended = Checkpoints.save, Checkpoints._ended
    Checkpoints.save = lambda self, *args: (self.wait(), before(), save(self, *args))[-1]
    Checkpoints._ended = lambda self, *args: (after(), ended(self, *args))[-1]


def _around_export(before: Callable[[], object], after: Callable[[], object]) -> None:
    from engine.train import Run

    export = Run.export
    Run.export = lambda self, *args, **options: (before(), export(self, *args, **options), after())[1]


MOMENTS: dict[str, Callable] = {"step": _before_step, "report": _before_report, "save": _in_save, "export": _in_export}


def _count(path: Path) -> None:
    """How many moments of each kind an uninterrupted run has."""
    found: dict[str, Any] = {"step": 0, "report": 0, "saves": [], "export": 0}
    events, began = Events(lambda n: None), time.monotonic()

    def of(kind: str) -> Callable[[], None]:
        return lambda: found.__setitem__(kind, found[kind] + 1)

    def before() -> None:
        events.count = 0
        events.begin()

    def saved() -> None:
        events.end()
        found["saves"].append(events.count)

    def exported() -> None:
        events.end()
        found["export"] = events.count

    def write() -> None:
        path.write_text(json.dumps(found | {"seconds": time.monotonic() - began}))

    for kind in ("step", "report"):
        _each(kind, of(kind))
    _around_saves(before, saved)
    _around_export(before, exported)
    atexit.register(write)
    _at_the_end_of_a_child(write)


def _each(kind: str, tell: Callable[[], None]) -> None:
    from engine import progress
    from engine.train import optim

    module, name = {"step": (optim, "step"), "report": (progress, "note")}[kind]
    original = getattr(module, name)
    setattr(module, name, lambda *args, **options: (tell(), original(*args, **options))[1])


def _at_the_end_of_a_child(write: Callable[[], None]) -> None:
    """A process of multiprocessing ends without atexit."""
    from multiprocessing import util

    util.Finalize(None, write, exitpriority=100)


# --- promises taken away ----------------------------------------------------------------------------------------------


def _position_lost() -> None:
    """After a resumption the data, and with it everything that is drawn by the step's number, begins again at the
    first step.
    """
    from engine.data.mixture import Steps
    from engine.train.checkpoint import Checkpoints

    resume, examples, after = Checkpoints.resume, Steps.examples, {"step": 0}

    def resuming(self: Any, which: str) -> Any:
        state = resume(self, which)
        after["step"] = state["step"] if state else 0
        return state

    Checkpoints.resume = resuming
    Steps.examples = lambda self, step: examples(self, step - after["step"])


def _moments_lost() -> None:
    """AdamW begins anew after a resumption."""
    _after_loading(lambda state: [of.zero_() for name, of in state.items() if name.startswith("exp_avg")])


def _step_count_lost() -> None:
    """The optimizer's own step, on which its bias corrections hang."""
    _after_loading(lambda state: state["step"].zero_())


def _after_loading(spoil: Callable[[dict[str, Any]], object]) -> None:
    from engine.train.checkpoint import Checkpoints

    load = Checkpoints._load

    def loading(self: Any, path: Path) -> dict[str, Any]:
        state = load(self, path)
        for _, _, p, optimizer in self._parameters():
            spoil(optimizer.state[p])
        return state

    Checkpoints._load = loading


def _exits_without_a_checkpoint() -> None:
    """A handler that ends the run as if all were well."""
    from engine import signals

    signals.ask = lambda why: os._exit(0)


def _no_checkpoint_at_the_end() -> None:
    """Status and line are right, and nothing is kept."""
    from engine.train import Run

    leave = Run._leave

    def leaving(self: Any, why: str) -> str:
        self._save = lambda: None
        return leave(self, why)

    Run._leave = leaving


def _stale_store() -> None:
    """Ranks meet at the store as torchrun gives it, with what dead ones left there."""
    from engine import world

    world._restart = lambda: "0"


def _nobody_watches() -> None:
    from engine.watch import Watch

    Watch._look = lambda self: None


CONTROLS: dict[str, Callable[[], None]] = {
    "position lost": _position_lost,
    "moments lost": _moments_lost,
    "step count lost": _step_count_lost,
    "exits without a checkpoint": _exits_without_a_checkpoint,
    "no checkpoint at the end": _no_checkpoint_at_the_end,
    "stale store": _stale_store,
    "nobody watches": _nobody_watches,
}

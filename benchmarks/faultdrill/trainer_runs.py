"""Runs of a plain `transformers` Trainer with a fault planted in them, each in a process of its own.

A process imports Trainer once, which takes seconds, and forks another for every run. A run is a function of its
directory and a plan:

    arguments  of TrainingArguments, beside those of baseline.trainer
    pace       seconds that every forward pass takes longer
    when       ["step", n], before its update; ["time", s] after the first step began; ["save", n, m], before the m-th
               change to the file system in the n-th save
    signal     what strikes then
    plant      [what, number, step]: a number that is none, in weights, loss, gradient or moments
    limit      [bytes, step]: no file may be larger, from that step on
    tell       a file for the steps that were begun, the changes in each save and the seconds of the training

It is the command of the documentation: resume_from_checkpoint=True where there is a checkpoint, and final/ in the end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.faultdrill import baseline
from tests.ranks import context

if TYPE_CHECKING:
    from transformers import Trainer

PATIENCE = 60  # seconds for a run, which takes one or two, on a busy machine
Plan = dict[str, Any]


class Warm:
    """The process that has imported Trainer. It ends with this one."""

    def __init__(self) -> None:
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.unusable: str = self._ours.recv()

    def run(self, directory: Path, plan: Plan, log: Path) -> int:
        """The status that it ended with; negative: the signal that it died by."""
        self._ours.send((str(directory), plan, str(log)))
        return self._ours.recv()


@functools.cache
def warm() -> Warm:
    """To be asked for outside of a case: what a case starts is killed with it."""
    return Warm()


def _serve(connection: Connection) -> None:
    try:
        _import()
    except ImportError as error:
        connection.send(" ".join(str(error).split()))
        return
    connection.send("")
    with contextlib.suppress(EOFError):
        while True:
            arguments = connection.recv()
            child = os.fork()
            if child == 0:
                _child(*arguments)
            connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _import() -> None:
    import torch
    import transformers.integrations
    import transformers.models.llama.modeling_llama
    import transformers.trainer
    import transformers.trainer_jit_checkpoint

    from benchmarks.faultdrill import events
    from engine.log import JsonLines
    from engine.model import export
    from engine.train import refcache

    del torch, transformers, events, JsonLines, export, refcache  # for the processes that are forked


def _child(directory: str, plan: Plan, log: str) -> None:
    signal.alarm(PATIENCE)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    code = 0
    try:
        go(directory, plan)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def go(directory: str, plan: Plan) -> None:
    """The run itself."""
    from transformers.trainer_utils import get_last_checkpoint

    made = baseline.trainer(directory, **plan.get("arguments", {}))
    if pace := plan.get("pace"):
        made.model.register_forward_pre_hook(lambda *_: time.sleep(pace))
    if "tell" in plan:
        _tell(made, Path(plan["tell"]), counts="when" not in plan)
    if "when" in plan:
        kind, *numbers = plan["when"]
        MOMENTS[kind](made, lambda: os.kill(os.getpid(), plan["signal"]), *numbers)
    if "plant" in plan:
        what, number, step = plan["plant"]
        PLANTS[what](made, float(number), step)
    if "limit" in plan:
        size, step = plan["limit"]
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        _at(made, "on_step_begin", step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
    last = get_last_checkpoint(directory) if os.path.isdir(directory) else None
    made.train(resume_from_checkpoint=True if last else None)
    made.save_model(f"{directory}/final")


def _at(made: Trainer, moment: str, step: int, do: Callable[[], object]) -> None:
    """At that moment of that step, which counts from one; 0: of every step."""
    from transformers import TrainerCallback

    def called(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if step in (0, state.global_step + 1):
            do()

    made.add_callback(type("At", (TrainerCallback,), {moment: called}))


def _tell(made: Trainer, path: Path, counts: bool) -> None:
    """`begun` is right at any moment that a process may die at."""
    found: dict[str, Any] = {"begun": 0, "saves": [], "seconds": 0.0}
    began = time.monotonic()

    def write() -> None:
        found["seconds"] = time.monotonic() - began
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(path)

    def begins() -> None:
        found["begun"] += 1
        write()

    _at(made, "on_step_begin", 0, begins)
    if counts:
        events = _events(lambda number: None)

        def before() -> None:
            events.count = 0
            events.begin()

        def after() -> None:
            events.end()
            found["saves"].append(events.count)
            write()

        _around_saves(made, before, after)


# --- moments ----------------------------------------------------------------------------------------------------------


def _events(strike: Callable[[int], object]) -> Any:
    """Changes to the file system, those of the writers of Trainer among them, which are not Python."""
    import torch
    from transformers import modeling_utils

    from benchmarks.faultdrill.events import Events

    events = Events(strike)
    modeling_utils.safe_save_file = events.around(modeling_utils.safe_save_file)
    torch.save = events.around(torch.save)
    return events


def _around_saves(made: Trainer, before: Callable[[], object], after: Callable[[], object]) -> None:
    save = made._save_checkpoint

    def saving(*args: Any, **options: Any) -> None:
        before()
        save(*args, **options)
        after()

    made._save_checkpoint = saving


def _before_step(made: Trainer, strike: Callable[[], object], step: int) -> None:
    _at(made, "on_pre_optimizer_step", step, strike)


def _after(made: Trainer, strike: Callable[[], object], seconds: float) -> None:
    _at(made, "on_step_begin", 1, lambda: _later(seconds, strike))


def _later(seconds: float, do: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()


def _in_save(made: Trainer, strike: Callable[[], object], which: int, number: int) -> None:
    events, saves = _events(lambda n: strike() if n == number else None), iter(range(1, 10**9))
    _around_saves(made, lambda: events.begin() if next(saves) == which else None, events.end)


MOMENTS: dict[str, Callable] = {"step": _before_step, "time": _after, "save": _in_save}

# --- numbers that are none --------------------------------------------------------------------------------------------


def _weights(made: Trainer, value: float, step: int) -> None:
    _at(made, "on_step_begin", step, lambda: _spoil(next(made.model.parameters()).data, value))


def _moments(made: Trainer, value: float, step: int) -> None:
    def spoil() -> None:
        _spoil(next(iter(made.optimizer.state.values()))["exp_avg"], value)

    _at(made, "on_step_begin", step, spoil)


def _gradient(made: Trainer, value: float, step: int) -> None:
    """As the backward pass gives it: before it is clipped."""

    def given(gradient: Any) -> Any:
        if made.state.global_step + 1 != step:
            return None
        spoiled = gradient.clone()
        _spoil(spoiled, value)
        return spoiled

    next(made.model.parameters()).register_hook(given)


def _loss(made: Trainer, value: float, step: int) -> None:
    loss_of = made.compute_loss

    def spoiled(*args: Any, **options: Any) -> Any:
        loss = loss_of(*args, **options)
        return loss * value if made.state.global_step + 1 == step else loss

    made.compute_loss = spoiled


def _spoil(tensor: Any, value: float) -> None:
    """Its first number."""
    tensor.view(-1)[:1] = value


PLANTS: dict[str, Callable] = {"weights": _weights, "moments": _moments, "gradient": _gradient, "loss": _loss}

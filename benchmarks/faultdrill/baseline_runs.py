"""Kills, signals, numbers that are none and full disks against a plain `transformers` Trainer, and what is said of it.

A random Llama of a few thousand numbers with dropout, one process, a checkpoint every few steps of which two are kept;
after every fault the same command again. It is asked for what the engine is asked for: the bits of a run that nothing
happened to; after SIGTERM a status of its own; one line in place of a traceback.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faultdrill import trainer_runs
from benchmarks.faultdrill.baseline import digest
from benchmarks.faultdrill.disks import CannotMount, disk, remount, size_of
from benchmarks.faultdrill.scenes import not_finite
from benchmarks.faultdrill.suite import Case, Cases

MOST = 8  # cases of a baseline
SETTINGS: dict[str, dict[str, Any]] = {  # of TrainingArguments
    "kills": {"max_steps": 12, "save_steps": 2, "save_total_limit": 2},
    "signals": {"max_steps": 20, "save_steps": 5, "save_total_limit": 2},
    "numbers": {"max_steps": 8, "save_steps": 1, "save_total_limit": 8, "logging_steps": 1},
    "disks": {"max_steps": 6, "save_steps": 1, "save_total_limit": 2},
}
PACE = 0.3  # seconds of a step that is told to end: option jit waits three before it listens
SAME = "the same bits after the same command"
PLANTED = ("weights:nan", "loss:nan", "loss:inf", "gradient:nan", "gradient:inf", "moments:nan")
STEP = 3  # at which they are
DISKS = ("full", "limited", "full", "read-only", "full", "limited", "full", "full")

# --- how a run ended --------------------------------------------------------------------------------------------------


def last_line(output: str) -> str:
    """The end of a traceback, cut to a line; '' where there is none."""
    return " ".join(output.rstrip().splitlines()[-1].split())[:160] if "Traceback" in output else ""


def came_to(code: int, output: str, found: str, wanted: str) -> str:
    """'' where a run came to its end with the weights that are wanted; else in what it ended."""
    if line := last_line(output):
        return f"a traceback: {line}"
    if code < 0:
        return f"died by signal {-code}"
    if code:
        return f"exit status {code}"
    return "" if found == wanted else "other bits, and it ended as if they were right"


def refusal(code: int, output: str) -> str:
    """'' where a run that could not go on said so in one line and ended with a status; else what it did."""
    if line := last_line(output):
        return f"a traceback: {line}"
    if code <= 0:
        return f"died by signal {-code}" if code else "status 0"
    lines = output.strip().splitlines()
    return "" if len(lines) == 1 else f"exit status {code} and {len(lines)} lines"


def stopped(code: int, output: str, lost: int, finished: bool, again: str) -> str:
    """What is wrong with the end of a run that was told to end: '' needs a status of its own, at most the step under
    way lost, and the same bits after the same command (`again`: what is wrong with those).
    """
    problems = []
    if line := last_line(output):
        problems.append(f"a traceback: {line}")
    elif code < 0:
        problems.append(f"died by signal {-code}")
    elif not code and not finished:
        problems.append("status 0 and final/, as if it were finished")
    if lost > 1 and not finished:
        problems.append(f"{lost} steps lost")
    if problems or again:
        problems.append(again or SAME)
    return "; ".join(problems)


def trained_on(code: int, output: str, written: list[str]) -> str:
    """What is wrong with the end of a run that met a number that is none: '' needs one line that names the step."""
    if written:
        said = "nan" in output.lower() or "inf" in output.lower()
        how = "as if all were well" if not code else f"with status {code}"
        logged = "the number is in its log" if said else "not a word in its log"
        return f"{len(written)} files of weights with numbers that are none ({written[0]} first), ended {how}; {logged}"
    if code == 0:
        return "it went on, and its weights are finite"
    return refusal(code, output) or ("" if "step" in output else "no step is named")


# --- runs -------------------------------------------------------------------------------------------------------------


@functools.cache
def whole(of: str) -> tuple[Path, dict[str, Any]]:
    """The directory of a run that nothing happened to, and its moments. Raises RuntimeError where it does not end."""
    root = Path(tempfile.mkdtemp(prefix=f"faultdrill-trainer-{of}-"))
    weakref.finalize(whole, shutil.rmtree, root, ignore_errors=True)
    plan = {"arguments": SETTINGS[of], "tell": str(root / "told")}
    if code := trainer_runs.warm().run(root / "run", plan, root / "log"):
        raise RuntimeError(f"the baseline does not run: status {code}, {(root / 'log').read_text()[-300:]}")
    return root / "run", json.loads((root / "told").read_text())


def again(of: str, run: Path, **plan: Any) -> str:
    """The same command, to the end: what is wrong with it."""
    log = run.with_name("again.log")
    code = trainer_runs.warm().run(run, {"arguments": SETTINGS[of]} | plan, log)
    return came_to(code, log.read_text(errors="replace"), _final(run), digest(whole(of)[0] / "final"))


def _final(run: Path) -> str:
    return digest(run / "final") if (run / "final" / "model.safetensors").is_file() else ""


def newest(run: Path) -> int:
    """The step of the newest checkpoint that was written to its end."""
    written = [path.parent.name for path in run.glob("checkpoint-*/trainer_state.json")]
    return max((int(name.removeprefix("checkpoint-")) for name in written), default=0)


def kill(number: int, seed: int, directory: Path) -> str:
    """Five of eight inside a save, as six in ten are among ours."""
    chance, run, (_, moments) = random.Random(f"kill {seed} {number}"), directory / "run", whole("kills")
    kind = ("save", "step", "save", "save", "time", "save", "step", "save")[number]
    which = chance.randrange(len(moments["saves"]))
    when = {
        "save": ["save", which + 1, chance.randint(1, moments["saves"][which])],
        "step": ["step", chance.randint(1, SETTINGS["kills"]["max_steps"])],
        "time": ["time", chance.random() * moments["seconds"]],
    }[kind]
    plan = {"arguments": SETTINGS["kills"], "when": when, "signal": int(signal.SIGKILL)}
    code = trainer_runs.warm().run(run, plan, directory / "log")
    if code != -signal.SIGKILL:  # a moment that did not come: one that does
        shutil.rmtree(run, ignore_errors=True)
        plan["when"] = when = ["step", 1 + number]
        code = trainer_runs.warm().run(run, plan, directory / "log")
    if code != -signal.SIGKILL:
        raise RuntimeError(f"the kill did not come: status {code}")
    problem = again("kills", run)
    return f"at {' '.join(map(str, when))}: {problem}" if problem else ""


def stop(number: int, seed: int, jit: bool, directory: Path) -> str:
    """SIGTERM in the first quarter of a run: `jit` takes three seconds to listen, and the run must not be over then."""
    chance, run, (_, moments) = random.Random(f"stop {seed} {number}"), directory / "run", whole("signals")
    settings, told = SETTINGS["signals"], directory / "told"
    early = settings["max_steps"] // 4
    when = (
        ["time", chance.random() * early * PACE],
        ["step", chance.randint(1, early)],
        ["save", 1, chance.randint(1, moments["saves"][0])],
    )[number % 3]
    plan = {"arguments": settings | {"enable_jit_checkpoint": jit}, "pace": PACE, "when": when, "tell": str(told)}
    code = trainer_runs.warm().run(run, plan | {"signal": int(signal.SIGTERM)}, directory / "log")
    begun, kept = json.loads(told.read_text())["begun"] if told.is_file() else 0, newest(run)
    output = (directory / "log").read_text(errors="replace")
    finished = begun == settings["max_steps"] and code == 0
    wrong = again("signals", run)
    problem = stopped(code, output, begun - kept, finished, f"{wrong} after the same command" if wrong else "")
    return f"SIGTERM at {' '.join(map(str, when))}: {problem}" if problem else ""


def spoil(what: str, directory: Path) -> str:
    """The number at a step in the middle, and a checkpoint after every step."""
    run, (where, number) = directory / "run", what.split(":")
    plan = {"arguments": SETTINGS["numbers"], "plant": [where, number, STEP]}
    code = trainer_runs.warm().run(run, plan, directory / "log")
    return trained_on(code, (directory / "log").read_text(errors="replace"), not_finite(run))


def fill(number: int, seed: int, directory: Path) -> str:
    """A disk without the room, a limit of files, a disk that is read-only; then the same command with room."""
    kind, chance = DISKS[number], random.Random(f"disk {seed} {number}")
    needed, _ = whole("disks")
    plan: dict[str, Any] = {"arguments": SETTINGS["disks"]}
    if kind == "limited":
        largest = max(path.stat().st_size for path in needed.rglob("*") if path.is_file())
        first = _first(directory / "run", plan | {"limit": [chance.randrange(largest), STEP]})
        return _both(first, again("disks", directory / "run"))
    try:
        with disk(directory / "small", max(16, size_of(needed) * chance.randint(10, 99) // 100)) as small:
            if kind == "read-only":
                remount(small, "ro")
            first = _first(small / "run", plan)
            remount(small, "rw" if kind == "read-only" else "size=64m")
            return _both(first, again("disks", small / "run"))
    except CannotMount:
        return "a small disk cannot be mounted here: not tried"


def _first(run: Path, plan: dict[str, Any]) -> str:
    """On a disk without room: it comes to the right end, or ends in one line."""
    log = run.parent.with_name("first.log")
    code = trainer_runs.warm().run(run, plan, log)
    output = log.read_text(errors="replace")
    return (
        came_to(code, output, _final(run), digest(whole("disks")[0] / "final")) if not code else refusal(code, output)
    )


def _both(first: str, second: str) -> str:
    if not first and not second:
        return ""
    return f"{first or 'one line'}; with room: {second or SAME}"


# --- the cases --------------------------------------------------------------------------------------------------------


def drawn(names: tuple[str, ...], run: Callable[..., str], count: int, seed: int) -> list[Case]:
    """At most eight: a Trainer's run takes a second or two."""
    return [Case(f"{name}.{i}", partial(run, i, seed)) for i, name in enumerate(names[: min(count, MOST)])]


def _numbers(number: int, seed: int, directory: Path) -> str:
    return spoil(PLANTED[number], directory)


def _cases(names: tuple[str, ...], run: Callable[..., str]) -> Cases:
    def cases(count: int, seed: int) -> Iterator[Case]:
        if why := trainer_runs.warm().unusable:  # outside of a case: what a case starts is killed with it
            print(f"  transformers' Trainer: not run: {why}")
            return
        yield from drawn(names, run, count, seed)

    return cases


NAME = "transformers' Trainer"
KILLS = {f"{NAME}, resume_from_checkpoint=True": _cases(("kill",) * 8, kill)}
SIGNALS = {
    NAME: _cases(("signal",) * 6, partial(stop, jit=False)),
    f"{NAME}, enable_jit_checkpoint": _cases(("signal",) * 6, partial(stop, jit=True)),
}
NUMBERS = {NAME: _cases(PLANTED, _numbers)}
STORAGE = {f"{NAME}, resume_from_checkpoint=True": _cases(DISKS, fill)}

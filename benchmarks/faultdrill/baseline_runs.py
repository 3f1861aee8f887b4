"""Kills, signals, numbers that are none and full disks against a plain `transformers` Trainer, and what is said of it.

A random Llama of a few thousand numbers with dropout, one process, a checkpoint every few steps of which two are kept;
after every fault the same command again. It is asked for what the engine is asked for: the bits of a run that nothing
happened to; after SIGTERM a status of its own; one line in place of a traceback.
"""

from __future__ import annotations

import functools
import json
import random
import re
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
    "signals": {"max_steps": 20, "save_steps": 7, "save_total_limit": 2},
    "numbers": {"max_steps": 8, "save_steps": 1, "save_total_limit": 8, "logging_steps": 1},
    "disks": {"max_steps": 6, "save_steps": 1, "save_total_limit": 2},
}
PACE = 0.3  # seconds of a step that is told to end: option jit waits three before it listens
SAME = "the same bits after the same command"
KILLED = ("save", "step", "save", "save", "time", "save", "step", "save")  # of ours six in ten are in a save
TOLD = ("time", "step", "save", "time", "step")
PLANTED = ("weights:nan", "loss:nan", "loss:inf", "gradient:nan", "gradient:inf", "moments:nan")
STEP = 3  # at which they are
DISKS = ("full", "limited", "full", "read-only", "full", "limited", "full", "full")

# --- how a run ended --------------------------------------------------------------------------------------------------


def last_line(output: str) -> str:
    """The end of a traceback, cut to a line; '' where there is none."""
    line = " ".join(output.rstrip().splitlines()[-1].split()) if "Traceback" in output else ""
    return re.sub(r"/[^\s']*/run\b", "run", line)[:160]


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
        said = re.search(r"\b(nan|inf)\b", output)
        how = "as if all were well" if not code else f"with status {code}"
        logged = "the number is in its log" if said else "not a word in its log"
        return f"{len(written)} files of weights with numbers that are none ({written[0]} first), ended {how}; {logged}"
    if code == 0:
        return "it went on, and its weights are finite"
    return refusal(code, output) or ("" if "step" in output else "no step is named")


def both(first: str, second: str) -> str:
    """What is wrong without room and, after it, with room: '' where neither is."""
    return f"{first or 'one line'}; with room: {second or SAME}" if first or second else ""


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


def again(of: str, run: Path) -> str:
    """The same command, to the end: what is wrong with it; and of a checkpoint that stops it, whether the run goes on
    once somebody has removed that by hand.
    """
    wrong = _gone_on(of, run)
    torn = newest(run, "")
    if not wrong.startswith("a traceback") or torn is None:
        return wrong
    shutil.rmtree(torn)
    return f"{wrong} ({_gone_on(of, run) or 'the same bits'} once {torn.name} is removed by hand)"


def _gone_on(of: str, run: Path) -> str:
    log = run.with_name("again.log")
    code = trainer_runs.warm().run(run, {"arguments": SETTINGS[of]}, log)
    return came_to(code, log.read_text(errors="replace"), _final(run), digest(whole(of)[0] / "final"))


def _final(run: Path) -> str:
    return digest(run / "final") if (run / "final" / "model.safetensors").is_file() else ""


def newest(run: Path, holds: str = "trainer_state.json") -> Path | None:
    """The newest checkpoint with that file, which is written last; '' for the newest of all."""
    return max((path for path in run.glob("checkpoint-*") if (path / holds).exists()), key=_step, default=None)


def _step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def kill(number: int, seed: int, directory: Path) -> str:
    """Once, and the same command until it finishes."""
    chance, run, (_, moments) = random.Random(f"kill {seed} {number}"), directory / "run", whole("kills")
    which = chance.randrange(len(moments["saves"]))
    when = {
        "save": ["save", which + 1, chance.randint(1, moments["saves"][which])],
        "step": ["step", chance.randint(1, SETTINGS["kills"]["max_steps"])],
        "time": ["time", round(chance.random() * moments["seconds"], 2)],
    }[KILLED[number]]
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


def stop(jit: bool, number: int, seed: int, directory: Path) -> str:
    """SIGTERM in the first quarter of a run: `jit` takes three seconds to listen, and the run must not be over then."""
    chance, run, (_, moments) = random.Random(f"stop {seed} {number}"), directory / "run", whole("signals")
    settings, told = SETTINGS["signals"], directory / "told"
    early = settings["max_steps"] // 4
    when = {
        "time": ["time", round(chance.random() * early * PACE, 2)],
        "step": ["step", chance.randint(1, early)],
        "save": ["save", 1, chance.randint(1, moments["saves"][0])],
    }[TOLD[number]]
    plan = {"arguments": settings | {"enable_jit_checkpoint": jit}, "pace": PACE, "when": when, "tell": str(told)}
    code = trainer_runs.warm().run(run, plan | {"signal": int(signal.SIGTERM)}, directory / "log")
    begun, kept = json.loads(told.read_text())["begun"] if told.is_file() else 0, _step(newest(run))
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
    share = chance.randint(10, 99)  # in hundredths of what is needed
    if kind == "limited":
        return _limited(share, directory)
    try:
        with disk(directory / "small", max(16, size_of(whole("disks")[0]) * share // 100)) as small:
            if kind == "read-only":
                remount(small, "ro")
            first = _first(small / "run", directory / "log")
            remount(small, "rw,size=64m")
            second = again("disks", small / "run")
            return both(first, second)
    except CannotMount:
        return _limited(share, directory)


def _limited(share: int, directory: Path) -> str:
    """Of the largest file, as a quota has it."""
    largest = max(path.stat().st_size for path in whole("disks")[0].rglob("*") if path.is_file())
    first = _first(directory / "run", directory / "log", limit=[largest * share // 100, STEP])
    return both(first, again("disks", directory / "run"))


def _first(run: Path, log: Path, **plan: Any) -> str:
    """Without the room: it comes to the right end, or ends in one line."""
    code = trainer_runs.warm().run(run, {"arguments": SETTINGS["disks"]} | plan, log)
    output = log.read_text(errors="replace")
    return refusal(code, output) if code else came_to(0, output, _final(run), digest(whole("disks")[0] / "final"))


# --- the cases --------------------------------------------------------------------------------------------------------


def drawn(names: tuple[str, ...], run: Callable[[int, int, Path], str], count: int, seed: int) -> list[Case]:
    """At most eight: a run of Trainer takes a second or two."""
    return [Case(f"{name}.{i}", partial(run, i, seed)) for i, name in enumerate(names[: min(count, MOST)])]


def _cases(of: str, names: tuple[str, ...], run: Callable[[int, int, Path], str]) -> Cases:
    """None, and a line that says why, where there is no Trainer, or one that does not come to its end."""

    def cases(count: int, seed: int) -> Iterator[Case]:
        why = trainer_runs.warm().unusable  # not in a case: what a case starts is killed with it
        try:
            if not why:
                whole(of)
        except RuntimeError as error:
            why = str(error)
        if why:
            print(f"  {NAME}: not run: {why}", flush=True)
            return
        yield from drawn(names, run, count, seed)

    return cases


NAME = "transformers' Trainer"
KILLS = {f"{NAME}, resume_from_checkpoint=True": _cases("kills", KILLED, kill)}
SIGNALS = {
    NAME: _cases("signals", TOLD, partial(stop, False)),
    f"{NAME}, enable_jit_checkpoint": _cases("signals", TOLD, partial(stop, True)),
}
NUMBERS = {NAME: _cases("numbers", PLANTED, lambda number, seed, directory: spoil(PLANTED[number], directory))}
STORAGE = {f"{NAME}, resume_from_checkpoint=True": _cases("disks", DISKS, fill)}

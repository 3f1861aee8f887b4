"""Disks that are full, read-only, limited or gone, and others that use the same directories at the same time.

On a disk that is full at any size a run comes to the end of one that had room, or ends in one line; with room again,
the same command comes to that end, and nothing is left over. Of two runs in one directory the second is refused and
names the first; runs that start together on one empty cache all come to the same end; a reader never sees half of
final/.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faultdrill import baseline_runs
from benchmarks.faultdrill.disks import CannotMount, disk, remount, size_of
from benchmarks.faultdrill.scenes import End, Scene, refused, said
from benchmarks.faultdrill.suite import Case, Suite
from engine.data.mixture import permutation
from tests.ranks import Result, start

SCENES = ("sft", "dpo", "ppo", "dpo-lora")
LEFT_OVER = re.compile(r"tmp-.*|.*\.partial|\..*\.\d+")
PATIENCE = 2.0  # seconds in which the second run of a directory is refused
CHECKPOINTS = "small/checkpoints"


@functools.cache
def scene(of: str) -> Scene:
    """A stage that saves after every step, and the end of a run that nothing happened to."""
    stage, _, form = of.partition("-")
    made = Scene(stage, form or "whole", save_steps=1, save_total_limit=2, max_steps=6)
    made.whole("run", 2)
    made.end = End.of(made.now / "run")
    made.keep()
    return made


def left_over(*directories: Path) -> list[str]:
    """What a run has for a while and should be gone after the next."""
    return [str(path) for of in directories for path in of.rglob("*") if LEFT_OVER.fullmatch(path.name)]


def ended(made: Scene, result: Result, output_dir: Path) -> str:
    """'' where the run came to the end of the undisturbed one."""
    if not result.ok or "Traceback" in result.output:
        return f"exit statuses {result.codes}: {result.output[-300:]}"
    end = End.of(output_dir)
    if end.weights != made.end.weights:
        return "other bits"
    rows = end.rows == made.end.rows or any("metrics.jsonl" in line for line in said(result.output))
    return "" if rows else "other rows of metrics.jsonl, and not a word"


# --- one fault each: (scene, a number that the case's name holds, hook) -> what is wrong ------------------------------


def full(made: Scene, of: str, number: int, hook: str) -> str:
    """A disk for `of` (output, checkpoints, cache) of so many hundredths of what is needed."""
    needed = size_of(made.now / ("cache" if of == "cache" else "run"))
    changes = {
        "cache": {"cache_dir": made.now / "small" / "cache"},
        "checkpoints": {"checkpoint_dir": made.now / CHECKPOINTS},
    }
    name, flags = ("small/again" if of == "output" else "again"), changes.get(of, {})
    with disk(made.now / "small", max(16, needed * number // 100)) as small:
        first = made.launch(name, 2, hook, log="first", **flags)
        wrong = ended(made, first, made.now / name) if first.ok else refused(first)
        if wrong:
            return f"on a full disk: {wrong}"
        remount(small, "size=64m")
        second = made.launch(name, 2, log="second", **flags)
        if wrong := ended(made, second, made.now / name):
            return f"with room again: {wrong}"
        return f"left over: {found}" if (found := left_over(made.now / name, small)) else ""


def limited(made: Scene, of: str, number: int, hook: str) -> str:
    """No file may be larger than so many KiB after the second step, as a quota has it."""
    first = made.launch("again", 2, hook or "no_large_files", plant=f"{number}:3", log="first")
    if wrong := (ended(made, first, made.now / "again") if first.ok else refused(first)):
        return f"under the limit: {wrong}"
    second = made.launch("again", 2, log="second")
    wrong = ended(made, second, made.now / "again")
    return wrong or (f"left over: {found}" if (found := left_over(made.now / "again")) else "")


def mounted(fault: str) -> Callable[[Scene, str, int, str], str]:
    """--checkpoint_dir on a disk that something happens to at step 3, by a hook of tests/faults.py."""

    def run(made: Scene, of: str, number: int, hook: str) -> str:
        with disk(made.now / "small", 2**16) as small:
            result = made.launch("again", 2, f"tests.faults:{fault}", log="first", checkpoint_dir=small)
            wrong = ended(made, result, made.now / "again")
            warnings = [line for line in said(result.output) if line.startswith("warning: ")]
            return wrong or ("" if len(warnings) == 1 else f"{len(warnings)} warnings: {warnings}")

    return run


def read_only(made: Scene, of: str, number: int, hook: str) -> str:
    """--output_dir or --cache_dir where nothing may be written, before the run begins."""
    flags = {"cache_dir": made.now / "small" / "cache"} if of == "cache" else {}
    name = "again" if of == "cache" else "small/again"
    with disk(made.now / "small", 2**16) as small:
        remount(small, "ro")
        first = made.launch(name, 2, hook, log="first", **flags)
        if wrong := refused(first):
            return f"read-only: {wrong}"
        remount(small, "rw")
        return ended(made, made.launch(name, 2, log="second", **flags), made.now / name)


def two_runs(made: Scene, of: str, number: int, hook: str) -> str:
    """In one directory."""
    command = made.runs.command("again")
    module, lock = f"launch.{made.stage}", made.now / "again" / ".lock"
    first = start(
        module, command, 1, made.now / "first.log", f"tests.plants:{hook}" if hook else "tests.faults:slow_steps"
    )
    deadline = time.monotonic() + 60
    while not (lock.is_file() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    second = made.launch("again", 1, f"tests.plants:{hook}" if hook else "", log="second")
    took, allowed = time.monotonic() - began, PATIENCE * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    first[0].join(120)
    if wrong := refused(second):
        return f"the second: {wrong}"
    if f"in use by process {first[0].pid}" not in second.output:
        return f"the first is not named: {said(second.output)}"
    if took > allowed:
        return f"refused after {took:.1f} s"
    result = Result([first[0].exitcode], (made.now / "first.log").read_text())
    return "" if result.ok and (made.now / "again" / "final").is_dir() else f"the first ended with {result.codes}"


def one_cache(made: Scene, of: str, number: int, hook: str) -> str:
    """Of four runs that start together, and it is empty."""
    shutil.rmtree(made.now / "cache")
    names = [f"again{i}" for i in range(4)]
    logs = {name: made.now / f"{name}.log" for name in names}
    started = {name: start(f"launch.{made.stage}", made.runs.command(name), 1, logs[name]) for name in names}
    ends = set()
    for name, (process,) in started.items():
        process.join(180)
        result = Result([process.exitcode], logs[name].read_text())
        if not result.ok or said(result.output):
            return f"{name}: {result.codes}, {said(result.output)}"
        ends.add(End.of(made.now / name))
    stores = [p for p in (made.now / "cache" / "tokens").iterdir() if p.is_dir()]
    if len(ends) > 1 or len(stores) > 1:
        return f"{len(ends)} ends, {len(stores)} token stores"
    return f"left over: {found}" if (found := left_over(made.now / "cache")) else ""


def readers(made: Scene, of: str, number: int, hook: str) -> str:
    """Of final/, which look all the time."""
    final, whole = made.now / "again" / "final", made.now / "run" / "final"
    wanted = {p.relative_to(whole): _digest(p) for p in whole.rglob("*model.safetensors")}
    wanted |= {p.relative_to(whole): "" for p in whole.rglob("*") if p.is_file() and p.relative_to(whole) not in wanted}
    over, torn, seen = threading.Event(), [], []

    def look() -> None:
        while not over.is_set():
            if final.is_dir():
                seen.append(1)
                bad = [
                    str(n) for n, d in wanted.items() if not (final / n).is_file() or d not in ("", _digest(final / n))
                ]
                torn.extend(bad[:1])
            time.sleep(0.0005)

    eyes = [threading.Thread(target=look) for _ in range(2)]
    for eye in eyes:
        eye.start()
    result = made.launch("again", 2, hook, log="first")
    over.set()
    for eye in eyes:
        eye.join()
    if not seen:
        return "nobody saw final/"
    if torn:
        return f"{len(torn)} of {len(seen)} readings found {torn[0]} missing or half"
    return ended(made, result, made.now / "again")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the cases --------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[Scene, str, int, str], str], tuple[str, ...]]] = {
    "full": (full, ("output", "checkpoints", "cache")),
    "limited": (limited, ("output",)),
    "read-only-for-a-while": (mounted("checkpoints_read_only_from_step_3_to_6"), ("checkpoints",)),
    "gone": (mounted("unmount_checkpoints_at_step_3"), ("checkpoints",)),
    "read-only": (read_only, ("output", "cache")),
    "two-runs": (two_runs, ("output",)),
    "one-cache": (one_cache, ("cache",)),
    "readers": (readers, ("final",)),
}
TURN = (  # of twelve cases
    *("full/output", "full/output", "full/output", "full/checkpoints", "full/cache", "limited/output"),
    *("read-only/output", "read-only-for-a-while/checkpoints", "gone/checkpoints"),
    *("two-runs/output", "one-cache/cache", "readers/final"),
)
WITH_CACHE = ("sft", "dpo", "dpo-lora")


def run(name: str, hook: str, directory: Path) -> str:
    """The fault of that name: scene/kind/of/number."""
    of, kind, what, number = name.split("/")
    made = scene(of)
    made.again()
    try:
        wrong = KINDS[kind][0](made, what, int(number), hook)
    except CannotMount:
        wrong = limited(made, what, int(number), hook) if kind == "full" else ""  # said by the suite's left_out
    if wrong:
        shutil.copytree(made.now, directory, dirs_exist_ok=True, symlinks=True)
    return wrong


def case(name: str, hook: str = "") -> Case:
    """That of a name: scene/kind/of/number, a number of hundredths of the room that is needed, or of KiB."""
    return Case(name, partial(run, name, hook))


def cases(count: int, seed: int) -> Iterator[Case]:
    """Every twelve are one turn; scenes change from case to case, and how full a disk is."""
    for number in range(count):
        kind = TURN[number % len(TURN)]
        scenes = WITH_CACHE if kind.endswith("cache") else SCENES
        of = scenes[permutation(len(scenes), seed, kind, number)[0]]
        yield case(f"{of}/{kind}/{int(permutation(130, seed, 'share', number)[0]) + 1}")


def planted(hook: str, *names: str) -> Callable[[int, int], Iterator[Case]]:
    """A control: these cases, with a promise taken away."""
    return lambda count, seed: (case(name, hook) for name in names[:count])


SUITE = Suite(
    name="storage",
    unit="faults of disks, and of others in the same place",
    promise="one line, nothing lost, nothing left over",
    sizes=(12, 60),
    cases=cases,
    controls={
        "final/ is written in place": planted("final_is_written_in_place", "sft/readers/final/1"),
        "a directory has no lock": planted("directories_have_no_lock", "sft/two-runs/output/1"),
    },
    baselines=baseline_runs.STORAGE,
    left_out=(
        "a network file system (its locks, its stale handles): there is none here",
        "power loss: a file system that was not synced; process death alone is tried",
        "where a process may not mount: a full disk is a limit on the size of files then, one that is read-only or gone"
        " is not tried",
    ),
)

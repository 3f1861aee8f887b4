"""Ranks that watch over each other: which one hangs or is gone, where it was, and what all of them were doing.

Every rank leaves a row in the store once a second: how far its main thread is, and whether it waits. To blame is a rank
that has left nothing, or whose main thread neither reports nor waits, for --patience, while the one that looks waits. A
main thread waits where its innermost frame is a collective, the store, or a number that the device still computes.
Where its work is not counted (`progress.leniency`: loading, compiling, a file being written) it has 12 times that, and
where one rank works for all (a download) as long as it takes; elsewhere a single call that takes longer than --patience
is taken for a hang. If all wait for each other, all are named.

Left out: a rank whose one call holds the interpreter's lock leaves nothing, and so no stack of its own; a device that
hangs looks like one that computes, and is NCCL's watchdog's to find.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from engine import progress, signals, terminal, world
from engine.disk import only_mine
from engine.errors import UserError
from engine.flags import RunFlags
from engine.redact import redact
from engine.world import World

HUNG = 86  # exit status of a rank that has waited too long for another
BEAT = 1.0  # seconds between two rows of a rank
GONE = 5.0  # seconds without a row after which a rank is taken for dead, once this one was told to end
IN_THE_WORLD = ("_first", "_come", "agree")  # of engine/world.py: where a rank waits for the store
FOR_THE_DEVICE = (("log.py", "reduce"), ("optim.py", "step"), ("experience.py", "evaluate"))
WAITS, DEVICE, WORKS = "waits", "device", "works"


@dataclass
class Seen:
    """What is known of a rank, on the clock of the one who looks."""

    count: int = -1
    state: str = WORKS
    doing: str = "starting"
    leniency: float = progress.LONGER
    left: int = -1  # rows
    left_at: float = 0.0
    moved_at: float = 0.0

    def update(self, row: dict[str, Any], now: float) -> None:
        if row["row"] != self.left:
            self.left, self.left_at = row["row"], now
        if (row["count"], row["state"] == WORKS) != (self.count, self.state == WORKS) or self.moved_at == 0.0:
            self.moved_at = now
        self.count, self.state, self.doing = row["count"], row["state"], row["doing"]
        self.leniency = row["leniency"]


def what_it_does(frame: FrameType | None) -> str:
    """WAITS, DEVICE or WORKS, by the innermost frame of a main thread."""
    if frame is None:
        return WORKS
    path, name = frame.f_code.co_filename, frame.f_code.co_name
    if f"{os.sep}torch{os.sep}distributed{os.sep}" in path or (path == world.__file__ and name in IN_THE_WORLD):
        return WAITS
    is_device = (Path(path).name, name) in FOR_THE_DEVICE or name == "_engine_run_backward" or name == "synchronize"
    return DEVICE if is_device else WORKS


def to_blame(seen: list[Seen], me: int, patience: float, now: float) -> list[tuple[int, str]]:
    """(rank, what is wrong with it) of those that rank `me` has waited for too long; none where it does not wait."""
    if seen[me].state == WORKS or now - seen[me].moved_at <= patience:
        return []
    found, still = [], 0
    for rank, of in enumerate(seen):
        limit = patience * of.leniency
        silent, stands = now - of.left_at, of.state == WORKS and now - of.moved_at > limit
        if silent > (patience / 2 if stands else patience):
            found.append((rank, f"has given no sign of life for {_time(silent)}"))
        elif stands:
            found.append((rank, f"has not gone on for {_time(now - of.moved_at)}"))
        still += of.state == WAITS and now - of.moved_at > limit
    if not found and still == len(seen):
        return [(rank, f"has waited for {_time(now - of.moved_at)}") for rank, of in enumerate(seen)]
    return found


def gone(seen: list[Seen], me: int, now: float) -> list[int]:
    """Ranks that have left nothing for GONE seconds while this one, which was told to end, waits."""
    if seen[me].state == WORKS or signals.asked_for() < GONE:
        return []
    return [rank for rank, of in enumerate(seen) if rank != me and now - of.left_at > GONE]


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


class Watch:
    """Two threads of a rank: one talks to the store, which may block it; the other looks at the clock."""

    def __init__(self, world: World, patience: float, crash: Path) -> None:
        self.rank, self.size, self.patience, self.crash = world.rank, world.size, patience, crash
        self.beat = min(BEAT, patience / 6)
        now = time.monotonic()
        self.seen = [Seen(left_at=now) for _ in range(world.size)]
        self.over = threading.Event()
        self.verdict = ""  # this rank's
        self.said = ""  # the first rank's that had one
        self.claimed = threading.Event()
        self._store: dist.Store | None = None
        self._rows = 0
        self._talked = now
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"watch {work.__name__}")
            for work in (self._talk, self._look)
        ]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Where ranks end alike, rank 0, whose store it may be, ends last: c10d prints a page for every one that loses
        it.
        """
        self.over.set()
        for thread in self._threads:
            thread.join(2.0)  # one that a dead store holds goes with the process
        alike = kind is None or issubclass(kind, UserError | signals.Stopped)
        if not alike or self._store is None or self._threads[0].is_alive():
            return
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            keys, end = [f"left/{rank}" for rank in range(self.size)], time.monotonic() + 2.0
            while self.rank == 0 and not self._store.check(keys) and time.monotonic() < end:
                time.sleep(0.01)

    def _own(self) -> dict[str, Any]:
        self._rows += 1
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        return {
            "row": self._rows,
            "count": progress.count(),
            "state": what_it_does(main),
            "doing": progress.words(),
            "leniency": progress.leniency(),
            "asked": signals.asked(),
        }

    def _talk(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, with the rank that keeps it: collectives say so
            store = self._store = world.another_store(self.patience + 60)
            while not self.over.is_set():
                self._exchange(store)
                self._talked = time.monotonic()
                self.over.wait(self.beat)

    def _exchange(self, store: dist.Store) -> None:
        own = self._own()
        store.set(f"rank/{self.rank}", json.dumps(own))
        keys = [f"rank/{rank}" for rank in range(self.size)]
        if store.check(keys):
            for rank, row in enumerate(map(json.loads, store.multi_get(keys))):
                if rank != self.rank:
                    self.seen[rank].update(row, time.monotonic())
                if row["asked"]:
                    signals.ask(row["asked"])
        if self.verdict and not self.claimed.is_set():
            if store.add("verdicts", 1) == 1:
                store.set("verdict", self.verdict)
                self.said = self.verdict
            self.claimed.set()
        if not self.said and store.check(["verdict"]):
            self.said = store.get("verdict").decode()

    def _look(self) -> None:
        last = time.monotonic()
        while not self.over.wait(self.beat):
            now = time.monotonic()
            if now - last > 5 * self.beat + 1:  # this process was itself stopped, or starved: nobody is judged by that
                self._talked = now
                for of in self.seen:
                    of.left_at = of.moved_at = now
            last = now
            if self.said:
                self._end("")
            self.seen[self.rank].update(self._own(), now)
            if self.seen[self.rank].state != WORKS and now - self._talked > self.patience:
                silent = _time(now - self._talked)
                self._end(f"the store that rank 0, or torchrun, keeps has not answered rank {self.rank} for {silent}")
            if dead := gone(self.seen, self.rank, now):
                names = ", ".join(f"rank {rank} ({self.seen[rank].doing})" for rank in dead)
                _leave(f"error: rank {self.rank}: told to end, and {names} is gone", 1)
            if blamed := to_blame(self.seen, self.rank, self.patience, now):
                self._end("; ".join(f"rank {rank} {what} ({self.seen[rank].doing})" for rank, what in blamed))

    def _end(self, verdict: str) -> None:
        """Of one verdict, or several at once, one is printed; every rank that can leaves its stacks."""
        if verdict:
            self.verdict = verdict
            if self.claimed.wait(3 * self.beat) and self.said != verdict:
                verdict = ""
        stacks = _dump(self.crash / f"rank-{self.rank}.txt", verdict or self.said)
        line = f"error: {verdict}; stacks are in {self.crash}/: the same command goes on from the last checkpoint"
        if not stacks:
            line = f"error: {verdict}; {self.crash} cannot be written: no stacks"
        _leave(line if verdict else "", HUNG, wait=4 * self.beat if self.rank == 0 or verdict else 0.0)


def _dump(path: Path, why: str) -> bool:
    """The stacks of all threads of this rank; whether they could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        with open(path, "x", encoding="utf-8", opener=only_mine) as f:
            f.write(redact(f"{why}\nhere: {progress.words()}\n\n"))
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)
    except OSError:
        return False
    return True


def _leave(line: str, status: int, wait: float = 0.0) -> None:
    """Ends the process from a thread; the store may be this process's, and others still read it for so long."""
    if line:
        terminal.error(line)
    time.sleep(wait)
    os._exit(status)


@contextlib.contextmanager
def guarded(flags: RunFlags, here: World, compiles: bool = False) -> Iterator[None]:
    """In the body the run ends when it is asked to, and does not wait for ever for a rank that hangs."""
    progress.compiles(compiles)
    with signals.listening(flags.max_hours, world.job_left()), contextlib.ExitStack() as stack:
        if here.size > 1:
            stack.enter_context(Watch(here, 60 * flags.patience, Path(flags.output_dir).expanduser() / "crash"))
        yield

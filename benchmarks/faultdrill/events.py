"""Every change that a process makes to a file system, seen before it is made: a moment to die at.

Python's audit events tell of opening for writing, renaming, removing and making; os.fsync and the writers that are not
Python (safetensors' save_file) are wrapped. What was fsynced is told to a file, so that a death of the machine can be
played afterwards (`tear`): of everything that no fsync had reached, three quarters are lost.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ELSEWHERE = ("/dev/", "/proc/", "/sys/")


class Events:
    """Counts from `begin` to `end`; `strike(number)` is called before each, in the thread that makes the change."""

    def __init__(self, strike: Callable[[int], object], synced: Path | None = None) -> None:
        self.strike, self.count, self.names = strike, 0, []
        self._on, self._lock = False, threading.Lock()
        self._synced = None if synced is None else os.open(synced, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._wrap()
        sys.addaudithook(self._hear)

    def begin(self) -> None:
        self._on = True

    def end(self) -> None:
        self._on = False

    def _hear(self, event: str, args: tuple) -> None:
        if not self._on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITES and not str(path).startswith(ELSEWHERE):
                self._tell(f"open {path}")
        elif event in CHANGES:
            self._tell(f"{event} {args[0]}")

    def _tell(self, what: str) -> None:
        if not self._on:
            return
        with self._lock:
            self.count += 1
            number = self.count
            self.names.append(what)
        self.strike(number)

    def _wrap(self) -> None:
        fsync = os.fsync

        def told(of: Any) -> None:
            descriptor = of if isinstance(of, int) else of.fileno()
            self._tell("fsync")
            fsync(descriptor)
            if self._synced is not None:
                facts = os.fstat(descriptor)
                row = [facts.st_ino, facts.st_size, facts.st_mtime_ns]
                os.write(self._synced, (json.dumps(row) + "\n").encode())

        os.fsync = told
        from engine.log import JsonLines
        from engine.model import export
        from engine.model.adapters import files
        from engine.train import refcache

        for module in (export, files, refcache):
            module.save_file = self.around(module.save_file)
        settle = JsonLines._settle
        JsonLines._settle = lambda lines: (self._tell("write a line"), settle(lines))[1]

    def around(self, save_file: Callable) -> Callable:
        """A writer of (content, path) that audit events do not see, and whose changes count."""

        def saving(tensors: Any, path: Any, *args: Any, **options: Any) -> None:
            self._tell(f"write {path}")
            save_file(tensors, path, *args, **options)
            self._tell(f"written {path}")

        return saving


def without_fsync() -> None:
    """The broken variant: nothing is ever asked to reach the disk."""
    os.fsync = lambda of: None


def listing(directory: Path) -> dict[int, tuple[int, int]]:
    """inode → (bytes, time of the last change) of every file, which are on the disk by now."""
    facts = [path.lstat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return {of.st_ino: (of.st_size, of.st_mtime_ns) for of in facts}


def tear(directory: Path, before: dict[int, tuple[int, int]], synced: Path) -> int:
    """Cuts every file that changed since `before` back to what an fsync had reached and a quarter of the rest; how
    many.
    """
    reached = {}
    for line in synced.read_text().splitlines() if synced.is_file() else []:
        inode, size, changed = json.loads(line)
        reached[inode] = (size, changed)
    torn = 0
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        facts = path.lstat()
        now = (facts.st_size, facts.st_mtime_ns)
        if now in (before.get(facts.st_ino), reached.get(facts.st_ino)):
            continue
        kept = reached.get(facts.st_ino, (0, 0))[0]
        kept = kept if kept < facts.st_size else 0  # written anew under the same length: none of it is sure
        os.truncate(path, kept + (facts.st_size - kept) // 4)
        torn += 1
    return torn

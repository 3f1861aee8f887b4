"""Judging a batch of responses in worker processes, in order, and surviving the death of any of them.

One pipe a worker, a few rows in flight on each, results put back in the order of the rows. A worker that dies, or that
says nothing for `silence` seconds (no verifier can be that slow; the clock never decides a verdict), costs the row that
it was at the status 'error', and is replaced; the rows that waited behind it are given to others.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple

from verifiers.verdict import Verdict, error

MAX_ERROR_RATE = 0.01
MAX_REASON = 1000
PIPE_BYTES = 32 * 1024  # unread by a worker; below what any pipe holds, so that a hung worker cannot block the sender
MEMORY_GIB = 4  # of a worker, so that a mistake of ours costs a worker and not the host
Row = tuple  # (response, ground_truth, dataset)
Job = tuple[int, Row]  # a row and its number


class ScoredBatch(NamedTuple):
    """The verdicts of a batch in the order of its rows, and how many of them are errors, to be masked from training."""

    verdicts: list[Verdict]
    errors: int

    @property
    def scores(self) -> list[float]:
        """The scores in the order of the rows; 0 where there is no verdict."""
        return [verdict.score for verdict in self.verdicts]

    @property
    def mask(self) -> list[bool]:
        """True where the verdict counts."""
        return [verdict.status == "ok" for verdict in self.verdicts]

    @property
    def too_many_errors(self) -> bool:
        """More than 1 % of the batch has no verdict: the step must not be trained on, and the run should stop."""
        return self.errors > MAX_ERROR_RATE * len(self.verdicts)


class Pool:
    """`with Pool(workers=4) as pool: batch = pool.score(rows)`; rows are (response, ground_truth, dataset).

    workers: processes (default: the cores this process may use). mode, loose, combine: as for `verify`. in_flight: rows
    given to a worker before its answers are awaited (back-pressure: no more than workers x in_flight are ever copied).
    module: a user's own verifier (custom.py), for rows that name it. silence: seconds after which a row has no verdict.
    judge: 'module:function' that takes a row and these options. The workers are fresh interpreters, not forks: a fork
    of a process with threads or a CUDA context is unsafe, and they inherit neither the main module nor the environment.
    """

    def __init__(
        self,
        workers: int | None = None,
        mode: str = "default",
        *,
        loose: bool = False,
        combine: str = "fraction",
        module: str | None = None,
        in_flight: int = 16,
        silence: float = 60.0,
        judge: str = "",
    ):
        self.options: dict[str, Any] = {"mode": mode, "loose": loose, "combine": combine}
        if module is not None:
            self.options["module"] = module
        self.in_flight, self.silence = in_flight, silence
        self.judge = judge or ("verifiers.route:verify" if module is None else "verifiers.custom:judged")
        self.killed = 0  # workers that died or were killed since the pool began
        count = workers or _cores()
        self._workers = [self._start() for _ in range(count)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def score(self, rows: Iterable[Row]) -> ScoredBatch:
        """The verdicts of all rows, in their order."""
        verdicts = list(self.imap(rows))
        return ScoredBatch(verdicts, sum(verdict.status == "error" for verdict in verdicts))

    def imap(self, rows: Iterable[Row]) -> Iterator[Verdict]:
        """The verdicts one by one in the order of the rows, which are drawn only as workers become free."""
        jobs = enumerate(rows)
        done: dict[int, Verdict] = {}
        again: deque[Job] = deque()
        wanted, drawn = 0, False
        while True:
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1
            drawn |= self._feed(jobs, done, again)
            if any(worker.waiting for worker in self._workers):
                self._collect(done, again)
            elif drawn and not again and wanted not in done:
                return

    def _feed(self, jobs: Iterator[Job], done: dict[int, Verdict], again: deque[Job]) -> bool:
        """Give every worker what it may hold, of the rows in `again` first; True when all rows are drawn."""
        drawn = False
        for worker in self._workers:
            while len(worker.waiting) < self.in_flight and len(done) < 64 * self.in_flight * len(self._workers):
                job = again.popleft() if again else next(jobs, None)
                if job is None:
                    drawn = True
                    break
                if not worker.send(job):
                    again.appendleft(job)
                    break
        return drawn

    def _collect(self, done: dict[int, Verdict], again: deque[Job]) -> None:
        """Wait for answers; put them into `done`, and the rows of a dead worker but its first into `again`."""
        busy = {worker.pipe: worker for worker in self._workers if worker.waiting}
        ready = set(wait(list(busy), timeout=1.0))
        for pipe, worker in busy.items():
            if pipe in ready:
                worker.receive(done)
        for i, worker in enumerate(self._workers):
            if worker.waiting and (worker.dead or time.monotonic() - worker.heard > self.silence):
                lost = list(worker.waiting.items())
                why = "was killed" if worker.dead else f"gave no verdict within {self.silence:g} s and was killed"
                done[lost[0][0]] = error(f"the worker process {why}")
                again.extend(lost[1:])
                self.killed += 1
                worker.end()
                self._workers[i] = self._start()

    def _start(self) -> "_Worker":
        return _Worker(self.judge, self.options)


class _Worker:
    """A process that judges, its pipe, and the rows that it has been given."""

    def __init__(self, judge: str, options: dict):
        self.pipe, theirs = Pipe()
        command = f"from verifiers.pool import serve; serve({theirs.fileno()}, {judge!r}, {options!r})"
        python_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {"PYTHONPATH": python_path, "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=(theirs.fileno(),),
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self.waiting: dict[int, Row] = {}  # in the order they were sent, which is the order they are answered
        self.unread: dict[int, int] = {}  # bytes of each
        self.heard = time.monotonic()
        self.dead = False

    def send(self, job: Job) -> bool:
        """Give the worker a row, as JSON; False if its pipe might be full. An idle worker reads, so it takes a row of
        any size."""
        try:
            blob = json.dumps(job).encode()
        except (TypeError, ValueError, RecursionError):
            # a ground truth that no file could hold: the worker calls it an error
            blob = json.dumps((job[0], ("", None, None))).encode()
        if self.waiting and sum(self.unread.values()) + len(blob) > PIPE_BYTES:
            return False
        if not self.waiting:
            self.heard = time.monotonic()
        self.waiting[job[0]], self.unread[job[0]] = job[1], len(blob)
        with contextlib.suppress(OSError):  # a dead worker is noticed by `receive`, after the answers that it left
            self.pipe.send_bytes(blob)
        return True

    def receive(self, done: dict[int, Verdict]) -> None:
        """Put the next answer into `done`, or note that the worker is dead."""
        try:
            number, verdict = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.dead = True
            return
        done[number] = Verdict(*verdict)
        del self.waiting[number], self.unread[number]
        self.heard = time.monotonic()

    def end(self) -> None:
        """Kill the process."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def serve(fileno: int, judge: str, options: dict) -> None:
    """A worker's life: a row in, a verdict out, until the pipe closes."""
    limit_memory()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a job: the trainer ends its workers
    module, _, function = judge.partition(":")
    verify = getattr(import_module(module), function)
    pipe = Connection(fileno)
    while True:
        try:
            number, row = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        verdict = verify(*row, **options)
        pipe.send_bytes(json.dumps((number, (verdict.score, verdict.reason[:MAX_REASON], verdict.status))).encode())


def limit_memory() -> None:
    """Let this process have no more than MEMORY_GIB of address space, where the system knows such a limit."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    except (ImportError, ValueError, OSError):
        pass


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1

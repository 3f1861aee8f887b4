"""Judging a batch of responses in worker processes, in order, and surviving the death of any of them.

One pipe a worker, a few rows in flight on each, results put back in the order of the rows. A worker that dies, or that says
nothing for `silence` seconds (no verifier can be that slow; the clock never decides a verdict), costs the row that it
was at the status 'error', and is replaced; the rows that waited behind it are given to others.
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from typing import NamedTuple

from .route import verify
from .verdict import Verdict, error

MAX_ERROR_RATE = 0.01
Row = tuple  # (response, ground_truth, dataset)


class ScoredBatch(NamedTuple):
    """The verdicts of a batch in the order of its rows, and how many of them are errors (to be masked from training)."""

    verdicts: list[Verdict]
    errors: int

    @property
    def scores(self) -> list[float]:
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
    """

    def __init__(
        self,
        workers: int | None = None,
        mode: str = "default",
        *,
        loose: bool = False,
        combine: str = "fraction",
        in_flight: int = 16,
        silence: float = 60.0,
        judge=verify,
    ):
        self.options = {"mode": mode, "loose": loose, "combine": combine}
        self.in_flight, self.silence, self.judge = in_flight, silence, judge
        self.killed = 0  # workers that died or were killed since the pool began
        self._context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        count = workers or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._workers = [self._start() for _ in range(count)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
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
        rows, done, again = enumerate(rows), {}, deque()
        wanted, drawn = 0, False
        while True:
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1
            for worker in self._workers:
                while len(worker.waiting) < self.in_flight and len(done) < 64 * self.in_flight * len(self._workers):
                    job = again.popleft() if again else next(rows, None)
                    if job is None:
                        drawn = True
                        break
                    worker.send(job)
            if not any(worker.waiting for worker in self._workers):
                if drawn and not again and wanted not in done:
                    return
                continue
            self._collect(done, again)

    def _collect(self, done: dict, again: deque) -> None:
        """Wait for answers; put them into `done`, and the rows of a dead worker but its first into `again`."""
        busy = {worker.pipe: worker for worker in self._workers if worker.waiting}
        ready = wait(list(busy), timeout=1.0)
        for pipe in ready:
            busy[pipe].receive(done)
        for i, worker in enumerate(self._workers):
            if worker.waiting and (worker.dead or time.monotonic() - worker.heard > self.silence):
                lost = list(worker.waiting.items())
                done[lost[0][0]] = error("the worker process was killed")
                again.extend(lost[1:])
                self.killed += 1
                worker.end()
                self._workers[i] = self._start()

    def _start(self) -> "_Worker":
        return _Worker(self._context, self.judge, self.options)


class _Worker:
    def __init__(self, context, judge, options: dict):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, judge, options), daemon=True)
        self.process.start()
        theirs.close()
        self.waiting: dict[int, Row] = {}  # in the order they were sent, which is the order they are answered
        self.heard = time.monotonic()
        self.dead = False

    def send(self, job: tuple[int, Row]) -> None:
        if not self.waiting:
            self.heard = time.monotonic()
        self.waiting[job[0]] = job[1]
        try:
            self.pipe.send(job)
        except OSError:
            self.dead = True

    def receive(self, done: dict) -> None:
        try:
            number, verdict = self.pipe.recv()
        except (EOFError, OSError):
            self.dead = True
            return
        done[number] = verdict
        self.waiting.pop(number, None)
        self.heard = time.monotonic()

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe, judge, options: dict) -> None:
    """A worker's life: a row in, a verdict out. Bounded memory, so that a mistake of ours costs a worker, not the host."""
    limit_memory()
    while True:
        try:
            number, row = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send((number, judge(*row, **options)))


def limit_memory(gibibytes: int = 4) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (gibibytes << 30, gibibytes << 30))
    except (ImportError, ValueError, OSError):
        pass

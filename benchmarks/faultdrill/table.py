"""Cases, controls and baselines of a suite, one after the other; and the table of all suites."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.faultdrill.suite import Case, Cases, Suite

BOUND = 240.0  # seconds after which a case has failed
CONTROL_CASES = 6  # of which one has to fail
QUIET = 120.0  # seconds after which a suite says how far it is
HEADER = ("suite", "passed", "controls caught", "baselines passed", "seconds", "promise")


class TimeIsUp(BaseException):
    """Not to be taken for an error of what a case runs."""


@dataclass
class Failure:
    case: str
    problem: str
    replay: str


@dataclass
class Outcome:
    """What came of one suite."""

    name: str
    unit: str
    promise: str
    run: int = 0
    failures: list[Failure] = field(default_factory=list)
    controls: dict[str, str] = field(default_factory=dict)  # what caught it, or ''
    blind: dict[str, str] = field(default_factory=dict)  # why a control was not caught
    baselines: dict[str, list[int]] = field(default_factory=dict)  # passed, run
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, found: dict[str, Any]) -> Outcome:
        """As `as_json` gives it."""
        known = {name: value for name, value in found.items() if name not in ("passed", "ok")}
        return cls(**known | {"failures": [Failure(**of) for of in found["failures"]]})

    @property
    def passed(self) -> int:
        return self.run - len(self.failures)

    @property
    def ok(self) -> bool:
        return self.run > 0 and not self.failures and not self.blind

    def row(self) -> list[str]:
        caught = f"{len(self.controls) - len(self.blind)} of {len(self.controls)}" if self.controls else "none"
        peers = ", ".join(f"{name} {passed} of {run}" for name, (passed, run) in self.baselines.items()) or "not run"
        return [self.name, f"{self.passed} of {self.run} {self.unit}", caught, peers, f"{self.seconds:.0f}"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "ok": self.ok}


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """The body is given up after so long, and what it started with it."""

    def give_up(*_: Any) -> None:
        raise TimeIsUp(f"it took longer than {seconds:.0f} s")

    before = {process.pid for process in multiprocessing.active_children()}
    handler = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        for process in multiprocessing.active_children():
            if process.pid not in before:
                process.kill()
                process.join()


def tried(case: Case, directory: Path, bound: float = BOUND) -> tuple[str, bool]:
    """(what is wrong or '', whether the case itself came to that verdict). Whatever it raises is a failure."""
    try:
        with bounded(bound):
            return " ".join(case.run(directory).split()), True
    except TimeIsUp as late:
        return str(late), False
    except Exception as error:  # a case may fail in any way, and the others must still run
        return measure.reason(error), False


def in_a_directory(case: Case) -> tuple[str, bool]:
    with tempfile.TemporaryDirectory(prefix="faultdrill-", ignore_cleanup_errors=True) as directory:
        return tried(case, Path(directory))


def run(suite: Suite, count: int, seed: int, baselines: bool, say: Callable[[str], None]) -> Outcome:
    """Runs a suite whole; says every failure as it comes."""
    outcome, began = Outcome(suite.name, suite.unit, suite.promise), time.monotonic()
    said = began
    for case in itertools.islice(suite.cases(count, seed), count):
        outcome.run += 1
        problem, _ = in_a_directory(case)
        if problem:
            outcome.failures.append(Failure(case.name, problem, f"--replay {suite.name}:{seed}:{case.name}"))
            say(f"  failed: {case.name}: {problem}")
        if time.monotonic() - said > QUIET:
            said = time.monotonic()
            say(f"  {suite.name}: {outcome.run} of {count}")
    for name, cases in suite.controls.items():
        outcome.controls[name] = caught = _caught(cases, seed, outcome, name)
        if not caught:
            say(f"  not caught: {name}: {outcome.blind[name]}")
    outcome.seconds = time.monotonic() - began
    for name, cases in suite.baselines.items() if baselines else ():
        tally = outcome.baselines.setdefault(name, [0, 0])
        for case in itertools.islice(cases(count, seed), count):
            problem, judged = in_a_directory(case)
            if not judged:
                say(f"  no verdict: {name}: {case.name}: {problem}")
            tally[0], tally[1] = tally[0] + (not problem), tally[1] + 1
            if problem:
                outcome.notes.append(f"{name}: {case.name}: {problem}")
    return outcome


def _caught(cases: Cases, seed: int, outcome: Outcome, name: str) -> str:
    """The verdict that caught a broken variant. What a case raises is no verdict: the drill itself may be broken."""
    why = "it has no cases"
    for case in itertools.islice(cases(CONTROL_CASES, seed), CONTROL_CASES):
        problem, judged = in_a_directory(case)
        if problem and judged:
            return f"{case.name}: {problem}"
        why = problem or "every case of it passed"
    outcome.blind[name] = why
    return ""


def text(outcomes: Sequence[Outcome]) -> str:
    """The table, and below it what failed and how it is done again."""
    rows = [[*of.row(), of.promise] for of in outcomes]
    lines = [_aligned([HEADER, *rows])]
    for of in outcomes:
        lines += [f"failed: {of.name} {f.case}: {f.problem}; again: {f.replay}" for f in of.failures]
        lines += [f"not caught: {of.name}, {name}: {why}" for name, why in of.blind.items()]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """All columns are words here."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

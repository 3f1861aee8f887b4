"""Plants the mutants of the catalogue one after another in a copy of the tree, and says which test notices each."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.catalogue import Mutant

ROOT = Path(__file__).resolve().parents[2]
WORKERS, SECONDS = 2, 120  # copies at a time; a run that takes longer is taken to hang
MOST_SURVIVORS = 0.03  # of those that can be seen
CAUGHT, SURVIVED, STALE, EQUIVALENT = "caught", "survived", "stale", "equivalent"
NOTICED = re.compile(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - .*)?$")


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: one of the four words above, and by which test, or why."""

    mutant: Mutant
    verdict: str
    by: str
    seconds: float

    def __str__(self) -> str:
        loud = self.verdict if self.verdict in (CAUGHT, EQUIVALENT) else self.verdict.upper()
        return f"{self.mutant.name}: {loud}{' by ' if self.verdict == CAUGHT else ', '}{self.by} ({self.seconds:.1f} s)"


class Copy:
    """The tracked files in a directory of their own, with a warm process that runs tests on them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.output = directory, directory.with_name(f"{directory.name}.out")
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, directory / name)
        environment = os.environ | {"PYTHONPATH": str(directory), "PYTHONHASHSEED": "0"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-m", "tests.mutants.warm"]
        self.process = subprocess.Popen(command, cwd=directory, env=environment, text=True, **pipes)

    def run(self, tests: Iterable[str], seconds: float = SECONDS) -> tuple[int | None, str]:
        """(exit status of pytest, None after a time-out; the first test that failed)."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([[*tests], seconds, str(self.output)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process in {self.directory} has ended")
        failed = NOTICED.search(self.output.read_text(encoding="utf-8", errors="replace"))
        return json.loads(answer), failed[1] if failed else ""

    def judge(self, mutant: Mutant) -> Outcome:
        """Plants the mutant, runs its tests, and takes it out again."""
        start, path = time.monotonic(), self.directory / mutant.file
        before = path.read_text(encoding="utf-8")
        if (times := before.count(mutant.old)) != 1:
            return Outcome(mutant, STALE, f"its old text stands {times} times in {mutant.file}", 0.0)
        try:
            self._write(path, before.replace(mutant.old, mutant.new))
            status, test = self.run(mutant.tests)
        finally:
            self._write(path, before)
        seconds = time.monotonic() - start
        if status == 0:
            return Outcome(mutant, *((EQUIVALENT, mutant.equivalent) if mutant.equivalent else (SURVIVED, "")), seconds)
        if mutant.equivalent:
            return Outcome(mutant, STALE, f"{test} sees it, though it is called equivalent", seconds)
        return Outcome(mutant, CAUGHT, test or ("time-out" if status is None else f"exit status {status}"), seconds)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):  # which may be as old and as long
            compiled.unlink()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def drill(mutants: list[Mutant], say: Callable[[str], None] = print) -> list[Outcome]:
    """The outcome of every mutant. Exits where tests fail without one."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as root:
        copies = [Copy(Path(root) / str(i)) for i in range(min(WORKERS, len(mutants)))]
        try:
            tests = sorted({test for mutant in mutants for test in mutant.tests})
            start = time.monotonic()
            parts = [part for i in range(WORKERS) if (part := tests[i::WORKERS])]
            whole = _in_parallel(copies, parts, lambda copy, part: copy.run(part, 1200))
            for status, test in whole:
                if status != 0:
                    raise SystemExit(f"without any mutant the tests end in status {status}: {test}")
            say(f"without any mutant {len(tests)} files and tests pass ({time.monotonic() - start:.0f} s)")

            def judge(copy: Copy, mutant: Mutant) -> Outcome:
                outcome = copy.judge(mutant)
                say(str(outcome))
                return outcome

            return _in_parallel(copies, mutants, judge)
        finally:
            for copy in copies:
                copy.close()


def _in_parallel(copies: list[Copy], work: list, do: Callable) -> list:
    """What `do(copy, item)` gives for every item, in order; each copy does one at a time."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for item in enumerate(work):
        waiting.put(item)
    found: dict[int, object] = {}
    problems: list[BaseException] = []

    def serve(copy: Copy) -> None:
        try:
            while not problems:
                i, item = waiting.get_nowait()
                found[i] = do(copy, item)
        except queue.Empty:
            pass
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=serve, args=(copy,)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return [found[i] for i in range(len(work))]


def table(outcomes: list[Outcome]) -> list[str]:
    """By room: how many there are, and what became of them."""
    words = (CAUGHT, SURVIVED, EQUIVALENT, STALE)
    counts = Counter((room, outcome.verdict) for outcome in outcomes for room in (outcome.mutant.room, "all"))
    rooms = [*sorted({outcome.mutant.room for outcome in outcomes}), "all"]
    lines = [f"{'room':<16}" + "".join(f"{word:>12}" for word in ("mutants", *words))]
    for room in rooms:
        numbers = [counts[room, word] for word in words]
        lines.append(f"{room:<16}" + "".join(f"{number:>12}" for number in (sum(numbers), *numbers)))
    return lines


def status(outcomes: list[Outcome]) -> int:
    """1 if a mutant is stale, or too many survive."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    seen = counts[CAUGHT] + counts[SURVIVED]
    return int(counts[STALE] > 0 or counts[SURVIVED] > MOST_SURVIVORS * seen)

"""A rank that hangs or is gone, through the real entry point: named with its step, stacks of all, status 86."""

from __future__ import annotations

import math
import re
import threading
import time

import pytest

from engine import signals
from engine.watch import DEVICE, WAITS, WORKS, Seen, gone, to_blame, what_it_does
from tests.families import save_family
from tests.launch.test_equivalence import Runs
from tests.ranks import start

PATIENCE = 3.0  # seconds


@pytest.fixture(scope="module")
def runs(tmp_path_factory, embedded_dir) -> Runs:
    root = tmp_path_factory.mktemp("hung")
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, initializer_range=0.05),
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_conversations,
        "batch_size": 12,
        "max_steps": 6,
        "micro_batch_tokens": 500,
        "patience": PATIENCE / 60,
        "sample_tokens": 0,
    }
    return Runs("sft", root, flags)


def errors(output: str) -> list[str]:
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("error: ")]


HANGS = {
    "loop_on_rank_1_at_step_4": (2, r"rank 1 has not gone on for \d s \(step 4, .*\)", {0: "all_reduce", 1: "forever"}),
    "call_on_rank_1_at_step_4": (
        2,
        r"rank 1 has not gone on for \d s \(step 4, .*\)",
        {0: "all_reduce", 1: "stepping"},
    ),
    "stop_rank_1_at_step_4": (2, r"rank 1 has given no sign of life for \d s \(step 4, .*\)", {0: "all_reduce"}),
    "wait_for_each_other_at_step_4": (
        2,
        r"rank 0 has waited for \d s \(step 4, .*\); rank 1 has waited for \d s \(step 4, .*\)",
        {0: "recv", 1: "recv"},
    ),
}


SLOW = ("call_on_rank_1_at_step_4", "wait_for_each_other_at_step_4")


@pytest.mark.parametrize("hook", [pytest.param(h, marks=pytest.mark.drill if h in SLOW else ()) for h in HANGS])
def test_a_rank_that_hangs_is_named(hook, runs):
    ranks, said, stacks = HANGS[hook]
    begun = time.monotonic()
    hung = runs.launch(hook, ranks, hook)
    assert hung.codes[0] == 86 and set(hung.codes) <= {86, -9}, hung.output
    (line,) = errors(hung.output)
    crash = runs.root / hook / "crash"
    rest = f"; stacks are in {crash}/: the same command goes on from the last checkpoint"
    assert line.endswith(rest) and re.fullmatch(f"error: {said}", line.removesuffix(rest)), line
    found = {int(path.stem.removeprefix("rank-")): path.read_text() for path in crash.iterdir()}
    assert found.keys() == stacks.keys()
    for rank, function in stacks.items():
        assert f" in {function}\n" in found[rank] and "here: step 4, " in found[rank]
    assert time.monotonic() - begun < 40


def test_the_rank_that_keeps_the_store_is_stopped(runs):
    log = runs.root / "store.log"
    kept, other = start("launch.sft", runs.command("store"), 2, log, "tests.faults:stop_rank_0_at_step_4")
    other.join(60)
    kept.kill()
    kept.join()
    assert other.exitcode == 86, log.read_text()
    (line,) = errors(log.read_text())
    assert re.match(r"error: the store that rank 0, or torchrun, keeps has not answered rank 1 for \d s; stacks", line)
    assert " in all_reduce\n" in (runs.root / "store" / "crash" / "rank-1.txt").read_text()


def test_work_that_lasts_is_no_hang(runs, tmp_path):
    """Tokenising, loading, and a call of all ranks at once, each for longer than patience."""
    slow = runs.launch("slow", 2, "load_slowly_on_rank_1", cache_dir=tmp_path, max_steps=2)
    assert slow.ok, slow.output
    assert runs.launch("long_step", 2, "call_of_four_seconds_at_step_4").ok


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_in_one_line(rank, runs):
    dead = runs.launch(f"killed_{rank}", 2, f"kill_rank_{rank}_at_step_4")
    assert dead.codes[rank] == -9 and dead.codes[1 - rank] == 1, dead.output
    assert [re.match(rf"error: rank {1 - rank}: another rank died", line) for line in errors(dead.output)] != [None]
    assert len(errors(dead.output)) == 1


# --- who is to blame --------------------------------------------------------------------------------------------------


def seen(*ranks: tuple[str, float, float, float]) -> list[Seen]:
    """Of (state, last row, last progress, leniency), at second 100."""
    return [
        Seen(count=1, state=state, doing="sampling", leniency=leniency, left=1, left_at=left, moved_at=moved)
        for state, left, moved, leniency in ranks
    ]


WAITING = (WAITS, 100.0, 80.0, 1)
CASES = {
    "nobody waits": ([(WORKS, 100.0, 10.0, 1), (WORKS, 100.0, 10.0, 1)], []),
    "not for long": ([(WAITS, 100.0, 95.0, 1), (WORKS, 100.0, 10.0, 1)], []),
    "it works and does not go on": ([WAITING, (WORKS, 100.0, 80.0, 1)], [1]),
    "it went on lately": ([WAITING, (WORKS, 100.0, 95.0, 1)], []),
    "it may take long": ([WAITING, (WORKS, 100.0, 80.0, 12)], []),
    "it may not take that long": ([(WAITS, 100.0, -50.0, 1), (WORKS, 100.0, -25.0, 12)], [1]),
    "it works for all": ([(WAITS, 100.0, -50.0, 12), (WORKS, 100.0, -9e9, math.inf)], []),
    "no sign of life": ([WAITING, (WAITS, 80.0, 80.0, 12)], [1]),
    "all wait": ([WAITING, (WAITS, 100.0, 85.0, 1)], [0, 1]),
    "one waits for its device": ([WAITING, (DEVICE, 100.0, 80.0, 1)], []),
    "from a device's wait": ([(DEVICE, 100.0, 80.0, 1), (WORKS, 100.0, 80.0, 1)], [1]),
    "two of three": ([WAITING, (WORKS, 100.0, 80.0, 1), (WORKS, 70.0, 70.0, 1)], [1, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_to_blame(case):
    ranks, blamed = CASES[case]
    assert [rank for rank, _ in to_blame(seen(*ranks), 0, 10.0, 100.0)] == blamed


def test_a_rank_that_is_told_to_end_does_not_wait_for_a_dead_one(monkeypatch):
    """torchrun ends the ranks that one which died leaves behind, and waits half a minute for each."""
    ranks = seen(WAITING, (WAITS, 80.0, 80.0, 1), (WAITS, 99.0, 80.0, 1))
    monkeypatch.setattr(signals, "asked_for", lambda: 6.0)
    assert gone(ranks, 0, 100.0) == [1]
    assert gone(seen((WORKS, 100.0, 80.0, 1), (WAITS, 80.0, 80.0, 1)), 0, 100.0) == []
    monkeypatch.setattr(signals, "asked_for", lambda: 0.0)
    assert gone(ranks, 0, 100.0) == []


def test_what_a_main_thread_does():
    """By its innermost frame: here one that waits on an event, in Python's own library."""
    import sys

    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    assert what_it_does(sys._current_frames()[other.ident]) == WORKS and what_it_does(None) == WORKS
    over.set()
    other.join()

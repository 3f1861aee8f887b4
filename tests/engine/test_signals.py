"""Asked to end: the clocks, the votes of all ranks, who waits for a lock; signals themselves are in
tests/launch/test_stopped.py.
"""

from __future__ import annotations

import fcntl
import math
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import disk, signals, world


@pytest.fixture(autouse=True)
def nothing_asked():
    yield
    with signals.listening(None, None):
        pass


def test_the_clocks(monkeypatch):
    """The earlier of the two counts, less the longest save; --max_hours from the start of the process."""
    monkeypatch.setattr(signals, "age", lambda: 1800.0)
    monkeypatch.setattr(signals, "LOOK", 60.0)
    with signals.listening(None, None):
        assert signals.time_left() == "" and signals.no_time_for(1e9) == ""
    with signals.listening(1.0, None):
        assert signals.time_left() == "ends by --max_hours, in 0 h 30 min, with a checkpoint"
        assert (signals.no_time_for(1700), signals.no_time_for(1900)) == ("", "--max_hours")
        signals.a_save_took(200.0)
        signals.a_save_took(100.0)
        assert (signals.no_time_for(1500), signals.no_time_for(1700)) == ("", "--max_hours")
        assert signals.vote() == 0
        signals.a_step_took(1700.0)
        signals.a_step_took(1.0)
        assert signals.read(signals.vote()) == ("--max_hours", False)
    with signals.listening(1.0, 600.0):
        assert signals.time_left() == "ends by the end of the job, in 0 h 10 min, with a checkpoint"
        assert signals.no_time_for(700) == "the end of the job" and signals.asked() == ""


def test_a_time_that_is_over_is_a_reason_to_end(monkeypatch):
    monkeypatch.setattr(signals, "LOOK", 0.01)
    with signals.listening(None, 0.0):
        end = time.monotonic() + 20
        while not signals.asked() and time.monotonic() < end:
            time.sleep(0.01)
        assert signals.asked() == "the end of the job"


def test_the_age_of_a_process():
    assert 0 < signals.age() < 24 * 3600 and signals.age() <= signals.age()


@pytest.mark.parametrize("said, left", [("", None), ("soon", None), ("1000060", 60.0), ("-5", None)])
def test_the_time_that_slurm_leaves(said, left, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", said)
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    assert world.job_left() == left


@given(st.lists(st.tuples(st.sampled_from(signals.REASONS), st.booleans()), min_size=1, max_size=1000))
def test_a_sum_of_votes_says_what_any_rank_wants(ranks):
    """The last of the reasons, and whether a checkpoint is owed: as every rank reads the same sum."""
    votes = 0.0
    for why, owes in ranks:
        with signals.listening(None, None):
            signals.ask(why)
            signals.owe(owes)
            votes += signals.vote()
    signals.count(votes)
    wanted = max((why for why, _ in ranks), key=signals.REASONS.index), any(owes for _, owes in ranks)
    assert signals.decided() == wanted and signals.decided() is None
    assert votes < 2**53 and math.isfinite(votes)


def test_a_rollout_ends_only_where_it_may():
    signals.ask("SIGTERM")
    signals.between_tokens()
    signals.rollouts_may_end(True)
    with pytest.raises(signals.GivenUp):
        signals.between_tokens()


def test_who_waits_for_a_lock_can_be_asked_to_end(tmp_path):
    holder, waiting = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    fcntl.flock(holder, fcntl.LOCK_EX)
    threading.Timer(0.3, signals.ask, ["SIGTERM"]).start()
    with pytest.raises(signals.Stopped, match="SIGTERM, while another run had the lock"):
        disk.take_in_turn(waiting)
    fcntl.flock(holder, fcntl.LOCK_UN)
    disk.take_in_turn(waiting)
    os.close(holder)
    os.close(waiting)

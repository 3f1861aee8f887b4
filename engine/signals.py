"""A run that is asked to end: by SIGTERM or SIGUSR1, by --max_hours, or by the time that a job was given.

A handler written in Python runs between two operations of the main thread, and one operation may take minutes. So a
thread besides reads the pipe that the interpreter's own handler writes to; both only note what was asked. The main
thread looks where it can end (`asked`): between rows, batches and tokens; between steps where the ranks' votes, which
are part of the sums that a step makes anyway, say so to all of them. Ctrl-C stays what it was.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from engine import progress

STOPPED = 85  # exit status of a run that can be resumed
HEARD = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 2.0  # seconds in which a signal counts once: torchrun passes on what a job's manager sends to every process
LOOK = 0.5  # seconds between two looks at the clock
TIMES = ("the end of the job", "--max_hours")
REASONS = ("", *TIMES, "SIGUSR1", "SIGTERM")  # by a number that ranks can compare
BASE = 1024.0  # more than there are ranks: a digit of a sum of votes
_imported = time.monotonic()


class Stopped(Exception):
    """The run ends here because it was asked to; raised on every rank. `engine.world.main` prints it and exits with
    STOPPED.
    """


class GivenUp(Exception):
    """A rollout of this rank ends before it is whole; who gathers it raises Stopped on every rank."""


class Dropped(Exception):
    """What is drawn beside the main thread ends here: the run does."""


class _Asked:
    """One process is asked once."""

    why = ""
    at = 0.0
    signalled = 0.0  # when a signal came, the first
    ends = math.inf  # time.monotonic() after which nothing may go on
    ends_by = ""
    reserve = 0.0  # seconds that the longest save took
    may_give_up = False  # whether what is sampled now can be thrown away
    drops_beside = False  # whether what another thread samples is thrown away
    longest = 0.0  # seconds of a step
    owes = False  # a checkpoint that could not be written, on this rank
    votes: float | None = None  # of all ranks, in the last sums of this step
    listens = False
    is_a_command = False  # whether the process ends with what it listens in


_state = _Asked()


def asked() -> str:
    """By what this process was asked to end, or ''."""
    return _state.why


def ask(why: str) -> None:
    """From now on `asked()`; the first reason stays."""
    if not _state.why:
        _state.why, _state.at = why, time.monotonic()


def end_if_asked(when: str) -> None:
    """Raises Stopped where this rank alone does the work."""
    if _state.why:
        raise Stopped(f"{_state.why}, {when}; the same command begins again")


def ignore() -> None:
    """In a process that works for another, which ends it."""
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)


def a_command(yes: bool) -> None:
    """Whether this process is one command's: what comes after it has listened, in its last moments, is ignored. What
    the signal asks for has been done.
    """
    _state.is_a_command = yes


def asked_for() -> float:
    """Seconds since it was asked."""
    return time.monotonic() - _state.at if _state.why else 0.0


def no_time_for(seconds: float) -> str:
    """What ends the run before something that takes so long, and a save after it, would be done; or ''."""
    return _state.ends_by if time.monotonic() + seconds + _state.reserve > _state.ends else ""


def vote() -> float:
    """What this rank wants after the step under way, as a number that goes into the sums that a step makes anyway: no
    rank decides alone, and none waits for a decision.
    """
    why = _state.why or no_time_for(_state.longest)
    return (BASE ** REASONS.index(why) if why else 0.0) + _state.owes


def count(votes: float) -> None:
    """The sum of all ranks' votes."""
    _state.votes = votes


def decided() -> tuple[str, bool] | None:
    """(why the run ends here, whether a checkpoint is owed), alike on every rank; None where no sums were made since
    the last call.
    """
    votes, _state.votes = _state.votes, None
    return None if votes is None else read(votes)


def read(votes: float) -> tuple[str, bool]:
    """Of a sum of votes; of several reasons the last of REASONS."""
    whys = [why for number, why in enumerate(REASONS) if number and votes >= BASE**number]
    return (whys or [""])[-1], votes % BASE > 0


def a_step_took(seconds: float) -> None:
    """The next may take as long."""
    _state.longest = max(_state.longest, seconds)


def owe(yes: bool) -> None:
    """Whether a checkpoint could not be written."""
    _state.owes = yes


def a_save_took(seconds: float) -> None:
    """So much time is kept for the last one."""
    _state.reserve = max(_state.reserve, seconds)


def rollouts_may_end(yes: bool) -> None:
    """Whether what is sampled can be thrown away because no weight has changed since the last finished step."""
    _state.may_give_up = yes


def drop_what_is_drawn_beside(yes: bool) -> None:
    """Whether nobody waits any more for what another thread than the main one samples."""
    _state.drops_beside = yes


def between_tokens(alone: bool = True) -> None:
    """A token of every response that is under way. Raises GivenUp where a rollout may end and the process was asked to,
    unless others draw it together with this rank (not `alone`), or a checkpoint waits for it, as for what a thread
    draws beside the main one, which ends by Dropped.
    """
    progress.note()
    if threading.current_thread() is not threading.main_thread():
        if _state.drops_beside:
            raise Dropped
        return
    if alone and _state.why and _state.may_give_up:
        raise GivenUp


def time_left() -> str:
    """What limits this run's time, in a few words, or ''."""
    if _state.ends == math.inf:
        return ""
    minutes = max(0, round((_state.ends - time.monotonic()) / 60))
    return f"ends by {_state.ends_by}, in {minutes // 60} h {minutes % 60:02} min, with a checkpoint"


def age() -> float:
    """Seconds since this process began (Linux), or since this module was imported."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _imported


@contextlib.contextmanager
def listening(max_hours: float | None, job_left: float | None) -> Iterator[None]:
    """In the body, signals and clocks ask the process to end. `max_hours` count from its start; `job_left` are seconds
    from now. A second signal, ECHO seconds after the first, ends it at once with 128 + its number. Inside another such
    body nothing changes.
    """
    if _state.listens:
        yield
        return
    _begin(max_hours, job_left)
    if threading.current_thread() is not threading.main_thread():  # handlers are the main thread's
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda of, _: ask(signal.Signals(of).name)) for number in HEARD}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(reading, over), daemon=True, name="signals")
    listener.start()
    _state.listens = True
    try:
        yield
    finally:
        _state.listens = False
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _state.is_a_command else handler)
        os.write(writing, b"\0")  # no signal's number: it wakes the listener
        listener.join()
        os.close(reading)
        os.close(writing)


def _begin(max_hours: float | None, job_left: float | None) -> None:
    _state.why, _state.may_give_up, _state.owes, _state.votes = "", False, False, None
    _state.at = _state.signalled = _state.reserve = _state.longest = 0.0
    limits = {REASONS[1]: job_left, REASONS[2]: None if max_hours is None else max_hours * 3600 - age()}
    given = [(seconds, by) for by, seconds in limits.items() if seconds is not None]
    seconds, _state.ends_by = min(given, default=(math.inf, ""))
    _state.ends = time.monotonic() + seconds


def _listen(reading: int, over: threading.Event) -> None:
    while not over.is_set():
        ready, _, _ = select.select([reading], [], [], LOOK)
        for number in os.read(reading, 64) if ready else b"":
            if number in HEARD:
                _heard(number)
        if by := no_time_for(0.0):
            ask(by)


def _heard(number: int) -> None:
    if _state.signalled and time.monotonic() - _state.signalled > ECHO:
        os.write(2, f"ended at once by a second signal ({signal.Signals(number).name})\n".encode())
        os._exit(128 + number)
    _state.signalled = _state.signalled or time.monotonic()
    ask(signal.Signals(number).name)

"""What a person sees of a command: lines in two columns, warnings that look like warnings, and one bar.

On a terminal a line is set in columns, wrapped at its width with a hanging indent, and coloured (not under NO_COLOR); a
bar moves below the lines. A file or pipe, and a terminal that calls itself dumb, gets the same text without any of it,
and in place of the bar a line now and then. The world says who speaks: rank 0.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

from engine import progress
from engine.redact import redact

COLUMN = 18  # where values begin
WIDEST = 120  # lines that are longer are hard to read
EVERY = 30.0  # seconds between two lines of progress in a file
BLINK = 0.1  # seconds between two looks of the bar
PATIENCE = 1.0  # seconds after which something under way is shown
BESIDE = "held out"  # how a phase begins that is part of no step
RECENT = 20  # steps, of which the time that is left is estimated
COLOURS = {"heading": 1, "label": 36, "warning": 33, "error": 31, "done": 32}
WARNINGS = ("warning: ", "  bad row ")  # how lines begin that --quiet leaves
COMMANDS = ("next", "or")  # labels of what may be copied and typed, which is not wrapped
LABEL = re.compile(r"[a-z][a-z0-9 ,'-]{0,40}(?=: )")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Row(str):
    """A fact of the first screen: a label, and a value in the second column."""

    label: str
    value: str

    def __new__(cls, label: str, value: str) -> Row:
        """As text it is what a file gets."""
        row = super().__new__(cls, f"  {label:<{COLUMN - 3}} {value}".rstrip())
        row.label, row.value = label, value
        return row


class Heading(str):
    """What the rows below it are about."""


class _State:
    """What a process may show; one process has one screen."""

    dumb = False  # a terminal that can print and nothing else
    colour = True
    quiet = False  # --quiet
    within = 0  # another command's run is under way: 1, which does not have the last word; 2, of which only warnings
    # and the bar are shown
    current: Progress | None = None  # what moves


_state = _State()


def configure(*, dumb: bool, colour: bool, quiet: bool = False) -> None:
    """What the user's environment says of the terminal; `quiet`: only warnings, errors and the last line are shown."""
    _state.dumb, _state.colour, _state.quiet = dumb, colour, quiet


@contextlib.contextmanager
def subdued(all_but_the_bar: bool = True) -> Iterator[None]:
    """In the body, a run that another command starts, only warnings and the bar are shown; or (False) all but the
    commands that would come next.
    """
    outer, _state.within = _state.within, max(_state.within, 2 if all_but_the_bar else 1)
    try:
        yield
    finally:
        _state.within = outer


# --- lines ------------------------------------------------------------------------------------------------------------


def say(*lines: str, last: bool = False) -> None:
    """Prints lines above the bar. `last`: what a command ends with, which --quiet shows too.

    A line that begins as WARNINGS do is one, and always shown. Control characters, which data may hold, are spaces.
    """
    for line in lines:
        inner = _state.within == 2 or (_state.within and line.startswith(tuple(f"{word}: " for word in COMMANDS)))
        if line.startswith(WARNINGS) or not (inner or (_state.quiet and (_state.within or not last))):
            tqdm.write(shown(_discreet(line), sys.stdout))
    sys.stdout.flush()


def _discreet(line: str) -> str:
    """The line without secrets, before it is wrapped."""
    return Row(line.label, redact(line.value)) if isinstance(line, Row) else type(line)(redact(line))


def shown(line: str, stream: TextIO) -> str:
    """The line as this stream shows it: see the head of this file."""
    if not is_terminal(stream):
        return f"\n{line}" if isinstance(line, Heading) else CONTROL.sub(" ", line)
    width = min(WIDEST, width_of(stream))
    if isinstance(line, Heading):
        return f"\n{paint(line, 'heading')}"
    if isinstance(line, Row):
        return _columns(f"  {line.label}", CONTROL.sub(" ", line.value), width, "label")
    return "\n".join(_event(CONTROL.sub(" ", part), width) for part in line.split("\n"))


def paint(text: str, kind: str) -> str:
    """The text in a colour, if there are any."""
    return text if not _state.colour else f"\x1b[{COLOURS[kind]}m{text}\x1b[0m"


def error(line: str) -> None:
    """The last word of a command that failed, on standard error, and its only one: whatever moved goes first."""
    if _state.current is not None:
        _state.current.close(failed=True)
    line = redact(line)
    tqdm.write(paint(line, "error") if is_terminal(sys.stderr) else line, file=sys.stderr)
    sys.stderr.flush()


def traceback_of(error: BaseException) -> None:
    """As Python prints an error that nobody expected, without secrets."""
    sys.stderr.write(redact("".join(traceback.format_exception(error))))
    sys.stderr.flush()


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at it, on a terminal that can do more than print."""
    return stream.isatty() and not _state.dumb


def is_coloured(stream: TextIO) -> bool:
    """Whether it is such a terminal, and its user wants colours."""
    return is_terminal(stream) and _state.colour


def width_of(stream: TextIO) -> int:
    """In characters, at least 40."""
    try:
        return max(40, os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        return max(40, shutil.get_terminal_size().columns)


def _event(line: str, width: int) -> str:
    """Something that happened: 'label: text' in two columns, where there is a label."""
    if match := LABEL.match(line):
        label, value = match[0], line[match.end() + 2 :]
        if label in COMMANDS:
            width = COLUMN + len(value)
        elif label not in COLOURS:
            return _columns(f"  {label}", value, width, "label")
        return _columns(label, value, width, label if label in COLOURS else "label")
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return line if len(line) <= width else _wrapped(line, width, "", indent)


def _columns(label: str, value: str, width: int, kind: str) -> str:
    """The label, and the value from COLUMN on; below the label where that is too long."""
    hanging = " " * COLUMN
    text = _wrapped(value, width, hanging, hanging) or hanging
    if len(label) < COLUMN - 1:
        return paint(label, kind) + " " * (COLUMN - len(label)) + text[COLUMN:]
    first = f"{label}  {value}"
    if len(first) <= width:
        return paint(label, kind) + first[len(label) :]
    return f"{paint(label, kind)}\n{text}"


def _wrapped(text: str, width: int, first: str, hanging: str) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=hanging,
        break_long_words=False,  # a path stays one that can be copied
        break_on_hyphens=False,
    )


# --- progress ---------------------------------------------------------------------------------------------------------


def phase(what: str, done: int = 0, total: int = 0) -> None:
    """What goes on now, beside the bar of the run; or, where there is none, as a bar of its own that goes when it is
    done, or when something else begins.
    """
    progress.note(what, counted=True if done or total else None)
    if _state.current is None or (_state.current.passing and _state.current.what != what):
        _state.current = Progress(what, total, passing=True)
    _state.current.phase(what, done, total)
    if _state.current.passing and 0 < total <= done:
        _state.current.close()


def rest() -> None:
    """Takes away what `phase` showed by itself: nothing goes on that is counted."""
    progress.note(counted=False)
    if _state.current is not None and _state.current.passing:
        _state.current.close()


class Progress:
    """Something under way, of which one is shown: a bar that moves, or in a file a line every EVERY seconds, and the
    last.
    """

    def __init__(self, what: str, total: int, start: int = 0, *, passing: bool = False) -> None:
        """`what` is one of the `total` (a step). A `passing` one leaves no trace, and is not shown if short."""
        self.what, self.total, self.n, self.passing = what, total, start, passing
        self.parts: list[str] = []  # figures, the most important first
        self.doing = ""
        self._begun = self._looked = self._said = time.monotonic()
        self._ends = deque([self._begun], RECENT + 1)  # of steps
        self._bar: Any = None
        if _state.current is not None:
            _state.current.close()
        _state.current = self

    def advance(self, figures: str) -> None:
        """A step is done, with its figures."""
        self.n += 1
        self.parts, self.doing = figures.split(", "), ""
        self._ends.append(time.monotonic())
        self._look()

    def phase(self, what: str, done: int, total: int) -> None:
        """Within a step, or between two."""
        if self.passing:
            self.n, self.total = done, total
        else:
            if len(self._ends) == 1 and self.doing.startswith(BESIDE) and not what.startswith(BESIDE):
                self._ends[0] = time.monotonic()  # the first step begins here
            self.doing = f"{what} {done:,} of {total:,}" if total else what
        self._look()

    def close(self, failed: bool = False) -> None:
        """The end, which a file is told of unless something else is to be said."""
        if self._bar is not None:
            self._bar.close()
        elif not (self.passing or failed or _state.quiet or is_terminal(sys.stderr)) and self.n > 0:
            self.doing = ""
            self._write()
        if _state.current is self:
            _state.current = None

    def _look(self) -> None:
        now = time.monotonic()
        if _state.quiet or (self.passing and now - self._begun < PATIENCE):
            return
        if is_terminal(sys.stderr):
            if now - self._looked >= BLINK or self._bar is None or self.n == self.total:
                self._looked = now
                self._draw()
        elif now - self._said >= EVERY:
            self._write()

    def _draw(self) -> None:
        """On the terminal."""
        width = min(WIDEST, width_of(sys.stderr))
        if self._bar is None:
            self._bar = tqdm(total=self.total or None, file=sys.stderr, leave=False, ncols=width)
        left, right = self._left(), self._right()
        while len(right) > 1 and len(left) + len(", ".join(right)) + 12 > width:
            del right[-2]  # the last is what goes on now
        text = ", ".join(filter(None, right)).replace("{", "{{").replace("}", "}}")
        self._bar.bar_format = f"{left} {'|{bar}| ' if self.total else ''}{text}"
        self._bar.ncols, self._bar.n = width, self.n
        self._bar.refresh()

    def _write(self) -> None:
        """In a file."""
        self._said = time.monotonic()
        tqdm.write(f"{self._left()}: {', '.join(filter(None, self._right()))}", file=sys.stderr)
        sys.stderr.flush()

    def _left(self) -> str:
        return f"{self.what} {self.n:,}" + (f"/{self.total:,}" if self.total else "")

    def _right(self) -> list[str]:
        """The time that went and that is left, the figures, and what goes on."""
        now = time.monotonic()
        times = as_time(now - self._begun)
        steps = len(self._ends) - 1
        if steps and self.n < self.total:
            seconds = (self._ends[-1] - self._ends[0]) / steps * (self.total - self.n)
            times += f", {as_time(max(0.0, seconds - (now - self._ends[-1])))} left"
        return [times, *self.parts, self.doing]


def as_time(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

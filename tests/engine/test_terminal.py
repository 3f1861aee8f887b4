"""What a person sees: columns, wrapping and colour on a terminal, the same text plain in a file; the bar, and its lines
in a file.
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import terminal
from engine.terminal import Heading, Row, shown
from engine.world import start

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Screen(io.StringIO):
    """A terminal of no known size: $COLUMNS."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain():
    """Every test begins and ends with nothing under way."""
    terminal.configure(dumb=False, colour=True)
    yield
    if terminal._state.current is not None:
        terminal._state.current.close()
    terminal.configure(dumb=False, colour=True)


def look(monkeypatch, columns: int = 80) -> tuple[Screen, Screen]:
    """Standard output and error, which are terminals from now on (pytest takes back what a fixture sets)."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setattr(sys, "stderr", Screen())
    return sys.stdout, sys.stderr


@pytest.fixture
def clock(monkeypatch):
    """Time goes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


# --- lines ------------------------------------------------------------------------------------------------------------

labels = st.text("abc ", max_size=30)


@given(st.sampled_from(["", "label", "row"]), labels, st.text(max_size=300), st.integers(40, 200))
def test_a_terminal_shows_the_words_of_a_file_within_its_width(kind, label, text, width):
    """In their order, no line wider than the screen unless one word is; and no control character reaches either."""
    line = {"": text, "label": f"a{label}: {text}", "row": Row(label, text)}[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        on_screen, in_file = shown(line, Screen()), shown(line, io.StringIO())
    text = ESCAPE.sub("", on_screen)
    colon = terminal.LABEL.match(line)
    plain = in_file.replace(":", "", 1) if colon and not isinstance(line, Row) else in_file
    assert text.split() == plain.split()
    widths = [len(part) for part in text.split("\n") if len(part.split()) > 1 + bool(colon)]
    assert all(n <= min(width, terminal.WIDEST) for n in widths) or (colon and colon[0] in terminal.COMMANDS)
    assert not terminal.CONTROL.search(in_file) and not terminal.CONTROL.search(text)


def test_labels_and_values_are_two_columns(monkeypatch):
    screen, _ = look(monkeypatch)
    value = "sdpa (first that runs here, in the order flash4 > flash3 > flash2 > varlen > sdpa > eager)"
    terminal.say(Heading("machine"), Row("attention", value), "policy: 158,016 parameters, " + "8 " * 40)
    said = [ESCAPE.sub("", line) for line in screen.getvalue().splitlines()]
    assert said[:2] == ["", "machine"] and said[2].startswith("  attention       sdpa (first")
    assert said[4].startswith("  policy          158,016 parameters")
    assert all(line[:18] == " " * 18 for line in (said[3], said[5]))
    assert "\x1b[36m  attention\x1b[0m" in screen.getvalue()


def test_a_command_to_type_is_one_line(monkeypatch):
    screen, _ = look(monkeypatch)
    command = "python -m launch.chat --model_name_or_path " + "output/" * 20
    terminal.say(f"next: {command}")
    assert command in screen.getvalue()


@pytest.mark.parametrize("variable, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_they_are_not_wanted(variable, value, monkeypatch):
    screen, _ = look(monkeypatch)
    monkeypatch.setenv(variable, value)
    start()
    terminal.say("warning: one", Row("two", "three"), Heading("four"))
    assert "\x1b" not in screen.getvalue()


def test_an_error_is_red_and_a_warning_is_yellow(monkeypatch):
    screen, below = look(monkeypatch)
    terminal.error("error: no such file")
    terminal.say("warning: the disk is nearly full")
    assert below.getvalue().strip("\r\n") == "\x1b[31merror: no such file\x1b[0m"
    assert screen.getvalue().startswith("\x1b[33mwarning\x1b[0m")


def test_what_quiet_leaves(capsys):
    start(quiet=True)
    progress = terminal.Progress("step", 3)
    progress.advance("loss 1")
    terminal.say("model: x", Row("a", "b"), "warning: careful", "  bad row x.jsonl:3: no text")
    terminal.say("done: all of it", last=True)
    progress.close()
    out, err = capsys.readouterr()
    assert out == "warning: careful\n  bad row x.jsonl:3: no text\ndone: all of it\n" and not err


def test_a_run_within_a_run_has_not_the_last_word(capsys):
    with terminal.subdued(all_but_the_bar=False):
        terminal.say("model: x", "next: python -m launch.dpo", "or: python -m launch.chat")
        with terminal.subdued():
            terminal.say("model: y", "warning: careful")
            terminal.say("done: inner", last=True)
        terminal.say("model: z")
    terminal.say("next: now")
    assert capsys.readouterr().out == "model: x\nwarning: careful\nmodel: z\nnext: now\n"


# --- progress ---------------------------------------------------------------------------------------------------------


def test_a_file_gets_a_line_now_and_then_and_the_last(capsys, clock):
    progress = terminal.Progress("step", 100)
    for step in range(100):
        clock(2)
        progress.advance(f"loss {step}, 5 tokens/s")
    progress.close()
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 + 200 // 30 and "\r" not in "".join(err)
    assert err[0] == "step 15/100: 0:30, 2:50 left, loss 14, 5 tokens/s"
    assert err[-1] == "step 100/100: 3:20, loss 99, 5 tokens/s"


def test_what_comes_before_the_first_step_is_no_part_of_it(capsys, clock):
    progress = terminal.Progress("iteration", 11)
    terminal.phase("held out: sampling", 0, 8)
    clock(600)
    terminal.phase("sampling", 0, 8)
    clock(20)
    terminal.phase("verifying", 8, 8)
    clock(20)
    progress.advance("score 0.5")
    clock(30)
    terminal.phase("sampling", 3, 8)
    assert capsys.readouterr().err.splitlines()[-1] == ("iteration 1/11: 11:10, 6:10 left, score 0.5, sampling 3 of 8")
    progress.close()


@pytest.mark.parametrize(
    "columns, seen, unseen",
    [(200, ["score", "kl", "tokens/s"], []), (80, ["score", "kl"], ["tokens/s"]), (48, [], ["kl", "left"])],
)
def test_a_narrow_bar_leaves_out_the_least(columns, seen, unseen, clock, monkeypatch):
    """What goes on now stays."""
    _, below = look(monkeypatch, columns)
    progress = terminal.Progress("step", 30)
    clock(10)
    progress.advance("score 0.438, kl 0.001, 1,848 tokens/s")
    clock(10)
    terminal.phase("sampling", 37, 128)
    bar = [line for line in re.split("[\r\n]", below.getvalue()) if line.strip()][-1]
    assert "sampling 37 of 128" in bar and len(bar.rstrip()) <= min(columns, terminal.WIDEST)
    assert all(word in bar for word in seen) and not any(word in bar for word in unseen)
    progress.close()


def test_what_is_over_soon_is_not_shown_and_what_is_long_is(clock, monkeypatch):
    _, below = look(monkeypatch)
    terminal.phase("tokenising, rows", 10)
    clock(0.5)
    terminal.phase("tokenising, rows", 20)
    assert not below.getvalue()
    clock(3)
    terminal.phase("tokenising, rows", 30)
    assert "tokenising, rows 30" in below.getvalue()
    terminal.rest()
    before = below.getvalue()
    terminal.phase("reference log-probs", 0, 10)
    clock(2)
    terminal.phase("reference log-probs", 5, 10)
    terminal.phase("reference log-probs", 10, 10)  # closes it
    after = below.getvalue()[len(before) :]
    assert "reference log-probs 5/10" in after and after.endswith("\r")


def test_a_failure_ends_the_bar(capsys, clock):
    progress = terminal.Progress("step", 3)
    progress.advance("loss 1")
    terminal.error("interrupted; the same command goes on from the last checkpoint")
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n"
    terminal.phase("sampling", 1, 2)
    assert progress.doing == ""  # it is not under way any more


def test_only_the_first_rank_shows_what_goes_on(capsys, clock):
    world = start()
    for rank in (1, 0):
        each = dataclasses.replace(world, rank=rank).each("updating", "abc")
        for _ in each:
            clock(31)
    assert capsys.readouterr().err == "updating 2/3: 0:31\nupdating 3/3: 1:02\n"

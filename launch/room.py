"""The terminal's side of a chat: lines in, commands, answers and notes out."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from engine.data.rows import BadRow
from engine.errors import UserError, nearest, on_one_line
from launch.conversation import Answer, Talk
from launch.display import Ink, shown, side_by_side

WIDE = 80  # columns from which on two answers stand side by side
COMMANDS = {
    "/new": "another conversation, with the same system turn",
    "/system": "TEXT: the system turn from now on; without TEXT, none",
    "/retry": "another answer to the last question",
    "/temperature": "X: of sampling from now on; 0 is greedy",
    "/save": "FILE: appends the conversation as a row that launch.sft reads",
    "/help": "this list",
    "/quit": "ends, as Ctrl-D does",
}


class Room:
    """Where the user and one model or two talk: lines in, answers and notes out."""

    def __init__(self, talks: list[Talk], ink: Ink, names: list[str]) -> None:
        self.talks, self.ink, self.names = talks, ink, names
        self.is_stopped = False  # the answer under way, by Ctrl-C
        self.is_watched = sys.stdin.isatty() and sys.stdout.isatty()
        for stream in (sys.stdin, sys.stdout):
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]

    def run(self) -> None:
        """Until the lines end, or /quit."""
        if self.is_watched:
            self.note("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - lines are edited, and come back with the arrow keys
        for line in self.lines():
            text = line.strip()
            if text.startswith("/") and not text.startswith("//"):
                if not self.command(*text.partition(" ")[::2]):
                    break
            elif text:
                for talk in self.talks:
                    talk.say(text.removeprefix("/") if text.startswith("//") else text)
                self.answer()

    def lines(self) -> Iterator[str]:
        """What the user says; Ctrl-C forgets a line that was begun."""
        while True:
            try:
                line = input(self.ink.mark("> ")) if self.is_watched else sys.stdin.readline()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                self.note("Ctrl-D or /quit ends")
                continue
            if not line and not self.is_watched:
                return
            if not self.is_watched:
                self.write(f"{self.ink.bold('> ')}{shown(line.rstrip())}\n")
            yield line

    def answer(self) -> None:
        """The answers to what was said last; a turn that cannot be answered is taken back."""
        answers = [Answer() for _ in self.talks]
        self.is_stopped = False
        try:
            for talk in self.talks:
                talk.prompt()
            self.show([self.until_stopped(talk.answer(into)) for talk, into in zip(self.talks, answers, strict=True)])
        except BadRow as problem:
            for talk in self.talks:
                talk.withdraw()
            return self.note(on_one_line(str(problem)))
        except KeyboardInterrupt:
            self.write("\n")
        for talk, answer, name in zip(self.talks, answers, self.names, strict=False):
            which = f"{name}: " if len(self.talks) > 1 else ""
            if not talk.keep(answer):
                self.note(f"{which}stopped before a word was said; the question is taken back")
            elif not answer.reason:
                self.note(f"{which}stopped; what was said is kept")
            elif answer.reason == "length":
                full = len(answer.ids) == talk.room
                why = "the conversation is full, /new begins another" if full else "--response_length"
                self.note(f"{which}cut after {len(answer.ids)} tokens: {why}")
        self.write("\n")

    def until_stopped(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces up to Ctrl-C, which ends all answers; what has come of a row of two is then shown."""
        while not self.is_stopped:
            try:
                yield next(pieces)
            except StopIteration:
                return
            except KeyboardInterrupt:
                self.is_stopped = True

    def show(self, texts: list[Iterator[str]]) -> None:
        """One answer as it comes; two side by side, or one under the other where there is no room, or no terminal."""
        columns = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
        if len(texts) > 1 and columns >= WIDE:
            names = [iter([name]) for name in self.names]
            for row in side_by_side(names, columns):
                self.write(f"{self.ink.dim(row)}\n")
            for row in side_by_side(texts, columns):
                self.write(f"{row}\n")
            return
        for name, text in zip(self.names, texts, strict=False):
            if len(texts) > 1:
                self.note(f"{name}:")
            for piece in text:
                self.write(shown(piece))
            self.write("\n")

    def command(self, name: str, argument: str) -> bool:
        """Does it; False where it ends the conversation."""
        argument = argument.strip()
        try:
            if name == "/quit":
                return False
            if name == "/new":
                for talk in self.talks:
                    talk.new()
                self.note("another conversation")
            elif name == "/system":
                said = {talk.set_system(argument or None) for talk in self.talks}
                self.note(*said, "the system turn is set" if argument else "no system turn from now on")
            elif name == "/retry":
                self.retry()
            elif name == "/temperature":
                self.temperature(argument)
            elif name == "/save":
                self.save(argument)
            elif name == "/help":
                self.note(*(f"{command:14}{what}" for command, what in COMMANDS.items()))
            else:
                self.note(f"{on_one_line(name)} is no command{nearest(name, COMMANDS)}; //... says it to the model")
        except (BadRow, UserError) as problem:
            self.note(on_one_line(str(problem)))
        return True

    def retry(self) -> None:
        """Raises UserError where nothing was answered."""
        if not all([talk.again() for talk in self.talks]):
            raise UserError("/retry: there is no answer to draw again")
        self.answer()

    def temperature(self, word: str) -> None:
        """Raises UserError."""
        try:
            value = float(word)
            params = [replace(talk.params, temperature=value) for talk in self.talks]
        except ValueError:
            raise UserError(f"/temperature: expected a number of 0 or more, got {word[:40]!r}") from None
        for talk, changed in zip(self.talks, params, strict=True):
            talk.params = changed
        self.note("greedy from now on" if value == 0 else f"temperature {value:g} from now on")

    def save(self, word: str) -> None:
        """Raises UserError."""
        if not word or not self.talks[0].turns:
            raise UserError("/save FILE: the name is missing" if not word else "/save: nothing was said yet")
        rows = [
            {"messages": talk.messages(), "model": name} for talk, name in zip(self.talks, self.names, strict=False)
        ]
        path = Path(word).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"/save {word}: {error.strerror}") from None
        self.note(f"appended to {path}")

    def note(self, *lines: str) -> None:
        """Lines that are not the model's."""
        for line in filter(None, lines):
            self.write(f"{self.ink.dim(line)}\n")

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

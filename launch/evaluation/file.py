"""The file of responses: one JSON object a response, written as they come, read by launch.compare and launch.verify.

    key       names what was asked and its ground truth, whatever the template, the model or the examples before it:
              by it responses of two models are matched
    settings  all that decides what is answered and how it is judged: a file is gone on with under the same alone

A run that is killed leaves the responses that have ended, and perhaps a torn last line. The same command keeps them,
adds those that are missing and puts the lines in order, so that the file is that of a run that was not killed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError

Name = tuple[str, int, int]  # of a response: its prompt's key, the seed, the sample
TEXT = 160  # characters of a response that are kept for the screen


@dataclass(frozen=True, slots=True)
class Response:
    """One response as it was judged; `score` is NaN where there is no verdict, and the mean of a row's several
    verifiers, whose scores add up in the file. `text` is its beginning.
    """

    key: str
    seed: int
    sample: int
    score: float
    verifier: str
    source: str
    answer: str | None  # that the verifier reads in it, where it reads one
    loose: float | None  # IFEval's loose score
    instructions: int  # of IFEval's row
    prompt_tokens: int
    response_tokens: int
    stopped: bool  # ended by itself
    reason: str
    text: str

    @property
    def name(self) -> Name:
        return self.key, self.seed, self.sample


def response_of(row: dict[str, Any]) -> Response:
    """A line's object as a Response. Raises ValueError for one that launch.evaluate did not write."""
    try:
        names = row["dataset"]
        several = 1 if isinstance(names, str) else len(names)
        loose = row.get("loose")
        response = Response(
            str(row["key"]),
            int(row["seed"]),
            int(row["sample"]),
            float(row["score"]) / several if row["status"] == "ok" else math.nan,
            names.lower() if isinstance(names, str) else "+".join(map(str.lower, names)),
            str(row["source"]),
            row.get("answer"),
            None if loose is None else float(loose),
            int(row.get("instructions", 0)),
            int(row["prompt_tokens"]),
            int(row["response_tokens"]),
            row["finish_reason"] == "stop",
            str(row["reason"])[:TEXT],
            str(row["response"])[:TEXT],
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as problem:
        raise ValueError(f"no response of launch.evaluate ({type(problem).__name__}: {problem})") from None
    if not isinstance(row.get("settings"), dict):
        raise ValueError("no response of launch.evaluate (no settings)")
    return response


def read_line(line: bytes, where: str) -> tuple[Response, dict[str, Any]]:
    """(the response, its settings). Raises UserError."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("no JSON object")
        return response_of(row), row["settings"]
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where}: {str(problem)[:160]}: not a file of responses of launch.evaluate") from None


def whole_lines(file: IO[bytes]) -> Iterable[tuple[int, bytes]]:
    """(where it begins, the line) of every line that ends; a torn last one is left out."""
    file.seek(0)
    start = 0
    for line in file:
        if line.endswith(b"\n"):
            yield start, line
        start += len(line)


class ResponseFile:
    """The responses of a run on rank 0, and --output, if there is one, while they come: `responses` are those that are
    there, `write` adds one, `finish` puts the lines in order.
    """

    def __init__(self, path: Path | None, wanted: dict[Name, str]) -> None:
        """`wanted`: the responses of the run in their order, each with its verifier. Opens or makes the file and locks
        it. Raises UserError for what is not a file of such responses: nothing of it is changed then.
        """
        self.path, self.wanted = path, wanted
        self.responses: dict[Name, Response] = {}
        self._places: dict[Name, int] = {}
        self.settings: dict[str, Any] = {}  # of the responses that are there
        self._file: IO[bytes] | None = None
        if path is not None:
            self._file = open(path, "a+b")  # noqa: SIM115 - closed in `close`
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._end = self._read(self._file, path)
            except BlockingIOError:
                self.close()
                raise UserError(f"--output {path}: another process is writing it") from None
            except UserError:
                self.close()
                raise

    def _read(self, file: IO[bytes], path: Path) -> int:
        """Takes the responses that are there. Returns where the whole lines end."""
        end = 0
        for number, (start, line) in enumerate(whole_lines(file), 1):
            response, settings = read_line(line, f"--output {path}:{number}")
            if self.responses and settings != self.settings:
                raise UserError(
                    f"--output {path}:{number} is of other settings than the lines before: give another file"
                )
            if self.wanted.get(response.name) != response.verifier:
                raise UserError(
                    f"--output {path}:{number}: a response that this command does not ask for (another dataset or"
                    " verifier, fewer prompts, samples or seeds): give another file"
                )
            self.settings = settings
            self.responses.setdefault(response.name, response)
            self._places.setdefault(response.name, start)
            end = start + len(line)
        return end

    def check(self, settings: dict[str, Any], unknown: tuple[str, ...] = ()) -> None:
        """Raises UserError where the responses that are there are of other settings, those of `unknown` names aside."""
        there = self.settings if self.responses else settings
        for name in sorted({*there, *settings}.difference(unknown)):
            if there.get(name) != settings.get(name):
                raise UserError(
                    f"--output {self.path} holds responses of {name} {_shown(there.get(name))}, this run has"
                    f" {_shown(settings.get(name))}: give another file"
                )

    @property
    def missing(self) -> list[Name]:
        """In their order."""
        return [name for name in self.wanted if name not in self.responses]

    def write(self, line: str) -> Response:
        """Adds one response; it is in the file when this returns."""
        response, self.settings = read_line(line.encode(), "a response")
        self.responses[response.name] = response
        if self._file is not None:
            try:
                self._file.truncate(self._end)  # a torn line, if there is one
                self._file.write(line.encode())
                self._file.flush()
            except OSError as problem:
                kept = "what is in it is kept, and the same command goes on"
                raise UserError(f"--output {self.path}: {problem.strerror}; {kept}") from None
            self._places[response.name] = self._end
            self._end += len(line.encode())
        return response

    def finish(self) -> None:
        """Puts the lines in order: in another file, which then takes the place of the first."""
        if self._file is None or self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as ordered:
            for name in self.wanted:
                self._file.seek(self._places[name])
                ordered.write(self._file.readline())
            ordered.flush()
            os.fsync(ordered.fileno())
        partial.replace(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)[:80]


def read_responses(path: Path) -> tuple[list[Response], dict[str, Any]]:
    """(all responses of a file, the settings of the first). Raises UserError."""
    try:
        with path.open("rb") as file:
            found = [read_line(line, f"{path}:{i}") for i, (_, line) in enumerate(whole_lines(file), 1)]
    except OSError as problem:
        raise UserError(f"{path}: {problem.strerror}") from None
    if not found:
        raise UserError(f"{path}: holds no response")
    return [response for response, _ in found], found[0][1]

"""What launch.generate has of its responses before all have ended: a file beside --output, with which the same command
goes on.

The first line names the run: the model's weights, the prompts, and all that decides what is answered. A run that is
killed leaves the responses that have ended, and perhaps a torn last line, which is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.data import Question
from engine.errors import UserError
from engine.world import World
from rollout import Rollout

Name = tuple[int, int]  # of a response: the prompt's place, the sample


def run_of(weights: str, questions: list[Question], settings: dict[str, Any]) -> str:
    """A name of all that decides what is answered."""
    digest = hashlib.sha256(json.dumps([weights, settings], sort_keys=True).encode())
    for question in questions:
        digest.update(np.asarray(question.ids, np.int64).tobytes() + b"/")
    return digest.hexdigest()


class Journal:
    """On rank 0; on the others, and without an --output, it holds nothing and writes nothing."""

    def __init__(self, output: str | None, run: str, questions: list[Question], world: World) -> None:
        """Reads what an earlier run left. Raises UserError where another process is writing it."""
        self.questions, self.rollouts = questions, {}
        self.path = None
        self._file: IO[bytes] | None = None
        if output is None or not world.is_main:
            return
        self.path = Path(output).with_name(f".{Path(output).name}.partial")
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {output}: another process is writing it") from None
        self._file.seek(0)
        first, *lines = self._file.read().split(b"\n")
        if first == run.encode():
            read = map(self._read, lines[:-1])  # the last is empty, or torn
            self.rollouts = {rollout_name(rollout): rollout for rollout in read if rollout is not None}
            world.say(f"{len(self.rollouts)} responses are there already, in {self.path}")
        elif first:
            world.say(f"{self.path} is of another model, prompts or flags: it starts anew")
        self._file.truncate(0)
        self._file.write(run.encode() + b"\n")
        for rollout in self.rollouts.values():
            self._write(rollout)
        self._file.flush()

    def missing(self, wanted: list[Name], world: World) -> list[Name]:
        """Of these, on every rank, those that are not there. Collective."""
        there = world.gather(list(self.rollouts))[0]
        return [name for name in wanted if name not in set(there)]

    def take(self, line: str) -> None:
        """A response, as `line_of` says it."""
        rollout = self._rollout(line.encode())
        self.rollouts[rollout_name(rollout)] = rollout
        if self._file is not None:
            self._write(rollout)
            self._file.flush()

    def close(self) -> None:
        """The responses are in --output."""
        if self._file is not None and self.path is not None:
            self.path.unlink()
            self._file.close()

    def _write(self, rollout: Rollout) -> None:
        assert self._file is not None
        self._file.write(line_of(rollout).encode() + b"\n")

    def _read(self, line: bytes) -> Rollout | None:
        """None for a line that is damaged: that response is made again."""
        try:
            return self._rollout(line)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None

    def _rollout(self, line: bytes) -> Rollout:
        example, sample, reason, ids = json.loads(line)
        prompt, nothing = np.asarray(self.questions[example].ids, np.int64), np.zeros(len(ids), np.float32)
        return Rollout(example, sample, prompt, np.asarray(ids, np.int64), nothing, nothing, reason)


def rollout_name(rollout: Rollout) -> Name:
    return rollout.example, rollout.sample


def line_of(rollout: Rollout) -> str:
    return json.dumps([rollout.example, rollout.sample, rollout.finish_reason, rollout.response_ids.tolist()])

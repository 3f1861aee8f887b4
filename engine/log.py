"""What a run says of itself: metrics.jsonl and the bar.

A metric of a step is a sum over the step's examples divided by a count, both over all ranks: one all-reduce a step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import signals, terminal
from engine.disk import keep, write_new
from engine.elsewhere import Elsewhere, elsewhere
from engine.errors import explained
from engine.redact import redacted
from engine.terminal import Progress
from engine.world import World


class Totals:
    """Named sums of one step: of tensors on the device until `reduce`, of Python's numbers on the host."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sums: dict[str, Tensor | float] = {}

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Adds each tensor's sum (detached, in fp64), or a number, to its metric."""
        for name, value in values.items():
            amount = value.detach().double().sum() if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + amount

    def reduce(self, names: tuple[str, ...]) -> dict[str, float]:
        """The sums over all ranks, by name; waits for the device. Every rank must pass the same names: one without
        examples has no sums of its own. With them goes whether the run is to end after this step.
        """
        held = [*(self.sums.get(name, 0.0) for name in names), signals.vote()]
        on_device = [
            x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=self.world.device)
            for x in held
        ]
        *sums, votes = self.world.sum(torch.stack(on_device)).tolist()
        signals.count(votes)
        return dict(zip(names, sums, strict=True))


class JsonLines:
    """A file of one JSON object a line, each with its `step`; opened at step `start`, the lines of later steps are cut
    off. A line that cannot be written is owed, said once, and written with the next.
    """

    def __init__(self, path: Path, start: int, known: str | None = None) -> None:
        """`known`: the `digest` of the lines up to `start`, where a checkpoint has it; others are named."""
        self.path, self._owed, self._warned = path, b"", False
        partial = path.with_suffix(".partial")
        rows = _rows_before(path, start) if start else []
        kept = b"".join(line + b"\n" for line in rows)
        self._hash = hashlib.sha256(kept)
        if known is not None and known != self.digest:
            terminal.say(
                f"warning: {path} was damaged, or changed: of its rows up to step {start}, {len(rows)} can be"
                " read and stay, and are not those that were written"
            )
        write_new(partial, kept)
        keep(partial)
        partial.rename(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in `close`
        self._size = path.stat().st_size  # of whole lines

    @property
    def digest(self) -> str:
        """Of all lines, of those that are owed too."""
        return self._hash.hexdigest()

    def write(self, row: dict[str, Any]) -> None:
        line = (json.dumps(redacted(row)) + "\n").encode()
        self._hash.update(line)
        self._owed += line
        if (problem := self._settle()) and not self._warned:
            terminal.say(f"warning: {problem}; training goes on, the rows are written with later ones")
        self._warned = bool(problem)

    def keep(self) -> None:
        """The lines so far outlive the machine; from any thread. Raises OSError."""
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file.closed:
            return
        if problem := self._settle():
            rows = self._owed.count(b"\n")
            terminal.say(f"warning: {problem}; {rows} row{'s are' if rows > 1 else ' is'} lost for {self.path}")
        self._file.close()

    def _settle(self) -> str:
        """Writes what is owed, all of it or nothing; what went wrong, or ''."""
        try:
            if self._owed:
                done = self._file.write(self._owed) or 0
                while done < len(self._owed):  # a disk with room for a part: the next attempt says what is wrong
                    done += self._file.write(self._owed[done:]) or 0
                self._size, self._owed = self._size + done, b""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            error.filename = error.filename or str(self.path)
            return explained(error)
        return ""


class Metrics:
    """metrics.jsonl and the bar, on rank 0; on resume the file is cut back to the resumed step."""

    def __init__(
        self,
        output_dir: Path,
        world: World,
        *,
        start: int,
        total: int,
        report_to: str = "none",
        unit: str = "step",
        known: str | None = None,
    ) -> None:
        """`known` is what a checkpoint has of `digest`."""
        self.is_main = world.is_main
        if world.is_main:
            self._file = JsonLines(output_dir / "metrics.jsonl", start, known)
            self._bar = Progress(unit, total, start)
            self._elsewhere: Elsewhere | None = elsewhere(report_to, output_dir, start)

    def write(self, step: int, row: dict[str, Any], postfix: str = "") -> None:
        """One row for step `step` (1-based: after that many optimizer steps). A postfix is shown on the bar, which then
        moves.
        """
        if self.is_main:
            self._file.write({"step": step, **row})
            if postfix:
                self._bar.advance(postfix)
            if self._elsewhere:
                self._elsewhere.write(step, row)

    def keep(self) -> None:
        """The rows so far outlive the machine."""
        if self.is_main:
            self._file.keep()

    @property
    def digest(self) -> str:
        """Of the rows so far; '' on ranks that write none."""
        return self._file.digest if self.is_main else ""

    def close_file(self) -> None:
        """Of a run that ends early: the bar is whoever says why."""
        if self.is_main:
            self._file.close()

    def close(self) -> None:
        if self.is_main:
            self._file.close()
            self._bar.close()
            if self._elsewhere:
                self._elsewhere.close()


def _rows_before(path: Path, start: int) -> list[bytes]:
    """The lines of steps up to `start`; one that is torn or damaged is dropped."""
    kept = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= start:
                kept.append(line)
    return kept

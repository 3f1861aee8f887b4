"""Broken variants of the engine that crash points must catch, and torch's own checkpoints in its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from benchmarks.faultdrill.crash_work import WORK, Save, Work
from benchmarks.faultdrill.events import without_fsync

OURS = WORK


def _unchecked() -> None:
    """A manifest that nobody compares with the files, and files that were not fsynced."""
    from engine.train import checkpoint

    without_fsync()
    checkpoint.damage = lambda path, world: ""


def _in_place() -> None:
    """The new checkpoint is written over the last one."""
    from engine.train.checkpoint import Checkpoints

    make_room = Checkpoints._make_room

    def over(self: Any, partial: Path, tensors: Any) -> str:
        if self.newest and self._is_main:
            (self.root / f"step-{self.newest:06d}").rename(partial)
        return make_room(self, partial, tensors)

    Checkpoints._make_room = over


def _rotated_first() -> None:
    """Older ones go before the new one is written, and none is kept beside it."""
    import shutil

    from engine.train.checkpoint import Checkpoints

    save = Checkpoints.save

    def saving(self: Any, step: int, state: dict[str, Any]) -> None:
        for old in self._named() if self._is_main else []:
            shutil.rmtree(old)
        save(self, step, state)

    Checkpoints.save = saving


def _one_rank_alone() -> None:
    """The shards of rank 0 are taken for all."""
    write = HuggingFaceStorageWriter.write_data

    def writing(self: Any, plan: Any, planner: Any) -> Any:
        if os.environ["RANK"] == "0":
            return write(self, plan, planner)
        nothing: torch.futures.Future = torch.futures.Future()
        nothing.set_result([])
        return nothing

    HuggingFaceStorageWriter.write_data = writing


CONTROLS: dict[str, Callable[[], None]] = {
    "no fsync": without_fsync,
    "unchecked shards": _unchecked,
    "in place": _in_place,
    "rotated first": _rotated_first,
    "one rank alone": _one_rank_alone,
}
# where each is tried: work, ranks, variant; '' where it needs no crash at all
WHERE = {
    "no fsync": ("save", 1, "torn"),
    "unchecked shards": ("save", 1, "torn"),
    "in place": ("save", 1, "killed"),
    "rotated first": ("save", 1, "killed"),
    "one rank alone": ("save", 2, ""),
}


# --- torch.distributed.checkpoint as it is ----------------------------------------------------------------------------


class Stock(Save):
    """dcp.save of the same tensors, again and again into one directory."""

    def _trained(self) -> None:
        super()._trained()

    def _path(self, step: int) -> Path:
        return self.directory / "stock"

    def _state(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "optimizer": get_optimizer_state_dict(self.module, self.optimizer)}

    def _save(self, step: int) -> str:
        dcp.save(self._state() | {"at": torch.tensor([step])}, checkpoint_id=str(self._path(step)))
        return ""

    def _newest(self) -> Path:
        return self.directory / "stock"

    def check(self, said: Callable[[], str]) -> str:
        expected = {int(k): v for k, v in json.loads(self._expected().read_text()).items()}
        self._trained()
        self._step()  # its optimizer has no state before
        state = self._state() | {"at": torch.tensor([0])}
        dcp.load(state, checkpoint_id=str(self._newest()))
        self.module.load_state_dict(state["model"])
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
        step = int(state["at"])
        if self._digest() != expected.get(step):
            return f"what was read says step {step} and is not what was saved then"
        self._save(4)
        return ""


class StockSteps(Stock):
    """dcp.save into a directory of each step; the newest with .metadata counts."""

    def _path(self, step: int) -> Path:
        return self.directory / f"stock-{step:03d}"

    def _newest(self) -> Path:
        return max(path.parent for path in self.directory.glob("stock-*/.metadata"))


PEERS: dict[str, type[Work]] = {"dcp in place": Stock, "dcp by step": StockSteps}
PIECES: dict[str, type[Work]] = OURS | PEERS


def keep_sums(directory: Path, path: Path) -> None:
    """The sums that a cache holds when nothing strikes: those of the rows, which the stub's log-probs give."""
    rows = [json.loads(line) for line in (path.parent.parent / "rows.jsonl").read_text().splitlines()]
    sums = []
    for row in rows[:12]:
        ids = np.array(row["ids"])
        sides = (ids[1:], ids[::-1][2:])
        sums.append([np.sum(-side.astype(np.float32) / np.float32(7), dtype=np.float64) for side in sides])
    np.save(path, np.array(sums, np.float32))

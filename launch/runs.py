"""Finished or unfinished runs as they lie on disk: their checkpoints, and the flags that they were started with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from engine.config import flags_of
from engine.errors import UserError, nearest
from engine.train import checkpoint
from engine.world import World

NAMED = re.compile(r"(?:tmp|step|abandoned-step)-\d+")
Flags = TypeVar("Flags")


def find(name: str, step: int | None) -> Path:
    """The directory of a checkpoint: `name` itself, or of the run `name` that of this step, or the newest. Raises
    UserError.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        siblings = [str(p) for p in directory.parent.iterdir()] if directory.parent.is_dir() else []
        raise UserError(f"{name}: no such directory{nearest(str(directory), siblings)}")
    if NAMED.fullmatch(directory.name) or (directory / "COMPLETE").is_file():
        if step is not None:
            raise UserError(f"--step {step}: {name} is one checkpoint already")
        return directory
    root = directory / "checkpoints"
    if not root.is_dir() and not (directory / "config.yaml").is_file():
        is_model = (directory / "config.json").is_file() or (directory / "adapter_config.json").is_file()
        what = "; it is a model, for --model_name_or_path" if is_model else ""
        raise UserError(f"{name} is no run's directory: expected config.yaml and checkpoints/ in it{what}")
    found = {step_of(path): path for path in checkpoint.complete(root)}
    if not found:
        raise UserError(f"{name} holds no complete checkpoint (a run saves them under --save_steps)")
    if step is None:
        return found[max(found)]
    if step not in found:
        begun = any((root / f"{kind}-{step:06d}").exists() for kind in ("tmp", "step"))
        why = "that of this step is incomplete" if begun else "none is of this step"
        raise UserError(f"{name}: --step {step}: {why}; there are {', '.join(map(str, found))}")
    return found[step]


def step_of(path: Path) -> int:
    """Of a checkpoint's directory."""
    return int(path.name.rpartition("-")[2])


def read_state(path: Path, world: World) -> dict[str, Any]:
    """A checkpoint's state.json, after its files were found to be whole. Collective. Raises UserError."""
    problem = next((p for p in world.gather(checkpoint.damage(path, world)) if p), "")
    if problem:
        raise UserError(f"{path}: {problem}")
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


def run_of(path: Path) -> Path | None:
    """The run's directory that a checkpoint lies in; None for one that was moved."""
    run = path.absolute().parent.parent
    return run if path.absolute().parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def as_flags(kind: type[Flags], values: dict[str, Any]) -> Flags:
    """A group of flags with the values of a run, the others at their defaults."""
    known = flags_of(kind)
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if n in known})

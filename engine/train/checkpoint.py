"""Checkpoints that survive a kill at any moment, and resume that is exact.

A checkpoint is output_dir/checkpoints/step-000100: DCP shards in safetensors (what is trained: masters and AdamW
moments; no pickle), a readable state.json, and COMPLETE, a manifest with the size and SHA-256 of every file. It is
written in the background, from a copy, over a process group of its own, under a temporary name; it gets its own name
when every rank's files are on disk. So a directory named step-* is whole, and one that has since been damaged is
noticed before it is read. An older one goes when the newer one has been read back. One that could not be written is
owed, and tried again after the next step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from engine import headers, signals
from engine.disk import fresh_directory, in_words, remove, sha256, sync_directory
from engine.errors import UserError, explained
from engine.run import is_gone
from engine.train import optim
from engine.train.finite import not_finite
from engine.train.state import wrong_in_state
from engine.world import World

PINNED = StagingOptions(use_shared_memory=False, use_async_staging=False)
BESIDE = "beside.json"  # what a run keeps beside what it trains
STEP = re.compile(r"step-(\d+)")
OF_ALL = ("model", "value model", "dataset")  # named in every checkpoint; what came later is not in those before
Trained = dict[str, tuple[nn.Module, torch.optim.Optimizer]]


class Checkpoints:
    """The checkpoints of one run. `identity` is what a checkpoint must share with the run to be resumed (model,
    data).
    """

    def __init__(
        self,
        output_dir: Path,
        world: World,
        trained: Trained,
        *,
        keep: int,
        identity: dict[str, str],
        settings: dict[str, Any],
    ) -> None:
        """`trained`: name → (module, its AdamW), everything that the run updates; `settings`: the flags that must not
        change.
        """
        self.root = output_dir / "checkpoints"
        self.world, self.trained, self.keep, self.identity, self.settings = world, trained, keep, identity, settings
        self.group = dist.new_group(backend="gloo")  # of its own: collectives of a save must not mix with training's
        # pages that are pinned once take a GPU's copies at the speed of its link; None: a copy that is made anew
        self.stager = DefaultStager(PINNED) if world.device.type == "cuda" else None
        self.newest = 0  # step of the last one that was written, or resumed
        self._writer: threading.Thread | None = None
        self._written: list[dict[str, Any]] = []  # by rank, what the writer has just gathered
        self._problem = ""
        self._lost: RuntimeError | None = None  # what told the writer that another rank is gone
        self._warned = False
        self._is_main = world.is_main
        if self._is_main and self.root.is_dir():
            for leftover in self.root.glob("tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    # --- writing ------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: dict[str, Any], beside: Any = None, keep: Callable[[], None] = lambda: None
    ) -> None:
        """Copies the tensors and returns; the files are written behind. Waits first for a save still under way. What
        cannot be written is said once, and owed. `beside`: what JSON can hold, in a file of its own. `keep()`, behind
        too, brings to the disk what was written of these steps elsewhere.
        """
        self.wait()
        if step == self.newest:
            return
        began, tensors, partial = time.monotonic(), self._tensors(), self.root / f"tmp-{step:06d}"
        self.require_finite(step, "a checkpoint", tensors)
        problem = self._make_room(partial, tensors) if self.world.is_main else ""
        if problem := self.world.gather(problem)[0]:
            self._ended(problem)
            self.wait()
            return
        signals.owe(False)  # not a second time while this one is being written
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self.group, async_stager=self.stager)
        steps = {
            part: int(next(iter(optimizer.state.values()))["step"]) for part, (_, optimizer) in self.trained.items()
        }
        state = {
            "step": step,
            "optimizer_steps": steps,
            "identity": self.identity,
            "settings": self.settings,
            "world_size": self.world.size,
            **state,
        }
        documents = {"state.json": state} | ({} if beside is None else {BESIDE: beside})
        save = future, partial, step, documents, keep, began
        self._writer = threading.Thread(target=self._behind, args=save, daemon=True)
        self._writer.start()

    def masters(self) -> dict[str, Tensor]:
        """The weights that are trained, by name."""
        return {name: t for name, t in self._tensors().items() if name.split(".")[1] == "master"}

    def require_finite(self, step: int, what: str, tensors: dict[str, Tensor]) -> None:
        """Raises UserError where numbers of these are none, so that nothing is written that cannot be gone on from.
        Collective.
        """
        broken = [f"{name} on rank {rank}" for rank, name in enumerate(self.world.gather(not_finite(tensors))) if name]
        if broken:
            newest = f"the last checkpoint is of step {self.newest}" if self.newest else "there is no checkpoint yet"
            raise UserError(
                f"step {step}: {', '.join(broken[:3])} holds numbers that are not finite; {what} of them is not"
                f" written, {newest}"
            )

    def wait(self) -> str:
        """Returns when no save is under way: what went wrong with the last one, on every rank, which is printed
        once; or ''. Raises RuntimeError if another rank died meanwhile.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._lost is not None:
            raise self._lost
        if self._problem and not self._warned:
            self.world.say(
                f"warning: checkpoint not written: {self._problem}; training goes on, it is tried again after every"
                " step, the previous checkpoint stays"
            )
        elif self._warned and not self._problem:
            self.world.say(f"a checkpoint is written again, of step {self.newest}")
        self._warned = bool(self._problem)
        return self._problem

    def _make_room(self, partial: Path, tensors: dict[str, Tensor]) -> str:
        """An empty directory on a disk that has room for what the last checkpoint took, or these tensors take; or what
        went wrong.
        """
        last = self.root / f"step-{self.newest:06d}"
        try:
            self.root.parent.stat()  # a mount that is gone is not made again on another disk
            if is_gone(self.root):
                return f"{self.root.readlink()} is gone, or another disk: mount it again"
            self.root.mkdir(exist_ok=True, mode=0o700)
            fresh_directory(partial, 0o700)
            sizes = [path.stat().st_size for path in last.iterdir()] if self.newest and last.is_dir() else []
            needed = sum(sizes) or sum(t.numel() * t.element_size() for t in tensors.values())
            if (free := shutil.disk_usage(partial).free) < needed:
                partial.rmdir()
                return f"{self.root} has {free / 2**20:,.1f} MiB left and one takes {needed / 2**20:,.1f}: free some"
        except OSError as error:
            return explained(error)
        return ""

    def _behind(self, *save: Any) -> None:
        """In the background. A rank that dies ends a save as it ends a step: in the main thread, which says so."""
        try:
            self._commit(*save)
        except RuntimeError as error:
            self._lost = error

    def _commit(
        self, future: Any, partial: Path, step: int, documents: dict[str, Any], keep: Callable[[], None], began: float
    ) -> None:
        """This rank's files to disk and hashed; once every rank's are, rank 0 publishes; once every rank has read its
        own again, older checkpoints go.
        """
        final, written = self.root / f"step-{step:06d}", {}

        def write() -> None:
            future.result()
            keep()
            for path in sorted(partial.glob(f"shard-{self.world.rank + 1:05d}-*")):
                written[path.name] = _sync_and_describe(path)

        problem = self._everywhere(write, written)
        if not problem:
            files = {name: facts for of in self._written for name, facts in of.items()}
            problem = self._everywhere(
                lambda: self._publish(partial, step, documents, files) if self._is_main else None
            )
        if not problem:
            problem = self._everywhere(lambda: _read_again(final, self.world))
            if problem and self._is_main:
                remove(final)
        if problem and self._is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if not problem:
            self.newest = step
            if self._is_main:
                for old in self._named()[: -self.keep] if self.keep > 0 else []:
                    remove(old)
            signals.a_save_took(time.monotonic() - began)
        self._ended(problem)

    def _ended(self, problem: str) -> None:
        self._problem = problem
        signals.owe(bool(problem))

    def _everywhere(self, work: Callable[[], Any], written: dict[str, Any] | None = None) -> str:
        """Does it on every rank; what went wrong with the first, on every rank, or ''."""
        problem = ""
        try:
            work()
        except BaseException as error:  # DCP's own is no Exception; training does not die of a checkpoint
            problem = in_words(error)
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, (problem, written or {}), group=self.group)
        self._written = [of for _, of in parts]
        return next((problem for problem, _ in parts if problem), "")

    def _publish(self, partial: Path, step: int, documents: dict[str, Any], files: dict[str, Any]) -> None:
        for name, content in documents.items():
            indent = 1 if name == "state.json" else None
            (partial / name).write_text(json.dumps(content, indent=indent), encoding="utf-8")
            files[name] = _sync_and_describe(partial / name)
        (partial / "COMPLETE").write_text(json.dumps(files, indent=1), encoding="utf-8")
        _sync_and_describe(partial / "COMPLETE")
        sync_directory(partial)
        final = self.root / f"step-{step:06d}"
        if final.exists():  # the same step of an earlier, damaged attempt
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(self.root)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """A save under way is finished, also when the run ends in a UserError or Stopped, which all ranks share; not
        when a rank died.
        """
        if kind is None or issubclass(kind, UserError | signals.Stopped):
            self.wait()

    # --- reading ------------------------------------------------------------------------------------------------------

    def _named(self) -> list[Path]:
        return complete(self.root)

    def resume(self, which: str) -> dict[str, Any] | None:
        """Loads the newest sound checkpoint (or the one at the path `which`, and no other) and returns its state; None
        if there is none. Names those that it passes over, and why.

        Collective. Raises UserError if the path is not a sound checkpoint, or belongs to another model or dataset.
        """
        if which == "never":
            return None
        candidates = [Path(which)] if which != "auto" else list(reversed(_steps(self.root)))
        candidates = self.world.gather(candidates)[0]
        for path in candidates:
            problem = next((p for p in self.world.gather(damage(path, self.world)) if p), "")
            if not problem:
                state = self._load(path)
                self.newest = state["step"] if path.resolve().parent == self.root.resolve() else 0
                return state
            if which != "auto":
                raise UserError(f"--resume {path}: {problem}")
            self.world.say(f"warning: checkpoint {path} is not used: {problem}")
        return None

    def _load(self, path: Path) -> dict[str, Any]:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(self.settings)).items():
            if state["settings"].get(name) != value:
                raise UserError(f"{path} is of a run with --{name} {state['settings'].get(name)}, now it is {value}")
        for name, value in self.identity.items():
            if state["identity"].get(name, None if name in OF_ALL else value) != value:
                raise UserError(
                    f"{path} is of another {name}: give another --output_dir, or the {name} that this one was started"
                    " with"
                )
        reader = HuggingFaceStorageReader(str(path))
        tensors = self._tensors(state["world_size"])
        stored: Any = reader.read_metadata().state_dict_metadata
        wrong = [n for n in stored.keys() ^ tensors.keys()] or [
            n for n, t in tensors.items() if stored[n].size != t.shape or stored[n].properties.dtype != t.dtype
        ]
        if wrong:
            raise UserError(f"{path}: tensors do not fit the model, the first is {sorted(wrong)[0]}")
        dcp.load(tensors, storage_reader=reader)
        rounded = 0
        for part, name, p, optimizer in self._parameters():
            read = {m: tensors.pop(key) for m in optim.MOMENTS if (key := f"{part}.{m}.{name}") in tensors}
            rounded += optim.adopt(optimizer, p, read, state["world_size"])
            optimizer.state[p]["step"].fill_(state["optimizer_steps"][part])
        if self.world.is_main:
            # what came after the resumed step belongs to another branch now: kept, but out of the way
            for later in (p for p in self._named() if int(p.name.removeprefix("step-")) > state["step"]):
                shutil.rmtree(later.with_name(f"abandoned-{later.name}"), ignore_errors=True)
                later.rename(later.with_name(f"abandoned-{later.name}"))
        if state["world_size"] != self.world.size:
            self.world.say(
                f"resuming a run of {state['world_size']} ranks on {self.world.size}: the same trajectory to rounding,"
                " not to the bit"
            )
        if rounded:
            self.world.say(
                f"8-bit moments were requantised: block boundaries moved ({rounded} of"
                f" {sum(1 for _ in self._parameters())} tensors)"
            )
        if (path / BESIDE).is_file():
            state["beside"] = json.loads((path / BESIDE).read_text(encoding="utf-8"))
        return state

    def _parameters(self) -> Iterator[tuple[str, str, nn.Parameter, torch.optim.Optimizer]]:
        """What is trained, in the order of its modules; what is frozen is known by the identity of the model."""
        for part, (module, optimizer) in self.trained.items():
            for name, p in module.named_parameters():
                if p.requires_grad:
                    yield part, name, p, optimizer

    def _tensors(self, ranks: int | None = None) -> dict[str, Tensor]:
        """Masters and moments by name; given `ranks`, to read into what a run of so many ranks wrote."""
        tensors = {}
        for part, name, p, optimizer in self._parameters():
            tensors[f"{part}.master.{name}"] = p.detach()
            tensors |= {f"{part}.{m}.{name}": moment for m, moment in optim.moments(optimizer, p, ranks).items()}
        return tensors


def complete(root: Path) -> list[Path]:
    """The whole ones among a run's checkpoints, oldest first."""
    return [path for path in _steps(root) if (path / "COMPLETE").is_file()]


def _steps(root: Path) -> list[Path]:
    """The step-* directories in a run's checkpoints/, oldest first, by number."""
    if not root.is_dir():
        return []
    matches = [(int(m.group(1)), p) for p in root.iterdir() if p.is_dir() and (m := STEP.fullmatch(p.name))]
    return [path for _, path in sorted(matches)]


def damage(path: Path, world: World) -> str:
    """What is wrong with a checkpoint, of whose files this rank reads its share, or ''."""
    if not (path / "COMPLETE").is_file():
        return "it is incomplete: it has no COMPLETE, its manifest"
    try:
        files = json.loads((path / "COMPLETE").read_text(encoding="utf-8"))
        shards = {name for name in files if name.endswith(".safetensors")}
        if not shards or "state.json" not in files:
            return f"its manifest, COMPLETE, lists {'no state.json' if shards else 'no weights'}"
        if unlisted := {p.name for p in path.glob("*.safetensors")} - shards:
            return f"{min(unlisted)} is not in its manifest"
        for name in sorted(files)[world.rank :: world.size]:
            if Path(name).name != name or not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != files[name]["bytes"] or sha256(path / name) != files[name]["sha256"]:
                return f"{name} is damaged"
            if name in shards:
                headers.read(path / name)
            if name == "state.json" and (problem := wrong_in_state(path / name)):
                return f"state.json: {problem}"
        step = json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]
        if (named := STEP.fullmatch(path.name)) and int(named[1]) != step:
            return f"it is a copy of step {step} under another name"
    except headers.Unsound as why:
        return f"{name} is damaged ({why})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its manifest, COMPLETE, is damaged"
    return ""


def _read_again(path: Path, world: World) -> None:
    """Raises OSError unless this rank's share of the files is what was written, read from the disk where the system
    can be made to.
    """
    for file in path.iterdir():
        with open(file, "rb") as f, contextlib.suppress(AttributeError):  # which systems other than Linux may lack
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if problem := damage(path, world):
        raise OSError(f"read again, {problem}")


def _sync_and_describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}

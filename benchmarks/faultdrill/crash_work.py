"""What crash points are tried on: each piece of work that the engine does on a disk, by its own classes, on tiny
inputs.

`prepare` leaves the old state, `act` changes it (the process may die before any change that it makes), and `check`, in
processes of their own afterwards, says what is wrong: neither the old state nor the new one, a warning, work that
cannot be done again, leftovers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from engine.world import World

WARNED = "warning: "


class Work:
    """One piece, of one rank of `world`, in `directory`."""

    ranks: tuple[int, ...] = (1,)  # how many it is done by

    def __init__(self, world: World, directory: Path, shared: Path) -> None:
        self.world, self.directory, self.shared = world, directory, shared

    def prepare(self) -> None:
        pass

    def act(self) -> None:
        raise NotImplementedError

    def check(self, said: Callable[[], str]) -> str:
        """`said()` is what was printed so far."""
        raise NotImplementedError


class Save(Work):
    """A third checkpoint, after which the first goes."""

    ranks = (1, 2)
    is_damaged = False  # whether there was a step 3 that is not whole

    def _trained(self) -> Any:
        from engine.flags import OptimizerFlags
        from engine.train import optim
        from engine.train.checkpoint import Checkpoints

        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 8))
        fully_shard(self.module, mesh=self.world.mesh)
        self.optimizer = optim.adamw(self.module, OptimizerFlags(), self.world)
        known = {"identity": {"model": "a"}, "settings": {"beta": 5.0}}
        trained = {"policy": (self.module, self.optimizer)}
        self.checkpoints = Checkpoints(self.directory, self.world, trained, keep=2, **known)

    def _step(self) -> None:
        from engine.train import optim

        (self.module(torch.ones(1, 24)) ** 2).sum().backward()
        optim.step(self.optimizer, self.world, lr=0.1, max_norm=1.0)

    def _save(self, step: int) -> str:
        """After the row of that step."""
        from engine.log import Metrics

        metrics = Metrics(self.directory, self.world, start=step - 1, total=9)
        metrics.write(step, {"loss": step / 3})
        self.checkpoints.save(step, {"num_tokens": step}, keep=metrics.keep)
        problem = self.checkpoints.wait()
        metrics.close_file()
        return problem

    def _rows(self) -> int:
        """The rows that are there, from the first on."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return sum(line == json.dumps({"step": i, "loss": i / 3}) for i, line in enumerate(lines, start=1))

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for p in self.module.parameters():
            for tensor in (p.detach(), *(self.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq", "step"))):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                digest.update(local.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _expected(self) -> Path:
        return self.directory / f"expected-{self.world.rank}.json"

    def prepare(self) -> None:
        self._trained()
        digests = {}
        for step in (1, 2, 3):
            self._step()
            digests[step] = self._digest()
            if step < 3:
                self._save(step)
        self._expected().write_text(json.dumps(digests))

    def act(self) -> None:
        self._save(3)

    def check(self, said: Callable[[], str]) -> str:
        from engine.errors import UserError

        expected = {int(k): v for k, v in json.loads(self._expected().read_text()).items()}
        last = self.directory / "checkpoints" / "step-000003"
        named = (last / "COMPLETE").is_file() if self.is_damaged else last.exists()
        self.world.barrier()
        self._trained()
        try:
            state = self.checkpoints.resume("auto")
        except UserError as error:
            return f"cannot be resumed: {error}"
        if state is None or state["step"] not in ((3,) if named else (2, 3)):
            return f"resumed after step {state and state['step']}: neither the old state nor the new one"
        if self._digest() != expected[state["step"]]:
            return f"what was read of step {state['step']} is not what was saved"
        if self._rows() < state["step"]:
            return f"of step {state['step']} only {self._rows()} rows of metrics are there"
        if WARNED in said() and not self.is_damaged:
            return f"a checkpoint with a name was not whole: {said()[-200:]}"
        self.world.barrier()
        for step in range(state["step"] + 1, 5):
            self._step()
            after = self._digest()
            if problem := self._save(step):
                return f"the next save does not work: {problem}"
        self._trained()
        state = self.checkpoints.resume("auto")
        if state is None or state["step"] != 4 or self._digest() != after:
            return "the next save is not read back"
        left = sorted(path.name for path in (self.directory / "checkpoints").iterdir())
        return "" if left == ["step-000003", "step-000004"] else f"left behind: {left}"


class Again(Save):
    """The same step once more, in the place of one that lost its manifest."""

    ranks = (1,)
    is_damaged = True

    def prepare(self) -> None:
        super().prepare()
        self._save(3)
        (self.directory / "checkpoints" / "step-000003" / "COMPLETE").unlink()
        self._trained()
        state = self.checkpoints.resume("auto")
        assert state is not None and state["step"] == 2
        self._step()


class Branch(Save):
    """A run that goes on from its first checkpoint: the others are put aside."""

    ranks = (1,)

    def _go_back(self) -> Any:
        self._trained()
        return self.checkpoints.resume(str(self.directory / "checkpoints" / "step-000001"))

    def prepare(self) -> None:
        self._trained()
        self.checkpoints.keep = 9
        digests = {}
        for step in (1, 2, 3):
            self._step()
            digests[step] = self._digest()
            self._save(step)
        self._expected().write_text(json.dumps(digests))

    def act(self) -> None:
        self._go_back()

    def check(self, said: Callable[[], str]) -> str:
        expected = json.loads(self._expected().read_text())
        state = self._go_back()
        if state["step"] != 1 or self._digest() != expected["1"]:
            return "the named step is not what was saved"
        left = sorted(path.name for path in (self.directory / "checkpoints").iterdir())
        wanted = ["abandoned-step-000002", "abandoned-step-000003", "step-000001"]
        return "" if left == wanted else f"left: {left}"


class Export(Work):
    """A model, with another inside, whole or not at all."""

    ranks = (1, 2)

    def _write(self) -> None:
        from engine.data.chat import load_tokenizer
        from engine.model import export
        from tests.families import load

        source = self.shared / "model"
        lm, tokenizer = load(source, self.world).lm, load_tokenizer(source, 512).tokenizer
        how = {"dtype": torch.float32, "end_ids": (1,)}
        value = self.directory / ".value"
        export.save_model(lm, tokenizer, source, value, self.world, **how)
        inside = {"value": value}
        export.save_model(
            lm, tokenizer, source, self.directory / "final", self.world, inside=inside, card="card", **how
        )

    def _open(self) -> bool:
        """Whether the run is taken for finished."""
        from engine.flags import RunFlags
        from engine.run import open_run

        with open_run(RunFlags(output_dir=str(self.directory)), {"seed": 3}, self.world, {}) as finished:
            return finished

    def prepare(self) -> None:
        self._open()

    def act(self) -> None:
        from engine.run import forget_final, remember_final

        if self.world.is_main:
            forget_final(self.directory)
        self._write()
        if self.world.is_main:
            remember_final(self.directory)

    def check(self, said: Callable[[], str]) -> str:
        final = self.directory / "final"
        if not self._open():
            self.act()  # as the same command does
        elif problem := _unlike(final, self.shared / "expected" / type(self).__name__):
            return f"final/ has its name and is not whole: {problem}"
        if problem := _unlike(final, self.shared / "expected" / type(self).__name__):
            return f"it cannot be written again: {problem}"
        left = {path.name for path in self.directory.glob(".*")} - {".lock", ".final"}
        if self.world.is_main and left:
            return f"left behind: {sorted(left)}"
        return ""


class Adapter(Export):
    """An adapter alone."""

    def _write(self) -> None:
        from engine.model.adapters import files
        from engine.model.adapters.lora import Adapters
        from tests.families import load

        names = tuple(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
        adapters = Adapters(4, 8.0, False, names, 1)
        lm = load(self.shared / "model", self.world, adapters=adapters).lm
        facts = {"base_name": "model", "revision": "local", "base_weights": "0"}
        files.save(lm, adapters, self.directory / "final", self.world, card="card", **facts)


def _unlike(found: Path, expected: Path) -> str:
    """The first file that is not the same; the expected ones are made by the first who asks."""
    ours = {str(p.relative_to(found)): p.read_bytes() for p in found.rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(expected)): p.read_bytes() for p in expected.rglob("*") if p.is_file()}
    return next((name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)), "")


class Cache(Work):
    """Two more segments of a reference cache."""

    def _sums(self, rows: int) -> Any:
        from engine.data.store import Examples
        from engine.flags import MemoryFlags
        from engine.train import refcache

        refcache.SEQUENCES_PER_SEGMENT, refcache.LEFT_OVER = 8, -1.0
        store = _store(self.directory / "tokens", self.shared)
        policy = SimpleNamespace(identity="w", release=lambda: None, logprobs=lambda b: -b.targets_R.float() / 7)
        config = SimpleNamespace(to_dict=lambda: {"a": 1})
        how = SimpleNamespace(backend="sdpa")
        memory = MemoryFlags(micro_batch_tokens=200)
        base = SimpleNamespace(config=config, dtype=torch.float32, how=how, memory=memory)
        examples = Examples([store], [np.arange(len(store))])
        cache_dir = str(self.directory)
        return refcache.reference_logprobs(policy, base, examples, np.arange(rows), self.world, cache_dir=cache_dir)

    def prepare(self) -> None:
        self._sums(4)

    def act(self) -> None:
        self._sums(12)

    def check(self, said: Callable[[], str]) -> str:
        found = self._sums(12)
        if WARNED in said() or "miss" in said():
            return f"not read as it was left: {said()[-200:]}"
        if found.computed > 16:
            return "what was cached before is computed again"
        again = self._sums(12)
        if again.computed or not np.array_equal(found.sums[:12], again.sums[:12]):
            return "what is cached is not what was computed"
        expected = self.shared / "expected" / "sums.npy"
        if not np.array_equal(np.load(expected), found.sums[:12]):
            return "the sums are not those of a run that was left alone"
        left = [p.name for p in (self.directory / "reference").rglob(".*")]
        return f"left behind: {left}" if left else ""


def _encode(row: dict, notes: Counter) -> list:
    ids = np.array(row["ids"], np.int32)
    return [(ids, np.arange(len(ids)) > 0), (ids[::-1].copy(), np.arange(len(ids)) > 1)]


def _store(root: Path, shared: Path, determinants: int = 1) -> Any:
    from engine.data.files import open_source
    from engine.data.store import open_or_build

    source = open_source(str(shared / "rows.jsonl"), "train", None)
    return open_or_build(root, source, _encode, {"length": determinants}, per_example=2)


class Store(Work):
    """Tokenised rows, beside others."""

    def prepare(self) -> None:
        _store(self.directory, self.shared, 1)

    def act(self) -> None:
        _store(self.directory, self.shared, 2)

    def check(self, said: Callable[[], str]) -> str:
        for determinants in (1, 2):
            store = _store(self.directory, self.shared, determinants)
            rows = [json.loads(line) for line in (self.shared / "rows.jsonl").read_text().splitlines()]
            if len(store) != len(rows):
                return f"{len(store)} of {len(rows)} rows"
            for i, row in enumerate(rows):
                if store.sequences(i)[0][0].tolist() != row["ids"]:
                    return f"row {i} is not what was tokenised"
        if WARNED in said():
            return f"a store with a name was not whole: {said()[-200:]}"
        left = [p.name for p in self.directory.iterdir() if p.name.endswith(".partial")]
        return f"left behind: {left}" if left else ""


class Metrics(Work):
    """Rows of a run that goes on after step 2."""

    def _write(self, start: int, *steps: int) -> None:
        from engine.log import JsonLines

        lines = JsonLines(self.directory / "metrics.jsonl", start)
        for step in steps:
            lines.write({"step": step, "loss": step / 3})
        lines.close()

    def prepare(self) -> None:
        self._write(0, 1, 2, 3, 4)

    def act(self) -> None:
        self._write(2, 3, 4, 5)

    def check(self, said: Callable[[], str]) -> str:
        self._write(2, 3)
        rows = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        if rows != [{"step": step, "loss": step / 3} for step in (1, 2, 3)]:
            return f"rows of steps {[row['step'] for row in rows]} instead of 1, 2, 3"
        left = [p.name for p in self.directory.iterdir() if p.name != "metrics.jsonl"]
        return f"left behind: {left}" if left else ""


class Directory(Work):
    """A run's own directory, whose config.yaml is written at every start."""

    def _open(self) -> bool:
        from engine.flags import RunFlags
        from engine.run import open_run

        values = {"learning_rate": 1e-3, "output_dir": "run", "batch_size": 7, "seed": 3}
        flags = RunFlags(output_dir=str(self.directory / "run"), checkpoint_dir=str(self.directory / "elsewhere"))
        with open_run(flags, values, self.world, {"commit": "a" * 40}) as finished:
            return finished

    def prepare(self) -> None:
        self._open()

    def act(self) -> None:
        self._open()

    def check(self, said: Callable[[], str]) -> str:
        from engine.errors import UserError
        from engine.run import flags_in

        try:
            for _ in range(2):
                if self._open():
                    return "the run is taken for finished"
        except UserError as error:
            return f"the same command is refused: {error}"
        if flags_in(self.directory / "run").get("batch_size") != 7:
            return "config.yaml is not read back"
        left = sorted(p.name for p in (self.directory / "run").iterdir())
        return "" if left == [".lock", "checkpoints", "config.yaml"] else f"left behind: {left}"


class NewDirectory(Directory):
    """The same, of a run's first start."""

    def prepare(self) -> None:
        pass


WORK: dict[str, type[Work]] = {
    "save": Save,
    "again": Again,
    "branch": Branch,
    "export": Export,
    "adapter": Adapter,
    "cache": Cache,
    "store": Store,
    "metrics": Metrics,
    "directory": Directory,
    "new directory": NewDirectory,
}

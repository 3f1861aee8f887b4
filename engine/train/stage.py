"""A run of a stage: its directory, its steps, its micro-batches and what it writes.

It owns no loop; a stage iterates it:

    with Run(flags, base, steps, world, values=..., data=...) as run:
        policy = load_policy(base, world)
        for step in run.steps(policy=(policy, optimizer)):  # resumes; saves and profiles between steps
            totals = Totals(world)
            for batch in run.micro_batches(policy, examples, chosen, totals):
                ...backward
            run.write(step, row, totals.reduce(...), shown)
        run.export(policy)
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine import progress, provenance, signals
from engine import run as directories
from engine.data.batch import Batchable, MicroBatch, MicroBatches
from engine.data.mixture import Steps
from engine.errors import UserError
from engine.flags import RunFlags
from engine.log import JsonLines, Metrics, Totals
from engine.model.export import export
from engine.model.open import Base
from engine.model.policy import Policy, Root
from engine.signals import Stopped
from engine.terminal import as_time
from engine.train import card, finite
from engine.train.checkpoint import Checkpoints
from engine.train.refcache import config_digest
from engine.train.throughput import Throughput
from engine.world import World

NORMS = {
    "grad_norm": "gradient norm",
    "policy": "the policy's gradient norm",
    "value": "the value model's gradient norm",
}
IDENTITIES = {"policy": "model", "value": "value model"}  # what a checkpoint's parts are called in its identity


class Kept(Protocol):
    """What a run has besides what it trains and its checkpoints must hold, as JSON has it."""

    def state(self) -> Any:
        """None: nothing now. Collective."""

    def restore(self, state: Any) -> None:
        """What `state` gave."""

    def close(self) -> None:
        """The run ends, by an error perhaps."""


class Run:
    """One run of a stage; also its context, which ends its checkpoints, trace and lock."""

    def __init__(
        self,
        flags: RunFlags,
        base: Base,
        steps: Steps,
        world: World,
        *,
        values: dict[str, Any],
        data: str,
        unit: str = "step",
    ) -> None:
        """`values` are all flags of the run, `data` is the fingerprint of what it trains on, `unit` is what the
        bar counts.
        """
        self.flags, self.base, self.plan, self.world = flags, base, steps, world
        self.values, self.data, self.unit = values, data, unit
        self.headline = ""  # the figures of the last evaluation, or step
        self._began, self._resumed_after = time.monotonic(), 0
        self.output_dir = Path(flags.output_dir)
        self.is_finished = False
        self._done = 0  # steps whose update is whole
        self._checkpoints: Checkpoints | None = None
        self._kept: Kept | None = None
        self._trained: dict[str, tuple[Root, torch.optim.Optimizer]] = {}
        self._trail = finite.Trail()
        self._stack = contextlib.ExitStack()
        self._batches: MicroBatches | None = None
        self._samples: JsonLines | None = None
        self.metrics: Metrics
        self.throughput: Throughput

    def __enter__(self) -> Run:
        facts = {"model_revision": self.base.revision} | provenance.facts(self.world, self.plan.total)
        opened = directories.open_run(self.flags, self.values, self.world, facts)
        self.is_finished = self._stack.enter_context(opened)
        if self.is_finished:
            self.world.say(f"{self.output_dir} is finished, final/ is written: nothing to do", last=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *traceback: Any) -> None:
        """A run that was asked to end is left with a checkpoint of its last whole step, and says how to go on."""
        try:
            if isinstance(error, Stopped):
                raise Stopped(self._leave(str(error))) from None
        finally:
            self._stack.__exit__(kind, error, *traceback)

    def _leave(self, why: str) -> str:
        """Collective. Raises UserError where no checkpoint can be written."""
        command = "the same command" if self.flags.resume == "auto" else "the same command with --resume auto"
        if self._checkpoints is None or not self._done:
            return f"{why}, before the first step was over; {command} begins again"
        self._save()
        if problem := self._checkpoints.wait():
            raise UserError(f"stopped: {why}, and the checkpoint of step {self._done} is not written: {problem}")
        return f"{why}, after step {self._done} of {self.plan.total}; {command} goes on from its checkpoint"

    def _save(self) -> None:
        """A checkpoint of the last whole step, in the background."""
        assert self._checkpoints is not None, "steps() has made them"
        self.world.phase("saving a checkpoint")
        progress.note(counted=False)
        facts: dict[str, Any] = {"total_steps": self.plan.total, "examples": self.plan.n}  # for a card
        facts["rows"] = {"metrics": self.metrics.digest} | ({"samples": self._samples.digest} if self._samples else {})
        beside = self._kept.state() if self._kept is not None else None
        self._checkpoints.save(self._done, {"num_tokens": self.throughput.num_tokens, **facts}, beside, self._keep_rows)

    def _keep_rows(self) -> None:
        """No step of a checkpoint lacks its row: a machine that dies may lose what no fsync had reached."""
        self.metrics.keep()
        if self._samples is not None:
            self._samples.keep()

    def remember(self, what: Kept) -> None:
        """Its state is part of every checkpoint that is saved from now on; the run closes it."""
        self._kept = what
        self._stack.callback(what.close)

    def _between(self, seconds: float) -> None:
        """Between two steps, of which the last took so long: ends the run if a rank was asked to, else saves what is
        due. After the last step, the end of its time costs the run a checkpoint and not its export. Collective. Raises
        Stopped.
        """
        assert self._checkpoints is not None, "steps() has made them"
        done, total, every = self._done, self.plan.total, self.flags.save_steps
        signals.a_step_took(seconds)
        if (decision := signals.decided()) is None:
            decision = signals.read(sum(self.world.gather(signals.vote())))
        why, again = decision
        if why and (done < total or why not in signals.TIMES):
            raise Stopped(why)
        if again or why or (every and self._resumed_after < done < total and done % every == 0):
            self._save()

    def steps(self, **trained: tuple[Root, torch.optim.Optimizer]) -> Iterator[int]:
        """The steps to take, after a checkpoint where there is one; the first of a fresh run is 0.

        `trained`: name (policy, value) → (root, its optimizer), all that a step updates. Between two steps a checkpoint
        is saved where --save_steps asks for one. Collective. Raises UserError.
        """
        flags, world = self.flags, self.world
        identity = {IDENTITIES[name]: root.identity for name, (root, _) in trained.items()} | {"dataset": self.data}
        for name, (root, _) in trained.items():
            config = self.base.config if name == "policy" else root.lm.config
            identity[f"{IDENTITIES[name]}'s config.json"] = config_digest(config)
        settings = directories.settings(self.values)
        checkpoints = Checkpoints(
            self.output_dir, world, dict(trained), keep=flags.save_total_limit, identity=identity, settings=settings
        )
        state = checkpoints.resume(flags.resume) or {"step": 0, "num_tokens": 0}
        start, total = state["step"], self.plan.total
        if self._kept is not None and "beside" in state:
            self._kept.restore(state["beside"])
        self._resumed_after = self._done = start
        self._checkpoints, self._trained = checkpoints, dict(trained)
        rows = state.get("rows", {}) if checkpoints.newest else {}  # of another run's checkpoint they are elsewhere
        world.say(f"resuming after step {start}" if start else "starting at step 0")

        def open_files() -> None:
            self.metrics = Metrics(
                self.output_dir,
                world,
                start=start,
                total=total,
                report_to=flags.report_to,
                unit=self.unit,
                known=rows.get("metrics"),
            )
            samples = self.output_dir / "samples.jsonl"
            if world.is_main and (samples.is_file() or "samples" in rows):  # of what is done again, nothing stays
                self._samples = JsonLines(samples, start, rows.get("samples"))

        world.on_main("metrics", open_files)
        if not world.is_main:
            open_files()
        self._stack.callback(self.metrics.close_file)
        policy: Any = trained["policy"][0]
        self.throughput = Throughput(world, policy, self.base.dtype, state["num_tokens"])
        profile = self._stack.enter_context(directories.profiler(flags.profile, self.output_dir, world))
        self._stack.enter_context(checkpoints)
        self._between(0.0)
        for step in range(start, total):
            progress.at_step(step + 1)
            signals.rollouts_may_end(True)
            began = time.monotonic()
            yield step
            self._done = step + 1
            progress.compiles(False)  # one compilation serves all lengths
            if profile is not None:
                profile.step()
            self._between(time.monotonic() - began)
        progress.note("writing the last checkpoint", counted=False)
        checkpoints.wait()

    def evaluates(self, done: int) -> bool:
        """Whether held-out data is looked at after so many steps: every --eval_steps, and after the last."""
        return done == self.plan.total or bool(self.flags.eval_steps and done % self.flags.eval_steps == 0)

    def micro_batches(
        self,
        root: Root,
        examples: Batchable,
        chosen: np.ndarray,
        totals: Totals | None = None,
        then: np.ndarray | None = None,
        counted: bool = True,
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the examples `chosen`, each to be followed by a backward pass of `root`.

        Sets when weights are gathered and gradients reduced; counts tokens and FLOPs into `totals`, unless they are
        `counted` elsewhere. `then` is what is taken next, which is prepared meanwhile. Every rank gets the same number.
        """
        if self._batches is None or self._batches.examples is not examples:
            self._batches = MicroBatches(examples, self.base.memory.micro_batch_tokens, self.world)
        for batch, last in self._batches(chosen, then=then):
            root.sync_gradients(last)
            if totals is not None and counted:
                self.throughput.count(batch, totals)
            progress.note()
            yield batch
            if totals is not None:
                self._trail.note(totals, batch.examples, totals.sums)

    def evaluation_batches(self, examples: Batchable) -> Iterator[MicroBatch]:
        """This rank's micro-batches of all these examples, without backward passes."""
        batches, seen = MicroBatches(examples, self.base.memory.micro_batch_tokens, self.world), 0
        for batch, _ in batches(np.arange(len(examples.tokens))):
            self.world.phase("held out", seen * self.world.size, len(examples.tokens))
            yield batch
            seen += len(batch.examples)

    def stop_unless_finite(
        self, step: int, numbers: dict[str, float], unit: str, examples: np.ndarray, prompts: torch.Tensor | None = None
    ) -> None:
        """Raises UserError on a loss, a gradient norm or another sum over all ranks that is not finite, with the rank
        and the examples that it came of, where they can be told; the optimizers have applied no gradient that is not.

        `prompts` are those of the responses that micro-batches were made of.
        """
        found = {name: number for name, number in numbers.items() if not math.isfinite(number)}
        if not found:
            return
        trained = {name: p for root, _ in self._trained.values() for name, p in root.named_parameters()}
        met = self._trail.first()
        met = met if prompts is None else sorted({int(prompts[response]) for response in met})
        on = finite.whose(self.world.gather((finite.not_finite(trained), met)), unit, examples.tolist())
        words = ", ".join(f"{NORMS.get(name, name)} {number}" for name, number in found.items())
        raise UserError(f"step {step + 1}: {words}, {on}; gradients that are not finite were not applied")

    def stop_unless_all_finite(self, step: int, columns: dict[str, torch.Tensor], examples: np.ndarray) -> None:
        """The same of numbers that every rank has for itself, in the order in which they come of each other.
        Collective.
        """
        mine = next((name for name, x_R in columns.items() if not finite.all_finite(x_R)), "")
        bad = [f"{name} on rank {rank}" for rank, name in enumerate(self.world.gather(mine)) if name]
        if bad:
            on = f"prompts {finite.shown(examples.tolist())}"
            raise UserError(f"step {step + 1}: {', '.join(bad[:4])} are not finite, on {on}; nothing was applied")

    def write(self, step: int, row: dict[str, Any], sums: dict[str, float], shown: str) -> None:
        """The row of a step that was taken, with its speed of `sums`; `shown` stands on the bar."""
        signals.rollouts_may_end(False)  # what is sampled now is an evaluation of this step
        row = row | self.throughput.row(sums)
        self.headline = shown
        self.metrics.write(step + 1, row, f"{shown}, {row['perf/tokens_per_second_per_gpu']:,.0f} tokens/s")

    def write_evaluation(self, done: int, row: dict[str, float], *lines: str) -> None:
        """A row of held-out figures after so many steps, and lines above the bar: a label with the figures, others."""
        self.metrics.write(done, {f"eval/{name}": value for name, value in row.items()})
        self.headline = "held out: " + lines[0].partition(": ")[2]
        self.world.say(*lines)

    def write_samples(self, done: int, rows: list[dict[str, Any]]) -> None:
        """Responses with what was thought of them, into samples.jsonl."""
        if self.world.is_main:
            self._samples = self._samples or JsonLines(self.output_dir / "samples.jsonl", 0)
            for row in rows:
                self._samples.write({"step": done, **row})

    def _card(self, policy: Policy, is_adapter: bool) -> str:
        facts = card.Facts(
            self.values,
            self.base.name,
            self.base.revision,
            policy.base_weights,
            type(policy.lm).__name__,
            step=self.plan.total,
            total=self.plan.total,
            data=self.data,
            rows=self.plan.n,
            metrics=card.metrics_in(self.output_dir / "metrics.jsonl"),
            recorded=card.recorded_in(self.output_dir / "config.yaml"),
            is_adapter=is_adapter,
        )
        return card.text(facts)

    def export(self, policy: Policy, then: Sequence[str] = (), **inside: Root) -> None:
        """Writes final/: the policy, and other roots under their names in it; says what was made, and which commands
        may come `then`. Collective.
        """
        self.world.phase("writing final/")
        progress.note(counted=False)
        if self._checkpoints is not None:
            self._checkpoints.require_finite(self._done, "final/", self._checkpoints.masters())
        self.world.on_main("output_dir", lambda: directories.forget_final(self.output_dir))
        done, flags, adapter_only = {}, self.flags, self.values["export_adapter"]
        for name, root in inside.items():
            done[name] = self.output_dir / f".{name}"
            export(root, self.base, self.world, done[name], dtype=flags.export_dtype)
        final = self.output_dir / "final"
        how = export(
            policy,
            self.base,
            self.world,
            final,
            dtype=flags.export_dtype,
            adapter_only=adapter_only,
            inside=done,
            card=self._card(policy, adapter_only),
        )
        self.world.on_main("final", lambda: directories.remember_final(self.output_dir))
        self.metrics.close()
        also = "".join(f", its {name}/ as a sequence classifier" for name in inside)
        self.world.say(f"done: {how}{also}{self._summary(final)}", last=True)
        self.world.say(*(f"{'or' if i else 'next'}: {command}" for i, command in enumerate(then)))

    def _summary(self, final: Path) -> str:
        """How much was written, in how many steps and what time, and the last figures."""
        size = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
        some = f" ({self.plan.total - self._resumed_after} of them now)" if self._resumed_after else ""
        took, plural = as_time(time.monotonic() - self._began), "s" if self.plan.total > 1 else ""
        return f"; {as_size(size)}, {self.plan.total:,} {self.unit}{plural}{some} in {took}" + (
            f"; {self.headline}" if self.headline else ""
        )


def as_size(n: int) -> str:
    """Bytes, in MiB or GiB."""
    return f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"

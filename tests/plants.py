"""Checks that a run is without, and numbers that go bad in it: what benchmarks/faultdrill plants in tests/ranks.py's
ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def word(argv: list[str], name: str) -> str:
    """The value of a flag of the drill's own, which the stage does not see."""
    at = argv.index(f"--{name}")
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


# --- controls of the damage suite -------------------------------------------------------------------------------------


def shards_are_not_verified() -> None:
    from engine.train import checkpoint

    checkpoint.damage = lambda path, world: "" if (path / "COMPLETE").is_file() else "it has no COMPLETE"


def manifests_may_list_nothing() -> None:
    """What is listed is verified, as before."""
    import json
    from pathlib import Path

    from engine.train import checkpoint

    def tolerant(path: Path, world: Any) -> str:
        for name, facts in json.loads((path / "COMPLETE").read_text()).items():
            if checkpoint.sha256(path / name) != facts["sha256"]:
                return f"{name} is damaged"
        return ""

    checkpoint.damage = tolerant


def segments_are_not_checked() -> None:
    from engine.train import refcache

    def unchecked(directory):
        for path in sorted(directory.glob("rows-*.safetensors")):
            with refcache.safe_open(path, framework="numpy") as f:
                yield {name: f.get_tensor(name) for name in ("keys", "logprobs", "counts")}

    refcache._segments = unchecked


def examples_are_not_checked() -> None:
    from itertools import pairwise

    from engine.data.store import TokenStore

    def unchecked(self, example):
        first = example * self.per_example
        bounds = self.offsets[first : first + self.per_example + 1]
        return [(self.ids[a:b], self.mask[a:b]) for a, b in pairwise(bounds)]

    TokenStore.sequences = unchecked


# --- numbers that go bad ----------------------------------------------------------------------------------------------

CALLS = {"sft": 1, "dpo": 1, "ppo": 2, "grpo": 1}  # of optim.step in a step of the drill's runs


def numbers_that_are_none(argv: list[str]) -> None:
    """--plant STAGE:WHERE:VALUE:RANK:STEP, and --planted, a file for the examples that had them."""
    stage, where, value, rank, step = word(argv, "plant").split(":")
    file = word(argv, "planted")
    if os.environ["RANK"] == rank:
        PLANTS[where](stage, float(value), int(step), file)


def numbers_that_nobody_checks(argv: list[str]) -> None:
    """The same in a run that goes on."""
    from engine.train import Run, checkpoint

    Run.stop_unless_finite = Run.stop_unless_all_finite = lambda *_: None
    checkpoint.Checkpoints.require_finite = lambda *_: None
    numbers_that_are_none(argv)


def _spoil(tensor: Any, value: float) -> None:
    """Its first number."""
    from engine.model.shards import local

    local(tensor).view(-1)[:1] = value


def _note(file: str, examples: Any) -> None:
    import json
    from pathlib import Path

    Path(file).write_text(json.dumps([int(e) for e in examples]))


def _around_step(stage: str, step: int, before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
    """What is done with an optimizer before and after the last update of a step."""
    import torch

    from engine.train import optim

    original, count, last = optim.step, iter(range(1, 1000)), step * CALLS[stage]

    @torch.no_grad()
    def stepping(optimizer, *args, **options):
        now = next(count) == last
        if now:
            before(optimizer)
        norm = original(optimizer, *args, **options)
        if now:
            after(optimizer)
        return norm

    optim.step = stepping


def _mine(optimizer: Any) -> list[Any]:
    """The parameters of which this rank holds something."""
    from engine.model.shards import local

    return [p for group in optimizer.param_groups for p in group["params"] if local(p).numel()]


def _weights(stage: str, value: float, step: int, file: str) -> None:
    _around_step(stage, step, lambda o: None, lambda o: _spoil(_mine(o)[0].data, value))


def _moments(stage: str, value: float, step: int, file: str) -> None:
    _around_step(stage, step, lambda o: None, lambda o: _spoil(o.state[_mine(o)[0]]["exp_avg"], value))


def _gradient(stage: str, value: float, step: int, file: str) -> None:
    _around_step(
        stage, step, lambda o: _spoil(next(p for p in _mine(o) if p.grad is not None).grad, value), lambda o: None
    )


def _loss(stage: str, value: float, step: int, file: str) -> None:
    """A log-prob of a micro-batch of that step, as the loss is given it."""
    from engine import progress
    from engine.model import Policy

    original, done = Policy.loss, []

    def spoiled(self, batch, loss_of_logprobs, *args, **options):
        def of(logprobs, part):
            if progress._now.step == step and batch.examples and not done and len(logprobs):
                done.append(1)
                _note(file, batch.examples)
                logprobs = logprobs * value
            return loss_of_logprobs(logprobs, part)

        return original(self, batch, of, *args, **options)

    Policy.loss = spoiled


def _reference(stage: str, value: float, step: int, file: str) -> None:
    """The reference of one sequence, on its way to the loss."""
    from engine import progress
    from engine.train import refcache

    original, done = refcache.Reference.__call__, []

    def spoiled(self, batch):
        found = original(self, batch)
        if progress._now.step == step and batch.examples and not done:
            done.append(1)
            _note(file, batch.examples)
            found[:1] = value
        return found

    refcache.Reference.__call__ = spoiled


def _evaluated(nth: int) -> Callable[..., None]:
    """The n-th of an iteration's passes over all responses: the policy, its reference, values."""

    def plant(stage: str, value: float, step: int, file: str) -> None:
        import importlib

        from engine import progress

        module = importlib.import_module(f"launch.{stage}")
        original, calls = module.evaluate, {"step": 0, "n": 0}

        def evaluating(forward, sequences, *rest):
            now = progress._now.step
            calls["n"] = calls["n"] + 1 if calls["step"] == now else 0
            calls["step"], done = now, []

            def spoiled(batch):
                out = forward(batch)
                if now == step and calls["n"] == nth and batch.examples and not done:
                    done.append(1)
                    _note(file, [sequences.prompts[batch.examples[0]]])
                    out = out.clone()
                    out[..., :1] = value
                return out

            return original(spoiled, sequences, *rest)

        module.evaluate = evaluating

    return plant


def _verdict(stage: str, value: float, step: int, file: str) -> None:
    """Of one response that this rank has judged."""
    from engine import progress
    from verifiers import Pool

    original, done = Pool.imap, []

    def spoiled(self, rows):
        for verdict in original(self, rows):
            if progress._now.step == step and not done:
                done.append(1)
                verdict = verdict._replace(score=value)
            yield verdict

    Pool.imap = spoiled


def _advantages(stage: str, value: float, step: int, file: str) -> None:
    """This rank's own, which it works out of what all have."""
    from engine import progress

    if stage == "ppo":
        import losses as module

        name = "whiten"
    else:
        import launch.grpo as module

        name = "advantages_of"
    original = getattr(module, name)

    def spoiled(*args, **options):
        found = original(*args, **options)
        if progress._now.step == step:
            found[:1] = value
        return found

    setattr(module, name, spoiled)


PLANTS: dict[str, Callable[..., None]] = {
    "weights": _weights,
    "moments": _moments,
    "gradient": _gradient,
    "loss": _loss,
    "reference": _reference,
    "old": _evaluated(0),
    "frozen": _evaluated(1),
    "value": _evaluated(2),
    "verdict": _verdict,
    "advantages": _advantages,
}


# --- disks and neighbours ---------------------------------------------------------------------------------------------


def no_large_files(argv: list[str]) -> None:
    """--plant KIB:STEP, from before that step's update on."""
    import resource

    kib, step = (int(n) for n in word(argv, "plant").split(":"))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = lambda optimizer: resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, hard))
    _around_step("sft", step, limit, lambda optimizer: None)


def final_is_written_in_place() -> None:
    """File by file, under its own name."""
    import shutil
    import time

    from engine.model import export

    def in_place(partial, final, inside):
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            target = final / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            time.sleep(0.02)
        shutil.rmtree(partial)

    export.publish = in_place


def directories_have_no_lock() -> None:
    from engine import run
    from tests import faults

    def unlocked(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.write(descriptor, str(os.getpid()).encode())
        return descriptor

    run._lock = unlocked
    faults.slow_steps()


# --- other numbers of ranks -------------------------------------------------------------------------------------------


def record_examples(argv: list[str]) -> None:
    """Which examples each step takes on this rank, in a file beside the run's directory."""
    import json
    from pathlib import Path

    from engine import progress
    from engine.train import Run

    file = Path(f"{argv[argv.index('--output_dir') + 1]}.examples.{os.environ['RANK']}")
    original = Run.micro_batches

    def recording(self, root, *args, **options):
        for batch in original(self, root, *args, **options):
            row = {"step": progress._now.step, "root": type(root).__name__, "examples": batch.examples}
            with file.open("a") as f:
                f.write(json.dumps(row) + "\n")
            yield batch

    Run.micro_batches = recording


def positions_are_of_a_rank(argv: list[str]) -> None:
    """A state that counts what one rank took: with other ranks it is another place."""
    from engine.train.checkpoint import Checkpoints

    record_examples(argv)
    original = Checkpoints.resume

    def resuming(self, which):
        state = original(self, which)
        return state and state | {"step": state["step"] * state["world_size"] // self.world.size}

    Checkpoints.resume = resuming


def moments_begin_anew_on_other_ranks(argv: list[str]) -> None:
    from engine.train import optim

    record_examples(argv)

    def forgetting(optimizer, p, read, ranks):
        for moment in read.values():
            moment.zero_()
        return False

    optim.adopt = forgetting

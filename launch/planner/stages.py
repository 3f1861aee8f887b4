"""One optimizer step of a stage, rehearsed: the stage's own functions on fake tensors, under a ledger. PPO's and
GRPO's iteration is in rlvr.py.

What a rank sees in a step is its fullest micro-batch: sequences of the longest length, and one of what room is left.
Two micro-batches show what accumulation keeps; the optimizer's state is there from the start, as in every step but the
first.

T tokens of a micro-batch · S sequences.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.data.batch import MicroBatch, micro_batch
from engine.hardware import Device
from engine.log import Totals
from engine.model import open
from engine.model.adapters import choose, lora
from engine.model.adapters.saved import vocabulary_modules
from engine.model.build import How
from engine.model.policy import Root
from engine.train import optim
from engine.train.reference import FrozenPolicy
from engine.train.throughput import Throughput
from launch import dpo, sft
from launch.planner.fakes import PLANNED, PlannedStream, PlannedWorld, follow
from launch.planner.ledger import ACTIVATIONS, BATCH, OPTIMIZER, REFERENCE, WEIGHTS, Cost, Ledger, Peak
from losses.sft import denominator

RLVR = ("ppo", "grpo")  # their step is an iteration: responses to prompts are sampled, then learnt from


@dataclass(frozen=True)
class Work:
    """What one rank does in a step. A unit is a conversation, a pair or a response with its prompt."""

    full: tuple[int, ...]  # tokens fed of every sequence of the fullest micro-batch
    typical: tuple[int, ...]  # of a micro-batch of mean sequences
    micro_batches: int  # a step (RLVR: a pass over an iteration's responses)
    units: int  # of a rank and step

    @classmethod
    def of(cls, stage: str, config: Any, ranks: int, longest: int, mean: float | None = None) -> Work:
        """For units of at most `longest` tokens a sequence and `mean` on average (None: the longest), counted before
        the shift by one.
        """
        batch = config.batch_size * (config.num_samples_per_prompt if stage in RLVR else 1)
        sequences, units = 2 if stage == "dpo" else 1, math.ceil(batch / ranks)
        budget, most, typical = config.micro_batch_tokens, longest - 1, max(1, round(mean or longest) - 1)
        whole = max(1, budget // (sequences * most))
        full = [most] * (sequences * min(whole, units))
        if whole < units and (left := (budget - sum(full)) // sequences) > most // 16:
            full += [left] * sequences
        per_batch = max(1, min(units, budget // (sequences * typical)))
        batches = math.ceil(units / per_batch)
        return cls(tuple(full), (typical,) * (sequences * math.ceil(units / batches)), batches, units)


@dataclass
class Rehearsed:
    """What the ledger saw."""

    parameters: int
    trained: int
    peak: Peak
    peaks: dict[str, Peak]
    micro_batch: Cost  # of one that is not the step's last; RLVR: of policy and value model, forward and backward
    last: Cost
    optimizer: Cost
    tokens: int  # of the timed micro-batch
    model_flops: float  # of the timed micro-batch, as perf/mfu counts them
    gradient_sync: tuple[str, str]
    dtype: torch.dtype  # of the checkpoint
    compute: torch.dtype
    # RLVR: hand-over, prefill (a prompt), decode (a token of all slots), evaluate (a micro-batch)
    rollout: dict[str, Cost] = field(default_factory=dict)
    slots: int = 0  # responses that are sampled at once
    pool: int = 0  # bytes of their cache
    vocabulary: tuple[str, ...] = ()  # what embedding and head are called
    steady: dict[str, int] = field(default_factory=dict)  # live between two steps, by kind


@dataclass(frozen=True)
class Case:
    """What is planned: a stage's resolved configuration, its models, the cluster, and a rank's work."""

    stage: str
    config: Any
    lm_config: Any
    value_config: Any  # PPO's
    device: Device
    ranks: int
    per_node: int
    work: Work
    trained_share: float = 1.0


def planned_base(case: Case, config: Any) -> open.Base:
    """The model as the stage would find it, without files."""
    cpu = case.device.name == "cpu"
    dtype = open.compute_dtype(config.dtype, "cpu" if cpu else "cuda")
    start = Path(config.adapter_name_or_path).expanduser() if config.adapter_name_or_path else None
    has_reference = case.stage == "dpo" or (case.stage in RLVR and config.kl_coef)
    keep_initial = bool(has_reference) and config.reference == "adapter"
    adapters = choose.choose(config, case.lm_config, start if start and start.is_dir() else None, keep_initial)
    if adapters is not None:
        choose.check_new_tokens(adapters, case.lm_config, dict.fromkeys(config.add_special_tokens or (), 0))
    how = How(dtype, "sdpa" if cpu else PLANNED, config.head, getattr(torch, config.master_dtype), adapters)
    chat: Any = None  # no text is read
    lm_config, how = open.untie(case.lm_config, how)
    return open.Base("", Path("."), "planned", lm_config, chat, how, "planned", config)


class Stage:
    """What the stages share."""

    def __init__(self, case: Case, config: Any, world: PlannedWorld, ledger: Ledger, mode: FakeTensorMode) -> None:
        self.stage, self.config, self.world, self.ledger, self.mode = case.stage, config, world, ledger, mode
        self.work, self.trained_share, self.value_config = case.work, case.trained_share, case.value_config
        self.base = planned_base(case, config)
        self.stream = None if case.device.name == "cpu" else PlannedStream(world.device, ledger)
        with ledger.phase("loading", WEIGHTS):
            self.policy = open.build_policy(self.base, world, self.stream)
        self.sync = open.gradient_sync(self.base, self.policy, world, models=1 if case.value_config is None else 2)
        self.policy.gradient_sync = self.sync[0]
        follow(self.policy, ledger)
        self.throughput = Throughput(world, self.policy, self.base.dtype)

    def batch(self, lengths: tuple[int, ...], counted: int | None = None) -> MicroBatch:
        """Sequences of these lengths on the device, whose last tokens count (`counted` of each, or the trained
        share).
        """

        def sequence(n: int) -> tuple[np.ndarray, np.ndarray]:
            rows = min(n, counted or max(1, round(n * self.trained_share)))
            return np.zeros(n + 1, np.int64), np.arange(n + 1) > n - rows

        real = micro_batch(
            [sequence(n) for n in lengths],
            range(len(lengths) // (2 if self.stage == "dpo" else 1)),
            torch.device("cpu"),
        )
        self.ledger.rows = len(real.targets_R)
        fields = {f.name: getattr(real, f.name) for f in dataclasses.fields(real)}
        fakes = {name: self.mode.from_tensor(x) for name, x in fields.items() if isinstance(x, torch.Tensor)}
        with self.ledger.allocating(BATCH):
            for fake in fakes.values():
                self.ledger.note(fake)
        exchanged: dict[str, Any] = dict(fakes)
        return dataclasses.replace(real, **exchanged)

    def cost(self, *phases: str) -> Cost:
        return sum((self.ledger.costs.get(name, Cost()) for name in phases), Cost())

    def frozen(self) -> FrozenPolicy:
        """pi_ref as the stage makes it, a copy with room for its weights and none read."""
        if self.config.reference != "copy":
            return FrozenPolicy(self.policy, lora.OFF if self.config.reference == "base" else lora.INITIAL)
        with self.ledger.phase("loading", REFERENCE):
            copy = open.build_policy(self.base, self.world, self.stream)
            copy.requires_grad_(False)
        follow(copy, self.ledger)
        return FrozenPolicy(copy, lora.TRAINED)

    def optimizer(self, root: Root, kind: str) -> torch.optim.Optimizer:
        """With the state that a first step would make: so one step shows what two would."""
        with self.ledger.phase("loading", kind):
            optimizer = optim.adamw(root, self.config, self.world)
            for p in root.parameters():
                if p.requires_grad:
                    optim.moments(optimizer, p)
        return optimizer

    def optimizer_step(self, optimizer: torch.optim.Optimizer, kind: str) -> None:
        with self.ledger.phase("optimizer", kind):
            optim.step(optimizer, self.world, lr=1e-6, max_norm=self.config.max_grad_norm)

    def result(self, costs: tuple[Cost, Cost, Cost], tokens: int, model_flops: float, **more: Any) -> Rehearsed:
        """What the ledger saw; `costs` are of a micro-batch, of the step's last, and of the optimizer."""
        ledger, policy = self.ledger, self.policy
        return Rehearsed(
            parameters=policy.num_parameters,
            trained=policy.num_trained,
            peak=ledger.peak,
            peaks=ledger.peaks,
            micro_batch=costs[0],
            last=costs[1],
            optimizer=costs[2],
            tokens=tokens,
            model_flops=model_flops,
            gradient_sync=self.sync,
            vocabulary=tuple(name.rpartition(".")[2] for name in vocabulary_modules(policy.lm)),
            dtype=self.base.config.dtype or torch.float32,
            compute=self.base.dtype,
            steady={kind: size for kind, size in ledger.live.items() if size},
            **more,
        )


class Supervised(Stage):
    """SFT and DPO: micro-batches of the stage's own loss, then the optimizer."""

    def rehearse(self) -> Rehearsed:
        self.reference = self._reference()
        optimizer = self.optimizer(self.policy, OPTIMIZER)
        count = min(2, self.work.micro_batches)
        steps = [self.work.full] + ([self.work.typical] if self.work.typical != self.work.full else [])
        for lengths in steps:
            passes, tokens, flops = [], 0, 0.0
            for i in range(count):
                before = self.cost("forward", "backward")
                tokens, flops = self._micro_batch(lengths, last=i == count - 1)
                passes.append(self.cost("forward", "backward") - before)
            before = self.cost("optimizer")
            self.optimizer_step(optimizer, OPTIMIZER)
        return self.result((passes[0], passes[-1], self.cost("optimizer") - before), tokens, flops)

    def _reference(self) -> Any:
        if self.stage != "dpo" or self.config.loss_type in dpo.REFERENCE_FREE:
            return None
        if self.config.reference == "cache":
            return lambda batch: torch.zeros(len(batch.counts_S))
        return self.frozen().sums

    def _micro_batch(self, lengths: tuple[int, ...], last: bool) -> tuple[int, float]:
        """(tokens, model FLOPs)."""
        batch, totals = self.batch(lengths), Totals(self.world)
        self.policy.sync_gradients(last)
        with self.ledger.phase("forward", ACTIVATIONS):
            loss = self._loss(batch, totals)
        with self.ledger.phase("backward", ACTIVATIONS):
            loss.backward()
        return batch.num_tokens, self.throughput.flops(batch)

    def _loss(self, batch: MicroBatch, totals: Totals) -> torch.Tensor:
        if self.stage == "sft":
            n = denominator(len(batch.targets_R), len(batch.lengths), self.config.reduce_loss)
            return sft.sft_loss(self.policy, batch, self.config.reduce_loss, n, totals)
        _, objective = dpo.resolve_loss(self.config)
        return dpo.preference_loss(self.policy, batch, self.reference, objective, self.config.batch_size, totals)

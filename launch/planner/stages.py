"""One optimizer step of a stage (of PPO: one iteration), rehearsed: the stage's own functions on fake tensors, under a
ledger.

What a rank sees in a step is its fullest micro-batch: sequences of the longest length, and one of what room is left.
Two micro-batches show what accumulation keeps; the optimizer's state is there from the start, as in every step but the
first.

T tokens of a micro-batch · S sequences · P prompt tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.data.batch import Batchable, MicroBatch, MicroBatches, micro_batch
from engine.hardware import Device
from engine.log import Totals
from engine.model import build, open
from engine.model.adapters import choose, lora
from engine.model.adapters.saved import vocabulary_modules
from engine.model.build import How
from engine.model.layers import transform_layers
from engine.model.policy import Root, ValueModel, release
from engine.train import optim
from engine.train.reference import FrozenPolicy
from engine.train.throughput import Throughput
from launch import dpo, ppo, sft
from launch.planner.fakes import PLANNED, PlannedCache, PlannedStream, PlannedWorld, follow, rehearsal
from launch.planner.ledger import (
    ACTIVATIONS,
    BATCH,
    GATHERED,
    OPTIMIZER,
    REFERENCE,
    SAMPLER,
    VALUE,
    WEIGHTS,
    Cost,
    Ledger,
    Peak,
)
from losses.sft import denominator
from rollout import Experience, Rollout, Sampler, SamplingParams
from rollout.cache import Pass
from rollout.choice import choose as choose_tokens


@dataclass(frozen=True)
class Work:
    """What one rank does in a step. A unit is a conversation, a pair or a response with its prompt."""

    full: tuple[int, ...]  # tokens fed of every sequence of the fullest micro-batch
    typical: tuple[int, ...]  # of a micro-batch of mean sequences
    micro_batches: int  # a step (PPO: a pass over an iteration's responses)
    units: int  # of a rank and step

    @classmethod
    def of(cls, stage: str, config: Any, ranks: int, longest: int, mean: float | None = None) -> Work:
        """For units of at most `longest` tokens a sequence and `mean` on average (None: the longest), counted before
        the shift by one.
        """
        batch = config.batch_size * (config.num_samples_per_prompt if stage == "ppo" else 1)
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
    micro_batch: Cost  # of one that is not the step's last; PPO: one of policy and value model, forward and backward
    last: Cost
    optimizer: Cost
    tokens: int  # of the timed micro-batch
    model_flops: float  # of the timed micro-batch, as perf/mfu counts them
    gradient_sync: tuple[str, str]
    dtype: torch.dtype  # of the checkpoint
    compute: torch.dtype
    # PPO: hand-over, prefill (a token), decode (a token of all slots), evaluate (a micro-batch)
    rollout: dict[str, Cost] = field(default_factory=dict)
    slots: int = 0
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


def rehearse(case: Case) -> Rehearsed:
    """A step of the stage on rank 0. Raises UserError for what the stage itself refuses."""
    config, device = case.config, case.device
    fused = 0.5 if config.compile else 1.0  # the traffic between matrix products that is left where layers are compiled
    config = dataclasses.replace(config, compile=False)
    with rehearsal(device, case.ranks, per_node=case.per_node, fused=fused) as (world, ledger, mode):
        stage = (_Ppo if case.stage == "ppo" else _Supervised)(case, config, world, ledger, mode)
        return stage.rehearse()


def planned_base(case: Case, config: Any) -> open.Base:
    """The model as the stage would find it, without files."""
    cpu = case.device.name == "cpu"
    dtype = open.compute_dtype(config.dtype, "cpu" if cpu else "cuda")
    start = Path(config.adapter_name_or_path).expanduser() if config.adapter_name_or_path else None
    keep_initial = case.stage != "sft" and config.reference == "adapter"
    adapters = choose.choose(config, case.lm_config, start if start and start.is_dir() else None, keep_initial)
    if adapters is not None:
        choose.check_new_tokens(adapters, case.lm_config, dict.fromkeys(config.add_special_tokens or (), 0))
    how = How(dtype, "sdpa" if cpu else PLANNED, config.head, getattr(torch, config.master_dtype), adapters)
    chat: Any = None  # no text is read
    lm_config, how = open.untie(case.lm_config, how)
    return open.Base("", Path("."), "planned", lm_config, chat, how, "planned", config)


class _Stage:
    """What the stages share."""

    def __init__(self, case: Case, config: Any, world: PlannedWorld, ledger: Ledger, mode: FakeTensorMode) -> None:
        self.stage, self.config, self.world, self.ledger, self.mode = case.stage, config, world, ledger, mode
        self.work, self.trained_share, self.value_config = case.work, case.trained_share, case.value_config
        self.base = planned_base(case, config)
        self.stream = None if case.device.name == "cpu" else PlannedStream(world.device, ledger)
        with ledger.phase("loading", WEIGHTS):
            self.policy = open.build_policy(self.base, world, self.stream)
        self.sync = open.gradient_sync(self.base, self.policy, world, models=2 if self.stage == "ppo" else 1)
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


class _Supervised(_Stage):
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


class _Ppo(_Stage):
    """PPO: hand-over, sampling, evaluation under three models, two updates."""

    def rehearse(self) -> Rehearsed:
        """One iteration."""
        config, ledger, world = self.config, self.ledger, self.world
        self.policy.temperature = config.temperature or 1.0
        frozen = self.frozen() if config.kl_coef else None
        with ledger.phase("loading", VALUE):
            value_model = build.build_value_model(self.value_config, world, self._value_how())
        transform_layers(value_model, self.base.memory, self.stream)
        follow(value_model, ledger)
        value_model.gradient_sync = self.policy.gradient_sync
        with ledger.phase("loading", SAMPLER):
            sampler = Sampler(
                self.base.config,
                self.policy,
                world,
                dtype=self.base.dtype,
                max_length=config.max_seq_length,
                slots=config.rollout_slots,
                backend=self.base.how.backend,
                make_cache=partial(PlannedCache, ledger=ledger),
            )
        optimizers = [self.optimizer(self.policy, OPTIMIZER), self.optimizer(value_model, VALUE)]
        rollout = self._rollout(sampler)
        rollout["evaluate"] = self._evaluate(frozen, value_model)
        totals = Totals(world)
        costs = self._update(value_model, optimizers, totals)
        flops = float(totals.sums["perf/flops"]) / min(2, self.work.micro_batches)
        slots = min(config.rollout_slots, self.work.units)
        result = self.result(costs, sum(self.work.full), flops, rollout=rollout, slots=slots)
        return dataclasses.replace(result, trained=result.trained + value_model.num_trained)

    def _value_how(self) -> How:
        """As `open.value_how`, without files."""
        adapters = self.base.adapters
        if adapters is not None and self.config.value_model_name_or_path:
            adapters = choose.for_value_model(adapters, self.value_config)
        return dataclasses.replace(
            self.base.how, adapters=adapters and dataclasses.replace(adapters, keep_initial=False)
        )

    @torch.no_grad()
    def _rollout(self, sampler: Sampler) -> dict[str, Cost]:
        config, ledger, costs = self.config, self.ledger, {}
        with ledger.phase("hand-over", GATHERED):
            before = self.cost("hand-over")
            sampler.load(self.policy)
            costs["hand-over"] = self.cost("hand-over") - before
        prompt = config.max_seq_length - config.response_length
        slots = min(config.rollout_slots, self.work.units)
        with ledger.phase("prefill", ACTIVATIONS):
            before, together = self.cost("prefill"), max(1, min(slots, 8192 // prompt))
            sampler.prefill({slot: [0] * prompt for slot in range(together)})
            costs["prefill"] = (self.cost("prefill") - before) * (1 / together)
        params = SamplingParams.of(config)
        most, mean = config.max_seq_length - 1, prompt + config.response_length // 2
        with ledger.phase("decode", ACTIVATIONS):
            for position in (most, mean):  # the most memory, then the mean time
                before = self.cost("decode")
                rows = torch.zeros(4, slots, dtype=torch.int64)
                hidden_AD = sampler.forward(rows[0], Pass(sampler.cache, rows[1], rows[2], position))
                chosen = choose_tokens(sampler.logits(hidden_AD), params, rows[2], rows[3])
                torch.stack([x.double() for x in chosen])
                costs["decode"] = self.cost("decode") - before
        sampler.release()
        return costs

    @torch.no_grad()
    def _evaluate(self, frozen: FrozenPolicy | None, value_model: ValueModel) -> Cost:
        before, batch = self.cost("evaluate"), self.batch(self.work.full, self.config.response_length)
        with self.ledger.phase("evaluate", ACTIVATIONS):
            self.policy.logprobs_and_entropy(batch)
            if frozen:
                frozen.logprobs(batch)
            value_model(batch)
        release(self.policy, frozen, value_model)
        return self.cost("evaluate") - before

    def _update(self, value_model: ValueModel, optimizers: list, totals: Totals) -> tuple[Cost, Cost, Cost]:
        """The losses of `launch.ppo` over responses that make two micro-batches a rank."""
        config, n = self.config, min(2, self.work.micro_batches)
        lengths = self.work.full * n * self.world.size
        rollouts = [_response(i, length, config.response_length) for i, length in enumerate(lengths)]
        after_end = config.score_slot == "after_eos"
        scores = [0.0] * len(rollouts)
        experience = Experience(rollouts, scores, slot_after_end=after_end, response_length=config.response_length)
        views = (experience.tokens, experience.slots)
        of_tokens_R, of_slots_R = (torch.zeros(int(view.counted.sum()), dtype=torch.float64) for view in views)
        n_tokens, n_slots = experience.counts(np.arange(len(experience)))
        before = self.cost("update")
        with self.ledger.phase("update", ACTIVATIONS):
            for batch in self._micro_batches(self.policy, experience.tokens):
                old = experience.tokens.of(batch, of_tokens_R, of_tokens_R)
                ppo.policy_loss(self.policy, batch, old, n_tokens, config.cliprange, totals).backward()
                self.throughput.count(batch, totals)
            for batch in self._micro_batches(value_model, experience.slots):
                old = experience.slots.of(batch, of_slots_R, of_slots_R)
                loss = ppo.value_loss(value_model, batch, old, n_slots, config.cliprange_value, totals)
                (config.vf_coef * loss).backward()
        update = (self.cost("update") - before) * (1 / n)
        before = self.cost("optimizer")
        for optimizer, kind in zip(optimizers, (OPTIMIZER, VALUE), strict=True):
            self.optimizer_step(optimizer, kind)
        return update, update, self.cost("optimizer") - before

    def _micro_batches(self, root: Root, view: Batchable) -> Iterator[MicroBatch]:
        batches = MicroBatches(view, self.base.memory.micro_batch_tokens, self.world)
        for batch, last in batches(np.arange(len(view.tokens))):
            root.sync_gradients(last)
            yield batch


def _response(example: int, length: int, response_length: int) -> Rollout:
    """One with so many tokens fed, of its prompt and itself."""
    prompt = np.zeros(max(1, length + 1 - response_length), np.int64)
    response = np.zeros(min(length, response_length), np.int64)
    return Rollout(example, 0, prompt, response, np.zeros(0), np.zeros(0), "length")

"""One optimizer step of a stage (of PPO: one iteration), rehearsed: the stage's own functions on fake tensors, under a
ledger.

What a rank sees in a step is its fullest micro-batch: sequences of the longest length, and one of what room is left.
Two micro-batches show what accumulation keeps; the optimizer's state is there from the start, as in every step but the
first.

T tokens of a micro-batch · S sequences · P prompt tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from engine import adapters, lora, model, optim, reference, setup
from engine import log as logs
from engine.batch import MicroBatch, micro_batch
from engine.hardware import Device
from engine.ledger import Cost, Ledger, Peak
from engine.rehearsal import ACTIVATIONS, GATHERED, WEIGHTS, follow, rehearsal
from launch import dpo, ppo, sft
from losses.sft import denominator
from rollout import Experience, Rollout, Sampler, SamplingParams, handover
from rollout import cache as caching
from rollout.choice import choose

REFERENCE, VALUE, SAMPLER, KV_CACHE, OPTIMIZER, BATCH = (
    "reference copy",
    "value model",
    "sampler's weights",
    "KV cache",
    "optimizer",
    "other",
)


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
    rollout: dict[str, Cost] = field(
        default_factory=dict
    )  # PPO: hand-over, prefill (a token), decode (a token of all slots), evaluate (a micro-batch)
    slots: int = 0
    steady: dict[str, int] = field(default_factory=dict)  # live between two steps, by kind


def rehearse(
    stage: str,
    config: Any,
    lm_config: Any,
    device: Device,
    ranks: int,
    per_node: int,
    *,
    work: Work,
    trained_share: float = 1.0,
    value_config: Any = None,
) -> Rehearsed:
    """A step of the stage on rank 0 of `ranks`. Raises UserError for what the stage itself refuses."""
    fused = (
        0.5 if config.compile else 1.0
    )  # the share of the traffic between matrix products that is left where layers are compiled
    config = dataclasses.replace(config, compile=False)
    dtype = {"auto": torch.float32 if device.name == "cpu" else torch.bfloat16}.get(config.dtype) or getattr(
        torch, config.dtype
    )
    backend = "sdpa" if device.name == "cpu" else "varlen"
    start = Path(config.adapter_name_or_path).expanduser() if config.adapter_name_or_path else None
    chosen = adapters.choose(
        config,
        lm_config,
        start if start and start.is_dir() else None,
        keep_initial=getattr(config, "reference", "") == "adapter",
    )
    base = setup.Base(Path("."), "planned", lm_config, None, dtype, backend, "planned", chosen, None)
    with rehearsal(device, ranks, per_node=per_node, fused=fused) as (here, ledger, mode):
        with ledger.phase("loading", WEIGHTS):
            policy = setup.build_policy(config, here, base)
        sync = setup.choose_gradient_sync(config, policy, here)
        policy.gradient_sync = sync[0]
        follow(policy, ledger)
        run = _Ppo if stage == "ppo" else _Supervised
        return run(stage, config, base, here, ledger, mode, policy, work, trained_share, value_config).rehearse(sync)


class _Stage:
    """What the stages share."""

    def __init__(
        self, stage, config, base, here, ledger: Ledger, mode, policy, work: Work, trained_share: float, value_config
    ) -> None:
        self.stage, self.config, self.base, self.here, self.ledger, self.mode = stage, config, base, here, ledger, mode
        self.policy, self.work, self.trained_share, self.value_config = policy, work, trained_share, value_config
        self.throughput = logs.Throughput(here, policy, base.dtype)

    def batch(self, lengths: tuple[int, ...], counted: int | None = None) -> MicroBatch:
        """Sequences of these lengths on the device, whose last tokens count (`counted` of each, or the trained share)."""

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
        return dataclasses.replace(real, **fakes)

    def cost(self, *phases: str) -> Cost:
        return sum((self.ledger.costs.get(name, Cost()) for name in phases), Cost())

    def frozen(self) -> Any:
        """pi_ref as the stage makes it, a copy with room for its weights and none read."""
        if self.config.reference != "copy":
            return reference.FrozenPolicy(self.policy, lora.OFF if self.config.reference == "base" else lora.INITIAL)
        with self.ledger.phase("loading", REFERENCE):
            copy = setup.build_policy(self.config, self.here, self.base).requires_grad_(False)
        follow(copy, self.ledger)
        return reference.FrozenPolicy(copy, lora.TRAINED)

    def optimizer(self, root: model.Root, kind: str) -> torch.optim.Optimizer:
        """With the state that a first step would make: so one step shows what two would."""
        with self.ledger.phase("loading", kind):
            optimizer = optim.adamw(root, self.config.weight_decay, self.config.optimizer)
            for p in root.parameters():
                if p.requires_grad:
                    optim.moments(optimizer, p)
        return optimizer

    def optimizer_step(self, optimizer: torch.optim.Optimizer, kind: str) -> None:
        with self.ledger.phase("optimizer", kind):
            optim.step(optimizer, self.here, lr=1e-6, max_norm=self.config.max_grad_norm)

    def result(
        self, sync: tuple[str, str], costs: tuple[Cost, Cost, Cost], tokens: int, model_flops: float, **more: Any
    ) -> Rehearsed:
        steady = {kind: size for kind, size in self.ledger.live.items() if size}
        held = self.base.config.dtype or torch.float32, self.base.dtype
        numbers = self.policy.num_parameters, self.policy.num_trained
        return Rehearsed(
            *numbers,
            self.ledger.peak,
            self.ledger.peaks,
            *costs,
            tokens,
            model_flops,
            sync,
            *held,
            steady=steady,
            **more,
        )


class _Supervised(_Stage):
    """SFT and DPO: micro-batches of the stage's own loss, then the optimizer."""

    def rehearse(self, sync: tuple[str, str]) -> Rehearsed:
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
        return self.result(sync, (passes[0], passes[-1], self.cost("optimizer") - before), tokens, flops)

    def _reference(self) -> Any:
        if self.stage != "dpo" or self.config.loss_type in dpo.REFERENCE_FREE:
            return None
        if self.config.reference == "cache":
            return lambda batch: torch.zeros(len(batch.counts_S))
        return self.frozen().sums

    def _micro_batch(self, lengths: tuple[int, ...], last: bool) -> tuple[int, float]:
        """(tokens, model FLOPs)."""
        batch, totals = self.batch(lengths), logs.Totals(self.here)
        self.policy.sync_gradients(last)
        with self.ledger.phase("forward", ACTIVATIONS):
            loss = self._loss(batch, totals)
        with self.ledger.phase("backward", ACTIVATIONS):
            loss.backward()
        return batch.num_tokens, self.throughput.flops(batch)

    def _loss(self, batch: MicroBatch, totals: logs.Totals) -> torch.Tensor:
        if self.stage == "sft":
            n = denominator(len(batch.targets_R), len(batch.lengths), self.config.reduce_loss)
            return sft.sft_loss(self.policy, batch, self.config.reduce_loss, n, totals)
        hyper = {name: getattr(self.config, name) for name in dpo.HYPER if getattr(self.config, name) is not None}
        return dpo.preference_loss(
            self.policy, batch, self.reference, self.config, hyper, self.config.batch_size, totals
        )


class _Ppo(_Stage):
    """PPO: hand-over, sampling, evaluation under three models, two updates."""

    def rehearse(self, sync: tuple[str, str]) -> Rehearsed:
        config, ledger, here = self.config, self.ledger, self.here
        self.policy.temperature = config.temperature or 1.0
        frozen = self.frozen() if config.kl_coef else None
        with ledger.phase("loading", VALUE):
            how = self.base.how(config)
            del how["start"], how["head"]
            value_model = model.build_value_model(self.value_config, here, **how)
        setup.transform_layers(value_model, config)
        follow(value_model, ledger)
        value_model.gradient_sync = self.policy.gradient_sync
        with ledger.phase("loading", SAMPLER), mock.patch.object(handover, "skeleton", _skeleton):
            sampler = Sampler(
                self.base.config,
                self.policy,
                here,
                dtype=self.base.dtype,
                max_length=config.max_seq_length,
                slots=config.rollout_slots,
            )
        optimizers = [self.optimizer(self.policy, OPTIMIZER), self.optimizer(value_model, VALUE)]
        rollout = self._rollout(sampler)
        rollout["evaluate"] = self._evaluate(frozen, value_model)
        totals = logs.Totals(here)
        costs = self._update(value_model, optimizers, totals)
        tokens = sum(self.work.full)
        n = min(2, self.work.micro_batches)
        result = self.result(
            sync,
            costs,
            tokens,
            totals.sums["perf/flops"] / n,
            rollout=rollout,
            slots=min(config.rollout_slots, self.work.units),
        )
        return dataclasses.replace(result, trained=result.trained + value_model.num_trained)

    @torch.no_grad()
    def _rollout(self, sampler: Sampler) -> dict[str, Cost]:
        config, ledger, costs = self.config, self.ledger, {}
        write = caching.SlotCache.write

        def counted_write(cache: Any, *args: Any) -> None:
            with ledger.allocating(KV_CACHE):
                write(cache, *args)

        with ledger.phase("hand-over", GATHERED):
            before = self.cost("hand-over")
            sampler.load(self.policy)
            costs["hand-over"] = self.cost("hand-over") - before
        prompt = config.max_seq_length - config.response_length
        slots = min(config.rollout_slots, self.work.units)
        with mock.patch.object(caching.SlotCache, "write", counted_write), ledger.phase("prefill", ACTIVATIONS):
            before, together = self.cost("prefill"), max(1, min(slots, 8192 // prompt))
            sampler._prefill({slot: [0] * prompt for slot in range(together)})
            costs["prefill"] = (self.cost("prefill") - before) * (1 / together)
        params = SamplingParams(
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        with ledger.phase("decode", ACTIVATIONS):
            for position in (
                config.max_seq_length - 1,
                prompt + config.response_length // 2,
            ):  # the most memory, then the mean time
                before = self.cost("decode")
                rows = torch.zeros(4, slots, dtype=torch.int64)
                hidden_AD = sampler._forward(rows[0], caching.Pass(sampler._cache, rows[1], rows[2], position))
                torch.stack([x.double() for x in choose(sampler._logits(hidden_AD), params, rows[2], rows[3])])
                costs["decode"] = self.cost("decode") - before
        sampler.release()
        return costs

    @torch.no_grad()
    def _evaluate(self, frozen: Any, value_model: model.ValueModel) -> Cost:
        before, batch = self.cost("evaluate"), self.batch(self.work.full, self.config.response_length)
        with self.ledger.phase("evaluate", ACTIVATIONS):
            self.policy(batch, mode="entropy")
            if frozen:
                frozen(batch)
            value_model(batch)
        for root in filter(None, (self.policy, frozen, value_model)):
            root.release()
        return self.cost("evaluate") - before

    def _update(self, value_model: model.ValueModel, optimizers: list, totals: logs.Totals) -> tuple[Cost, Cost, Cost]:
        """`launch.ppo.update` over responses that make two micro-batches a rank."""
        config, n = self.config, min(2, self.work.micro_batches)
        prompt = config.max_seq_length - config.response_length
        lengths = self.work.full * n * self.here.size
        rollouts = [
            Rollout(
                i,
                0,
                np.zeros(max(1, length + 1 - config.response_length), np.int64),
                np.zeros(min(length, config.response_length), np.int64),
                None,
                None,
                "length",
            )
            for i, length in enumerate(lengths)
        ]
        assert prompt > 0
        batch = Experience(
            rollouts,
            [0.0] * len(rollouts),
            slot_after_end=config.score_slot == "after_eos",
            response_length=config.response_length,
        )
        of_tokens, of_slots = (
            torch.zeros(int(x.counted.sum()), dtype=torch.float64) for x in (batch.tokens, batch.slots)
        )
        before = self.cost("update")
        with self.ledger.phase("update", ACTIVATIONS):
            ppo.update(
                self.policy,
                value_model,
                batch,
                np.arange(len(batch)),
                of_tokens,
                of_tokens,
                of_slots,
                of_slots,
                config,
                config.value_warmup_steps,
                self.here,
                totals,
                self.throughput,
            )
        update = (self.cost("update") - before) * (1 / n)
        before = self.cost("optimizer")
        for optimizer, kind in zip(optimizers, (OPTIMIZER, VALUE), strict=True):
            self.optimizer_step(optimizer, kind)
        return update, update, self.cost("optimizer") - before


def _skeleton(config: Any, attention_name: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """`handover.skeleton` without Module.to_empty, which cannot exchange fake parameters."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention_name)
    for module in lm.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None:
                    empty = torch.empty(x.shape, dtype=x.dtype, device=device)
                    held[name] = torch.nn.Parameter(empty, requires_grad=False) if held is module._parameters else empty
    lm.tie_weights()
    return lm.eval()

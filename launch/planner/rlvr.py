"""An iteration of PPO or GRPO, rehearsed: hand-over, sampling, evaluation under every model there is, and an update of
each that is trained.

PPO trains a value model beside the policy, GRPO none; where no KL divergence is taken, neither has a reference.

P prompt tokens · R response tokens (or slots) of all responses, end to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from engine.data.batch import Batchable, MicroBatch, MicroBatches
from engine.log import Totals
from engine.model import build
from engine.model.adapters import choose
from engine.model.build import How
from engine.model.layers import transform_layers
from engine.model.policy import Root, ValueModel, release
from engine.train.reference import FrozenPolicy
from launch import grpo, ppo
from launch.planner.fakes import PlannedCache, follow
from launch.planner.ledger import ACTIVATIONS, GATHERED, OPTIMIZER, SAMPLER, VALUE, Cost
from launch.planner.stages import Rehearsed, Stage
from rollout import Experience, Rollout, Sampler, SamplingParams, handover
from rollout.cache import Pass
from rollout.choice import choose as choose_tokens

BUCKETS = 64  # of a hand-over that are rehearsed


class Rlvr(Stage):
    """Hand-over, sampling, evaluation, updates."""

    def rehearse(self) -> Rehearsed:
        """One iteration."""
        config, ledger, world = self.config, self.ledger, self.world
        self.policy.temperature = config.temperature or 1.0
        frozen = self.frozen() if config.kl_coef else None
        value_model = None if self.value_config is None else self._value_model()
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
                tensor_parallel=config.rollout_tensor_parallel,
            )
        optimizers = {OPTIMIZER: self.optimizer(self.policy, OPTIMIZER)}
        if value_model is not None:
            optimizers[VALUE] = self.optimizer(value_model, VALUE)
        rollout = self._rollout(sampler)
        rollout["evaluate"] = self._evaluate(frozen, value_model)
        totals = Totals(world)
        costs = self._update(value_model, optimizers, totals)
        flops = float(totals.sums["perf/flops"]) / min(2, self.work.micro_batches)
        team = config.rollout_tensor_parallel  # ranks that sample the responses of all of them together
        slots = max(1, min(config.rollout_slots // team, self.work.units))  # of them a rank's own
        result = self.result(costs, sum(self.work.full), flops, rollout=rollout, slots=slots)
        trained = sum(root.num_trained for root in (self.policy, value_model) if root is not None)
        return dataclasses.replace(result, trained=trained)

    def _value_model(self) -> ValueModel:
        """PPO's, as large as its configuration says."""
        with self.ledger.phase("loading", VALUE):
            value_model = build.build_value_model(self.value_config, self.world, self._value_how())
        transform_layers(value_model, self.base.memory, self.stream)
        follow(value_model, self.ledger)
        value_model.gradient_sync = self.policy.gradient_sync
        return value_model

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
            times = handover.load(sampler.lm, self.policy.lm, self.world, rehearsed=BUCKETS)
            costs["hand-over"] = (self.cost("hand-over") - before) * max(1.0, times)
        prompt = config.max_seq_length - config.response_length
        slots = min(config.rollout_slots, self.work.units * config.rollout_tensor_parallel)
        with ledger.phase("prefill", ACTIVATIONS):
            before, together = self.cost("prefill"), max(1, min(slots, 8192 // prompt))
            sampler.prefill({slot: [0] * prompt for slot in range(together)})
            costs["prefill"] = (self.cost("prefill") - before) * (config.rollout_tensor_parallel / together)
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
    def _evaluate(self, frozen: FrozenPolicy | None, value_model: ValueModel | None) -> Cost:
        before, batch = self.cost("evaluate"), self.batch(self.work.full, self.config.response_length)
        with self.ledger.phase("evaluate", ACTIVATIONS):
            self.policy.logprobs_and_entropy(batch)
            if frozen is not None:
                frozen.logprobs(batch)
            if value_model is not None:
                value_model(batch)
        release(self.policy, frozen, value_model)
        return self.cost("evaluate") - before

    def _update(
        self, value_model: ValueModel | None, optimizers: dict[str, torch.optim.Optimizer], totals: Totals
    ) -> tuple[Cost, Cost, Cost]:
        """The stage's own losses over responses that make two micro-batches a rank."""
        n = min(2, self.work.micro_batches)
        experience = self._experience(self.work.full * n * self.world.size)
        before = self.cost("update")
        with self.ledger.phase("update", ACTIVATIONS):
            for batch in self._micro_batches(self.policy, experience.tokens):
                self._policy_loss(batch, experience, totals).backward()
                self.throughput.count(batch, totals)
            if value_model is not None:
                for batch in self._micro_batches(value_model, experience.slots):
                    self._value_loss(value_model, batch, experience, totals).backward()
        update = (self.cost("update") - before) * (1 / n)
        before = self.cost("optimizer")
        for kind, optimizer in optimizers.items():
            self.optimizer_step(optimizer, kind)
        return update, update, self.cost("optimizer") - before

    def _experience(self, lengths: tuple[int, ...]) -> Experience:
        """Responses that feed so many tokens with their prompts."""
        config = self.config
        rollouts = [_response(i, length, config.response_length) for i, length in enumerate(lengths)]
        after_end = self.stage == "ppo" and config.score_slot == "after_eos"
        scores = [0.0] * len(rollouts)
        return Experience(rollouts, scores, slot_after_end=after_end, response_length=config.response_length)

    def _policy_loss(self, batch: MicroBatch, experience: Experience, totals: Totals) -> torch.Tensor:
        """Of `launch.ppo`: pi_old and advantages; of `launch.grpo`: these, pi_ref, and every token's weight."""
        x_R = torch.zeros(int(experience.tokens.counted.sum()), dtype=torch.float64)
        if self.stage == "grpo":
            return grpo.group_loss(self.policy, batch, experience.tokens.of(batch, *[x_R] * 4), self.config, totals)
        n_tokens, _ = experience.counts(experience.all)
        old = experience.tokens.of(batch, x_R, x_R)
        return ppo.policy_loss(self.policy, batch, old, n_tokens, self.config.cliprange, totals)

    def _value_loss(
        self, value_model: ValueModel, batch: MicroBatch, experience: Experience, totals: Totals
    ) -> torch.Tensor:
        """Of `launch.ppo`, against old values and returns, as it counts in the sum."""
        x_R = torch.zeros(int(experience.slots.counted.sum()), dtype=torch.float64)
        _, n_slots = experience.counts(experience.all)
        old = experience.slots.of(batch, x_R, x_R)
        loss = ppo.value_loss(value_model, batch, old, n_slots, self.config.cliprange_value, totals)
        return self.config.vf_coef * loss

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

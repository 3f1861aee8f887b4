"""An iteration of PPO or GRPO, rehearsed: hand-over, sampling, evaluation under every model there is, and an update of
each that is trained.

PPO trains a value model beside the policy, GRPO none; where no KL divergence is taken, neither has a reference.

P prompt tokens · R response tokens (or slots) of all responses, end to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from engine.data.batch import Batchable, MicroBatch, MicroBatches
from engine.errors import UserError
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
from rollout import Experience, Rollout, Sampler, SamplingParams, handover, room
from rollout.cache import Decode, Layer, Probe
from rollout.choice import choose as choose_tokens
from rollout.sampler import PREFILL_TOKENS, SLOTS, default_share
from rollout.schedule import Joined, Response

BUCKETS = 64  # of a hand-over that are rehearsed


class Rlvr(Stage):
    """Hand-over, sampling, evaluation, updates."""

    def rehearse(self) -> Rehearsed:
        """One iteration."""
        config, ledger, world = self.config, self.ledger, self.world
        self.policy.temperature = config.temperature or 1.0
        frozen = self.frozen() if config.kl_coef else None
        value_model = None if self.value_config is None else self._value_model()
        roots = [root for root in (self.policy, value_model) if root is not None]
        copy = room.copy_of(self.policy.lm, self.base.dtype) // config.rollout_tensor_parallel
        beside = ledger.total + room.to_come(roots, config.optimizer)
        self._weights = room.weights(config, copy, beside, None if self._kind == "cpu" else ledger.device.memory)
        with ledger.phase("loading", SAMPLER):
            sampler = Sampler(
                self.base.config,
                self.policy,
                world,
                dtype=self.base.dtype,
                max_length=config.max_seq_length,
                slots=config.rollout_slots or SLOTS[self._kind],
                backend=self.base.how.backend,
                tensor_parallel=config.rollout_tensor_parallel,
                weights=self._weights,
            )
        optimizers = {OPTIMIZER: self.optimizer(self.policy, OPTIMIZER)}
        if value_model is not None:
            optimizers[VALUE] = self.optimizer(value_model, VALUE)
        with torch.no_grad():
            rollout = self._rollout(sampler)
        rollout["evaluate"] = self._evaluate(frozen, value_model)
        totals = Totals(world)
        costs = self._update(value_model, optimizers, totals)
        flops = float(totals.sums["perf/flops"]) / min(2, self.work.micro_batches)
        own = max(1, self._at_once // config.rollout_tensor_parallel)  # of the responses that its team samples at once
        result = self.result(costs, sum(self.work.full), flops, rollout=rollout, slots=own, pool=self._pool)
        trained = sum(root.num_trained for root in roots)
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

    @property
    def _kind(self) -> str:
        return "cpu" if self.ledger.device.name == "cpu" else "cuda"

    def _rollout(self, sampler: Sampler) -> dict[str, Cost]:
        """Its parts: prefill of a prompt; decode of a token of all responses that the cache holds, half grown."""
        config, ledger, costs = self.config, self.ledger, {}
        with ledger.phase("hand-over", GATHERED):
            before = self.cost("hand-over")
            times = handover.load(sampler.lm, self.policy.lm, self.world, rehearsed=BUCKETS)
            costs["hand-over"] = (self.cost("hand-over") - before) * max(1.0, times)
        responses = self._responses()
        prompt, grown = len(responses[0].prompt), len(responses[0].prompt) + config.response_length // 2
        with ledger.phase("pages", ACTIVATIONS):
            probe = Probe(torch.zeros(1, dtype=torch.int64))
            sampler.forward(probe.positions_T, probe)
        cache = self._cache(responses, probe.layers, sampler)
        columns = {window: np.zeros_like(kind.tables[0]) for window, kind in cache.kinds.items()}
        with ledger.phase("prefill", ACTIVATIONS):
            before, together = self.cost("prefill"), max(1, min(self._at_once, PREFILL_TOKENS // prompt))
            sampler.prefill(Joined([[0] * prompt] * together, [columns] * together))
            costs["prefill"] = (self.cost("prefill") - before) * (config.rollout_tensor_parallel / together)
        ledger.positions, ledger.launch = grown, ledger.device.replay if self._kind == "cuda" else None
        rows = torch.zeros(3, self._at_once, dtype=torch.int64)
        tables = {window: rows.new_zeros(self._at_once, len(x), dtype=torch.int32) for window, x in columns.items()}
        with ledger.phase("decode", ACTIVATIONS):
            before = self.cost("decode")
            hidden_AD = sampler.forward(rows[0], Decode.by_tables(cache, rows[1], tables))
            chosen = choose_tokens(sampler.logits(hidden_AD), SamplingParams.of(config), rows[1], rows[2])
            torch.stack([x.double() for x in chosen])
            costs["decode"] = self.cost("decode") - before
        ledger.launch = None
        if self._weights != "apart":  # else it goes on beside the update
            sampler.cache = None
        if self._weights == "gathered":
            for name, p in sampler.lm.named_parameters():
                if name not in sampler.lm.origin.shared:
                    ledger.resize(p.untyped_storage(), 0)
        return costs

    def _responses(self) -> list[Response]:
        """Those of an iteration that a rank, or its team, samples: of the longest prompts and to the last token."""
        config, n = self.config, self.config.num_samples_per_prompt
        prompt = [0] * (config.max_seq_length - config.response_length)
        names = (str(i // n).encode() for i in range(self.work.units * config.rollout_tensor_parallel))
        return [Response(i, prompt, name, 0, config.response_length) for i, name in enumerate(names)]

    def _cache(self, responses: list[Response], layers: dict[int, Layer], sampler: Sampler) -> PlannedCache:
        """The pages that these can need, or those that the memory holds beside what is there when sampling begins."""
        config, ledger, block = self.config, self.ledger, sampler.block
        asked = room.wanted(responses, layers, sampler.slots, block)
        share = config.rollout_memory or default_share(self._kind, self._weights)
        free = int(share * (ledger.device.memory - ledger.device.reserved - ledger.total))
        try:
            counts = room.counts(free, asked, layers, block)
        except UserError:  # the plan says that it does not fit
            counts = {window: least for window, (least, _) in asked.items()}
        cache = PlannedCache(layers, counts, sampler.slots, config.max_seq_length, block, ledger=ledger)
        sampler.cache = cache
        with ledger.phase("pages", ACTIVATIONS):
            cache.allocate(torch.device("cpu"))
        samples = min(config.num_samples_per_prompt, len(responses))
        grown = len(responses[0].prompt) + config.response_length // 2
        a_token = min(  # how many responses, half grown, the pages of every kind hold
            counts[w] / (pages.needed(grown) - (1 - 1 / samples) * pages.needed(len(responses[0].prompt)))
            for w, pages in cache.kinds.items()
        )
        self._at_once = max(1, min(int(a_token), sampler.slots, len(responses)))
        self._pool = sum(counts[layer.window] * layer.bytes_of(block) for layer in layers.values())
        return cache

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

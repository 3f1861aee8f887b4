"""Rollouts as training data: the same list on every rank, packed like any other examples, with numbers attached per
token.

A response of n tokens has n rows (tokens) and n slots, or n + 1 slots where its score is credited one slot after its
end.

R rows of all responses, end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import progress
from engine.data.batch import MicroBatch, step_batches
from engine.data.mixture import permutation
from engine.errors import UserError
from engine.flags import MemoryFlags, RlvrFlags
from engine.world import World, on_device
from rollout.collect import Drawn
from rollout.rewards import score_of
from rollout.sampler import Rollout
from verifiers import MAX_ERROR_RATE


@dataclass(frozen=True)
class Sequences:
    """One view of the responses: what is fed, and which positions count. A `Batchable`."""

    ids: list[np.ndarray]  # prompt, response (and a placeholder where the end of the response is a state of its own)
    counted: np.ndarray  # of each, at its end
    prompts: Sequence[int] = ()  # of each

    @property
    def tokens(self) -> np.ndarray:
        return np.array([len(ids) - 1 for ids in self.ids])

    def sequences(self, example: int) -> list[tuple[np.ndarray, np.ndarray]]:
        mask = np.zeros(len(self.ids[example]), bool)
        mask[len(mask) - self.counted[example] :] = True
        return [(self.ids[example], mask)]

    def rows(self, values_R: Tensor, examples: tuple[int, ...] | np.ndarray) -> Tensor:
        """The rows of some responses, in the given order, of a tensor over the rows of all."""
        parts = values_R.split(self.counted.tolist())
        return torch.cat([parts[e] for e in examples]) if len(examples) else values_R[:0]

    def of(self, batch: MicroBatch, *values_R: Tensor) -> list[Tensor]:
        """The rows of a micro-batch of each of these tensors, in fp32 on its device."""
        return [on_device(self.rows(x_R, batch.examples).float(), batch.ids_T.device) for x_R in values_R]


class Experience:
    """The responses of one iteration: `tokens` for the policy, `slots` for the value model, their scores."""

    def __init__(
        self, rollouts: list[Rollout], scores: list[float], *, slot_after_end: bool, response_length: int
    ) -> None:
        lengths = np.array([len(r.response_ids) for r in rollouts])
        extra = np.array(
            [slot_after_end and r.finish_reason == "stop" and len(r.response_ids) < response_length for r in rollouts]
        )
        whole = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
        self.rollouts = rollouts
        prompts = [r.example for r in rollouts]
        self.tokens = Sequences(whole, lengths, prompts)
        self.slots = Sequences(
            [np.append(ids, 0) if more else ids for ids, more in zip(whole, extra, strict=True)],
            lengths + extra,
            prompts,
        )
        self.scores_S = torch.tensor(scores, dtype=torch.float64)
        self.token_counts_S, self.slot_counts_S = torch.tensor(lengths), torch.tensor(lengths + extra)
        self.prompts_S = torch.tensor(prompts)
        slots = [np.arange(n + more) < n for n, more in zip(lengths, extra, strict=True)]
        self.is_token_R = torch.as_tensor(np.concatenate(slots))  # over slots

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def all(self) -> np.ndarray:
        """The numbers of all responses."""
        return np.arange(len(self))

    def counts(self, responses: np.ndarray) -> tuple[int, int]:
        """(tokens, slots) of some responses."""
        return int(self.tokens.counted[responses].sum()), int(self.slots.counted[responses].sum())

    @property
    def sampled_R(self) -> Tensor:
        """The sampler's log-probs of all tokens, under the distribution that they were drawn from, in float64."""
        return torch.as_tensor(np.concatenate([r.logprobs for r in self.rollouts])).double()

    def on_tokens(self, values_S: Tensor) -> Tensor:
        """A number of every response as one of each of its tokens."""
        return values_S.repeat_interleave(self.token_counts_S)

    def on_slots(self, values_R: Tensor) -> Tensor:
        """A tensor over tokens as one over slots, 0 in slots that hold no token."""
        return torch.zeros(len(self.is_token_R), dtype=values_R.dtype).masked_scatter(self.is_token_R, values_R)


def experience_of(
    drawn: Drawn, flags: RlvrFlags, text_of: Callable[[np.ndarray], str], score_slot: str = "last"
) -> Experience:
    """The responses that have a verdict, with their scores, credited at the last token or `after_eos`. Raises UserError
    if more than 1 % have none.
    """
    rollouts, verdicts = drawn.rollouts, drawn.verdicts
    errors = [verdict.reason for verdict in verdicts if verdict.status == "error"]
    if len(errors) > MAX_ERROR_RATE * len(verdicts):
        raise UserError(f"{len(errors)} of {len(verdicts)} responses could not be verified, the first: {errors[0]}")
    judged = [(r, v) for r, v in zip(rollouts, verdicts, strict=True) if v.status == "ok"]
    longest = flags.response_length
    scores = [score_of(rollout, verdict, flags, longest, text_of) for rollout, verdict in judged]
    responses = [rollout for rollout, _ in judged]
    return Experience(responses, scores, slot_after_end=score_slot == "after_eos", response_length=longest)


def minibatches(responses: np.ndarray, flags: RlvrFlags, step: int) -> list[np.ndarray]:
    """The responses of every optimizer step of the iteration: a permutation per pass, cut into --num_mini_batches."""
    n = len(responses)
    if not n:
        return []
    orders = [permutation(n, flags.seed, "ppo", step, epoch) for epoch in range(flags.num_ppo_epochs)]
    return [part for order in orders for part in np.array_split(responses[order], min(flags.num_mini_batches, n))]


@torch.no_grad()
def evaluate(forward: Callable[[MicroBatch], Tensor], sequences: Sequences, flags: MemoryFlags, world: World) -> Tensor:
    """`forward(batch)`, (..., R), over all responses, shared among the ranks, in float64 on every rank's host.
    Collective. Raises UserError, on every rank, for numbers that are not finite.
    """
    order: list[int] = []
    outs: list[Tensor] = []
    for batch, _ in step_batches(sequences, np.arange(len(sequences.ids)), flags.micro_batch_tokens, world):
        world.phase("evaluating", len(order) * world.size, len(sequences.ids))
        out = forward(batch)  # collective, also where the batch is a placeholder
        if batch.examples:
            order += batch.examples
            outs.append(out.double())
    ends = np.cumsum(sequences.counted[order])[:-1]
    parts = np.split(torch.cat(outs, -1).cpu().numpy(), ends, axis=-1) if outs else []  # one wait for the device
    mine = list(zip(order, parts, strict=True))
    everyone = world.gather(mine)
    for rank, (response, numbers) in ((rank, pair) for rank, part in enumerate(everyone) for pair in part):
        if not np.isfinite(numbers).all():
            prompt = sequences.prompts[response] if len(sequences.prompts) else "?"
            raise UserError(
                f"{progress.words()}: rank {rank} has {numbers.sum()} for response {response}, to prompt {prompt}: the"
                " model or its dtype is broken"
            )
    found = dict(pair for part in everyone for pair in part)
    return torch.as_tensor(np.concatenate([found[e] for e in range(len(sequences.ids))], axis=-1))

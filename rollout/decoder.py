"""One token for every active response: what they are at lies on the device and is updated there.

    state (5, slots) int64: the next input token · its position · tokens taken · key of the noise · whether it has ended

    tokens, log-probs  =  choose( logits( forward( tokens at positions ) ), noise of (key, taken) )
    state              <- tokens, position + 1, taken + 1, ended where a token is a stop id

The host sends what changes (who joins, who has left, pages), and reads a token's results `lag` tokens later, from a
copy that was made meanwhile: it waits for nothing that runs. What a response computes between its end and the moment
that the host hears of it is thrown away. On a CPU there is nothing to hide, and the lag is 0.

A active responses · D hidden · J pages that a response may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.world import on_device
from rollout.cache import Decode, PagedCache
from rollout.choice import SamplingParams, choose
from rollout.ladder import ENDED, KEY, POSITION, TAKEN, TOKEN, Graphs, Ladder
from rollout.schedule import Response, Schedule

LAG = {"cpu": 0, "cuda": 2}  # tokens


@dataclass(frozen=True)
class Launched:
    """A token of every active response that the host has not seen yet."""

    responses: tuple[Response, ...]
    results_3A: Tensor  # float64, on the host once `arrived`: tokens, log-probs, log-probs at temperature 1
    arrived: Any  # a CUDA event, or None

    def read(self) -> list[list[float]]:
        if self.arrived is not None:
            self.arrived.synchronize()  # recorded `lag` tokens ago
        return self.results_3A.tolist()


class Decoder:
    """Decodes the active responses of a schedule, token by token: on a CPU page by page, on CUDA by tables, in batches
    of a few sizes that are graphs (ladder.py).
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Decode], Tensor],
        logits: Callable[[Tensor], Tensor],
        cache: PagedCache,
        params: SamplingParams,
        device: torch.device,
        how: str,
    ) -> None:
        """`how`: rows | tables | graphs."""
        self.forward, self.logits, self.cache, self.params, self.device = forward, logits, cache, params, device
        self.state = torch.zeros(5, cache.slots, dtype=torch.int64, device=device)
        self.stops = on_device(torch.tensor(sorted(params.stop_ids), dtype=torch.int64), device)
        self._numbers: list[int] = []  # of the starts of the responses that the state's columns are of
        kinds = {"rows": None, "tables": Ladder, "graphs": Graphs}
        make = kinds[how]
        self.ladder = None if make is None else make(self.step, self.state, cache, device)

    def launch(self, schedule: Schedule) -> Launched:
        """Asks for the next token of every active response."""
        active = tuple(schedule.active)
        self._arrange(active)
        slots, positions = schedule.places()
        if self.ladder is None:
            results_3A = self.step(Decode.by_rows(self.cache, slots, positions, self.device), len(active))
        else:
            results_3A = self.ladder.step(slots)
        for response in active:
            response.launched += 1
        return Launched(active, *_to_host(results_3A))

    def step(self, token_pass: Decode, active: int) -> Tensor:
        """One token for the first `active` columns of the state; nothing here waits for the device."""
        state = self.state[:, :active]
        hidden_AD = self.forward(state[TOKEN], token_pass)
        chosen_A, logprobs_A, logprobs_t1_A = choose(self.logits(hidden_AD), self.params, state[KEY], state[TAKEN])
        results_3A = torch.stack([chosen_A.double(), logprobs_A.double(), logprobs_t1_A.double()])
        goes_on_A = 1 - state[ENDED]
        state[TOKEN] = torch.where(goes_on_A.bool(), chosen_A, state[TOKEN])
        state[POSITION] += goes_on_A
        state[TAKEN] += goes_on_A
        state[ENDED] |= (chosen_A[:, None] == self.stops).any(1)
        return results_3A

    def _arrange(self, active: Sequence[Response]) -> None:
        """The state's columns are those of the active responses, in their order: kept where they were, and set where a
        response joins.
        """
        numbers = [response.number for response in active]
        if numbers == self._numbers:
            return
        before = {number: column for column, number in enumerate(self._numbers)}
        old = [before.get(number, -1) for number in numbers]
        columns = [
            (r.input, r.position, len(r.tokens), r.key, 0) if column < 0 else (0, 0, 0, 0, 0)
            for r, column in zip(active, old, strict=True)
        ]
        sent = on_device(torch.tensor([*zip(*columns, strict=True), old]), self.device)
        kept = self.state.index_select(1, sent[5].clamp(min=0))
        self.state.zero_()
        self.state[ENDED, len(active) :] = 1  # columns of nobody, with which a batch may be filled
        self.state[:, : len(active)] = torch.where(sent[5] < 0, sent[:5], kept)
        self._numbers = numbers


def _to_host(x: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, on its way; and the event after which it is there."""
    if not x.is_cuda:
        return x, None
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived

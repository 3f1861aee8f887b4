"""Sample and verify: responses to prompts with their verdicts, the same list on every rank."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine import progress, signals
from engine.data.chat import ChatTokenizer
from engine.data.prompts import Prompt
from engine.errors import UserError
from engine.flags import SamplingFlags
from engine.world import World
from rollout.choice import SamplingParams
from rollout.sampler import Request, Rollout, Sampler
from verifiers import Pool, Verdict


@dataclass(frozen=True)
class Drawn:
    """The responses of a step, their verdicts, and what belongs into the step's row of metrics: what the cache of this
    rank held at most, how often a response was set back.
    """

    rollouts: Sequence[Rollout]
    verdicts: Sequence[Verdict]
    row: dict[str, float] = field(default_factory=dict)


class Collector:
    """Draws responses from a sampler and has a pool of processes judge each as soon as it ends."""

    def __init__(
        self, sampler: Sampler, pool: Pool, chat: ChatTokenizer, flags: SamplingFlags, seed: int, world: World
    ) -> None:
        self.sampler, self.pool, self.chat, self.seed, self.world = sampler, pool, chat, seed, world
        self.params = SamplingParams.of(flags, *chat.end_ids)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        chosen: np.ndarray,
        samples: int,
        step: int,
        seed: int | None = None,
        shown: str = "",
    ) -> Drawn:
        """`samples` responses to each chosen prompt and their verdicts, on every rank in one order. Collective.
        Raises Stopped, and UserError for a verdict that is no number.

        `seed` is in place of the run's; `shown` stands before the phases on the bar. Every n-th group of samples is
        this rank's, or its team's, of whom one verifies; verification draws finished responses from the sampler while
        it goes on.
        """
        team, total = self.sampler.team, len(chosen) * samples
        seed = self.seed if seed is None else seed
        requests = [
            Request(prompts[e].ids, int(e), sample)
            for e in chosen[team.number :: team.count]
            for sample in range(samples)
        ]
        drawn = self.sampler.stream(requests, self.params, seed=seed, step=step)
        finished: list[Rollout] = []
        verdicts: list[Verdict] = []

        def rows() -> Iterator[tuple]:
            self.world.phase(f"{shown}sampling", 0, total)
            for _, rollout in drawn:
                finished.append(rollout)
                self.world.phase(f"{shown}sampling", len(finished) * team.count, total)
                prompt = prompts[rollout.example]
                yield self.chat.response_text(rollout.response_ids), prompt.ground_truth, prompt.dataset

        if not team.leads:  # draws what its team draws, and hears of the verdicts with everyone
            deque(drawn, maxlen=0)
        given_up = ""
        try:
            for verdict in self.pool.imap(rows()):
                verdicts.append(verdict)
                if len(finished) == len(requests):
                    self.world.phase(f"{shown}verifying", len(verdicts) * team.count, total)
        except signals.GivenUp:  # by this rank; the others, which may have finished, are told where they meet
            given_up = signals.asked()
        mine = given_up or list(zip(finished, verdicts, strict=True))
        place = {int(e): i for i, e in enumerate(chosen)}
        parts = self.world.gather(mine)
        for why in (part for part in parts if isinstance(part, str)):
            raise signals.Stopped(why)
        for rank, part in enumerate(parts):
            if bad := [rollout.example for rollout, verdict in part if not math.isfinite(verdict.score)]:
                raise UserError(
                    f"{progress.words()}: rank {rank} has a verdict that is no number, of a response to prompt {bad[0]}"
                )
        everyone = [pair for part in parts for pair in part]
        everyone.sort(key=lambda pair: (place[pair[0].example], pair[0].sample))
        used = self.sampler.used
        row = {"perf/cache_gib": used.bytes / 2**30, "perf/set_back": used.set_back}
        return Drawn([rollout for rollout, _ in everyone], [verdict for _, verdict in everyone], row)

"""Sampling and verifying: which requests are a rank's, what a verifier is given, and in which order all come back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engine.data.prompts import Prompt
from engine.errors import UserError
from engine.flags import SamplingFlags
from rollout import Collector, Rollout
from rollout.parallel import Team
from rollout.sampler import Used

END = 9
PROMPTS = [Prompt(np.array([n]), f"truth {n}", f"verifier {n}") for n in range(5)]


class Sampler:
    """Every response is its prompt, its sample and, where it stops, the end of turn; the last request ends first."""

    def stream(self, requests, params, *, seed, step):
        assert params.stop_ids == (END,) and params.max_new_tokens == 7
        self.drawn = 0
        self.asked, self.seed, self.step = [(r.example, r.sample) for r in requests], seed, step
        for i in reversed(range(len(requests))):
            r, stops = requests[i], requests[i].example % 2 == 0
            self.drawn += 1
            ids = np.array([10 + r.example, 20 + r.sample, *([END] if stops else [])])
            yield i, Rollout(r.example, r.sample, r.prompt_ids, ids, ids, ids, "stop" if stops else "length")


class Pool:
    score = 1.0

    def imap(self, rows):
        for row in rows:
            yield SimpleNamespace(row=row, score=self.score)


def collector(rank: int, size: int, others=(), team: Team | None = None) -> Collector:
    chat = SimpleNamespace(end_ids=(END,), response_text=lambda ids: " ".join(str(i) for i in ids if i != END))
    phases: list[tuple[str, int, int]] = []
    world = SimpleNamespace(rank=rank, size=size, gather=lambda mine: [mine, *others], phases=phases)
    world.phase = lambda *shown: phases.append(shown)
    sampler = Sampler()
    sampler.team, sampler.used = team or Team(0, 1, rank, size), Used(2**30, 3)
    return Collector(sampler, Pool(), chat, SamplingFlags(response_length=7), 3, world)


def test_what_is_verified_is_the_response_without_its_end():
    collect = collector(0, 1)
    drawn = collect(PROMPTS, np.array([4, 1, 2]), 2, step=5)
    rollouts, verdicts = drawn.rollouts, drawn.verdicts
    assert [(r.example, r.sample) for r in rollouts] == [(e, s) for e in (4, 1, 2) for s in (0, 1)]
    expected = [(f"{10 + e} {20 + s}", f"truth {e}", f"verifier {e}") for e in (4, 1, 2) for s in (0, 1)]
    assert [v.row for v in verdicts] == expected and (collect.sampler.seed, collect.sampler.step) == (3, 5)
    collect(PROMPTS, np.array([0]), 1, step=5, seed=77)
    assert collect.sampler.seed == 77 and drawn.row == {"perf/cache_gib": 1.0, "perf/set_back": 3}


@pytest.mark.parametrize("rank, expected", [(0, [4, 2]), (1, [1])])
def test_every_rank_samples_its_share(rank, expected):
    collect = collector(rank, 2)
    collect.world.gather = lambda mine: [mine]
    rollouts = collect(PROMPTS, np.array([4, 1, 2]), 2, step=0).rollouts
    assert collect.sampler.asked == [(e, s) for e in expected for s in (0, 1)]
    assert [r.example for r in rollouts] == [e for e in expected for _ in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_a_team_verifies_what_all_of_it_sample(rank):
    collect = collector(2 + rank, 4, team=Team(rank, 2, 1, 2))
    collect.world.gather = lambda mine: [mine]
    drawn = collect(PROMPTS, np.array([4, 1, 2]), 2, step=0)
    rollouts, verdicts = drawn.rollouts, drawn.verdicts
    assert collect.sampler.asked == [(1, 0), (1, 1)] and collect.sampler.drawn == 2
    assert len(rollouts) == len(verdicts) == (0 if rank else 2)


def test_what_goes_on_is_shown_while_it_does():
    """Counted as if every rank were as far as this one; a verdict is shown only once nothing is sampled."""
    collect = collector(1, 2, others=[])
    collect(PROMPTS, np.array([4, 1, 2]), 2, step=0, shown="held out: ")
    phases = collect.world.phases
    assert phases[:3] == [("held out: sampling", n, 6) for n in (0, 2, 4)]
    assert phases[3:] == [("held out: verifying", 4, 6)]  # the first verdict came while the second was sampled


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_verdict_that_is_no_number_ends_the_run(score):
    """On every rank, whichever judged: with the rank and the prompt."""
    theirs = [(SimpleNamespace(example=2, sample=0), SimpleNamespace(score=score))]
    collect = collector(0, 2)
    collect.world.gather = lambda mine: [mine, theirs]
    with pytest.raises(UserError, match="rank 1 has a verdict that is no number, of a response to prompt 2"):
        collect(PROMPTS, np.array([4, 1, 2]), 1, step=0)

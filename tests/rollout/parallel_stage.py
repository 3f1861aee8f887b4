"""A stage for tests/ranks.py: teams of ranks sample their shares of the requests, for one model after another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import world
from engine.flags import flag
from rollout import Request, Sampler, SamplingParams
from tests.families import load

GREEDY = SamplingParams(max_new_tokens=12, temperature=0, stop_ids=tuple(range(0, 511, 32)))
DRAWN = SamplingParams(max_new_tokens=12, temperature=0.8, stop_ids=tuple(range(0, 511, 32)))


@dataclass(frozen=True, kw_only=True)
class Config:
    directories: tuple[str, ...] = flag((), "the models", texts=True)
    output: str = flag("", "the file of responses")
    parts: int = flag(1, "ranks of a team")


def train(config: Config) -> None:
    here = world.start()
    seen = {Path(d).name: responses(Path(d), config.parts, here) for d in config.directories}
    if here.is_main:
        Path(config.output).write_text(json.dumps(seen), encoding="utf-8")


def responses(directory: Path, parts: int, here: world.World) -> list[list[Any]]:
    """Greedy and drawn ones to every prompt, in one order; every rank of a team holds its part, and says the same."""
    policy = load(directory, here)
    sampler = Sampler(
        policy.lm.config, policy, here, dtype=torch.float32, max_length=48, slots=4, tensor_parallel=parts
    )
    addresses = [p.data_ptr() for p in sampler.lm.parameters()]
    sampler.load(policy)
    sampler.load(policy)
    assert addresses == [p.data_ptr() for p in sampler.lm.parameters()]
    whole = {name: p.full_tensor() for name, p in policy.lm.named_parameters()}
    for name, p in sampler.lm.named_parameters():
        place = sampler.lm.origin.places.get(name)
        expected = whole[name] if place is None else whole[name].narrow(place.dimension, place.first, place.size)
        assert torch.equal(p, expected), name
    generator = np.random.Generator(np.random.Philox(key=1))
    requests = [Request(generator.integers(2, 511, n), example) for example, n in enumerate((3, 11, 20, 1, 7))]
    mine = requests[sampler.team.number :: sampler.team.count]
    found = []
    for params in (GREEDY, DRAWN):
        for r in sampler.generate(mine, params, seed=7, step=1):
            logprobs = [r.logprobs.tolist(), r.logprobs_t1.tolist()]
            found.append([params.temperature, r.example, r.response_ids.tolist(), r.finish_reason, logprobs])
    everyones = here.gather(found)
    for rank, others in enumerate(everyones):
        assert others == everyones[rank // parts * parts], f"rank {rank} and its team differ"
    return sorted(row for part in everyones[::parts] for row in part)

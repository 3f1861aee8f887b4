"""A stage for tests/ranks.py: every rank samples its share of the requests; rank 0 writes all responses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from engine import world
from engine.flags import flag
from rollout import Request, Sampler, SamplingParams
from tests.families import load


@dataclass(frozen=True, kw_only=True)
class Config:
    directory: str = flag("", "the model")
    output: str = flag("", "the file of responses")


def train(config: Config) -> None:
    here = world.start()
    directory = Path(config.directory)
    policy = load(directory, here)
    sampler = Sampler(policy.lm.config, policy, here, dtype=torch.float32, max_length=48, slots=4)
    sampler.load(policy)
    for name, tensor in load_file(directory / "model.safetensors").items():
        assert torch.equal(dict(sampler.lm.named_parameters())[name], tensor), name
    generator = np.random.Generator(np.random.Philox(key=1))
    prompts = [generator.integers(2, 511, n) for n in (3, 11, 20, 1, 7)]
    requests = [Request(ids, example, sample) for example, ids in enumerate(prompts) for sample in range(3)]
    params = SamplingParams(max_new_tokens=24, temperature=0.8, top_p=0.95, stop_ids=tuple(range(0, 511, 32)))
    mine = sampler.generate(requests[here.rank :: here.size], params, seed=7, step=1)
    rows = [[r.example, r.sample, r.response_ids.tolist(), r.finish_reason] for r in mine]
    everything = sorted(row for part in here.gather(rows) for row in part)
    if here.is_main:
        Path(config.output).write_text(json.dumps(everything), encoding="utf-8")

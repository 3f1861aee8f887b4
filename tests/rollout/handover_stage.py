"""A stage for tests/ranks.py: weights handed over in buckets, beside the gather of one parameter after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import world
from engine.flags import flag
from engine.model.adapters import lora
from engine.model.adapters.lora import Adapters
from engine.model.shards import local, whole
from rollout import handover
from tests.families import load

MODULES = tuple(f"model.layers.{i}.{x}_proj" for i in range(2) for x in ("self_attn.q", "mlp.down", "mlp.up"))
CASES: dict[str, dict[str, Any]] = {  # how the policy is held; the sampler computes in the last one's dtype
    "whole": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "lora": {"dtype": torch.bfloat16, "adapters": Adapters(5, 8.0, False, MODULES, 1)},
    "nf4": {"adapters": Adapters(4, 8.0, False, MODULES, 1, four_bit=True, double_quant=True)},
    "nf4 frozen": {"adapters": Adapters(4, 8.0, False, (), 1, four_bit=True)},
    "saved": {"adapters": Adapters(4, 8.0, False, MODULES, 1, saved=("model.embed_tokens",)), "untied": True},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    tied: str = flag("", "a model whose embedding is its head")
    untied: str = flag("", "one with a head of its own, of rows that NF4 can hold")
    output: str = flag("", "the file of what was seen")


def one_by_one(target: Any, source: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The naive twin: every parameter merged, cast and gathered by itself, beside what was handed over."""
    own = dict(target.named_parameters())
    for name, (_, read) in lora.dense(source).items():
        if name in own:
            yield name, own[name], whole(read().to(own[name].dtype))


def train(config: Config) -> None:
    here = world.start()
    seen: dict[str, Any] = {}
    for case, how in CASES.items():
        directory = Path(config.untied if "nf4" in case or case == "saved" else config.tied)
        policy = load(directory, here, **{k: v for k, v in how.items() if k != "untied"})
        for bucket in (2**25, 7000):
            seen[f"{case} {bucket}"] = hand_over(policy, how.get("dtype", torch.float32), here, bucket)
    if here.is_main:
        Path(config.output).write_text(json.dumps(seen), encoding="utf-8")


def hand_over(policy: Any, dtype: torch.dtype, here: world.World, bucket: int) -> dict[str, Any]:
    """Twice, with other weights the second time. Collectives, buckets, and the largest buffer."""
    handover.BUCKET = bucket
    target: Any = handover.skeleton(policy.lm.config, "sdpa", dtype, here.device)
    addresses = [p.data_ptr() for p in target.parameters()]
    gathers: list[tuple[bool, int]] = []  # of a bucket, or of what merging needs whole; bytes
    planned: list[int] = []
    gather, buckets = handover.all_gather, handover.buckets

    def counted(output: torch.Tensor, mine: torch.Tensor, **options: Any) -> Any:
        gathers.append(("async_op" in options, output.nbytes))
        return gather(output, mine, **options)

    def plan(moving: Any, size: int) -> Any:
        found = buckets(moving, size)
        planned.append(len(found))
        return found

    handover.all_gather, handover.buckets = counted, plan
    found = []
    try:
        for number in range(2):
            torch.manual_seed(10 * number + here.rank)
            for p in policy.parameters():
                if p.requires_grad:
                    local(p).detach().normal_()
            gathers.clear()
            handover.load(target, policy.lm, here)
            sizes = {flies: [size for f, size in gathers if f is flies] for flies in (True, False)}
            found.append({"planned": planned[-1], "buckets": sizes[True], "wholes": sizes[False]})
            for name, own, expected in one_by_one(target, policy.lm):
                assert torch.equal(own, expected), (name, bucket)
        assert addresses == [p.data_ptr() for p in target.parameters()]
    finally:
        handover.all_gather, handover.buckets = gather, buckets
    return {"rounds": found, "bytes": sum(p.nbytes for p in target.parameters())}

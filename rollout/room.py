"""How much memory the cache takes: what the requests can need, or what there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from engine.flags import RlvrFlags
from engine.model.adapters import lora
from engine.model.policy import Root
from engine.model.shards import local
from engine.train.stage import as_size
from engine.world import World, host_memory
from rollout.cache import Layer, Window
from rollout.pages import Layout, Strip
from rollout.schedule import Response

LEFT = 1 / 3  # of a device's memory, for activations, beside weights that are kept


def copy_of(lm: Any, dtype: torch.dtype) -> int:
    """Bytes of a whole model's weights in this type."""
    return sum(shape.numel() for shape, _ in lora.dense(lm).values()) * dtype.itemsize


def to_come(trained: Sequence[Root], optimizer: str) -> int:
    """Bytes of this rank's gradients and moments, which are not there before the first step."""
    moments = lambda size: 2 if optimizer == "adamw_8bit" else 2 * size
    shards = [local(p) for root in trained for p in root.parameters() if p.requires_grad]
    return sum(p.numel() * (p.element_size() + moments(p.element_size())) for p in shards)


def weights(flags: RlvrFlags, copy: int, beside: int, memory: int | None) -> str:
    """How a sampler has its weights, of `copy` bytes, in a run that holds so much `beside` (Sampler: `weights`).
    `memory`: a GPU's; None of a host.
    """
    if flags.rollout_ahead:
        return "apart"
    short = memory is not None and beside + copy > (1 - LEFT) * memory
    gathers = short if flags.rollout_weights == "auto" else flags.rollout_weights == "gather"
    return "gathered" if gathers else "shared"


def free_memory(world: World) -> int:
    """Bytes that this rank could still take: of its GPU, or its share of what the host has left."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps for training is free now
        return torch.cuda.mem_get_info(world.device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # another system than Linux
        available = host_memory()
    return available // world.size


def wanted(
    responses: Sequence[Response], layers: dict[int, Layer], slots: int, block: int
) -> dict[Window, tuple[int, int]]:
    """By window, (pages that the longest of these responses needs, that `slots` of them can ever need)."""
    samples = Counter(response.prompt_name for response in responses)
    prompts = {r.prompt_name: len(r.prompt) - 1 for r in responses if samples[r.prompt_name] > 1}
    found = {}
    for window in {layer.window for layer in layers.values()}:
        at_once = lambda n, w=window: -(-n // block) if w is None else min(-(-n // block), (w - 1) // block + 2)
        whole = [at_once(r.room) + 1 for r in responses]  # and the prompt's last page, which is copied
        own = [
            at_once(r.room)
            + 1
            - (prompts[r.prompt_name] // block if r.prompt_name in prompts and window is None else 0)
            for r in responses
        ]
        held = sorted((at_once(n) for n in prompts.values()), reverse=True)
        together = sum(sorted(own, reverse=True)[:slots]) + sum(held[:slots]) + min(slots, len(own))
        found[window] = 1 + max(whole, default=0), 1 + max(max(whole, default=0), together)
    return found


def layout_of(responses: Sequence[Response], slots: int, block: int) -> Layout:
    """A strip for every slot, as long as the most that one of these responses has beside a shared prompt, and strips
    for the prompts that are held at a time: those of the slots, and those of which a sample is still to come.
    """
    samples = Counter(response.prompt_name for response in responses)
    prompts = {r.prompt_name: len(r.prompt) - 1 for r in responses if samples[r.prompt_name] > 1}
    own = max((-(-r.room // block) - prompts.get(r.prompt_name, 0) // block for r in responses), default=1)
    longest = max((-(-n // block) for n in prompts.values()), default=1)
    begun, to_come, open_ = Counter[bytes](), 0, 0
    for name in (r.prompt_name for r in responses if r.prompt_name in prompts):
        begun[name] += 1
        open_ += (begun[name] == 1) - (begun[name] == samples[name])
        to_come = max(to_come, open_ + 1)
    strips = Strip(1, own, slots)
    return Layout(strips, Strip(strips.end, max(1, longest), min(len(prompts), slots + to_come)))


def counts(
    memory: int, asked: dict[Window, tuple[int, int]], layers: dict[int, Layer], block: int
) -> dict[Window, int]:
    """Pages by window: all that are wanted, or as many as so many bytes hold, each kind the same part of the way from
    least to most. Raises UserError where the least do not fit.
    """
    size = {w: sum(layer.bytes_of(block) for layer in layers.values() if layer.window == w) for w in asked}
    least, most = (sum(asked[w][i] * size[w] for w in asked) for i in (0, 1))
    if memory < least:
        raise UserError(
            f"the cache of the longest response takes {as_size(least)}, and sampling may use {as_size(memory)}: raise"
            " --rollout_memory, or lower --response_length"
        )
    part = 1.0 if memory >= most else (memory - least) / (most - least)
    return {w: low + int(part * (high - low)) for w, (low, high) in asked.items()}

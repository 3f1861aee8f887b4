"""Weights from the sharded policy to the sampler: one whole copy in the compute dtype, at addresses that stay.

    W_sampler  <-  all_gather( cast(shard of W + s B A) )          parameter by parameter, in the model's order

The cast comes before the gather, so bf16 travels at half the bytes of the fp32 masters, and what is gathered is bit for
bit what FSDP gathers for training; under adapters it is their sum, rounded once. Addresses never change (CUDA graphs
and views survive an update).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from engine.model.adapters import lora
from engine.model.adapters.saved import checkpoint_name
from engine.model.shards import local
from engine.world import World


def skeleton(config: Any, attention_name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The family's own modules with uninitialised weights, in eval mode, without gradients."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention_name)
    for module in lm.modules():  # Module.to_empty would exchange data of parameters, which fake tensors refuse
        for name, p in module.named_parameters(recurse=False):
            empty = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    lm.tie_weights()
    return lm.eval()


@torch.no_grad()
def load(target: Any, source: Any, world: World) -> None:
    """Copies every parameter and buffer of `source` (shards or whole) into `target`'s. Collective.

    Raises ValueError where the two are not the same model.
    """
    buffers = {checkpoint_name(name): buffer for name, buffer in source.named_buffers()}
    own = dict(target.named_parameters())
    theirs = {name: read for name, (_, read) in lora.dense(source).items() if name not in buffers}
    if own.keys() != theirs.keys():
        raise ValueError(f"not the same model: {sorted(own.keys() ^ theirs.keys())[:4]}")
    for name, p in own.items():
        _gather(p, theirs[name](), world)
    modules = dict(target.named_modules())
    # rotary frequencies, embedding scales: whole on every rank, in a dtype of their own
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        held = modules[path]._buffers
        if held[leaf].dtype != buffer.dtype or held[leaf].shape != buffer.shape:
            held[leaf] = buffer.detach().clone()
        held[leaf].copy_(buffer)


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13's name, and before


def _gather(target: Tensor, p: Tensor, world: World) -> None:
    if not isinstance(p, DTensor) or world.size == 1:
        target.copy_(local(p))
        return
    rows, per_rank = p.shape[0], -(-p.shape[0] // world.size)  # FSDP's chunks: the last ranks may hold less, or nothing
    shard = p.to_local().to(target.dtype)
    if rows == per_rank * world.size:
        _all_gather(target.data, shard.contiguous(), group=p.device_mesh.get_group())
        return
    padded = target.new_zeros(per_rank, *target.shape[1:])
    padded[: len(shard)] = shard
    whole = target.new_empty(per_rank * world.size, *target.shape[1:])
    _all_gather(whole, padded, group=p.device_mesh.get_group())
    target.copy_(whole[:rows])

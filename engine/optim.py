"""AdamW, the learning-rate schedules as pure functions of the step, and one optimizer step over sharded gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.world import World


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.999, eps 1e-8) on fp32 masters; weight decay on matrices only. The learning rate is set per step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=True)


def learning_rate(step: int, *, peak: float, steps: int, warmup_ratio: float, schedule: str) -> float:
    """The learning rate of optimizer step `step` (0-based) of `steps`: linear warm-up from 0, then the schedule to 0.

    With w = ceil(warmup_ratio * steps): step / w during the warm-up, then of x = (step - w) / (steps - w):
    linear 1 - x, cosine (1 + cos(pi x)) / 2, constant 1. The convention of transformers' schedulers: the first step has
    learning rate 0 where there is a warm-up, and 0 would be reached one step after the last.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * step / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "constant": 1.0}[schedule]


def local(p: Tensor) -> Tensor:
    """This rank's shard."""
    return p.to_local() if isinstance(p, DTensor) else p


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, world: World, *, lr: float, max_norm: float) -> Tensor:
    """Clips the global gradient norm to `max_norm` (0: off), steps, clears the gradients. Returns the norm before clipping (fp64).

    A norm that is not finite leaves weights and moments untouched, on every rank alike since the norm is global; the caller
    stops the run. This is the one place in a step that waits for the device.
    """
    grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [g for g in grads if g.numel()]
    squares = torch.stack(torch._foreach_norm(grads)).double().square().sum() if grads else torch.zeros((), dtype=torch.float64)
    norm = world.sum(squares.to(world.device)).sqrt()
    if max_norm > 0 and grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(grads[0].dtype))
    if torch.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

"""AdamW, the learning-rate schedules as pure functions of the step, and one optimizer step over sharded gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from engine import signals
from engine.flags import OptimizerFlags
from engine.model.shards import local
from engine.train.adamw8bit import AdamW8bit
from engine.world import World

# names in checkpoints; scales are of 8-bit moments
MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
INVERSE_SQRT = 10_000  # steps after which inverse_sqrt without a warm-up is down to 1 / sqrt(2); transformers' number
DECAY_RATIO = 0.1  # of warmup_stable_decay; MiniCPM's (arXiv 2404.06395)


def adamw(root: nn.Module, flags: OptimizerFlags, world: World) -> torch.optim.Optimizer:
    """AdamW (--adam_beta1, --adam_beta2, --adam_epsilon) on what is trained; weight decay on matrices only. The
    learning rate is set per step.

    --optimizer adamw: moments in the masters' dtype (in bfloat16, v stalls: its changes of 1 / 1000 are less than a
    rounding); adamw_8bit: in 8 bits, in fp32 for small tensors; it says which.
    """
    trained = [p for p in root.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": flags.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    betas, eps = (flags.adam_beta1, flags.adam_beta2), flags.adam_epsilon
    if flags.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    optimizer = AdamW8bit(groups, betas=betas, eps=eps)
    world.say(optimizer.describe({p: name for name, p in root.named_parameters()}))
    return optimizer


def moments(optimizer: torch.optim.Optimizer, p: nn.Parameter, ranks: int | None = None) -> dict[str, Tensor]:
    """Name → tensor: a parameter's state without its step, made (zero) where no step was taken yet.

    Given `ranks`, tensors to read into what a run of so many ranks wrote; `adopt` takes it over.
    """
    if isinstance(optimizer, AdamW8bit):
        return optimizer.moments(p, ranks)
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=local(p).device)
        state |= {name: torch.zeros_like(p) for name in MOMENTS[:2]}
    return {name: state[name] for name in MOMENTS[:2]}


def adopt(optimizer: torch.optim.Optimizer, p: nn.Parameter, read: dict[str, Tensor], ranks: int) -> bool:
    """Takes over what was read into `moments(optimizer, p, ranks)`; returns whether 8-bit moments were rounded
    again.
    """
    return isinstance(optimizer, AdamW8bit) and optimizer.adopt(p, read, ranks)


def learning_rate(flags: OptimizerFlags, step: int, steps: int, peak: float | None = None) -> float:
    """The learning rate of optimizer step `step` (0-based) of `steps`: linear warm-up from 0, then the schedule.

    `peak` takes the place of --learning_rate.

    With w steps of warm-up: step / w during it, then of x = (step - w) / (steps - w)

        linear 1 - x    cosine (1 + cos(pi x)) / 2    constant 1    inverse_sqrt 1 / sqrt(1 + (step - w) / w)

    (the last with 10000 in place of a w of 0). cosine_with_min_lr is f + (1 - f) cosine with the floor f =
    --min_lr_ratio. warmup_stable_decay is 1 until d steps before the end, and then the same of x = 1 - (steps - step) /
    d; its warm-up begins at f. The convention of transformers' schedulers: the first step has learning rate 0 where
    there is a warm-up, and 0 would be reached one step after the last.
    """
    warmup = warmup_steps(flags, steps)
    peak = flags.learning_rate if peak is None else peak
    kind, floor = flags.lr_scheduler_type, flags.min_lr_ratio or 0.0
    if step < warmup:
        return peak * _above(floor, step / warmup) if kind == "warmup_stable_decay" else peak * step / warmup
    x = (step - warmup) / max(1, steps - warmup)
    if kind == "inverse_sqrt":
        return peak / math.sqrt(1 + (step - warmup) / (warmup or INVERSE_SQRT))
    if kind == "cosine_with_min_lr":
        return peak * _above(floor, (1 + math.cos(math.pi * x)) / 2)
    if kind == "warmup_stable_decay":
        decay = decay_steps(flags, steps)
        x = max(0, step - (steps - decay)) / decay
        return peak * _above(floor, (1 + math.cos(math.pi * x)) / 2)
    return peak * {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "constant": 1.0}[kind]


def warmup_steps(flags: OptimizerFlags, steps: int) -> int:
    """Of a run of `steps`: --warmup_steps, or --warmup_ratio of them, rounded up. It may be longer than the run."""
    share = flags.warmup_ratio if flags.warmup_steps is None else flags.warmup_steps
    if share >= 1 and flags.warmup_steps is not None:
        return int(share)
    return math.ceil(share * steps)


def decay_steps(flags: OptimizerFlags, steps: int) -> int:
    """The last ones of a run of `steps`, in which warmup_stable_decay decays: --decay_steps, or --decay_ratio of
    them, rounded up.
    """
    share = DECAY_RATIO if flags.decay_ratio is None else flags.decay_ratio
    return math.ceil(share * steps) if flags.decay_steps is None else flags.decay_steps


def _above(floor: float, share: float) -> float:
    """Of 1, where `share` of what is above the floor is left."""
    return share * (1 - floor) + floor


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, world: World, lr: float, max_norm: float) -> float:
    """Clips the global gradient norm to `max_norm` (0: off), steps, clears the gradients. Returns the norm before
    clipping.

    A norm that is not finite leaves weights and moments untouched, on every rank alike since the norm is global; the
    caller stops the run. Waits for the device once, for the norm.
    """
    grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [g for g in grads if g.numel()]
    # a norm in bfloat16 is off by up to 1 / 256
    wide = torch.promote_types(grads[0].dtype, torch.float32) if grads else torch.float32
    squares = (
        torch.stack(torch._foreach_norm(grads, 2, wide)).double().square().sum()
        if grads
        else torch.zeros((), dtype=torch.float64, device=world.device)
    )
    vote = torch.full((), signals.vote(), dtype=torch.float64, device=world.device)
    square, votes = world.sum(torch.stack([squares, vote])).tolist()
    signals.count(votes)
    norm = math.sqrt(square)
    if math.isfinite(norm):
        if norm + 1e-6 > max_norm > 0 and grads:
            factor = torch.tensor(
                max_norm / (norm + 1e-6), dtype=grads[0].dtype
            ).item()  # rounded once, as the gradients' own numbers are
            torch._foreach_mul_(grads, factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

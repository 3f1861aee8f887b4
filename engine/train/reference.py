"""The reference policy pi_ref: cached numbers, or a forward pass of frozen weights that are there anyway.

cache     numbers computed once by the policy before its first update (refcache.py)
base      the policy's own frozen weights, its adapters switched off: pi_ref where new adapters are trained
adapter   the adapter that training starts from, frozen beside its trained copy on the same weights
copy      a second, frozen model
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.data.batch import MicroBatch, sum_by_sequence
from engine.errors import UserError
from engine.flags import AdapterFlags
from engine.model import build
from engine.model.adapters import lora
from engine.model.layers import transform_layers
from engine.model.open import Base
from engine.model.policy import Policy
from engine.world import World


class FrozenPolicy:
    """pi_ref as a function of a micro-batch: a policy under one of its adapters, or none."""

    def __init__(self, policy: Policy, use: str) -> None:
        self.policy, self.use = policy, use

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """log pi_ref of every counted token, (R,) fp32. Collective, also for an empty micro-batch."""
        with lora.using(self.policy, self.use):
            return self.policy.logprobs(batch)

    def sums(self, batch: MicroBatch) -> Tensor:
        """sum log pi_ref of every sequence, (S,) fp32; the same function of a batch as `refcache.Reference`."""
        return sum_by_sequence(self.logprobs(batch).double(), batch.counts_S).float()

    def release(self) -> None:
        """Frees gathered weights."""
        self.policy.release()


def resolve_reference(requested: str, flags: AdapterFlags, *, without_lora: str, with_lora: str = "") -> str:
    """--reference auto by its meaning here: `without_lora`, or `with_lora` ('': what the adapters' start says). Raises
    UserError.
    """
    own = "adapter" if flags.adapter_name_or_path else "base"
    if requested == "auto":
        return (with_lora or own) if flags.use_lora else without_lora
    if requested in ("base", "adapter") and not flags.use_lora:
        raise UserError(f"--reference {requested} needs --use_lora: all weights are trained, none stays as it was")
    if requested in ("base", "adapter") and requested != own:
        adapter = f"the adapter {flags.adapter_name_or_path}"
        start = adapter if own == "adapter" else "the model without an adapter"
        raise UserError(f"--reference {requested}: training starts from {start}, so the reference is --reference {own}")
    return requested


def frozen(requested: str, base: Base, world: World, policy: Policy) -> FrozenPolicy:
    """The reference that --reference base, adapter or copy names. Collective."""
    if requested != "copy":
        return FrozenPolicy(policy, lora.OFF if requested == "base" else lora.INITIAL)
    copy = build.load_policy(base.directory, base.config, world, base.how)
    transform_layers(copy, base.memory)
    copy.requires_grad_(False)
    copy.temperature = policy.temperature
    return FrozenPolicy(copy, lora.TRAINED)

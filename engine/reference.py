"""The reference policy pi_ref: cached numbers, or a forward pass of frozen weights that are there anyway.

cache     numbers computed once by the policy before its first update (refcache.py)
base      the policy's own frozen weights, its adapters switched off: pi_ref where new adapters are trained
adapter   the adapter that training starts from, frozen beside its trained copy on the same weights
copy      a second, frozen model
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine import lora, model, setup
from engine.batch import MicroBatch, sum_by_sequence
from engine.config import Config, RunConfig
from engine.errors import UserError
from engine.model import Policy
from engine.world import World

CHOICES = ("auto", "cache", "base", "adapter", "copy")


class FrozenPolicy:
    """pi_ref as a function of a micro-batch: a policy under one of its adapters, or none."""

    def __init__(self, policy: Policy, use: str) -> None:
        self.policy, self.use = policy, use

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """log pi_ref of every counted token, (R,) fp32. Collective, also for an empty micro-batch."""
        with lora.using(self.policy, self.use):
            return self.policy(batch)

    def sums(self, batch: MicroBatch) -> Tensor:
        """sum log pi_ref of every sequence, (S,) fp32; the same function of a batch as `refcache.Reference`."""
        return sum_by_sequence(self(batch).double(), batch.counts_S).float()

    def release(self) -> None:
        self.policy.release()


def resolve(config: Config, *, without_lora: str, with_lora: str = "") -> Config:
    """--reference auto by its meaning here: `without_lora`, or `with_lora` ('': what the adapters' start says). Raises
    UserError.
    """
    own = "adapter" if config.adapter_name_or_path else "base"
    if config.reference == "auto":
        return replace(config, reference=(with_lora or own) if config.use_lora else without_lora)
    if config.reference in ("base", "adapter") and not config.use_lora:
        raise UserError(
            f"--reference {config.reference} needs --use_lora: all weights are trained, none stays as it was"
        )
    if config.reference in ("base", "adapter") and config.reference != own:
        start = (
            f"from the adapter {config.adapter_name_or_path}"
            if own == "adapter"
            else "from the model without an adapter"
        )
        raise UserError(
            f"--reference {config.reference}: training starts {start}, so the reference is --reference {own}"
        )
    return config


def frozen(config: RunConfig, here: World, base: setup.Base, policy: Policy) -> FrozenPolicy:
    """The reference that --reference base, adapter or copy names. Collective."""
    if config.reference != "copy":
        return FrozenPolicy(policy, lora.OFF if config.reference == "base" else lora.INITIAL)
    copy, _ = model.load(base.directory, base.config, here, **base.how(config))
    setup.transform_layers(copy, config)
    copy.requires_grad_(False)
    copy.temperature = policy.temperature
    return FrozenPolicy(copy, lora.TRAINED)

"""The flags of the optimizer: how much a step takes, how many there are, and how far each goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import UserError, require
from engine.flags.declare import OPTIMIZATION, STAGE, flag, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """How many steps, of how much, and how far each goes."""

    batch_size: int = flag(
        None,
        "examples per optimizer step, whatever the machine",
        STAGE,
        excludes=("per_device_train_batch_size", "gradient_accumulation_steps"),
    )
    learning_rate: float = flag(None, "peak", STAGE)
    num_train_epochs: int = flag(1, "passes over the data", OPTIMIZATION, aliases=("num_epochs",))
    max_steps: int = flag(
        -1, "stop after N optimizer steps, whatever the epochs (-1: off)", OPTIMIZATION, aliases=("max_train_steps",)
    )
    per_device_train_batch_size: int | None = flag(
        None, "with --gradient_accumulation_steps and the number of ranks: sets --batch_size", OPTIMIZATION
    )
    gradient_accumulation_steps: int | None = flag(None, "see --per_device_train_batch_size", OPTIMIZATION)
    optimizer: str = flag(
        "adamw",
        "AdamW in fp32, or with moments of 8 bits by blocks of 256 (bitsandbytes)",
        OPTIMIZATION,
        choices=("adamw", "adamw_8bit"),
    )
    lr_scheduler_type: str = flag("linear", "after the warm-up", OPTIMIZATION, choices=("linear", "cosine", "constant"))
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises linearly from 0", OPTIMIZATION)
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (not on norms and biases)", OPTIMIZATION)
    max_grad_norm: float = flag(
        1.0, "global gradient norm is clipped to it (0: off)", OPTIMIZATION, aliases=("clip_grad_norm",)
    )

    def batch_size_on(self, ranks: int) -> tuple[int, str]:
        """(--batch_size, what --per_device_train_batch_size and --gradient_accumulation_steps made of it, or '')."""
        per_device, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if per_device is None and accumulation is None:
            return self.batch_size, ""
        factors = (per_device or 1, accumulation or 1, ranks)
        batch_size = math.prod(factors)
        return batch_size, "{} per device x {} accumulation x {} ranks = --batch_size {}".format(*factors, batch_size)

    def check_optimizer(self) -> None:
        """Raises UserError for what cannot be."""
        require_positive(self, "batch_size", "num_train_epochs", "learning_rate")
        require_positive(self, "per_device_train_batch_size", "gradient_accumulation_steps")
        require_not_negative(self, "warmup_ratio", "weight_decay", "max_grad_norm")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps must be greater than 0, or -1 for whole epochs, got {self.max_steps}")
        if self.warmup_ratio > 1:
            raise UserError(f"--warmup_ratio is a share of the steps, at most 1, got {self.warmup_ratio}")
        if self.optimizer == "adamw_8bit":
            require("bitsandbytes", "--optimizer adamw_8bit")

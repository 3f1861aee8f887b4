"""The flags of the optimizer: how much a step takes, how many there are, and how far each goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import UserError, require
from engine.flags.declare import OPTIMIZATION, STAGE, flag, require_not_negative, require_positive

SCHEDULES = ("linear", "cosine", "constant", "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt")
READ_BY = {  # flag → the schedules that read it
    "min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
    "decay_ratio": ("warmup_stable_decay",),
    "decay_steps": ("warmup_stable_decay",),
}


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
    lr_scheduler_type: str = flag(
        "linear",
        "after the warm-up, by the names of transformers (warmup_stable_decay: WSD)",
        OPTIMIZATION,
        choices=SCHEDULES,
    )
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises linearly from 0", OPTIMIZATION)
    warmup_steps: float | None = flag(
        None, "the warm-up in steps; less than 1 is a share", OPTIMIZATION, excludes=("warmup_ratio",)
    )
    min_lr_ratio: float | None = flag(
        None, "the floor as a share of the peak, of cosine_with_min_lr and warmup_stable_decay (0)", OPTIMIZATION
    )
    decay_ratio: float | None = flag(
        None, "share of the steps, the last ones, in which warmup_stable_decay decays; 0.1", OPTIMIZATION
    )
    decay_steps: int | None = flag(None, "the same in steps", OPTIMIZATION, excludes=("decay_ratio",))
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (not on norms and biases)", OPTIMIZATION)
    adam_beta1: float = flag(0.9, "of AdamW's mean of gradients", OPTIMIZATION)
    adam_beta2: float = flag(0.999, "of AdamW's mean of their squares", OPTIMIZATION)
    adam_epsilon: float = flag(1e-8, "added to the root of that mean", OPTIMIZATION)
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
        require_not_negative(self, "weight_decay", "max_grad_norm")
        require_positive(self, "adam_epsilon")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= vars(self)[name] < 1:
                raise UserError(f"--{name} must be at least 0 and less than 1, got {vars(self)[name]}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps must be greater than 0, or -1 for whole epochs, got {self.max_steps}")
        self.check_schedule()
        if self.optimizer == "adamw_8bit":
            require("bitsandbytes", "--optimizer adamw_8bit")

    def check_schedule(self) -> None:
        """Raises UserError for a length that is none, and for a flag that --lr_scheduler_type does not read."""
        for name, schedules in READ_BY.items():
            if vars(self)[name] is not None and self.lr_scheduler_type not in schedules:
                raise UserError(
                    f"--{name} is not read by --lr_scheduler_type {self.lr_scheduler_type}, but by"
                    f" {' and '.join(schedules)}"
                )
        if self.warmup_steps is None:
            require_not_negative(self, "warmup_ratio")
            if self.warmup_ratio > 1:
                raise UserError(f"--warmup_ratio is a share of the steps, at most 1, got {self.warmup_ratio}")
        elif self.warmup_steps < 0 or (self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps)):
            raise UserError(
                f"--warmup_steps must be a whole number of steps, or a share of them that is less than 1, got"
                f" {self.warmup_steps:g}"
            )
        require_positive(self, "decay_ratio", "decay_steps")
        for name in ("min_lr_ratio", "decay_ratio"):
            if vars(self)[name] is not None and not 0 <= vars(self)[name] <= 1:
                raise UserError(f"--{name} is a share, from 0 to 1, got {vars(self)[name]}")
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.min_lr_ratio is None:
            raise UserError("--lr_scheduler_type cosine_with_min_lr needs --min_lr_ratio, the floor (0.1, for example)")

"""What flags may be, each on either side of its bound, and what fills those that were left open."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from engine.errors import UserError
from engine.flags import StageFlags, fill, flag, require_between
from tests import needs

ALLOWED = [
    {},
    {"warmup_ratio": 1.0},
    {"max_steps": -1},
    {"warmup_steps": 0.0},
    {"warmup_steps": 0.5},
    {"warmup_steps": 1.0},
    {"warmup_steps": 2000.0, "warmup_ratio": None},
    {"adam_beta1": 0.0, "adam_beta2": 0.5, "adam_epsilon": 1e-5},
    {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": 0.0},
    {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": 1.0},
    {"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 1.0},
    {"lr_scheduler_type": "warmup_stable_decay", "decay_steps": 1, "min_lr_ratio": 0.1},
    {"max_steps": 1},
    {"use_lora": True, "lora_rank": 4, "use_rslora": True},
    {"use_lora": True, "adapter_name_or_path": "x"},
    {"use_lora": True, "export_adapter": True, "export_dtype": "float32"},
    pytest.param({"use_lora": True, "load_in_4bit": True, "double_quant": True}, marks=needs.bitsandbytes),
]
REFUSED = [
    ({"warmup_ratio": 1.01}, "--warmup_ratio is a share"),
    ({"warmup_ratio": -0.1}, "--warmup_ratio must not be negative"),
    ({"warmup_steps": -1.0}, "--warmup_steps must be a whole number of steps, or a share"),
    ({"warmup_steps": 1.5}, "--warmup_steps must be a whole number of steps, or a share .* got 1.5"),
    ({"adam_beta1": 1.0}, "--adam_beta1 must be at least 0 and less than 1, got 1.0"),
    ({"adam_beta2": -0.1}, "--adam_beta2 must be at least 0"),
    ({"adam_epsilon": 0.0}, "--adam_epsilon must be greater than 0"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr needs --min_lr_ratio"),
    ({"min_lr_ratio": 0.1}, "--min_lr_ratio is not read by --lr_scheduler_type linear, but by cosine_with_min_lr and"),
    ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": 1.1}, "--min_lr_ratio is a share, from 0 to 1"),
    ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": -0.1}, "--min_lr_ratio is a share, from 0 to 1"),
    ({"decay_steps": 10, "lr_scheduler_type": "cosine"}, "--decay_steps is not read by --lr_scheduler_type cosine"),
    ({"decay_ratio": 0.0, "lr_scheduler_type": "warmup_stable_decay"}, "--decay_ratio must be greater than 0"),
    ({"decay_steps": 0, "lr_scheduler_type": "warmup_stable_decay"}, "--decay_steps must be greater than 0"),
    ({"decay_ratio": 1.5, "lr_scheduler_type": "warmup_stable_decay"}, "--decay_ratio is a share, from 0 to 1"),
    ({"max_steps": 0}, "--max_steps must be greater than 0"),
    ({"max_steps": -2}, "--max_steps must be greater than 0"),
    ({"batch_size": 0}, "--batch_size must be greater than 0"),
    ({"dtype": "float16"}, "--dtype float16 is refused"),
    ({"load_in_4bit": True}, "--load_in_4bit needs --use_lora"),
    ({"lora_rank": 4}, "--lora_rank is not read without --use_lora"),
    ({"use_rslora": True}, "--use_rslora is not read without --use_lora"),
    ({"use_lora": True, "double_quant": True}, "--double_quant is not read without --load_in_4bit"),
    ({"use_lora": True, "adapter_name_or_path": "x", "lora_rank": 4}, "--lora_rank is that of --adapter_name_or_path"),
    ({"use_lora": True, "export_adapter": True, "export_dtype": "bfloat16"}, "--export_dtype bfloat16 is not read"),
    ({"model_name_or_path": "x"}, "needs --dataset_name or --mixer_list"),
    ({"save_total_limit": 0}, "--save_total_limit must be at least 1"),
]


@pytest.mark.parametrize("values", ALLOWED, ids=str)
def test_flags_that_are_allowed(values):
    StageFlags(**values).check()


@pytest.mark.parametrize("values, said", REFUSED, ids=str)
def test_flags_that_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        StageFlags(**values).check()


@dataclass(frozen=True)
class Shares:
    share: float = flag(0.5, "")


@pytest.mark.parametrize(
    "value, fits", [(0, True), (1, True), (0.5, True), (-0.01, False), (1.01, False), (float("nan"), False)]
)
def test_bounds_are_of_both_sides(value, fits):
    if fits:
        require_between(Shares(value), share=(0, 1))
    else:
        with pytest.raises(UserError, match="--share must be between 0 and 1"):
            require_between(Shares(value), share=(0, 1))


def test_only_what_was_not_given_is_filled():
    filled = fill(StageFlags(learning_rate=0.0), learning_rate=1e-3, batch_size=8)
    assert (filled.learning_rate, filled.batch_size) == (0.0, 8)

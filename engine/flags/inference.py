"""The flags of commands that draw responses from a model that is not trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import UserError
from engine.flags.data import TextFlags
from engine.flags.declare import SAMPLING, flag, override, require_between, require_positive
from engine.flags.model import ModelFlags


@dataclass(frozen=True, kw_only=True)
class DecodingFlags:
    """How tokens are drawn."""

    response_length: int = flag(None, "longest response in tokens; 1024, embedded 24", SAMPLING)
    temperature: float = flag(1.0, "of sampling; 0 is greedy", SAMPLING)
    top_k: int = flag(0, "sample from the k likeliest tokens (0: from all)", SAMPLING)
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability", SAMPLING)

    def check_decoding(self) -> None:
        """Raises UserError for what cannot be."""
        require_positive(self, "response_length")
        require_between(self, top_p=(1e-9, 1), temperature=(0, 1e3), top_k=(0, 1e9))


@dataclass(frozen=True, kw_only=True)
class RolloutFlags(DecodingFlags):
    """How many are drawn."""

    num_samples_per_prompt: int = flag(None, "responses to each prompt", SAMPLING)
    rollout_slots: int = flag(
        None,
        "responses sampled at a time on each rank, at most; auto: 64 on a CPU, 512 on CUDA, if the cache holds them",
        SAMPLING,
    )
    rollout_memory: float = flag(
        None,
        "of the memory that is free when sampling begins, the share that the cache may take; auto: 0.9 of a GPU's, 0.5"
        " of a host's",
        SAMPLING,
    )
    rollout_tensor_parallel: int = flag(
        1,
        "neighbouring ranks that share one sampler, each with a part of every layer, for a model whose whole copy does"
        " not fit one; --rollout_slots is then theirs together",
        SAMPLING,
    )

    @property
    def rollout_room(self) -> dict[str, Any]:
        """What a sampler is given of it."""
        return {
            "slots": self.rollout_slots,
            "memory": self.rollout_memory,
            "tensor_parallel": self.rollout_tensor_parallel,
        }

    def check_rollout(self) -> None:
        """Raises UserError for what cannot be."""
        require_positive(self, "num_samples_per_prompt", "rollout_slots", "rollout_memory", "rollout_tensor_parallel")
        if (self.rollout_memory or 0) > 1:
            raise UserError(f"--rollout_memory {self.rollout_memory:g}: expected a share, 1 at most")


@dataclass(frozen=True, kw_only=True)
class InferenceFlags(ModelFlags, TextFlags):
    """A model as it is, with an adapter on it or none."""

    model_name_or_path: str = override(
        None, "local directory or hub id of a decoder, or a run's directory (its final/); without it, the embedded one"
    )
    adapter_name_or_path: str | None = override(None, "an adapter on it, in PEFT's format")
    load_in_4bit: bool = override(
        False, "with an adapter: the model's linear layers in NF4, as the adapter was trained on them"
    )
    double_quant: bool = override(False, "with --load_in_4bit, as in training")
    dtype: str = override(
        "auto", "compute dtype; auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "bfloat16", "float32")
    )
    attention: str = override("auto", "packed attention backend of the load-time check")
    cache_dir: str = override("~/.cache/triptych", "where the embedded model lies")

    def check_inference(self) -> None:
        """Raises UserError for flags that contradict each other."""
        if self.load_in_4bit and not self.adapter_name_or_path:
            raise UserError("--load_in_4bit is not read without --adapter_name_or_path")
        if self.double_quant and not self.load_in_4bit:
            raise UserError("--double_quant is not read without --load_in_4bit")
        require_positive(self, "max_seq_length")

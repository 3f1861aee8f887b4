"""Tokens per second, model FLOPs and peak memory of a step.

perf/tokens_per_second_per_gpu   tokens fed to the model / seconds / ranks
perf/mfu                         model FLOPs / seconds / peak FLOP/s; 6 per matmul weight and token, 4 where it is
                                 frozen under adapters (the head: per counted token), 6 x layers x heads x head size
                                 x sum of squared lengths for causal attention
perf/peak_memory_gib             allocator's peak on CUDA, resident set's peak on a CPU; rank 0's
"""

from __future__ import annotations

import resource
import time

import torch

from engine.data.batch import MicroBatch
from engine.hardware import of_gpu
from engine.log import Totals
from engine.model.adapters.saved import saved
from engine.model.policy import Policy
from engine.world import World


class Throughput:
    """Tokens and FLOPs of a step, counted into its `Totals` under the names COUNTED."""

    COUNTED = ("perf/tokens", "perf/flops")

    def __init__(self, world: World, policy: Policy, dtype: torch.dtype, num_tokens: int = 0) -> None:
        lm_config = policy.lm.config
        embedding, head = (
            m.weight.numel() for m in (policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings())
        )
        tied = lm_config.tie_word_embeddings
        body = policy.num_parameters - embedding - (0 if tied else head)
        frozen = policy.adapters is not None
        whole = saved(policy.lm)  # of which an embedding multiplies nothing, and the head only rows that count
        adapters = policy.num_trained - sum(module.weight.numel() for module in whole.values())
        self.per_token = 4 * body + 6 * adapters if frozen else 6 * body
        self.per_row = (4 if frozen and policy.lm.get_output_embeddings() not in whole.values() else 6) * head
        head_size = getattr(lm_config, "head_dim", None) or lm_config.hidden_size // lm_config.num_attention_heads
        self.attention = lm_config.num_hidden_layers * lm_config.num_attention_heads * head_size
        self.world, self.peak = world, peak_flops(world.device, dtype)
        self.num_tokens = num_tokens
        self._since = time.perf_counter()

    def flops(self, batch: MicroBatch) -> float:
        """Model FLOPs of the batch, forward and backward."""
        if not batch.examples:
            return 0.0
        squares = sum(length * length for length in batch.lengths)
        return self.per_token * batch.num_tokens + self.per_row * len(batch.targets_R) + 6.0 * self.attention * squares

    def count(self, batch: MicroBatch, totals: Totals) -> None:
        totals.add({"perf/tokens": batch.num_tokens, "perf/flops": self.flops(batch)})

    def row(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of a step from its reduced totals. Time goes from one `row` to the next: each comes after a wait
        for the device.
        """
        if self.world.device.type == "cuda":
            peak_memory = torch.cuda.max_memory_allocated(self.world.device)
        else:
            peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        now = time.perf_counter()
        tokens, flops = (sums[name] for name in self.COUNTED)
        seconds, self._since = now - self._since, now
        self.num_tokens += int(tokens)
        return {
            "num_tokens": self.num_tokens,
            "perf/tokens_per_second_per_gpu": tokens / seconds / self.world.size,
            "perf/mfu": flops / seconds / self.world.size / self.peak,
            "perf/peak_memory_gib": peak_memory / 2**30,
        }


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The data sheet's figure of a known GPU in bf16, else what a matrix product reaches now."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (known := of_gpu(device)):
        return known.flops
    n = 4096 if device.type == "cuda" else 512
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


class Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.since = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds

"""The loss of supervised fine-tuning: one sum of cross entropies, three denominators.

    token   L = sum_s sum_t CE_st / sum_s |y_s|         every trained token weighs the same
    sum     L = sum_s sum_t CE_st / S                   the same direction, larger by the mean length: Tülu 3's, whose
                                                        per-device batch was 1 (arXiv 2411.15124, section 4.3.2)
    mean    L = sum_s (1/|y_s|) sum_t CE_st / S         every sequence weighs the same, so a token of a short answer
                                                        weighs more: what the mean of micro-batch means does at batch
                                                        size 1

CE = - log p(y_t). Denominators count the whole step, over all ranks and micro-batches, so none depends on the layout.

S sequences · R trained tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("token", "sum", "mean")


def token_weights(counts_S: Tensor, reduce: str, num_tokens: int | None = None) -> Tensor:
    """The weight of every trained token in the numerator, (R,) fp32: 1, or under 'mean' 1 / |y_s|. Raises ValueError.

    `num_tokens`, the sum of the counts, spares a wait for the device.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    weights_S = (
        torch.ones_like(counts_S, dtype=torch.float32) if reduce != "mean" else 1 / counts_S.clamp(min=1).float()
    )
    return weights_S.repeat_interleave(counts_S, output_size=num_tokens)


def denominator(num_tokens: int, num_sequences: int, reduce: str) -> int:
    """What the sum over the whole step is divided by."""
    return num_tokens if reduce == "token" else num_sequences


def sft(logprobs_R: Tensor, weights_R: Tensor) -> Tensor:
    """- sum_t w_t log p(y_t): the numerator, for any part of a step's tokens; the caller divides by `denominator`."""
    return -(weights_R * logprobs_R).sum()

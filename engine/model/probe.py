"""The load-time probe: a model that cannot be packed is refused by name, before anything is trained."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from engine.data.batch import micro_batch
from engine.errors import UserError
from engine.model.policy import Policy
from engine.world import World


def rounding(dtype: torch.dtype) -> float:
    """By how much two ways to compute a log-prob may differ on average: 16 roundings of the compute dtype, in float32
    1e-4.
    """
    return max(16 * torch.finfo(dtype).eps, 1e-4)


@torch.no_grad()
def check_packing(policy: Policy, config: Any, world: World, dtype: torch.dtype, adapted: str = "") -> None:
    """Two packed sequences must have the log-probs of the model's own logits for each alone, else the model is refused
    by name.

    This catches decoders that mix tokens other than through attention (state spaces, convolutions), that read positions
    or masks in ways the packed path does not serve, or that transform logits unknown to `_logit_transform`. The root
    mean square of the difference may be 16 roundings of the compute dtype (in float32 1e-4) of the log-probs' spread.
    """
    window = getattr(config, "sliding_window", None) or 0
    lengths = (window + 5, 9) if 0 < window <= 64 else (13, 9)
    generator = np.random.Generator(np.random.Philox(key=0))
    sequences = [(generator.integers(0, config.vocab_size, n + 1), np.ones(n + 1, bool)) for n in lengths]
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    try:
        packed_R = policy.logprobs(micro_batch(sequences, (0, 1), world.device))
        alone_R = []
        for i, sequence in enumerate(sequences):
            batch = micro_batch([sequence], (i,), world.device)
            logprobs_TV = policy.own_logits(batch).float().log_softmax(-1)
            alone_R.append(logprobs_TV.gather(1, batch.targets_R[:, None]).squeeze(1))
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "Connection" in str(error):  # of the machine, not of the model
            raise
        raise UserError(f"{name} cannot be packed: {' '.join(str(error).split())[:200]}") from error
    finally:
        policy.release()
    expected_R = torch.cat(alone_R)
    difference = (packed_R - expected_R).square().mean().sqrt().item()
    if not math.isfinite(difference):
        raise UserError(f"{name}{adapted}: log-probs are not finite numbers")
    bound = rounding(dtype) * max(1.0, expected_R.std().item())
    if not difference <= bound:
        raise UserError(
            f"{name} cannot be packed: log-probs of packed sequences differ from those alone by {difference:.1e} (bound"
            f" {bound:.1e})"
        )

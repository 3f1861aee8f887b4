"""What must hold in the first iteration of a fresh run, up to what rounding can do: asserted at run time.

R rows of all responses, end to end.
"""

from __future__ import annotations

import torch

from engine.errors import UserError
from engine.flags import SamplingFlags
from engine.model import rounding
from engine.world import World
from rollout.experience import Experience


def check_sampler(
    experience: Experience, old_R: torch.Tensor, config: SamplingFlags, dtype: torch.dtype, world: World
) -> None:
    """The sampler's log-probs are the trainer's, on average, up to what rounding can do to them. Raises UserError."""
    if config.top_k or config.top_p < 1 or config.temperature == 0:
        world.say(
            "the policy is not what was sampled from (temperature 0, --top_k or --top_p): log-probs are of the whole"
            " distribution"
        )
        return
    difference_R = (experience.sampled_R - old_R).abs()
    mean, most = difference_R.mean().item(), difference_R.max().item()
    bound = rounding(dtype) * max(1.0, old_R.abs().mean().item())
    world.say(
        f"step 0: sampler's and trainer's log-probs differ by {mean:.1e} on average, {most:.1e} at most; rounding"
        f" allows {bound:.1e} on average"
    )
    if not mean <= bound:
        found = f"log-probs differ by {mean:.1e}, allowed {bound:.1e}"
        raise UserError(f"step 0: the sampler is not the policy ({found})")


def check_ratio(sums: dict[str, float], dtype: torch.dtype, world: World) -> None:
    """In the first update the policy is still pi_old: the ratio is 1. Raises UserError."""
    if not sums["val/ratio"]:  # the value model's warm-up: no policy update
        return
    off, bound = abs(sums["val/ratio"] / sums["tokens"] - 1), rounding(dtype)
    world.say(f"step 0: mean ratio of the first update off 1 by {off:.1e}, rounding allows {bound:.1e}")
    if not off <= bound:
        raise UserError(f"step 0: the first update's ratio is off 1 by {off:.1e}, allowed {bound:.1e}")

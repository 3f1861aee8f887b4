"""What a response is worth: its verdict, its end, its length and its form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.errors import UserError
from engine.flags import RewardFlags
from rollout.sampler import Rollout
from verifiers import Verdict, verify

FORM = ("think", "answer")  # --format_tags


def score_of(
    rollout: Rollout, verdict: Verdict, flags: RewardFlags, response_length: int, text_of: Callable[[np.ndarray], str]
) -> float:
    """verification_reward x verdict, or missing_eos_penalty in its place; with format_reward for the form, and less

        overlong_penalty max(0, |y| - (response_length - overlong_buffer)) / overlong_buffer

    which is DAPO's (arXiv 2503.14476, eq. 13). `text_of` makes a text of the response's ids.
    """
    score = flags.verification_reward * verdict.score
    if flags.missing_eos_penalty is not None and rollout.finish_reason == "length":
        score = flags.missing_eos_penalty
    if flags.format_reward:
        score += flags.format_reward * verify(text_of(rollout.response_ids), form_of(flags), "format").score
    if flags.overlong_buffer:
        beyond = len(rollout.response_ids) - (response_length - flags.overlong_buffer)
        penalty = 1.0 if flags.overlong_penalty is None else flags.overlong_penalty
        score -= penalty * max(0, beyond) / flags.overlong_buffer
    return score


def check_form(flags: RewardFlags) -> None:
    """Raises UserError for --format_tags that are none."""
    try:
        verify("", form_of(flags), "format")
    except ValueError as error:
        raise UserError(f"--format_tags: {error}") from None


def form_of(flags: RewardFlags) -> dict[str, list[str]]:
    return {"tags": list(FORM if flags.format_tags is None else flags.format_tags)}

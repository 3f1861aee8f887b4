"""Pure functions of tensors: every formula of Triptych, and nothing else (no I/O, no config, no communication).

A loss returns one number per pair (or per token); the launch file sums it and divides by one global denominator.
"""

from losses.group import (
    cispo,
    clipped_surrogate,
    dr_grpo_advantages,
    grpo_advantages,
    gspo_logprobs,
    kl_loss,
    reinforce_pp_advantages,
    rloo_advantages,
    token_weights,
    truncated_ratio,
)
from losses.logprobs import linear_argmax, linear_logprobs, linear_loss, naive_logprobs, naive_loss
from losses.ppo import diagnostics, explained_variance, gae, kl, ppo_policy, ppo_value, token_rewards, whiten
from losses.preference import dpo, dpo_norm, simpo
from losses.preference_variants import chosen_nll, ipo, wpo
from losses.sft import sft

__all__ = [
    "chosen_nll",
    "cispo",
    "clipped_surrogate",
    "diagnostics",
    "dpo",
    "dpo_norm",
    "dr_grpo_advantages",
    "explained_variance",
    "gae",
    "grpo_advantages",
    "gspo_logprobs",
    "ipo",
    "kl",
    "kl_loss",
    "linear_argmax",
    "linear_logprobs",
    "linear_loss",
    "naive_logprobs",
    "naive_loss",
    "ppo_policy",
    "ppo_value",
    "reinforce_pp_advantages",
    "rloo_advantages",
    "sft",
    "simpo",
    "token_rewards",
    "token_weights",
    "truncated_ratio",
    "whiten",
    "wpo",
]

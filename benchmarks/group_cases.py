"""Losses that launch.grpo and TRL's GRPOTrainer both have, in the words of both, and where they differ.

A case's `steps` is the number of micro-batches that TRL cuts a step into. What a case leaves out is clipping at 0.1 on
both sides, a temperature of 1 and TRL's defaults (its use_bias_correction_kl is True: our --kl_estimator unbiased).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EPSILON = 1e-4  # TRL's, beside the deviation of a group; ours is 1e-6


@dataclass(frozen=True)
class Case:
    """One loss in the words of both. Where they differ, `why` says it; `by_ended`: by a known factor, the share of
    responses that end.
    """

    trl: str
    ours: str
    why: str = ""
    by_ended: bool = False
    epsilon: float = EPSILON

    @property
    def agrees(self) -> bool:
        return not self.why or self.by_ended

    def of_trl(self) -> dict[str, Any]:
        return {name: read(word) for name, word in (pair.split("=") for pair in self.trl.split())}

    def of_ours(self) -> dict[str, Any]:
        pairs = [flag.partition(" ") for flag in self.ours.removeprefix("--").split(" --")]
        return {name: read(word or "True") for name, _, word in pairs}


def read(word: str) -> Any:
    return word == "True" if word in ("True", "False") else word if word.isidentifier() else float(word)


SEQUENCE = "importance_sampling_level=sequence epsilon=0.05"
GSPO = "--surrogate gspo --clip_low 0.05 --clip_high 0.05"
ONLY_LEARNT = "the mean is over responses that are learnt from; TRL leaves the masked ones in its denominator"
CASES = (
    Case("loss_type=grpo", "--aggregate sequence"),
    Case("loss_type=grpo steps=4", "--aggregate sequence"),
    Case("loss_type=bnpo", "--aggregate token"),
    Case("loss_type=dapo", "--aggregate token"),
    Case("loss_type=dapo steps=4", "--aggregate token"),
    Case("loss_type=dr_grpo", "--aggregate dr_grpo"),
    Case("loss_type=dr_grpo scale_rewards=none", "--aggregate dr_grpo --advantage dr_grpo"),
    Case("loss_type=dapo epsilon_high=0.28", "--aggregate token --clip_high 0.28"),
    Case(
        "loss_type=dapo epsilon=0.01 delta=1.02", "--aggregate token --clip_low 0.01 --clip_high 0.01 --dual_clip 1.02"
    ),
    Case("loss_type=cispo epsilon_high=1.1", "--aggregate token --surrogate cispo --clip_low 1"),
    Case(f"loss_type=grpo {SEQUENCE}", f"--aggregate sequence {GSPO}"),
    Case(f"loss_type=dapo {SEQUENCE}", f"--aggregate token {GSPO}"),
    Case("loss_type=grpo beta=0.2 use_bias_correction_kl=False", "--aggregate sequence --kl_coef 0.2"),
    Case("loss_type=dapo beta=0.2", "--aggregate token --kl_coef 0.2 --kl_estimator unbiased"),
    Case("loss_type=dapo temperature=0.7", "--aggregate token --temperature 0.7"),
    Case("loss_type=dapo entropy_coef=0.05", "--aggregate token --entropy_coef 0.05"),
    Case("loss_type=dapo mask_truncated_completions=True", "--aggregate token --mask_truncated"),
    Case(
        "loss_type=grpo mask_truncated_completions=True",
        "--aggregate sequence --mask_truncated",
        ONLY_LEARNT,
        by_ended=True,
    ),
    Case(
        "loss_type=dr_grpo mask_truncated_completions=True",
        "--aggregate dr_grpo --mask_truncated",
        ONLY_LEARNT,
        by_ended=True,
    ),
    Case(
        "loss_type=dapo",
        "--aggregate token",
        "with our own epsilon beside a group's deviation, 1e-6; TRL's is 1e-4",
        epsilon=1e-6,
    ),
    Case(
        "loss_type=bnpo steps=4",
        "--aggregate token",
        "TRL divides by the tokens of a micro-batch: its gradient depends on how the batch is cut",
    ),
    Case(
        "loss_type=grpo entropy_coef=0.05",
        "--aggregate sequence --entropy_coef 0.05",
        "the bonus is weighed as the loss is; TRL's is a mean over tokens whatever the loss",
    ),
    Case(
        f"loss_type=grpo {SEQUENCE} beta=0.2",
        f"--aggregate sequence {GSPO} --kl_coef 0.2 --kl_estimator unbiased",
        "the unbiased KL is weighed by a token's ratio; TRL weighs it by the response's, which is biased",
    ),
    Case(
        "loss_type=dapo delta=1.05",
        "--aggregate token --dual_clip 1.05",
        "with a bound below 1 + epsilon_high, TRL clips positive advantages at it, not negative ones; ours only these",
    ),
)
WITHOUT_COUNTERPART = (
    "no counterpart here: loss_type sapo, luspo, vespo; scale_rewards=batch; top_entropy_quantile;"
    " off_policy_mask_threshold; use_adaptive_entropy",
    "none in TRL's GRPOTrainer: --advantage rloo (TRL has a trainer for it), reinforce_pp; --kl_in reward;"
    " --kl_estimator k2; --surrogate cispo with a floor",
)

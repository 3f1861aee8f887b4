"""What every training stage takes, and what both kinds of reinforcement learning share."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UserError
from engine.flags.data import MixtureFlags, PromptFlags
from engine.flags.declare import SAMPLING, flag, override, require_between, require_not_negative, require_positive
from engine.flags.model import AdapterFlags, ReferenceFlags
from engine.flags.optimizer import OptimizerFlags
from engine.flags.run import MemoryFlags, RunFlags, SamplingFlags


@dataclass(frozen=True, kw_only=True)
class StageFlags(AdapterFlags, MixtureFlags, OptimizerFlags, MemoryFlags, RunFlags):
    """What every training stage takes."""

    def check(self) -> None:
        """Raises UserError for what cannot be, within a group and between groups; nothing is opened."""
        require_positive(self, "max_seq_length", "micro_batch_tokens")
        self.check_rows()
        self.check_optimizer()
        self.check_run()
        if self.dtype == "float16":
            raise UserError("--dtype float16 is refused: it needs loss scaling, which bfloat16 and float32 do not")
        if self.model_name_or_path is not None and not self.names_data:
            raise UserError(
                "--model_name_or_path needs --dataset_name or --mixer_list (without either, all is embedded)"
            )
        self.check_adapters()
        if self.export_adapter and self.export_dtype not in (None, self.master_dtype):
            raise UserError(
                f"--export_dtype {self.export_dtype} is not read with --export_adapter: adapters are written as they"
                " are trained, in --master_dtype"
            )


@dataclass(frozen=True, kw_only=True)
class RewardFlags:
    """What a response is worth."""

    verification_reward: float = flag(1.0, "reward of a right answer (the original: 10)")
    missing_eos_penalty: float | None = flag(
        None, "score, in place of the verifier's, of a response without an end (the original: -10)"
    )
    overlong_buffer: int = flag(
        0, "the last so many tokens of --response_length cost up to --overlong_penalty, linearly (DAPO)"
    )
    overlong_penalty: float | None = flag(None, "see --overlong_buffer; 1")
    format_reward: float = flag(0.0, "added to the score of a response in the form of --format_tags")
    format_tags: tuple[str, ...] | None = flag(
        None, "the form, tags each once and in order; think answer: <think>…</think><answer>…</answer>", many=True
    )

    def check_rewards(self, response_length: int | None) -> None:
        """Raises UserError for what cannot be."""
        require_positive(self, "overlong_penalty")
        require_not_negative(self, "overlong_buffer", "format_reward")
        for name, of in (("overlong_penalty", "overlong_buffer"), ("format_tags", "format_reward")):
            if vars(self)[name] is not None and not vars(self)[of]:
                raise UserError(f"--{name} is not read without --{of}")
        if response_length is not None and self.overlong_buffer >= response_length:
            raise UserError(f"--overlong_buffer must be less than --response_length {response_length}")


@dataclass(frozen=True, kw_only=True)
class RlvrFlags(StageFlags, PromptFlags, ReferenceFlags, SamplingFlags, RewardFlags):
    """Reinforcement learning with verifiable rewards, whatever the algorithm: what is sampled, what it is worth, and
    how often it is learnt from.
    """

    temperature: float = override(1.0, "of sampling, and of all log-probs")
    num_train_epochs: int = override(None, "passes over the data; 1, embedded: 30 iterations")
    warmup_ratio: float = override(0.0)
    reference: str = override(
        "auto",
        "pi_ref: the frozen base or adapter under the trained one (auto, with --use_lora), or a frozen copy",
        choices=("auto", "base", "adapter", "copy"),
    )
    num_ppo_epochs: int = flag(None, "passes over an iteration's responses")
    num_mini_batches: int = flag(1, "optimizer steps per pass")
    eval_samples: int = flag(4, "samples per held-out prompt")
    rollout_ahead: int = flag(
        0,
        "1: the next step's responses are sampled while one is learnt from, by weights one update old; pi_old is then"
        " what the sampler wrote down (0: exactly on-policy)",
        SAMPLING,
    )
    rollout_weights: str = flag(
        "auto",
        "the sampler's copy of the weights: kept, or gathered for every rollout and given back after it; auto: kept"
        " where a third of the device's memory is left beside it and all that is trained",
        SAMPLING,
        choices=("auto", "keep", "gather"),
    )

    def check(self) -> None:
        """Raises UserError for what cannot be."""
        super().check()
        self.check_prompts()
        self.check_sampling()
        self.check_rewards(self.response_length)
        require_positive(self, "num_samples_per_prompt", "num_ppo_epochs", "num_mini_batches", "eval_samples")
        require_between(self, rollout_ahead=(0, 1))
        self.check_ahead()

    def check_ahead(self) -> None:
        """Raises UserError for what does not go with responses that are sampled ahead."""
        if not self.rollout_ahead:
            return
        one = "--rollout_ahead 1"
        if self.top_k or self.top_p < 1 or self.temperature == 0:
            raise UserError(
                f"{one} takes pi_old from the sampler, which has to draw from the policy itself: --top_k 0, --top_p 1"
                " and a --temperature greater than 0"
            )
        if self.rollout_weights == "gather":
            raise UserError(f"{one} needs the sampler's weights all the time: --rollout_weights keep")
        if self.rollout_tensor_parallel > 1:
            raise UserError(f"{one} does not go with --rollout_tensor_parallel: a team's sums would cross training's")

"""The acts of launch.demo as flags of the stages: in miniature, and of a real model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.data.word_problems import SIZES, WordProblems
from engine.errors import UserError
from engine.flags import flag, require_positive
from launch import dpo, grpo, ppo, sft
from launch.evaluate import Config as Evaluation


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """What the acts are made of, and where they go."""

    model_name_or_path: str | None = flag(None, "a real chat model in place of the embedded tiny Llama")
    conversations: str | None = flag(None, "act I of a real model: what launch.sft reads, such as GSM8K's solutions")
    pairs: str | None = flag(None, "act II of a real model: what launch.dpo reads")
    output_dir: str = flag("output/demo", "holds sft/, dpo/, ppo/, grpo/, evaluations/, results.json, report.html")
    seed: int = flag(1, "of all that is drawn")
    scale: float = flag(
        1.0, "of every act's steps, and of the problems that it is measured by: 0.1 is a look at whether all works"
    )
    cache_dir: str = flag("~/.cache/triptych", "where the embedded model and problems lie")


@dataclass(frozen=True)
class Act:
    """One act of the recipe: what it is called, which act it goes on from, what it does, and with which flags."""

    name: str
    start: str
    says: str
    stage: ModuleType
    flags: Any


def check(config: RecipeFlags) -> None:
    """Raises UserError for what cannot be."""
    require_positive(config, "scale")
    named = [f"--{name}" for name in ("conversations", "pairs") if vars(config)[name] is None]
    if config.model_name_or_path is not None and named:
        raise UserError(f"--model_name_or_path needs {' and '.join(named)} (without it, all is embedded)")
    if config.model_name_or_path is None and len(named) < 2:
        raise UserError("--conversations and --pairs are read with --model_name_or_path")


def tiny(config: RecipeFlags, problems: WordProblems) -> tuple[str, list[Act], Evaluation]:
    """(the model to begin with, the acts, how each is evaluated): from nothing, in minutes."""
    shared = common(config) | {"max_seq_length": 128, "save_steps": 50}
    acts = [
        Act(
            "SFT",
            "base",
            "imitates the worked answers of somebody careless (launch/sft.py, losses/sft.py)",
            sft,
            sft.Config(
                **shared | out(config, "sft"),
                model_name_or_path=str(problems.model),
                dataset_name=str(problems.conversations),
                batch_size=32,
                max_steps=scaled(config, 1000),
                learning_rate=4e-3,
                lr_scheduler_type="cosine",
                sample_tokens=0,
            ),
        ),
        Act(
            "DPO",
            "SFT",
            "prefers of two answers the one that was judged better (launch/dpo.py, losses/preference.py)",
            dpo,
            dpo.Config(
                **shared | out(config, "dpo"),
                model_name_or_path=f"{config.output_dir}/sft/final",
                dataset_name=str(problems.pairs),
                batch_size=32,
                max_steps=scaled(config, 48),
                learning_rate=3e-4,
                rpo_alpha=1.0,
            ),
        ),
        *tiny_rlvr(config, problems, shared),
    ]
    how = {"response_length": 48, "num_samples_per_prompt": 4}
    return str(problems.model), acts, measured_on(problems.held_out, SIZES["held_out"], config, **how)


def tiny_rlvr(config: RecipeFlags, problems: WordProblems, shared: dict[str, Any]) -> list[Act]:
    """Act III by both algorithms, from one start."""
    shared = shared | {
        "model_name_or_path": f"{config.output_dir}/dpo/final",
        "dataset_name": str(problems.problems),
        "response_length": 48,
        "warmup_ratio": 0.1,
    }
    return [
        Act(
            "PPO",
            "DPO",
            "reinforces, by PPO, the answers that a program verifies to be right (launch/ppo.py, losses/ppo.py)",
            ppo,
            ppo.Config(
                **shared | out(config, "ppo"),
                batch_size=32,
                num_samples_per_prompt=4,
                max_steps=scaled(config, 45),
                learning_rate=4e-4,
                num_ppo_epochs=2,
                num_mini_batches=2,
            ),
        ),
        Act(
            "GRPO",
            "DPO",
            "does so from the same start by GRPO, without a value model (launch/grpo.py, losses/group.py)",
            grpo,
            grpo.Config(
                **shared | out(config, "grpo"),
                batch_size=32,
                num_samples_per_prompt=8,
                max_steps=scaled(config, 60),
                learning_rate=4e-4,
                lr_scheduler_type="linear",
                kl_coef=0.05,
                kl_in="reward",
            ),
        ),
    ]


def real(config: RecipeFlags, problems: WordProblems) -> tuple[str, list[Act], Evaluation]:
    """The same of a real chat model on real data. Acts II and III train adapters: their reference is the model under
    them, and a step costs a third less.
    """
    model, conversations, pairs = str(config.model_name_or_path), str(config.conversations), str(config.pairs)
    shared = common(config) | {"max_seq_length": 512, "save_steps": 8}
    lora = {"use_lora": True, "lora_rank": 16}
    acts = [
        Act(
            "SFT",
            "base",
            f"imitates the worked answers of {conversations} (launch/sft.py)",
            sft,
            sft.Config(
                **shared | out(config, "sft"),
                model_name_or_path=model,
                dataset_name=conversations,
                batch_size=8,
                max_steps=scaled(config, 32),
                learning_rate=2e-5,
            ),
        ),
        Act(
            "DPO",
            "SFT",
            f"prefers the better answers of {pairs} (launch/dpo.py)",
            dpo,
            dpo.Config(
                **shared | out(config, "dpo") | lora,
                model_name_or_path=f"{config.output_dir}/sft/final",
                dataset_name=pairs,
                batch_size=8,
                max_steps=scaled(config, 16),
                learning_rate=5e-5,
            ),
        ),
        *real_rlvr(config, problems, shared | lora),
    ]
    how = {"response_length": 256, "temperature": 0.0, "source_column": "source"}
    return model, acts, measured_on(problems.exam, SIZES["exam"], config, **how)


def real_rlvr(config: RecipeFlags, problems: WordProblems, shared: dict[str, Any]) -> list[Act]:
    """Act III by both algorithms, from one start."""
    shared = shared | {
        "model_name_or_path": f"{config.output_dir}/dpo/final",
        "dataset_name": str(problems.practice),
        "response_length": 96,
        "max_steps": scaled(config, 16),
    }
    return [
        Act(
            "PPO",
            "DPO",
            "reinforces right answers to sums and word problems, by PPO (launch/ppo.py, verifiers/gsm8k.py)",
            ppo,
            ppo.Config(
                **shared | out(config, "ppo"),
                batch_size=12,
                num_samples_per_prompt=4,
                learning_rate=1e-4,
                num_ppo_epochs=1,
                num_mini_batches=2,
            ),
        ),
        Act(
            "GRPO",
            "DPO",
            "does so from the same start by GRPO, without a value model (launch/grpo.py, losses/group.py)",
            grpo,
            grpo.Config(
                **shared | out(config, "grpo"),
                batch_size=6,
                num_samples_per_prompt=8,
                learning_rate=1e-4,
                num_mini_batches=2,
            ),
        ),
    ]


def measured_on(problems: Path, n: int, config: RecipeFlags, **how: Any) -> Evaluation:
    """How every model is evaluated; which one is left open."""
    n = scaled(config, n)
    shared: dict[str, Any] = {"num_prompts": n, "seed": config.seed, "cache_dir": config.cache_dir}
    return Evaluation(model_name_or_path="", dataset_name=str(problems), **shared | how)


def common(config: RecipeFlags) -> dict[str, Any]:
    """What all acts have in common: an interrupted one goes on where it was."""
    return {"seed": config.seed, "cache_dir": config.cache_dir}


def out(config: RecipeFlags, act: str) -> dict[str, str]:
    """The act's own directory."""
    return {"output_dir": f"{config.output_dir}/{act}"}


def scaled(config: RecipeFlags, n: int) -> int:
    """So many, at the scale of the recipe."""
    return max(4, round(n * config.scale))

"""The whole recipe in one sitting.                                                       python -m launch.demo --help

    base  --SFT-->  pi_1  --DPO-->  pi_2  --PPO-->  pi_3          each evaluated on the same held-out problems

    act I    launch.sft   maximises log pi(answer | problem) on worked answers, many of them wrong
    act II   launch.dpo   prefers the better of two answers, as somebody judged who sometimes errs
    act III  launch.ppo   reinforces what a program verifies to be right

With no argument: a tiny Llama that has read nothing and a small language of word problems
(engine/data/word_problems.py), some minutes on two cores. With --model_name_or_path a real chat model on real data,
some hours:

    python -m launch.demo --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --conversations gsm8k_train.jsonl
        --pairs preferences.jsonl

At the end stand a table, which of the differences are more than chance, three answers side by side, and a page to look
at: output/demo/report.html. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from engine import terminal
from engine.config import parse
from engine.data.word_problems import WordProblems, word_problems
from engine.errors import UserError
from engine.flags import flag, require_positive
from engine.world import World, main, start
from launch import commands, dpo, ppo, sft
from launch.compare import compare
from launch.evaluate import Config as Evaluation
from launch.evaluate import evaluate
from launch.report import report, require_matplotlib

SHOWN = 3  # problems whose answers stand side by side


@dataclass(frozen=True, kw_only=True)
class Config:
    __doc__ = __doc__
    model_name_or_path: str | None = flag(None, "a real chat model in place of the embedded tiny Llama")
    conversations: str | None = flag(None, "act I of a real model: what launch.sft reads, such as GSM8K's solutions")
    pairs: str | None = flag(None, "act II of a real model: what launch.dpo reads")
    output_dir: str = flag("output/demo", "holds sft/, dpo/, ppo/, evaluations/, results.json, report.html")
    seed: int = flag(1, "of all that is drawn")
    scale: float = flag(1.0, "every act's steps, as a multiple: 0.1 is a look at whether all works")
    cache_dir: str = flag("~/.cache/triptych", "where the embedded model and problems lie")


@dataclass(frozen=True)
class Act:
    """One act of the recipe: what it is called, what it does, and with which flags."""

    name: str
    says: str
    stage: ModuleType
    flags: Any


def demo(config: Config) -> None:
    """Three acts, with an evaluation before and after each. Raises UserError."""
    world = start()
    check(config)
    problems = world.once("problems", lambda: word_problems(Path(config.cache_dir).expanduser()))
    base, acts, evaluation = (tiny if config.model_name_or_path is None else real)(config, problems)
    output_dir = Path(config.output_dir)
    world.on_main("evaluations", lambda: (output_dir / "evaluations").mkdir(parents=True, exist_ok=True))

    world.say(f"base: {base}")
    measured = [measure("base", base, evaluation, world, output_dir)]
    for act in acts:
        world.say(terminal.Heading(act.name), act.says)
        with terminal.subdued():
            act.stage.train(act.flags)
        measured.append(measure(act.name, f"{act.flags.output_dir}/final", evaluation, world, output_dir))

    results = {"title": f"accuracy on {measured[0]['n']} held-out problems", "rows": measured}
    results["answers"] = side_by_side([row["name"] for row in measured], output_dir)
    world.say(*told(results, output_dir))
    if world.is_main:
        (output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        runs = [act.flags.output_dir for act in acts]
        world.say(*report(runs, output_dir / "report.html", results=results, title="The whole recipe in one sitting"))


# --- the acts ---------------------------------------------------------------------------------------------------------


def tiny(config: Config, problems: WordProblems) -> tuple[str, list[Act], Evaluation]:
    """(the model to begin with, the acts, how each is evaluated): from nothing, in minutes."""
    shared = common(config) | {"max_seq_length": 128}
    acts = [
        Act(
            "SFT",
            "worked answers of somebody careless, losses/sft.py; launch/sft.py",
            sft,
            sft.Config(
                **shared | out(config, "sft"),
                model_name_or_path=str(problems.model),
                dataset_name=str(problems.conversations),
                batch_size=32,
                max_steps=steps(config, 750),
                learning_rate=3e-3,
                sample_tokens=0,
            ),
        ),
        Act(
            "DPO",
            "of two answers the one judged better, length-normalised, losses/preference.py; launch/dpo.py",
            dpo,
            dpo.Config(
                **shared | out(config, "dpo"),
                model_name_or_path=f"{config.output_dir}/sft/final",
                dataset_name=str(problems.pairs),
                batch_size=32,
                max_steps=steps(config, 64),
                learning_rate=1e-3,
            ),
        ),
        Act(
            "RLVR",
            "what the verifier finds right is reinforced, PPO with GAE and a KL penalty, losses/ppo.py; launch/ppo.py",
            ppo,
            ppo.Config(
                **shared | out(config, "ppo"),
                model_name_or_path=f"{config.output_dir}/dpo/final",
                dataset_name=str(problems.problems),
                batch_size=32,
                num_samples_per_prompt=4,
                max_steps=steps(config, 30),
                learning_rate=1e-3,
                response_length=48,
            ),
        ),
    ]
    evaluation = Evaluation(
        model_name_or_path="", dataset_name=str(problems.held_out), response_length=48, num_samples_per_prompt=4
    )
    return str(problems.model), acts, replace(evaluation, seed=config.seed, cache_dir=config.cache_dir)


def real(config: Config, problems: WordProblems) -> tuple[str, list[Act], Evaluation]:
    """The same of a real chat model on real data. Act II and III train adapters: their reference is the model under
    them, and a step costs a third less.
    """
    shared = common(config) | {"max_seq_length": 512}
    lora = {"use_lora": True, "lora_rank": 16}
    acts = [
        Act(
            "SFT",
            f"worked answers of {config.conversations}; launch/sft.py",
            sft,
            sft.Config(
                **shared | out(config, "sft"),
                model_name_or_path=config.model_name_or_path,
                dataset_name=config.conversations,
                batch_size=8,
                max_steps=steps(config, 32),
                learning_rate=2e-5,
            ),
        ),
        Act(
            "DPO",
            f"preferences of {config.pairs}; launch/dpo.py",
            dpo,
            dpo.Config(
                **shared | out(config, "dpo") | lora,
                model_name_or_path=f"{config.output_dir}/sft/final",
                dataset_name=config.pairs,
                batch_size=8,
                max_steps=steps(config, 16),
                learning_rate=5e-5,
            ),
        ),
        Act(
            "RLVR",
            "sums and word problems, verified by verifiers/gsm8k.py; launch/ppo.py",
            ppo,
            ppo.Config(
                **shared | out(config, "ppo") | lora,
                model_name_or_path=f"{config.output_dir}/dpo/final",
                dataset_name=str(problems.practice),
                batch_size=12,
                num_samples_per_prompt=4,
                max_steps=steps(config, 16),
                learning_rate=1e-4,
                num_ppo_epochs=1,
                num_mini_batches=2,
                response_length=96,
            ),
        ),
    ]
    evaluation = Evaluation(
        model_name_or_path="", dataset_name=str(problems.exam), response_length=256, temperature=0.0
    )
    return str(config.model_name_or_path), acts, replace(evaluation, seed=config.seed, cache_dir=config.cache_dir)


def common(config: Config) -> dict[str, Any]:
    """What all acts have in common: an interrupted one goes on where it was."""
    return {"seed": config.seed, "cache_dir": config.cache_dir, "save_steps": 10}


def out(config: Config, act: str) -> dict[str, str]:
    """The act's own directory."""
    return {"output_dir": f"{config.output_dir}/{act}"}


def steps(config: Config, n: int) -> int:
    return max(2, round(n * config.scale))


def check(config: Config) -> None:
    """Raises UserError for what cannot be."""
    require_matplotlib()  # before the hours, not after
    require_positive(config, "scale")
    named = [f"--{name}" for name in ("conversations", "pairs") if vars(config)[name] is None]
    if config.model_name_or_path is not None and named:
        raise UserError(f"--model_name_or_path needs {' and '.join(named)} (without it, all is embedded)")
    if config.model_name_or_path is None and len(named) < 2:
        raise UserError("--conversations and --pairs are read with --model_name_or_path")


# --- what is measured, and said ---------------------------------------------------------------------------------------


def measure(name: str, model: str, evaluation: Evaluation, world: World, output_dir: Path) -> dict[str, Any]:
    """A row of the table: this model's accuracy on the held-out problems."""
    with terminal.subdued():
        found = evaluate(replace(evaluation, model_name_or_path=model, output=str(responses(output_dir, name))))
    row = {"name": name, "accuracy": found.accuracy, "low": found.low, "high": found.high, "n": len(found.keys)}
    world.say(f"held-out problems solved: {found.accuracy:.1%} (95 % {found.low:.1%} to {found.high:.1%})")
    return row


def told(results: dict[str, Any], output_dir: Path) -> list[str]:
    """The table, the differences between neighbours, and the answers side by side."""
    lines = ["", results["title"], f"{'model':6} {'accuracy':>9}   95 % interval"]
    for row in results["rows"]:
        lines.append(f"{row['name']:6} {row['accuracy']:9.1%}   {row['low']:.1%} to {row['high']:.1%}")
    names = [row["name"] for row in results["rows"]]
    for a, b in itertools.pairwise(names):
        lines += compare(responses(output_dir, a), responses(output_dir, b)).lines(a, b)[:1]
    for shown in results["answers"]:
        lines += ["", shown["prompt"]]
        lines += [
            f"  {name:5} {a['score']:g}  {' '.join(a['text'].split())[:100]}" for name, a in shown["answers"].items()
        ]
    return lines


def side_by_side(names: list[str], output_dir: Path) -> list[dict[str, Any]]:
    """Every model's first answer to the first problems."""
    answers: dict[str, dict[str, Any]] = {}
    for name in names:
        with responses(output_dir, name).open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        first = [row for row in rows if row["sample"] == 0][:SHOWN]
        for row in first:
            of = answers.setdefault(row["key"], {"prompt": row["prompt"], "truth": row["ground_truth"], "answers": {}})
            of["answers"][name] = {"text": row["response"], "score": row["score"]}
    return list(answers.values())


def responses(output_dir: Path, name: str) -> Path:
    return output_dir / "evaluations" / f"{name.lower()}.jsonl"


if __name__ == "__main__":
    main(lambda: demo(parse(Config, elsewhere=commands)))

"""The whole recipe in one sitting.                                                       python -m launch.demo --help

    base  --SFT-->  pi_1  --DPO-->  pi_2  --PPO-->   pi_3         each evaluated on the same held-out problems
                                    pi_2  --GRPO-->  pi_4

    act I    launch.sft   maximises log pi(answer | problem) on worked answers, many of them wrong
    act II   launch.dpo   prefers the better of two answers, as somebody judged who sometimes errs
    act III  launch.ppo   reinforces what a program verifies to be right; launch.grpo does from the same start

With no argument: a tiny Llama that has read nothing and a small language of word problems
(engine/data/word_problems.py), some minutes on two cores. With --model_name_or_path a real chat model on real data,
some hours:

    python -m launch.demo --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --conversations gsm8k_train.jsonl
        --pairs preferences.jsonl

At the end stand a table, which of the differences are more than chance, three answers side by side, and a page to look
at: output/demo/report.html. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine import terminal
from engine.config import parse
from engine.data.word_problems import word_problems
from engine.world import World, main, start
from launch import commands
from launch.acts import Evaluation, RecipeFlags, check, real, tiny
from launch.compare import compare
from launch.evaluate import evaluate
from launch.report import report, require_matplotlib

SHOWN = 3  # problems whose answers stand side by side


@dataclass(frozen=True, kw_only=True)
class Config(RecipeFlags):
    __doc__ = __doc__


def demo(config: Config) -> None:
    """The acts, with an evaluation before and after each. Raises UserError."""
    world = start()
    check(config)
    require_matplotlib()  # before the hours, not after
    problems = world.once("problems", lambda: word_problems(Path(config.cache_dir).expanduser()))
    base, acts, evaluation = (tiny if config.model_name_or_path is None else real)(config, problems)
    output_dir = Path(config.output_dir)
    world.on_main("evaluations", lambda: (output_dir / "evaluations").mkdir(parents=True, exist_ok=True))

    world.say(terminal.Heading("base"), f"{base}, as it is")
    measured = [measure("base", base, evaluation, world, output_dir)]
    for act in acts:
        world.say(terminal.Heading(act.name), act.says)
        with terminal.subdued():
            act.stage.train(act.flags)
        measured.append(measure(act.name, f"{act.flags.output_dir}/final", evaluation, world, output_dir))

    results = {"title": f"accuracy on {measured[0]['n']} held-out problems", "rows": measured}
    results["answers"] = side_by_side([row["name"] for row in measured], output_dir)
    world.say(*told(results, output_dir, [(act.start, act.name) for act in acts]))
    if world.is_main:
        (output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        page, runs = output_dir / "report.html", [act.flags.output_dir for act in acts]
        report(runs, page, results=results, title="The whole recipe in one sitting")
        world.say("", f"done: {output_dir}/results.json; {page}, to open in a browser", last=True)
        world.say(f"next: python -m launch.chat --model_name_or_path {runs[-1]}/final --compare {base}", last=True)


# --- what is measured, and said ---------------------------------------------------------------------------------------


def measure(name: str, model: str, evaluation: Evaluation, world: World, output_dir: Path) -> dict[str, Any]:
    """A row of the table: this model's accuracy on the held-out problems."""
    with terminal.subdued():
        found = evaluate(replace(evaluation, model_name_or_path=model, output=str(responses(output_dir, name))))
    row = {"name": name, "accuracy": found.accuracy, "low": found.low, "high": found.high, "n": len(found.keys)}
    world.say(f"held-out problems solved: {found.accuracy:.1%} (95 % {found.low:.1%} to {found.high:.1%})")
    return row


def told(results: dict[str, Any], output_dir: Path, pairs: list[tuple[str, str]]) -> list[str]:
    """The table, what each act did to the model that it began with, and the answers side by side."""
    lines: list[str] = [terminal.Heading(results["title"])]
    for row in results["rows"]:
        lines.append(f"  {row['name']:6} {row['accuracy']:6.1%}   95 % {row['low']:.1%} to {row['high']:.1%}")
    lines.append(terminal.Heading("what the acts did"))
    for a, b in pairs:
        lines.append(f"  {compare(responses(output_dir, a), responses(output_dir, b)).lines(a, b)[0]}")
    lines.append(terminal.Heading("answers side by side"))
    for shown in results["answers"]:
        lines.append(f"  {' '.join(shown['prompt'].split())}")
        for name, answer in shown["answers"].items():
            right = "right" if answer["score"] == 1 else "wrong"
            lines.append(f"    {name:6} {right}   {' '.join(answer['text'].split())[:80]}")
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
    main(lambda: demo(parse(Config, elsewhere=commands)), resumable=True)

"""A model's card, README.md beside its weights: what it was made of, by which flags, and how it did at the end.

Everything in it is read from the run; what the run did not record is said to be unknown, and nothing else is said. A
card is a function of the run, so that a resumed run writes the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from engine.redact import redact
from engine.run import settings

STAGES = {"reduce_loss": "sft", "loss_type": "dpo", "vf_coef": "ppo", "advantage": "grpo"}  # by a flag of no other
NAMES = {
    "sft": "supervised fine-tuning",
    "dpo": "preference optimisation",
    "ppo": "reinforcement learning with verifiable rewards (PPO)",
    "grpo": "reinforcement learning with verifiable rewards (GRPO)",
}
ADVANTAGES = {  # of launch.grpo, in words
    "grpo": "a reward less its group's mean, over the group's deviation",
    "dr_grpo": "a reward less its group's mean",
    "rloo": "a reward less the mean of the others of its group",
    "reinforce_pp": "a reward whitened over the batch",
}
SURROGATES = {
    "clip": "the clipped ratio of a token",
    "cispo": "a clipped weight",
    "gspo": "the clipped ratio of a response",
}
AGGREGATES = {
    "token": "every token counts alike",
    "sequence": "every response counts alike",
    "dr_grpo": "a token counts 1 / (responses x response_length)",
}
DATA = ("dataset_name", "mixer_list", "dataset_split", "dataset_revision", "eval_dataset_name", "eval_split")
MODEL = ("model_name_or_path", "model_revision", "adapter_name_or_path", "value_model_name_or_path")
BETWEEN = ("low", "high")  # the ends of an interval, beside an accuracy
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Facts:
    """What is known of a run. Empty texts and None are not known."""

    values: dict[str, Any]  # its flags as they were read
    base_name: str
    base_revision: str  # 'local': a directory
    base_weights: str  # fingerprint
    architecture: str
    step: int | None = None
    total: int | None = None
    data: str = ""  # fingerprint
    rows: int | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    recorded: dict[str, str] | None = None  # what the head of config.yaml says of where the run was made
    is_adapter: bool = False
    adapter: str = ""  # that was merged, of a model without a run

    @property
    def stage(self) -> str:
        return next((stage for flag, stage in STAGES.items() if flag in self.values), "")


def recorded_in(path: Path) -> dict[str, str]:
    """The facts at the head of a config.yaml, '# commit: abc' lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    matches = (re.fullmatch(r"# (\w+): (.*)", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def metrics_in(path: Path, upto: int | None = None) -> tuple[dict[str, Any], ...]:
    """The rows of a metrics.jsonl up to a step; none of a file that is not one."""
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if upto is None or row["step"] <= upto:
                found.append(row)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a torn last line, or nothing there
    return tuple(found)


def text(facts: Facts) -> str:
    """The card."""
    name = NAMES.get(facts.stage, "")
    what = "A low-rank adapter on" if facts.is_adapter else "A"
    base = f"`{facts.base_name}`"
    made = f"{what} {base}" if facts.is_adapter else f"{what} {facts.architecture}, made of {base}"
    made += f" with the adapter `{facts.adapter}` merged" if facts.adapter else ""
    after = _after(facts)
    parts = [
        _front_matter(facts),
        f"# {Path(facts.base_name).name}{f' after launch.{facts.stage}' if facts.stage else ''}",
        f"{made}{f' by {name}' if name else ''}{after}, with Triptych.",
        "## Figures",
        *_figures(facts.metrics),
        "## Data",
        *_data(facts),
        "## Recipe",
        _loss(facts),
        _recipe(facts),
        "## Base model",
        f"{base}, {_revision(facts)}, weights {facts.base_weights or UNKNOWN} (fingerprint of what was read).",
        "## Made with",
        *_versions(facts),
    ]
    return redact("\n\n".join(filter(None, parts)) + "\n")


def _front_matter(facts: Facts) -> str:
    """What a hub reads; a base that is a directory has no id there and is not named as one."""
    head: dict[str, Any] = {"library_name": "peft" if facts.is_adapter else "transformers"}
    if facts.base_revision != "local":
        head |= {"base_model": facts.base_name, "base_model_relation": "adapter" if facts.is_adapter else "finetune"}
    head |= {"pipeline_tag": "text-generation", "tags": list(filter(None, ["triptych", facts.stage]))}
    local = "" if "base_model" in head else f"# base_model: the directory {json.dumps(facts.base_name)}, no hub's id\n"
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}{local}---"


def _after(facts: Facts) -> str:
    if facts.step is None:
        return ""
    unit = "iterations" if facts.stage in ("ppo", "grpo") else "steps"
    return f", after {facts.step} of {facts.total} {unit}" if facts.total else f", after {facts.step} {unit}"


def _revision(facts: Facts) -> str:
    return "a local directory" if facts.base_revision == "local" else f"revision {facts.base_revision or UNKNOWN}"


def _figures(metrics: tuple[dict[str, Any], ...]) -> list[str]:
    """The last loss, and the last of every figure of held-out data, accuracies with their interval."""
    trained = [row for row in metrics if "loss" in row]
    lines = [f"| loss of step {trained[-1]['step']} | {_number(trained[-1]['loss'])} |"] if trained else []
    held_out = next((row for row in reversed(metrics) if any(key.startswith("eval/") for key in row)), None)
    for key, value in (held_out or {}).items():
        name = key.removeprefix("eval/")
        if name == key or name in BETWEEN or not isinstance(value, int | float):
            continue
        low, high = ((held_out or {}).get(f"eval/{end}") for end in BETWEEN)
        known = name == "accuracy" and low is not None and high is not None
        interval = f" (95 % interval {_number(low)} to {_number(high)})" if known else ""
        lines.append(f"| held out, after step {(held_out or {})['step']}: {name} | {_number(value)}{interval} |")
    if not lines:
        return ["No figures are recorded."]
    return ["\n".join(["| | |", "| --- | --- |", *lines])]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _data(facts: Facts) -> list[str]:
    said = {name: facts.values[name] for name in DATA if facts.values.get(name) is not None}
    if "eval_dataset_name" not in said:
        said.pop("eval_split", None)
    names = "\n".join(f"- {name}: `{_words(value)}`" for name, value in said.items())
    rows = f"{facts.rows:,} examples" if facts.rows is not None else f"number of examples {UNKNOWN}"
    return [names or f"Names {UNKNOWN}.", f"Trained on {rows}; fingerprint {facts.data[:16] or UNKNOWN}."]


def _loss(facts: Facts) -> str:
    """What launch.grpo descended, in words; '' of the stages whose one loss their name says."""
    flags = facts.values
    names = ("surrogate", "clip_low", "clip_high", "aggregate", "num_samples_per_prompt")
    if facts.stage != "grpo" or any(flags.get(name) is None for name in names):
        return ""
    advantage = ADVANTAGES.get(str(flags["advantage"]), flags["advantage"])
    surrogate = SURROGATES.get(str(flags["surrogate"]), flags["surrogate"])
    mean = AGGREGATES.get(str(flags["aggregate"]), flags["aggregate"])
    kl = "no KL term"
    if flags.get("kl_coef"):
        estimator, place = flags.get("kl_estimator"), flags.get("kl_in")
        kl = f"{flags['kl_coef']} times the KL to the reference ({estimator}) in the {place}"
    group = f"a group is {flags['num_samples_per_prompt']} responses to a prompt"
    return (
        f"The advantage is {advantage}; {group}. The surrogate is {surrogate}, from 1 - {flags['clip_low']} to 1 +"
        f" {flags['clip_high']}; in the mean {mean}; {kl}."
    )


def _recipe(facts: Facts) -> str:
    """The flags on which the trajectory depends, as a recipe of the command line."""
    kept = {name: value for name, value in settings(facts.values).items() if name not in (*DATA, *MODEL)}
    if not kept:
        return f"Flags {UNKNOWN}."
    command = f"The flags that `launch.{facts.stage}` read:\n\n" if facts.stage else ""
    return f"{command}```yaml\n{yaml.safe_dump(kept, sort_keys=True, allow_unicode=True)}```"


def _versions(facts: Facts) -> list[str]:
    recorded = facts.recorded or {}
    lines = [f"- {key}: {recorded.get(key, UNKNOWN)}" for key in ("version", "commit", "machine")]
    return ["\n".join([*lines, f"- written by: torch {torch.__version__}, transformers {transformers.__version__}"])]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

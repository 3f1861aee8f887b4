"""What to type after a stage: the next act on what it made, or a look at it."""

from __future__ import annotations

import shlex
from pathlib import Path

from engine.flags import StageFlags
from engine.world import World


def after(stage: str, config: StageFlags, world: World, response_length: int = 0) -> list[str]:
    """The commands, the likeliest first; a word in capitals is left for the user to fill in."""
    made = _model(config)
    python, train = "python -m launch.", "python -m launch."
    if world.size > 1:
        train = f"torchrun --nproc_per_node {world.size} -m launch."
    data = _embedded(config)
    chat, report = f"{python}chat {made}", f"{python}report {shlex.quote(config.output_dir)}"
    if stage == "sft":
        of_pairs = f"{data / 'train_pairs.jsonl'} --learning_rate 1e-3" if data else "PAIRS"
        return [chat, f"{train}dpo {made} --dataset_name {of_pairs}"]
    if stage == "dpo":
        words = "" if data else f" {made} --dataset_name PROBLEMS"
        return [*(f"{train}{kind}{words}" for kind in ("ppo", "grpo")), chat]
    held_out = shlex.quote(config.eval_dataset_name or "PROBLEMS")
    return [report, f"{python}evaluate {made} --dataset_name {held_out} --response_length {response_length}"]


def _model(config: StageFlags) -> str:
    """The flags that name what the run made."""
    final = shlex.quote(f"{config.output_dir}/final")
    if not config.export_adapter:
        return f"--model_name_or_path {final}"
    model = f"--model_name_or_path {shlex.quote(str(config.model_name_or_path))} --adapter_name_or_path {final}"
    return (
        model + (" --load_in_4bit" if config.load_in_4bit else "") + (" --double_quant" if config.double_quant else "")
    )


def _embedded(config: StageFlags) -> Path | None:
    """Where the embedded data lies that was trained on, if it was."""
    cache, name = Path(config.cache_dir).expanduser(), Path(config.dataset_name or "/")
    return name.parent if cache in name.parents and name.parent.name.startswith("embedded") else None

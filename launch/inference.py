"""A model as the commands that draw from one open it: the embedded one where none is named, a run's final/ for the run,
and what a person should know of it before reading its answers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.data import ChatTokenizer, embedded
from engine.data.chat import CLOSED_THOUGHT, MARK_OF_THOUGHT
from engine.errors import UserError
from engine.flags import InferenceFlags, RlvrFlags, RolloutFlags
from engine.model import Base, Policy, load_untrained
from engine.model.policy import Root
from engine.train.stage import as_size
from engine.world import World
from rollout import Sampler, parallel, room

Config = TypeVar("Config", bound=InferenceFlags)
LIBRARYS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0, "repetition_penalty": 1.0}  # own settings


def resolve_model(config: Config, world: World) -> Config:
    """With the directory of the model filled in; says which it is, where that was left open. Raises UserError."""
    config.check_inference()
    if config.model_name_or_path is not None:
        return replace(config, model_name_or_path=model_of_run(config.model_name_or_path))
    made = world.once("embedded", lambda: embedded(Path(config.cache_dir).expanduser()))
    tuned = made.model.parent / "tuned_on_sums" / "final"
    directory, what = made.model, "random weights: it answers noise until launch.sft has trained it"
    if (tuned / "config.json").is_file():
        directory, what = tuned, "it knows 'There are 25 lamps and one more comes. How many lamps?' and no more"
    world.say(f"no --model_name_or_path: the embedded tiny Llama ({what})")
    reach = min(config.max_seq_length, 512)
    return replace(config, model_name_or_path=str(directory), max_seq_length=reach)


def model_of_run(name: str) -> str:
    """The final/ of a run's directory; any other name as it is. Raises UserError for a run that has none yet."""
    directory = Path(name).expanduser()
    if (directory / "config.json").is_file() or not (directory / "config.yaml").is_file():
        return str(directory) if name.startswith("~/") else name
    final = directory / "final"
    if (final / "config.json").is_file():
        return str(final)
    if (final / "adapter_config.json").is_file():
        raise UserError(f"{final} is an adapter: give the model it was trained on, and this to --adapter_name_or_path")
    raise UserError(
        f"{directory} is a run that has no final/ yet: python -m launch.export {directory} makes a model of its newest"
        " checkpoint"
    )


def beside(config: Config, other: str) -> Config:
    """The flags of a model to compare with: another one, or of an adapter's directory the same with this adapter.
    Raises UserError.
    """
    for place in (Path(other).expanduser(), Path(other).expanduser() / "final"):
        if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
            return replace(config, adapter_name_or_path=str(place))
    config = replace(config, adapter_name_or_path=None, load_in_4bit=False, double_quant=False)
    return replace(config, model_name_or_path=model_of_run(other), model_revision=None, add_special_tokens=None)


def embedded_questions(cache_dir: str, count: int) -> tuple[str, ...]:
    """Some of the questions that come with the embedded model."""
    with open(embedded(Path(cache_dir).expanduser()).held_out_problems, encoding="utf-8") as rows:
        asked = [json.loads(row)["messages"][0]["content"] for row in rows]
    return tuple(asked[:: len(asked) // count][:count])


def make_sampler(
    base: Base, policy: Policy, world: World, flags: RolloutFlags, window: int, weights: str = "shared"
) -> Sampler:
    """A sampler of `window` tokens that has no weights yet; `weights`: as for Sampler. Collective. Raises UserError."""
    room_of = flags.rollout_room
    return Sampler(base.config, policy, world, dtype=base.dtype, max_length=window, weights=weights, **room_of)


def sampler_beside(base: Base, config: RlvrFlags, world: World, window: int, *trained: Root) -> Sampler:
    """The sampler of a policy, the first of what is `trained`: says so where its weights are not kept. Collective.
    Raises UserError.
    """
    policy: Any = trained[0]
    copy = room.copy_of(policy.lm, base.dtype) // config.rollout_tensor_parallel
    on_gpu = world.device.type == "cuda"
    beside = room.to_come(trained, config.optimizer) + (torch.cuda.memory_allocated(world.device) if on_gpu else 0)
    weights = room.weights(config, copy, beside, world.memory if on_gpu else None)
    if weights == "gathered":
        world.say(f"the sampler's weights, {as_size(copy)}, are gathered for every rollout and given back after it")
    return make_sampler(base, policy, world, config, window, weights)


def open_sampler(base: Base, world: World, *, window: int, flags: RolloutFlags) -> tuple[Sampler, str]:
    """(a sampler of `window` tokens with the model's weights, what these weights are called). Collective. Raises
    UserError.
    """
    parallel.check(base.config, flags.rollout_tensor_parallel, world)
    policy = load_untrained(base, world)
    sampler = make_sampler(base, policy, world, flags, window)
    sampler.load(policy)
    return sampler, policy.identity


def cautions(base: Base, is_embedded: bool = False) -> list[str]:
    """What a reader of this model's answers should know, a line each."""
    lines = []
    if base.chat.template_origin.endswith("has none") and not is_embedded:
        lines.append(
            f"warning: {base.directory} has no chat template, so Tülu's is used; a base model was not trained to chat"
        )
    if thought := opened_thought(base.chat):
        lines.append(f"the template begins every answer with {thought!r}: what follows is a thought, and is shown")
    elif base.chat.habits.thoughts:
        lines.append("the template knows thoughts: they are shown as the model writes them")
    if unread := _unread_settings(base.directory):
        lines.append(f"not used: {unread} of the model's generation_config.json; flags say how to sample")
    return lines


def opened_thought(chat: ChatTokenizer) -> str:
    """The mark by which the prompt begins a thought that the model is to end; '' where it does not."""
    *_, last = ["", *(mark.group() for mark in MARK_OF_THOUGHT.finditer(chat.habits.prompt))]
    return "" if CLOSED_THOUGHT.fullmatch(last) else last


def _unread_settings(directory: Path) -> str:
    """'temperature 0.6, top_p 0.9', what generation_config.json says of sampling where it is not the library's own."""
    try:
        said = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        return ", ".join(f"{name} {said[name]}" for name in LIBRARYS if said.get(name) not in (None, LIBRARYS[name]))
    except (OSError, ValueError, TypeError, AttributeError):
        return ""

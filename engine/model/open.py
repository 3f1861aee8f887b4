"""The model as a run finds it: where it lies, its tokenizer, and how it will be held and computed; then, loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.data.chat import ChatTokenizer, load_tokenizer
from engine.errors import UserError, require
from engine.flags import AdapterFlags, MemoryFlags, ModelFlags
from engine.hardware import emulates_bfloat16
from engine.model import attention, build, limits, weights
from engine.model.adapters import choose
from engine.model.adapters.files import check_added
from engine.model.adapters.lora import Adapters
from engine.model.build import How
from engine.model.generation import generation_config
from engine.model.layers import transform_layers
from engine.model.offload import CopyStream
from engine.model.policy import Policy, ValueModel
from engine.model.sync import choose_gradient_sync, working_memory
from engine.world import World


@dataclass(frozen=True)
class Base:
    """The model as found. No weight is loaded yet."""

    name: str  # as it was given
    directory: Path
    revision: str
    config: Any
    chat: ChatTokenizer
    how: How
    why_backend: str
    memory: MemoryFlags
    changes_tokenizer: bool = False  # --add_special_tokens or --chat_template

    @property
    def adapters(self) -> Adapters | None:
        return self.how.adapters

    @property
    def dtype(self) -> torch.dtype:
        """That it is computed in."""
        return self.how.dtype

    def usual_response(self, max_seq_length: int) -> int:
        """The longest response where none is named: 1,024 tokens, and at most half of what there is room for."""
        return min(1024, self.longest_prompt(max_seq_length, 1) // 2)

    def longest_prompt(self, max_seq_length: int, response_length: int) -> int:
        """Tokens of a prompt that leave room for such a response. Raises UserError where that is none."""
        reach = getattr(self.config, "max_position_embeddings", None)
        most = min(max_seq_length, reach or max_seq_length)
        if response_length >= most:
            limits = f"--max_seq_length {max_seq_length}, the model's limit {reach or 'unknown'}"
            raise UserError(
                f"--response_length {response_length} leaves no room for a prompt in {most} tokens ({limits})"
            )
        return most - response_length


def open_model(
    flags: ModelFlags,
    world: World,
    *,
    memory: MemoryFlags | None = None,
    adapters: AdapterFlags | None = None,
    keep_initial: bool = False,
) -> Base:
    """Opens configuration and tokenizer, picks dtype and attention backend. Raises UserError.

    `adapters` says what is trained, `memory` how (None: nothing is; an adapter is taken as it is); `keep_initial`: the
    adapter that training starts from stays beside the trained one, as the reference.
    """
    directory, revision = world.once("model", lambda: weights.resolve(flags.model_name_or_path, flags.model_revision))
    lm_config = build.load_config(directory)
    limits.check_layers(directory, build.layers_of(lm_config), len(weights.files_by_name(directory)))
    if line := limits.code_of_its_own(directory):
        world.say(line)
    dtype = compute_dtype(flags.dtype, world.device.type)
    if dtype == torch.bfloat16 and world.device.type == "cpu" and emulates_bfloat16():
        world.say("warning: this processor has no bfloat16 instructions: float32 is about 5 times as fast here")
    backend, why = attention.choose_backend(flags.attention, world.device, lm_config, dtype)
    world.agree("attention backend", backend)
    chat = load_tokenizer(directory, lm_config.vocab_size, flags.add_special_tokens or (), flags.chat_template)
    _, why_not = generation_config(directory, lm_config, chat.end_ids)
    if why_not:
        world.say(f"warning: {directory}/generation_config.json is not kept beside what is trained ({why_not})")
    lm_config, rows_there = grow(lm_config, chat.vocab_size)
    world.say(*_describe_tokens(chat, rows_there or lm_config.vocab_size))
    start = _directory_of_adapter(flags.adapter_name_or_path, world)
    if flags.load_in_4bit:
        require("bitsandbytes", "--load_in_4bit")
    chosen = None
    if adapters is not None:
        chosen = choose.choose(adapters, lm_config, start, keep_initial)
    elif start is not None:
        as_it_is = choose.of_directory(start, lm_config)
        chosen = replace(as_it_is, four_bit=flags.load_in_4bit, double_quant=flags.double_quant)
    if start is not None:
        check_added(start, chat.added)
    if adapters is not None and chosen is not None:
        choose.check_new_tokens(chosen, lm_config, chat.added)
    memory = memory or MemoryFlags()
    how = How(dtype, backend, memory.head, getattr(torch, memory.master_dtype), chosen, rows_there, start=start)
    lm_config, how = untie(lm_config, how)
    changes = bool(flags.add_special_tokens or flags.chat_template)
    return Base(flags.model_name_or_path, directory, revision, lm_config, chat, how, why, memory, changes)


def grow(lm_config: Any, vocab_size: int) -> tuple[Any, int | None]:
    """(the configuration with rows for so many tokens, how many the checkpoint has if that is less)."""
    there = lm_config.vocab_size
    if vocab_size <= there:
        return lm_config, None
    grown = copy.deepcopy(lm_config)
    grown.vocab_size = vocab_size
    return grown, there


def untie(lm_config: Any, how: How) -> tuple[Any, How]:
    """Where embedding and head are one tensor, and one of them or both are trained whole, they part: the model has two,
    and its configuration says so.
    """
    if not (how.adapters and how.adapters.saved and lm_config.tie_word_embeddings):
        return lm_config, how
    apart = copy.deepcopy(lm_config)
    apart.tie_word_embeddings = False
    return apart, replace(how, untied=True)


def _describe_tokens(chat: ChatTokenizer, rows_there: int) -> list[str]:
    """What became of --add_special_tokens, in a line each."""
    there = [f"{token!r} is there already, as token {i}; it is not added" for token, i in chat.known.items()]
    old = {token: i for token, i in chat.added.items() if i < rows_there}
    new = {token: i for token, i in chat.added.items() if i >= rows_there}
    names = lambda tokens: ", ".join(f"{token!r} ({i})" for token, i in tokens.items())
    lines = (
        [f"new tokens: {names(old)} in rows that the model has already, as they are in the checkpoint"] if old else []
    )
    if new:
        lines.append(
            f"new tokens: {names(new)}; embedding and head grow from {rows_there} to {chat.vocab_size} rows, each new"
            " one the mean of those"
        )
    return [*there, *lines]


def compute_dtype(requested: str, device_type: str) -> torch.dtype:
    """What --dtype means on this kind of device."""
    if requested == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return getattr(torch, requested)


def _directory_of_adapter(name: str | None, world: World) -> Path | None:
    """Where --adapter_name_or_path lies, downloaded if it is a hub id. Raises UserError."""
    if name is None:
        return None
    return world.once("adapter", lambda: weights.resolve(name, None, "--adapter_name_or_path"))[0]


def build_policy(base: Base, world: World, stream: CopyStream | None = None) -> Policy:
    """The sharded policy as it will be trained, with room for its weights and none read: what `launch.plan` measures.

    `stream` carries what is offloaded (`transform_layers`).
    """
    policy = build.build_policy(base.config, world, base.how)
    transform_layers(policy, base.memory, stream)
    return policy


def load_policy(base: Base, world: World, models: int = 1, temperature: float = 1.0) -> Policy:
    """The sharded policy with its weights; prints what was loaded. Collective.

    `models` like it are trained at once; its log-probs are taken at `temperature`.
    """
    policy = build.load_policy(base.directory, base.config, world, base.how)
    policy.temperature = temperature
    transform_layers(policy, base.memory)
    policy.gradient_sync, why = gradient_sync(base, policy, world, models)
    world.say(
        f"policy: {policy.num_parameters:,} parameters, {policy.num_trained:,} trained,"
        f" {policy.bytes_held / 2**20:,.0f} MiB held by each rank, weights {policy.identity}, two packed sequences"
        " equal each alone",
        f"gradient sync: {policy.gradient_sync} ({why})",
    )
    return policy


def load_untrained(base: Base, world: World) -> Policy:
    """The sharded policy with its weights, to be looked at or sampled from; prints what was loaded. Collective."""
    policy = build.load_policy(base.directory, base.config, world, base.how)
    adapter = f" with the adapter {base.how.start}" if base.how.start else ""
    compute = str(base.dtype).removeprefix("torch.")
    world.say(f"model: {base.directory}{adapter}, weights {policy.identity}, compute {compute}")
    return policy


def gradient_sync(base: Base, policy: Policy, world: World, models: int = 1) -> tuple[str, str]:
    """(mode, why) of a stage that trains so many models like the policy."""
    working = working_memory(base.memory, policy)
    return choose_gradient_sync(base.memory.gradient_sync, policy, world, models=models, working=working)


def value_how(base: Base, name: str | None) -> How:
    """How the value model is held: as the policy, its adapters on its own layers. `name` is the flag's. Raises
    UserError.
    """
    if base.adapters is None or name is None:
        return replace(base.how, adapters=base.adapters and replace(base.adapters, keep_initial=False))
    config = build.load_value_config(_directory_of_value_model(name), base.config.vocab_size, base.how.rows_there)
    # another model: what the policy's adapter starts from does not fit it
    return replace(base.how, adapters=choose.for_value_model(base.adapters, config), start=None)


def check_value_model(base: Base, name: str) -> None:
    """Raises UserError where this value model does not fit the policy."""
    build.load_value_config(_directory_of_value_model(name), base.config.vocab_size, base.how.rows_there)
    value_how(base, name)


def load_value_model(base: Base, world: World, name: str | None, like: Policy) -> ValueModel:
    """The value model of the flag `name`, or one of the policy's body with a head of zeros; prints what was loaded.
    Collective.
    """
    directory = _directory_of_value_model(name) if name else base.directory
    value_model = build.load_value_model(directory, world, value_how(base, name), base.config.vocab_size)
    transform_layers(value_model, base.memory)
    value_model.gradient_sync = like.gradient_sync
    adapters = value_model.adapters
    on = f", adapters on {len(adapters.modules)} layers" if adapters else ""
    world.say(
        f"value model: {value_model.num_parameters:,} parameters, {value_model.num_trained:,} trained{on}, weights"
        f" {value_model.identity}"
    )
    return value_model


def _directory_of_value_model(name: str) -> Path:
    return weights.resolve(name, None, "--value_model_name_or_path")[0]

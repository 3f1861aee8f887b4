"""Talks with a model in the terminal.                                              python -m launch.chat --help

    python -m launch.chat --model_name_or_path output/dpo
    python -m launch.chat --model_name_or_path output/dpo --compare output/sft --temperature 0
    echo 'Name three rivers.' | python -m launch.chat --model_name_or_path output/dpo

An answer appears as it is sampled; Ctrl-C stops it and keeps what was said, Ctrl-D ends the conversation, /help lists
the commands. --compare has a second model (or, of an adapter's directory, the same model with that adapter) answer the
same turns beside the first. Lines are read from standard input where that is no terminal. The first answer is that of
launch.generate to the same prompt. Control characters in what a model says are shown, not obeyed.

With no argument it talks with the embedded tiny model.
"""

import sys
from dataclasses import dataclass

from engine import terminal
from engine.config import parse
from engine.data.rows import BadRow
from engine.errors import UserError
from engine.flags import DecodingFlags, InferenceFlags, RolloutFlags, SystemFlags, fill, flag, override
from engine.model import open_model
from engine.world import World, main, start
from launch import commands
from launch.conversation import Talk
from launch.display import Ink
from launch.inference import beside, cautions, open_sampler, resolve_model
from launch.room import Room
from rollout import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config(InferenceFlags, SystemFlags, DecodingFlags):
    __doc__ = __doc__
    compare: str | None = flag(None, "a second model, run or adapter, which answers beside the first")
    max_seq_length: int = override(4096, "tokens of the whole conversation, which the model may limit further")
    system_prompt: str | None = override(None, "system turn")
    response_length: int = override(None, "longest answer in tokens; 1024, embedded 48")


def chat(config: Config) -> None:
    """Opens the model, or both, and answers line after line until the end."""
    world = start()
    if world.size > 1:
        raise UserError(f"launch.chat is one process, not {world.size}: start it with python -m launch.chat")
    config.check_decoding()
    embeds = config.model_name_or_path is None
    config = fill(resolve_model(config, world), response_length=48 if embeds else 1024)
    talks = [open_talk(config, world, embeds)]
    if config.compare is not None:
        talks.append(open_talk(beside(config, config.compare), world))
    ink = Ink(terminal.is_coloured(sys.stdout))
    Room(talks, ink, [config.model_name_or_path, config.compare or ""]).run()


def open_talk(config: Config, world: World, is_embedded: bool = False) -> Talk:
    """A conversation with the model that the flags name. Raises UserError."""
    base = open_model(config, world)
    world.say(*cautions(base, is_embedded))
    window = base.longest_prompt(config.max_seq_length, 1) + 1
    params = SamplingParams.of(config, *base.chat.end_ids)
    sampler, _ = open_sampler(base, world, window=window, flags=RolloutFlags(rollout_slots=1))
    talk = Talk(base.chat, sampler, params, config.seed)
    if config.system_prompt is not None:
        try:
            world.say(*filter(None, [talk.set_system(config.system_prompt)]))
        except BadRow as problem:
            raise UserError(f"--system_prompt: {problem}") from None
    return talk


if __name__ == "__main__":
    main(lambda: chat(parse(Config, elsewhere=commands)))

"""From dataset flags to tokenised examples: one store per source, tokenised by the first rank of a machine for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.chat import ChatTokenizer
from engine.data.conversations import ConversationEncoder, first_form
from engine.data.files import Source, open_source
from engine.data.mixture import mixture_index
from engine.data.preferences import PairEncoder
from engine.data.prompts import Check, Prompt, fingerprint_of, load_prompts
from engine.data.store import Examples, open_or_build, summary
from engine.data.tokenise import Encoder
from engine.errors import UserError
from engine.flags import DataFlags, MixtureFlags
from engine.world import World, available_cores

EncoderOf = Callable[[Source], Encoder]


def load_examples(
    names: list[tuple[str, str]],
    flags: MixtureFlags,
    world: World,
    chat: ChatTokenizer,
    encoder_of: EncoderOf,
    *,
    split: str,
    per_example: int,
    kind: dict[str, Any],
) -> Examples:
    """The examples of a mixture of (name, amount); amount '' takes all. Prints what was kept, dropped and bad. Raises
    UserError.

    `kind` holds what, besides tokenizer, template and length, decides how the encoders turn a row into sequences.
    """
    determinants = {"tokenizer": chat.fingerprint, "max_seq_length": flags.max_seq_length, **kind}
    root = Path(flags.cache_dir).expanduser() / "tokens"

    def build() -> list:
        opened = [open_source(name, split, flags.dataset_revision) for name, _ in names]
        workers = flags.dataset_num_proc or available_cores()
        how: dict[str, Any] = {"per_example": per_example, "on_bad_row": flags.on_bad_row, "workers": workers}
        return [open_or_build(root, source, encoder_of(source), determinants, **how) for source in opened]

    stores = world.once(f"tokens/{split}/{names}", build)
    world.say(*summary(stores))
    indices = [
        mixture_index(len(store), amount, flags.seed, name) if amount else np.arange(len(store))
        for store, (name, amount) in zip(stores, names, strict=True)
    ]
    examples = Examples(stores, indices)
    if not len(examples):
        raise UserError(f"{' '.join(name for name, _ in names)}: {_why_empty(stores, flags)}")
    world.agree(f"dataset ({split})", examples.fingerprint)
    return examples


def read_conversations(flags: MixtureFlags, chat: ChatTokenizer, world: World) -> tuple[Examples, Examples | None]:
    """(training conversations, held-out conversations or None), every assistant turn trained. Raises UserError."""

    def encoder_of(source: Source) -> Encoder:
        return ConversationEncoder(chat, flags.max_seq_length, first_form(source))

    kind = {"conversations": "all turns"}
    return _both_splits(flags, world, chat, encoder_of, per_example=1, kind=kind, unit="conversations")


def read_pairs(
    flags: MixtureFlags, count_turns: str, chat: ChatTokenizer, world: World
) -> tuple[Examples, Examples | None]:
    """(training pairs, held-out pairs or None), of which the `last` or `all` turns count. Raises UserError."""

    def encoder_of(source: Source) -> Encoder:
        return PairEncoder(chat, flags.max_seq_length, count_turns == "last")

    return _both_splits(flags, world, chat, encoder_of, per_example=2, kind={"pairs": count_turns}, unit="pairs")


def _both_splits(
    flags: MixtureFlags, world: World, chat: ChatTokenizer, encoder_of: EncoderOf, *, unit: str, **how: Any
) -> tuple[Examples, Examples | None]:
    train = load_examples(mixture(flags), flags, world, chat, encoder_of, split=flags.dataset_split, **how)
    if world.size > len(train):
        raise UserError(f"{world.size} ranks for {len(train)} {unit}: lower --nproc_per_node")
    if flags.eval_dataset_name is None:
        return train, None
    held_out = [(flags.eval_dataset_name, "")]
    return train, load_examples(held_out, flags, world, chat, encoder_of, split=flags.eval_split, **how)


def prompts_of(
    name: str, split: str, flags: DataFlags, chat: ChatTokenizer, world: World, *, longest: int, check: Check
) -> list[Prompt]:
    """The prompts of one dataset of at most `longest` tokens; says what was kept, dropped and bad. Raises UserError.

    `check(dataset, ground_truth)` raises ValueError for a row that no verifier could judge.
    """
    source = open_source(name, split, flags.dataset_revision)
    found, lines = load_prompts(source, chat, longest, check, flags.on_bad_row)
    world.say(*lines)
    return found


def read_prompts(
    flags: MixtureFlags, chat: ChatTokenizer, longest: int, check: Check, world: World
) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), of a mixture as `prompts_of` gives those of one dataset. Raises
    UserError.
    """

    def load(name: str, amount: str, split: str) -> list[Prompt]:
        found = prompts_of(name, split, flags, chat, world, longest=longest, check=check)
        return [found[i] for i in mixture_index(len(found), amount, flags.seed, name)] if amount else found

    prompts = [prompt for name, amount in mixture(flags) for prompt in load(name, amount, flags.dataset_split)]
    if world.size > len(prompts):
        raise UserError(f"{world.size} ranks for {len(prompts)} prompts: lower --nproc_per_node")
    world.agree("prompts", fingerprint_of(prompts))
    return prompts, load(flags.eval_dataset_name, "", flags.eval_split) if flags.eval_dataset_name else []


def _why_empty(stores: list, flags: MixtureFlags) -> str:
    headers = [store.header for store in stores]
    if sum(h["rows"] for h in headers) == 0:
        return "the dataset is empty"
    bad, dropped = sum(h["bad_rows"] for h in headers), sum(sum(h["dropped"].values()) for h in headers)
    if bad > dropped:
        first = next(h["name"] + h["bad_list"][0] for h in headers if h["bad_list"])
        return f"no usable row, the first bad one is {first}"
    if dropped:
        return f"--max_seq_length {flags.max_seq_length} is too small: no row keeps a counted token"
    return "the mixture takes no row"


def mixture(flags: MixtureFlags) -> list[tuple[str, str]]:
    """--mixer_list or --dataset_name as (name, amount) pairs. Raises UserError."""
    if flags.mixer_list is None:
        return [(flags.dataset_name, "")]
    if len(flags.mixer_list) % 2:
        raise UserError(f"--mixer_list: expected NAME AMOUNT pairs, got {len(flags.mixer_list)} words")
    return list(zip(flags.mixer_list[::2], flags.mixer_list[1::2], strict=True))

"""From dataset flags to tokenised examples: one store per source, tokenised by the first rank of a machine for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.chat import ChatTokenizer
from engine.data.conversations import ConversationEncoder, first_form
from engine.data.files import Source, open_source
from engine.data.judgements import Judgement, gathered
from engine.data.mixture import mixture_index
from engine.data.preferences import PairEncoder
from engine.data.prompts import Prompt, PromptReader, ReadPrompt, fingerprint_of, load_prompts
from engine.data.store import Examples, open_or_build, summary
from engine.data.tokenise import Encoder
from engine.errors import UserError
from engine.flags import ConversationFlags, DataFlags, MixtureFlags, PairFlags
from engine.world import World, available_cores

KEYS_AT_A_TIME = 2**16
Prepare = Callable[[Source], tuple[Source, Encoder]]  # the rows as they are read, and what makes them sequences


def load_examples(
    names: list[tuple[str, str]],
    flags: MixtureFlags,
    world: World,
    chat: ChatTokenizer,
    prepare: Prepare,
    *,
    split: str,
    per_example: int,
    kind: dict[str, Any],
) -> Examples:
    """The examples of a mixture of (name, amount); amount '' takes all. Prints what was kept, dropped and bad. Raises
    UserError.

    `kind` holds what, besides tokenizer, template and length, decides how a row becomes sequences.
    """
    determinants = {"tokenizer": chat.fingerprint, "max_seq_length": flags.max_seq_length, **kind}
    root = Path(flags.cache_dir).expanduser() / "tokens"

    def build() -> list:
        opened = [open_source(name, split, flags.dataset_revision) for name, _ in names]
        workers = flags.dataset_num_proc or available_cores()
        how: dict[str, Any] = {"per_example": per_example, "workers": workers, **flags.bad_row_policy}
        return [open_or_build(root, *prepare(source), determinants, **how) for source in opened]

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


def read_conversations(
    flags: MixtureFlags, chat: ChatTokenizer, world: World, *, rows: ConversationFlags
) -> tuple[Examples, Examples | None]:
    """(training conversations, held-out conversations or None), every assistant turn trained. Raises UserError."""
    kind, prepare = conversations_prepared(flags, chat, rows, flags.max_seq_length)
    return _both_splits(flags, world, chat, prepare, per_example=1, kind=kind, unit="conversations")


def conversations_prepared(
    flags: DataFlags, chat: ChatTokenizer, rows: ConversationFlags, max_length: int
) -> tuple[dict[str, Any], Prepare]:
    """(what besides the tokenizer decides how rows become sequences, how a source of conversations is read)."""
    how: dict[str, Any] = {
        "text_column": rows.text_column,
        "only_label": rows.only_label,
        "thoughts_each": rows.history_thoughts == "each",
        "fold_system": flags.system_role == "fold",
    }

    def prepare(source: Source) -> tuple[Source, Encoder]:
        form = None if rows.text_column else first_form(source)
        return source, ConversationEncoder(chat, max_length, form, **how)

    return {"conversations": "all turns", **how}, prepare


def read_pairs(
    flags: MixtureFlags, count_turns: str, chat: ChatTokenizer, world: World, *, rows: PairFlags
) -> tuple[Examples, Examples | None]:
    """(training pairs, held-out pairs or None), of which the `last` or `all` turns count. Raises UserError."""
    kind, prepare = pairs_prepared(flags, count_turns, chat, rows, flags.max_seq_length)
    return _both_splits(flags, world, chat, prepare, per_example=2, kind=kind, unit="pairs")


def pairs_prepared(
    flags: DataFlags, count_turns: str, chat: ChatTokenizer, rows: PairFlags, max_length: int
) -> tuple[dict[str, Any], Prepare]:
    """As `conversations_prepared`, of pairs."""
    judgement = Judgement(rows.preference_column, rows.preference_numbers, rows.chosen_by_score)
    fold_system = flags.system_role == "fold"

    def prepare(source: Source) -> tuple[Source, Encoder]:
        encode = PairEncoder(chat, max_length, count_turns == "last", judgement, fold_system)
        return gathered(source, judgement), encode

    return {"pairs": count_turns, "judgement": asdict(judgement), "fold_system": fold_system}, prepare


def _both_splits(
    flags: MixtureFlags, world: World, chat: ChatTokenizer, prepare: Prepare, *, unit: str, **how: Any
) -> tuple[Examples, Examples | None]:
    train = load_examples(mixture(flags), flags, world, chat, prepare, split=flags.dataset_split, **how)
    if world.size > len(train):
        raise UserError(f"{world.size} ranks for {len(train)} {unit}: lower --nproc_per_node")
    if flags.eval_dataset_name is None:
        return train, None
    named = [(flags.eval_dataset_name, "")]
    held_out = load_examples(named, flags, world, chat, prepare, split=flags.eval_split, **how)
    rows = [key.tobytes() for key in held_out.keys(np.arange(len(held_out)))]
    wanted, trained = set(rows), set()
    for start in range(0, len(train), KEYS_AT_A_TIME):
        keys = train.keys(np.arange(start, min(start + KEYS_AT_A_TIME, len(train))))
        trained |= wanted & {key.tobytes() for key in keys}
    _warn_of_trained(sum(row in trained for row in rows), len(rows), unit, world)
    return train, held_out


def _warn_of_trained(both: int, held_out: int, unit: str, world: World) -> None:
    """Says how much of the held-out data is trained on as well, to the token."""
    if both:
        world.say(
            f"warning: {both:,} of {held_out:,} held-out {unit} are trained on as well, to the token: they measure"
            " memory (python -m launch.data --against finds those that are alike)"
        )


def prompts_of(
    name: str, split: str, flags: DataFlags, read: ReadPrompt, world: World, *, longest: int
) -> list[Prompt]:
    """The prompts of one dataset of at most `longest` tokens; says what was kept, dropped and bad. Raises UserError."""
    source = open_source(name, split, flags.dataset_revision)
    found, lines = load_prompts(source, read, longest, **flags.bad_row_policy)
    world.say(*lines)
    return found


def read_prompts(
    flags: MixtureFlags, read: PromptReader, longest: int, world: World
) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), of a mixture as `prompts_of` gives those of one dataset. Raises
    UserError.
    """
    read = replace(read, longest=longest)

    def load(name: str, amount: str, split: str) -> list[Prompt]:
        found = prompts_of(name, split, flags, read, world, longest=longest)
        return [found[i] for i in mixture_index(len(found), amount, flags.seed, name)] if amount else found

    prompts = [prompt for name, amount in mixture(flags) for prompt in load(name, amount, flags.dataset_split)]
    if world.size > len(prompts):
        raise UserError(f"{world.size} ranks for {len(prompts)} prompts: lower --nproc_per_node")
    world.agree("prompts", fingerprint_of(prompts))
    held_out = load(flags.eval_dataset_name, "", flags.eval_split) if flags.eval_dataset_name else []
    trained = {prompt.ids.tobytes() for prompt in prompts} if held_out else set()
    _warn_of_trained(sum(p.ids.tobytes() in trained for p in held_out), len(held_out), "prompts", world)
    return prompts, held_out


def _why_empty(stores: list, flags: MixtureFlags) -> str:
    headers = [store.header for store in stores]
    if sum(h["rows"] for h in headers) == 0:
        return "the dataset is empty: name one that has rows"
    bad, dropped = sum(h["bad_rows"] for h in headers), sum(sum(h["dropped"].values()) for h in headers)
    if bad > dropped:
        first = next(h["name"] + h["bad_list"][0] for h in headers if h["bad_list"])
        return f"no usable row, the first bad one is {first}"
    if dropped:
        why = {reason for h in headers for reason in h["dropped"]}
        if any("tokens" in reason for reason in why):
            return f"--max_seq_length {flags.max_seq_length} is too small: no row keeps a counted token"
        return f"no row is left, all were dropped ({', '.join(sorted(why))})"
    return "the mixture takes no row"


def mixture(flags: MixtureFlags) -> list[tuple[str, str]]:
    """--mixer_list or --dataset_name as (name, amount) pairs. Raises UserError."""
    if flags.mixer_list is None:
        return [(flags.dataset_name, "")]
    if len(flags.mixer_list) % 2:
        raise UserError(f"--mixer_list: expected NAME AMOUNT pairs, got {len(flags.mixer_list)} words")
    return list(zip(flags.mixer_list[::2], flags.mixer_list[1::2], strict=True))

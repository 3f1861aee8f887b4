"""From dataset flags to tokenised examples: one store per source, tokenised by the first rank of a machine, shared by
all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.chat import ChatTokenizer
from engine.config import RunConfig
from engine.errors import UserError
from engine.rows import Source, open_source
from engine.store import Examples, mixture_index, open_or_build, summary
from engine.tokenise import Encoder
from engine.world import World, available_cores


def load_examples(
    names: list[tuple[str, str]],
    config: RunConfig,
    world: World,
    chat: ChatTokenizer,
    encoder_of: Callable[[Source], Encoder],
    *,
    split: str,
    per_example: int,
    kind: dict[str, Any],
) -> Examples:
    """The examples of a mixture of (name, amount); amount '' takes all. Prints what was kept, dropped and bad. Raises
    UserError.

    `kind` holds what, besides tokenizer, template and length, decides how the encoders turn a row into sequences.
    """
    determinants = {"tokenizer": chat.fingerprint, "max_seq_length": config.max_seq_length, **kind}
    root = Path(config.cache_dir).expanduser() / "tokens"

    def build() -> list:
        opened = [open_source(name, split, config.dataset_revision) for name, _ in names]
        workers = config.dataset_num_proc or available_cores()
        return [
            open_or_build(root, source, encoder_of(source), determinants, per_example, config.on_bad_row, workers)
            for source in opened
        ]

    stores = world.once(f"tokens/{split}/{names}", build)
    world.say(*summary(stores))
    indices = [
        mixture_index(len(store), amount, config.seed, name) if amount else np.arange(len(store))
        for store, (name, amount) in zip(stores, names, strict=True)
    ]
    examples = Examples(stores, indices)
    if not len(examples):
        raise UserError(f"{' '.join(name for name, _ in names)}: {_why_empty(stores, config)}")
    world.agree(f"dataset ({split})", examples.fingerprint)
    return examples


def _why_empty(stores: list, config: RunConfig) -> str:
    headers = [store.header for store in stores]
    if sum(h["rows"] for h in headers) == 0:
        return "the dataset is empty"
    bad, dropped = sum(h["bad_rows"] for h in headers), sum(sum(h["dropped"].values()) for h in headers)
    if bad > dropped:
        first = next(h["name"] + h["bad_list"][0] for h in headers if h["bad_list"])
        return f"no usable row, the first bad one is {first}"
    if dropped:
        return f"--max_seq_length {config.max_seq_length} is too small: no row keeps a counted token"
    return "the mixture takes no row"


def mixture(config: RunConfig) -> list[tuple[str, str]]:
    """--mixer_list or --dataset_name as (name, amount) pairs. Raises UserError."""
    if config.mixer_list is None:
        return [(config.dataset_name, "")]
    if config.dataset_name is not None and "dataset_name" in config.given:
        raise UserError("--mixer_list and --dataset_name are two ways to say one thing: give one of them")
    if len(config.mixer_list) % 2:
        raise UserError(f"--mixer_list: expected NAME AMOUNT pairs, got {len(config.mixer_list)} words")
    return list(zip(config.mixer_list[::2], config.mixer_list[1::2], strict=True))

"""Files of rows as the stages read them, without a run: what was kept, dropped and bad."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data import ChatTokenizer, PromptReader, embedded
from engine.data.chat import load_tokenizer
from engine.data.files import open_source
from engine.data.prompts import load_prompts
from engine.data.sources import conversations_prepared, pairs_prepared
from engine.data.store import TokenStore, open_or_build
from launch import dpo, grpo, sft
from launch.judges import checker

SCHEMAS = ("sft", "dpo", "ppo")
LONGEST = 128  # tokens of a sequence
NO_BOUND = 1e9


@dataclass(frozen=True)
class Read:
    """What became of a file's rows: the bad ones are listed as 'place: why', up to twenty."""

    rows: int
    kept: list[bytes]  # what addresses each of them by its tokens
    dropped: dict[str, int]
    bad: list[str]
    num_bad: int
    notes: list[str]


@functools.cache
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(embedded(Path(sft.Config().cache_dir).expanduser()).model, 512)


def read(schema: str, path: Path, cache: Path, on_bad_row: str = "skip", max_bad_rows: float = NO_BOUND) -> Read:
    """Raises UserError as the stage does."""
    policy: dict[str, Any] = {"on_bad_row": on_bad_row, "max_bad_rows": max_bad_rows}
    if schema == "ppo":
        return _problems(path, policy)
    store = opened(schema, path, cache, policy)
    per = store.per_example
    keys = [b"".join(key.tobytes() for key in store.keys[i : i + per]) for i in range(0, len(store.keys), per)]
    header = store.header
    notes = [f"{what} {which}" for what, which, _ in header["notes"]]
    return Read(header["rows"], keys, header["dropped"], header["bad_list"], header["bad_rows"], notes)


def opened(schema: str, path: Path, cache: Path, policy: dict[str, Any]) -> TokenStore:
    """The store of a file of conversations or pairs."""
    if schema == "sft":
        _, prepare = conversations_prepared(sft.Config(), tokenizer(), sft.Config(), LONGEST)
    else:
        _, prepare = pairs_prepared(dpo.Config(), "last", tokenizer(), dpo.Config(), LONGEST)
    source = open_source(str(path), "train", None)
    return open_or_build(cache, *prepare(source), {"drill": schema}, per_example=1 + (schema == "dpo"), **policy)


def _problems(path: Path, policy: dict[str, Any]) -> Read:
    with checker("default", None) as check:
        reader = PromptReader(tokenizer(), grpo.Config(), check, longest=LONGEST)
        source = open_source(str(path), "train", None)
        prompts, lines = load_prompts(source, reader, LONGEST, **policy)
    head, *others = lines
    counts = {what: int(n) for n, _, what in (p.partition(" ") for p in head.removeprefix(f"{path}: ").split(", "))}
    mark = f"  bad row {path}"
    dropped = {what[9:-1]: n for what, n in counts.items() if what.startswith("dropped")}
    bad = [line.removeprefix(mark) for line in others if line.startswith(mark)]
    notes = [line for line in others if line.startswith("  not used")]
    kept = [prompt.ids.tobytes() + str(prompt.ground_truth).encode() for prompt in prompts]
    return Read(counts["rows"], kept, dropped, bad, counts.get("bad", 0), notes)

"""Prompts with verifiable answers (RLVR rows): `messages`, `ground_truth`, `dataset` (the verifier's name), read
unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data import rows
from engine.data.chat import ChatTokenizer
from engine.data.files import Source
from engine.data.rows import BadRow
from engine.errors import UserError

LISTED = 20
Check = Callable[[Any, Any], None]  # (dataset, ground truth); raises ValueError


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, up to where the assistant begins to write, and what its answer is verified against."""

    ids: np.ndarray
    ground_truth: Any
    dataset: str | list[str]

    @property
    def verifier(self) -> str:
        """The name, or names, of what judges its answer."""
        return self.dataset.lower() if isinstance(self.dataset, str) else "+".join(map(str.lower, self.dataset))


def load_prompts(
    source: Source, chat: ChatTokenizer, max_prompt_tokens: int, check: Check, on_bad_row: str
) -> tuple[list[Prompt], list[str]]:
    """(prompts, lines that say what was kept, dropped and bad). `check(dataset, ground_truth)` raises ValueError for a
    row that no verifier could judge. A prompt longer than `max_prompt_tokens` is dropped and counted. Raises UserError.
    """
    prompts, bad, total, too_long = [], [], 0, 0
    for place, row in source.rows():
        total += 1
        try:
            if isinstance(row, BadRow):
                raise row
            prompt = _prompt(row, chat, check)
        except BadRow as problem:
            bad.append(f"{source.name}{place}: {problem}")
            if on_bad_row == "error":
                raise UserError(bad[0]) from None
            continue
        if len(prompt.ids) > max_prompt_tokens:
            too_long += 1
        else:
            prompts.append(prompt)
    dropped = f", {too_long} dropped (longer than {max_prompt_tokens} tokens)" if too_long else ""
    lines = [f"{source.name}: {total} rows, {len(prompts)} kept{dropped}" + (f", {len(bad)} bad" if bad else "")]
    lines += [f"  bad row {line}" for line in bad[:LISTED]] + (
        [f"  and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
    )
    if not prompts:
        why = (
            f"the first bad row is {bad[0]}"
            if bad
            else f"none has at most {max_prompt_tokens} tokens"
            if too_long
            else "it is empty"
        )
        raise UserError(f"{source.name}: no usable prompt, {why}")
    return prompts, lines


def fingerprint_of(prompts: list[Prompt]) -> str:
    """Of the prompts, what they are verified against, and their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.ids.tobytes() + json.dumps([prompt.ground_truth, prompt.dataset], default=str).encode())
    return digest.hexdigest()


def _prompt(row: dict, chat: ChatTokenizer, check: Check) -> Prompt:
    messages = rows.messages(row.get("messages"), "messages")
    # a worked answer behind the question is not part of the prompt
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise BadRow("messages: expected a turn to answer, got only the assistant's")
    for field in ("ground_truth", "dataset"):
        if row.get(field) is None:
            raise BadRow(f"{field}: missing")
    try:
        check(row["dataset"], row["ground_truth"])
    except ValueError as problem:
        raise BadRow(str(problem)) from None
    for i, message in enumerate(messages):
        if control := chat.control.search(message["content"]):
            raise BadRow(f"messages[{i}].content: holds the control token {control.group()!r}")
    text = chat.render(messages, add_generation_prompt=True)
    ids = np.array(chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
    if len(ids) and ids.max() >= chat.vocab_size:
        raise BadRow(f"token id {ids.max()} is beyond the model's {chat.vocab_size} embeddings")
    return Prompt(ids, row["ground_truth"], row["dataset"])

"""Preference rows as they are published, as pairs of tokenised sequences.

Accepted: `chosen` and `rejected` as message lists that share a prefix (whole conversations, with or without an explicit
`prompt` beside them), as completions to an explicit `prompt`, or as hh-rlhf's transcripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from engine import rows
from engine.chat import ChatTokenizer
from engine.rows import BadRow
from engine.store import Encoded

Messages = list[dict[str, str]]
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def conversations(row: dict) -> tuple[Messages, Messages]:
    """(chosen, rejected) as whole conversations that end in the assistant's answer. Raises BadRow."""
    sides = []
    for field in ("chosen", "rejected"):
        if isinstance(row.get(field), list):
            sides.append(rows.messages(row[field], field))
        else:
            sides.append(rows.text(row, field))
    chosen, rejected = sides
    if type(chosen) is not type(rejected):
        raise BadRow("rejected: chosen is a list of messages and this is text, or the other way round")
    prompt = _prompt(row)
    if isinstance(chosen, str):
        if prompt is None:
            chosen, rejected = _transcript(chosen, "chosen"), _transcript(rejected, "rejected")
        else:
            chosen, rejected = ([*prompt, {"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    elif chosen[0]["role"] == "assistant":
        if prompt is None:
            raise BadRow("prompt: missing, and chosen starts with the assistant")
        chosen, rejected = prompt + chosen, prompt + rejected
    elif prompt is not None and isinstance(row["prompt"], list) and chosen[: len(prompt)] != prompt:
        raise BadRow("prompt: is not how chosen begins")
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise BadRow(f"{field}: ends with the {side[-1]['role']}, expected the assistant")
    if chosen[0] != rejected[0]:
        raise BadRow("rejected: does not begin like chosen; the two must answer one prompt")
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen")
    return chosen, rejected


def _prompt(row: dict) -> Messages | None:
    if row.get("prompt") is None:
        return None
    if isinstance(row["prompt"], str):
        return [{"role": "user", "content": rows.text(row, "prompt")}]
    return rows.messages(row["prompt"], "prompt")


def _transcript(text: str, field: str) -> Messages:
    """hh-rlhf: '\\n\\nHuman: ...\\n\\nAssistant: ...', the last turn the assistant's."""
    parts = _HH_TURN.split(text)
    if len(parts) < 5 or parts[0].strip() or parts[1] != "Human":
        raise BadRow(f"{field}: is text without a prompt beside it, so expected a transcript '\\n\\nHuman: ...\\n\\nAssistant: ...'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return turns


def pair_encoder(chat: ChatTokenizer, max_length: int, last_turn_only: bool) -> Callable[[dict], Encoded | str]:
    """row → [(ids, mask) of chosen, of rejected], or why the pair is dropped.

    Truncated, not dropped, at `max_length`; which turn is the last is decided before the cut, so a cut never promotes an
    earlier one. A pair of which either side keeps no counted token is dropped: its mean log-prob would be 0 / 0.
    """

    def encode(row: dict) -> Encoded | str:
        sequences = [chat.encode(side, max_length, last_turn_only) for side in conversations(row)]
        if not all(mask[1:].any() for _, mask in sequences):
            return f"no counted token within {max_length} tokens"
        return sequences

    return encode

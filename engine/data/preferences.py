"""Preference rows as they are published, as pairs of tokenised sequences.

Accepted: `chosen` and `rejected` as message lists that share a prefix (whole conversations, with or without an explicit
`prompt` beside them), as completions to an explicit `prompt`, or as hh-rlhf's transcripts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile

from engine.data import rows
from engine.data.chat import ChatTokenizer
from engine.data.rows import BadRow
from engine.data.tokenise import Encoded
from engine.errors import nearest

Messages = list[dict[str, str]]
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def conversations(row: dict) -> tuple[Messages, Messages]:
    """(chosen, rejected) as whole conversations that end in the assistant's answer. Raises BadRow."""
    prompt = _side(row, "prompt") if row.get("prompt") is not None else None
    chosen, rejected = (_conversation(_side(row, field), prompt, field) for field in ("chosen", "rejected"))
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise BadRow(f"rejected: expected {rows.kind(row['chosen'])} like chosen, got {rows.kind(row['rejected'])}")
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise BadRow(f"{field}: expected the assistant's turn at the end, got the {side[-1]['role']}'s")
    if chosen == rejected:
        raise BadRow("rejected: expected another answer than chosen, got the same")
    parting = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if not all(parting < len(side) and side[parting]["role"] == "assistant" for side in (chosen, rejected)):
        raise BadRow(
            f"rejected: expected the prompt of chosen, got another (they part at message {parting}, not at an"
            " assistant's turn)"
        )
    if parting == 0 and prompt is None:
        raise BadRow(
            "prompt: expected text or a list of messages, got nothing, and chosen and rejected share no beginning"
        )
    return chosen, rejected


def _side(row: dict, field: str) -> str | Messages:
    if isinstance(row.get(field), list):
        return rows.messages(row[field], field)
    if isinstance(row.get(field), str):
        return rows.text(row, field)
    got = rows.kind(row[field]) if field in row else f"nothing{nearest(field, row)}"
    raise BadRow(f"{field}: expected text or a list of messages, got {got}")


def _conversation(answer: str | Messages, prompt: str | Messages | None, field: str) -> Messages:
    """The whole conversation that `answer` stands for, or ends."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(answer, str):
        return _transcript(answer, field) if asked is None else [*asked, {"role": "assistant", "content": answer}]
    if asked is None or answer[: len(asked)] == asked:
        return answer
    if answer[0]["role"] == "assistant":
        return asked + answer
    if isinstance(prompt, list):
        raise BadRow(f"{field}: expected it to begin like prompt, or with the assistant, got another beginning")
    return answer  # a prompt text beside whole conversations repeats a part of them, in one way or another


def _transcript(text: str, field: str) -> Messages:
    """hh-rlhf: '\\n\\nHuman: ...\\n\\nAssistant: ...', the last turn the assistant's."""
    parts = _HH_TURN.split(text)
    if len(parts) < 5 or parts[0].strip() or parts[1] != "Human":
        raise BadRow(
            f"{field}: expected a transcript '\\n\\nHuman: ...\\n\\nAssistant: ...' (no prompt stands beside it), got"
            " other text"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


@dataclass(frozen=True)
class PairEncoder:
    """row → [(ids, mask) of chosen, of rejected], or why the pair is dropped.

    Truncated, not dropped, at `max_length`; which turn is the last is decided before the cut, so a cut never promotes
    an earlier one. A pair of which either side keeps no counted token is dropped: its mean log-prob would be 0 / 0.
    """

    chat: ChatTokenizer
    max_length: int
    last_turn_only: bool

    def __call__(self, row: dict) -> Encoded | str:
        sequences = [self.chat.encode(side, self.max_length, self.last_turn_only) for side in conversations(row)]
        if not all(mask[1:].any() for _, mask in sequences):
            return f"no counted token within {self.max_length} tokens"
        return sequences

"""Preference rows in the forms in which they are published, as pairs of tokenised sequences.

chosen, rejected     whole conversations that share a prefix, or answers to a prompt beside them: lists of messages, one
                     message, or text; ShareGPT's {from, value} as well; or hh-rlhf's transcripts
response_a, _b       (or 1 and 2, 0 and 1) and a column that says which is better: a label or two scores, named by flags
completions          [{response, a score}, ...]: the best and the worst by the score that a flag names

The prompt is `prompt`, `question`, `query`, `instruction` (and `input`), `context`, or ShareGPT's `conversations`;
`system` and `tools` may stand beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from engine.data import messages, rows
from engine.data.chat import ChatTokenizer
from engine.data.conversations import asked_turns, label_of, note_unread, renamed, turns_in, with_system
from engine.data.judgements import EITHER_IS_NAMED, PROMPTS, Judgement, Tie, judged
from engine.data.messages import Conversation, Message, Notes
from engine.data.rows import BadRow
from engine.data.tokenise import Encoded
from engine.errors import nearest

Messages = list[Message]
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def conversations(
    row: dict, judgement: Judgement = EITHER_IS_NAMED, notes: Notes | None = None
) -> tuple[Conversation, Conversation]:
    """(chosen, rejected) as whole conversations that end in the assistant's answer. Raises BadRow, and Tie."""
    notes = Counter() if notes is None else notes
    if row.get("chosen") is None and row.get("completion") is not None and label_of(row) is not None:
        raise BadRow(
            "label: a KTO row, one answer and whether it was liked: expected chosen and rejected answers to one prompt"
            " (launch.sft --only_label true trains those that were liked)"
        )
    row = judged(row, judgement, notes)
    asked = next((column for column in PROMPTS if row.get(column) is not None), None)
    read = {"chosen", "rejected", "system", "tools", str(asked)} | ({"input"} if asked == "instruction" else set())
    note_unread(row, read, notes)
    prompt = None if asked is None else messages.read(asked_turns(row, asked), asked, notes).messages
    tools = messages.tools_of(row, notes)
    chosen = with_system(replace(_whole(row, "chosen", prompt, asked, notes), tools=tools), row)
    rejected = with_system(replace(_whole(row, "rejected", prompt, asked, notes), tools=tools), row)
    _check(row, chosen.messages, rejected.messages, has_prompt=prompt is not None)
    repeated = asked is None or not isinstance(row[asked], str)
    if not repeated and not any(row[asked].strip() in message["content"] for message in chosen.messages):
        notes["not used", f"{asked} that the conversations do not hold"] += 1
    return chosen, rejected


def _check(row: dict, chosen: Messages, rejected: Messages, has_prompt: bool) -> None:
    """Raises BadRow unless both answer one prompt, in different ways."""
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise BadRow(f"rejected: expected {rows.kind(row['chosen'])} like chosen, got {rows.kind(row['rejected'])}")
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise BadRow(f"{field}: expected the assistant's turn at the end, got the {side[-1]['role']}'s")
    if chosen == rejected:
        raise BadRow("rejected: expected another answer than chosen, got the same")
    parting = sum(
        1 for _ in takewhile(lambda pair: said(pair[0]) == said(pair[1]), zip(chosen, rejected, strict=False))
    )
    if not all(parting < len(side) and side[parting]["role"] == "assistant" for side in (chosen, rejected)):
        raise BadRow(
            f"rejected: expected the prompt of chosen, got another (they part at message {parting}, not at an"
            " assistant's turn)"
        )
    if parting == 0 and not has_prompt:
        raise BadRow(
            "prompt: expected text or a list of messages, got nothing, and chosen and rejected share no beginning"
        )


def said(message: Message) -> Message:
    """A message without its labels: two that say the same are the same turn."""
    return {key: value for key, value in message.items() if key not in ("name", "tool_call_id")}


def _whole(row: dict, field: str, prompt: Messages | None, asked: str | None, notes: Notes) -> Conversation:
    """The whole conversation that an answer stands for, or ends. Raises BadRow."""
    value = turns_in(row.get(field))
    if isinstance(value, str):
        rows.text(row, field)
        answered = [*(prompt or ()), {"role": "assistant", "content": value}]
        return Conversation(transcript(value, field) if prompt is None else answered)
    if not isinstance(value, list):
        got = rows.kind(value) if field in row else f"nothing{nearest(field, row)}"
        plain = field not in row and (row.get("messages") or row.get("conversations"))
        hint = " (conversations are read by launch.sft)" if plain else ""
        raise BadRow(f"{field}: expected text or a list of messages, got {got}{hint}")
    answer = messages.read(renamed(value, field), field, notes)
    if prompt is None or list(map(said, answer.messages[: len(prompt)])) == list(map(said, prompt)):
        return answer
    if answer.messages[0]["role"] == "assistant":
        return messages.joined(Conversation(prompt), answer)
    if asked is not None and isinstance(turns_in(row[asked]), list):
        raise BadRow(f"{field}: expected it to begin like {asked}, or with the assistant, got another beginning")
    return answer  # a prompt text beside whole conversations repeats a part of them, in one way or another


def transcript(text: str, field: str) -> Messages:
    """hh-rlhf: '\\n\\nHuman: ...\\n\\nAssistant: ...', the last turn the assistant's. Raises BadRow."""
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
    judgement: Judgement = EITHER_IS_NAMED
    fold_system: bool = False

    def __call__(self, row: dict, notes: Notes | None = None) -> Encoded | str:
        notes = Counter() if notes is None else notes
        try:
            pair = conversations(row, self.judgement, notes)
        except Tie as tie:
            return str(tie)
        sequences = [self._sequence(messages.folded(side) if self.fold_system else side, notes) for side in pair]
        if not all(mask[1:].any() for _, mask in sequences):
            return f"no counted token within {self.max_length} tokens"
        return sequences

    def _sequence(self, side: Conversation, notes: Notes) -> tuple[np.ndarray, np.ndarray]:
        whole, spans = self.chat.spans(side.messages, side.tools)
        self.chat.note_unshown(side.messages, side.tools, whole, notes)
        if lost := self.chat.lost_thoughts(side.messages, side.tools, whole, spans):
            notes["thoughts that the chat template leaves out", ""] += lost
        turns = [i for i, message in enumerate(side.messages) if message["role"] == "assistant"]
        counted = [span for i, span in zip(turns, spans, strict=True) if i not in side.untrained]
        if self.last_turn_only:
            counted = [] if turns[-1] in side.untrained else spans[-1:]
        return self.chat.tokens(whole, spans, counted, self.max_length)

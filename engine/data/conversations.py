"""Conversations for supervised fine-tuning, in the four forms in which they are published, as tokenised sequences.

messages                      [{role, content}, ...]
conversations                 ShareGPT: [{from, value}, ...]
prompt, completion            text, or lists of messages
instruction, input, output    input may be missing or empty
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.data import rows
from engine.data.chat import ChatTokenizer
from engine.data.files import Source
from engine.data.rows import BadRow
from engine.data.tokenise import Encoded

FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
Messages = list[dict[str, str]]


def form_of(row: dict) -> str:
    """The form whose columns the row has. Raises BadRow for none and for two."""
    found = [form for form, columns in FORMS.items() if all(row.get(column) is not None for column in columns)]
    if len(found) != 1:
        got = " and ".join(", ".join(FORMS[form]) for form in found) or ", ".join(sorted(row)[:6]) or "nothing"
        raise BadRow(f"columns: expected {' or '.join(', '.join(c) for c in FORMS.values())}, got {got}")
    return found[0]


def first_form(source: Source) -> str | None:
    """The form of the source's first usable row: the one that all its rows must have."""
    for _, row in source.rows():
        try:
            return form_of(row) if isinstance(row, dict) else None
        except BadRow:
            continue
    return None


def conversation(row: dict, form: str) -> Messages:
    """The row as messages. Raises BadRow."""
    if form == "messages":
        return rows.messages(row["messages"], "messages")
    if form == "conversations":
        return rows.messages(_renamed(row["conversations"]), "conversations")
    if form == "instruction":
        question = rows.text(row, "instruction")
        if row.get("input"):
            question += "\n\n" + rows.text(row, "input")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": rows.text(row, "output")}]
    sides = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        is_list = isinstance(row[column], list)
        sides += rows.messages(row[column], column) if is_list else [{"role": role, "content": rows.text(row, column)}]
    return sides


def _renamed(turns: object) -> object:
    """ShareGPT's turns under the names of messages; what is not a turn is left for `rows.messages` to name."""
    if not isinstance(turns, list):
        return turns
    renamed = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            renamed.append(turn)
            continue
        role = turn.get("from")
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            raise BadRow(
                f"conversations[{i}].from: expected one of {', '.join(SHAREGPT_ROLES)}, got {str(role)[:40]!r}"
            )
        renamed.append({"role": SHAREGPT_ROLES[role], "content": turn.get("value")})
    return renamed


@dataclass(frozen=True)
class ConversationEncoder:
    """row → [(ids, mask)] with every assistant turn trained, or why the row is dropped."""

    chat: ChatTokenizer
    max_length: int
    form: str | None

    def __call__(self, row: dict) -> Encoded | str:
        form = form_of(row)
        if form != self.form:
            first = ", ".join(FORMS[self.form]) if self.form else "nothing usable"
            raise BadRow(f"columns: the file begins with {first}, this row has {', '.join(FORMS[form])}")
        ids, mask = self.chat.encode(conversation(row, form), self.max_length, last_turn_only=False)
        if not mask[1:].any():
            return f"no trained token within {self.max_length} tokens"
        return [(ids, mask)]

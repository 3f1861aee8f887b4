"""Conversations for supervised fine-tuning, in the forms in which they are published, as tokenised sequences.

messages                      [{role, content, ...}, ...]
conversations                 ShareGPT: [{from, value}, ...]
prompt, completion            text, or lists of messages
instruction, input, output    Alpaca: input may be missing or empty, history is [[question, answer], ...]
question, answer              text
query, response               text

Beside any of them may stand `system` (the first message, unless the conversation has one) and `tools`. Plain text is a
column that is named by a flag. A column that its form does not read is noted.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from engine.data import messages, rows
from engine.data.chat import ChatTokenizer
from engine.data.files import Source
from engine.data.messages import Conversation, Notes
from engine.data.rows import BadRow
from engine.data.tokenise import Encoded

FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "query": ("query", "response"),
}
WHOLE = ("messages", "conversations")  # whole conversations: other columns of a row that has one repeat parts of it
BESIDE = {
    form: {*columns, "system", "tools"} | ({"input", "history"} if form == "instruction" else set())
    for form, columns in FORMS.items()
}
LABELS = ("label", "kto_tag")  # whether a person liked the answer: KTO's rows
WORDS = {"true": True, "false": False, "1": True, "0": False, "desirable": True, "undesirable": False}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def form_of(row: dict) -> str:
    """The form whose columns the row has. Raises BadRow for none and for two."""
    found = [form for form, columns in FORMS.items() if all(row.get(column) is not None for column in columns)]
    found = [form for form in found if form in WHOLE] or found
    if len(found) != 1:
        got = " and ".join(", ".join(FORMS[form]) for form in found) or ", ".join(sorted(row)[:6]) or "nothing"
        hint = "" if found else _elsewhere(row)
        raise BadRow(f"columns: expected {' or '.join(', '.join(c) for c in FORMS.values())}, got {got}{hint}")
    return found[0]


def _elsewhere(row: dict) -> str:
    """What reads a row that has none of these forms, where its columns tell."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return " (pairs are read by launch.dpo)"
    if row.get("ground_truth") is not None or row.get("reward_model") is not None:
        return " (problems are read by launch.ppo and launch.grpo)"
    return " (plain text: --text_column text)" if isinstance(row.get("text"), str) else ""


def first_form(source: Source) -> str | None:
    """The form of the source's first usable row: the one that all its rows must have."""
    for _, row in source.rows():
        if isinstance(row, dict):
            with suppress(BadRow):
                return form_of(row)
    return None


def conversation(row: dict, form: str, notes: Notes | None = None) -> Conversation:
    """The row as messages; what it does not read is noted. Raises BadRow."""
    notes = Counter() if notes is None else notes
    note_unread(row, BESIDE[form], notes)
    column, *answered = FORMS[form]
    said = messages.read(asked_turns(row, column), column, notes)
    if answered:
        answer = messages.read(asked_turns(row, answered[0], "assistant"), answered[0], notes)
        earlier = history(row) if form == "instruction" else []
        said = messages.joined(Conversation(earlier), messages.joined(said, answer))
    return with_system(replace(said, tools=messages.tools_of(row, notes)), row)


def note_unread(row: dict, read: set[str], notes: Notes) -> None:
    """Notes the columns that say something and are not among those `read`."""
    for column in row.keys() - read:
        if row[column] is not None:
            notes["not used", column] += 1


def asked_turns(row: dict, column: str, role: str = "user") -> Any:
    """A column as turns under the names of messages: a text is one turn of this role, with Alpaca's input behind an
    instruction; turns are as they are, for `messages.read`. Raises BadRow.
    """
    turns = turns_in(row[column])
    has_input = column == "instruction" and row.get("input") not in (None, "")
    if isinstance(turns, list) or column in WHOLE:
        if has_input:
            raise BadRow("input: expected none beside an instruction that is a list of messages, got one")
        return renamed(turns, column)
    if not isinstance(turns, str):
        raise BadRow(f"{column}: expected text or a list of messages, got {rows.kind(turns)}")
    said = rows.text(row, column)
    if has_input:
        said += "\n\n" + rows.text(row, "input")
    return [{"role": role, "content": said}]


def turns_in(value: Any) -> Any:
    """A cell of a table that holds turns as JSON text, as a list; anything else, any other text too, as it is."""
    if isinstance(value, dict) and {"role", "from"} & value.keys():
        return [value]
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        turns = rows.parse_json(value)
    except BadRow:
        return value
    return turns if all(map(_is_turn, turns)) else value


def _is_turn(value: Any) -> bool:
    """Whether this is a message or ShareGPT's turn beyond doubt: of a known role, with something said."""
    if not isinstance(value, dict):
        return False
    known = (*messages.ROLES, *messages.ALSO_ROLES, *SHAREGPT_ROLES)
    return (value.get("role") in known and "content" in value) or (value.get("from") in known and "value" in value)


def history(row: dict) -> list[dict]:
    """Alpaca's earlier turns, [[question, answer], ...], as messages. Raises BadRow."""
    turns = messages.parsed(row.get("history"), "history")
    if not turns:
        return []
    if not isinstance(turns, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in turns
    ):
        raise BadRow(f"history: expected a list of [question, answer], got {rows.kind(turns)} of something else")
    roles = ("user", "assistant")
    messages.check_json(turns, "history")
    return [{"role": role, "content": text} for pair in turns for role, text in zip(roles, pair, strict=True)]


def with_system(said: Conversation, row: dict) -> Conversation:
    """The conversation behind the row's `system` column. Raises BadRow if it begins with another one."""
    if row.get("system") in (None, ""):
        return said
    system = {"role": "system", "content": rows.text(row, "system")}
    if said.messages[0] == system:
        return said
    if said.messages[0]["role"] == "system":
        raise BadRow("system: expected the conversation's own system turn, got another one")
    return messages.joined(Conversation([system]), said)


def renamed(turns: Any, field: str) -> Any:
    """ShareGPT's turns (or one) under the names of messages; what is not a turn is left for `messages.read` to name.
    Raises BadRow.
    """
    turns = messages.parsed(turns, field)
    if isinstance(turns, dict):
        return renamed([turns], field)
    if not isinstance(turns, list):
        return turns
    return [_renamed(given, f"{field}[{i}]") for i, given in enumerate(turns)]


def _renamed(given: Any, where: str) -> Any:
    if not isinstance(given, dict) or given.get("from") is None:  # a message under ShareGPT's column
        return given
    if given.get("role") is not None or given.get("content") is not None:
        raise BadRow(f"{where}: expected from and value, or role and content, got both")
    role = given["from"]
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        raise BadRow(f"{where}.from: expected one of {', '.join(SHAREGPT_ROLES)}, got {str(role)[:40]!r}")
    rest = {key: value for key, value in given.items() if key not in ("from", "value", "role", "content")}
    if role == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": given.get("value")} | rest
    return {"role": SHAREGPT_ROLES[role], "content": given.get("value")} | rest


def label_of(row: dict, is_answer: bool = True) -> bool | None:
    """What a KTO row says of its answer; None for a row that says nothing. Where one answer stands beside it
    (`is_answer`), a number is a label as well, and anything else is refused. Raises BadRow.
    """
    found = {}
    for column in LABELS:
        value = row.get(column)
        word = str(value).strip().lower()
        word = {"1.0": "1", "0.0": "0"}.get(word, word)
        is_number = word in ("0", "1") and not isinstance(value, bool)
        if word in WORDS and (is_answer or not is_number):
            found[column] = WORDS[word]
        elif is_answer and value not in (None, ""):
            raise BadRow(f"{column}: expected true or false, whether the answer was liked, got {word[:40]!r}")
    if len(set(found.values())) > 1:
        raise BadRow("kto_tag: expected the same as label, got the opposite")
    return next(iter(found.values()), None)


@dataclass(frozen=True)
class ConversationEncoder:
    """row → [(ids, mask)] with every assistant turn trained that the row does not leave out, or why it is dropped.

    `form` is that of the file, or `text_column` the column of plain text. `only_label`: of KTO's rows those that are
    labelled true. `thoughts_each`: where the template leaves thoughts out of earlier turns, every turn is an example of
    its own, as the model writes it at inference. `fold_system`: into the first turn of the user.
    """

    chat: ChatTokenizer
    max_length: int
    form: str | None
    text_column: str | None = None
    only_label: bool = False
    thoughts_each: bool = False
    fold_system: bool = False

    def __call__(self, row: dict, notes: Notes | None = None) -> Encoded | str:
        notes = Counter() if notes is None else notes
        if (label := label_of(row, is_answer=row.get("completion") is not None)) is not None:
            if not self.only_label:
                raise BadRow(
                    "label: a KTO row (an answer and whether it was liked): expected --only_label true, which trains"
                    " those that were"
                )
            row = {column: value for column, value in row.items() if column not in LABELS}
            if not label:
                return "labelled false"
        elif self.only_label:
            raise BadRow("label: expected true or false (--only_label), got nothing")
        if self.text_column is not None:
            note_unread(row, {self.text_column}, notes)
            sequences = [self.chat.plain_text(rows.text(row, self.text_column), self.max_length)]
        else:
            sequences = self._sequences(self._conversation(row, notes), notes)
        kept = [(ids, mask) for ids, mask in sequences if mask[1:].any()]
        if kept:
            return kept
        none = f"no turn that is trained{_elsewhere(row)}"
        return f"no trained token within {self.max_length} tokens" if sequences else none

    def _conversation(self, row: dict, notes: Notes) -> Conversation:
        form = form_of(row)
        if form != self.form:
            first = ", ".join(FORMS[self.form]) if self.form else "nothing usable"
            raise BadRow(f"columns: the file begins with {first}, this row has {', '.join(FORMS[form])}")
        said = conversation(row, form, notes)
        return messages.folded(said) if self.fold_system else said

    def _sequences(self, said: Conversation, notes: Notes) -> Encoded:
        whole, spans = self.chat.spans(said.messages, said.tools)
        turns = [i for i, message in enumerate(said.messages) if message["role"] == "assistant"]
        self.chat.note_unshown(said.messages, said.tools, whole, notes)
        lost = self.chat.lost_thoughts(said.messages, said.tools, whole, spans)
        if lost and self.thoughts_each:
            parts = [replace(said, messages=said.messages[: i + 1]) for i in turns if i not in said.untrained]
            notes[
                "conversations cut into an example for each turn, whose thought it keeps (--history_thoughts)", ""
            ] += 1
            return [self.chat.encode_last(part.messages, self.max_length, part.tools) for part in parts]
        if lost:
            notes["thoughts that the chat template leaves out (--history_thoughts each)", ""] += lost
        counted = [span for i, span in zip(turns, spans, strict=True) if i not in said.untrained]
        return [] if not counted else [self.chat.tokens(whole, spans, counted, self.max_length)]

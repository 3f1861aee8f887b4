"""Prompts without a verifier: rows of any kind that says what is asked, with a label or without."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from engine.data.conversations import history, note_unread
from engine.data.messages import Message, Notes
from engine.data.prompts import ASKED, Check, Prompt, PromptReader
from engine.data.rows import BadRow

LABELS = ("ground_truth", "dataset")  # what `launch.verify` judges a response by


@dataclass(frozen=True)
class Question(Prompt):
    """A prompt that nothing judges here; `labels` are the columns by which something may, elsewhere."""

    messages: list[Message] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)


def _unasked(dataset: Any, ground_truth: Any) -> None:
    """No verifier is asked whether it could judge the row."""


@dataclass(frozen=True)
class QuestionReader(PromptReader):
    """row → Question, in the forms of prompts and of conversations; an answer at the end is cut."""

    check: Check = _unasked

    def __call__(self, row: dict, notes: Notes) -> Question:
        """Raises BadRow."""
        asked = next((column for column in ASKED if row.get(column) is not None), None)
        if asked is None:
            got = ", ".join(sorted(row)[:6]) or "nothing"
            raise BadRow(f"messages: expected what is asked, as one of {', '.join(ASKED)}, got {got}")
        beside = {"input", "history"} if asked == "instruction" else set()
        note_unread(row, {asked, *LABELS, "system", "tools"} | beside, notes)
        said = self._asked(row, asked, notes)
        if earlier := history(row) if asked == "instruction" else []:
            first = 1 if said.messages[0]["role"] == "system" else 0
            said = replace(said, messages=[*said.messages[:first], *earlier, *said.messages[first:]])
        said = self.worded(said, notes)
        labels = {column: row[column] for column in LABELS if row.get(column) is not None}
        ids = self.ids(said, notes)
        return Question(ids, None, "", messages=said.messages, labels=labels)

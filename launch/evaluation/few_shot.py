"""Examples before the question: N worked answers of a file, as earlier turns of the chat or as text in one turn.

    turns    user: question 1   assistant: answer 1   ...   user: the question
    text     user: 'Question: question 1' 'Answer: answer 1', a blank line, ..., 'Question: the question' 'Answer:'

The file is in any form that launch.sft reads (question and answer, prompt and completion, messages, ...). The first N
of it stand before every question, or N that are drawn for each, as a function of (seed, 'few_shot', the question). One
that asks the question itself is left out, and the next one taken. --prompt_template goes around their questions too.
Source: Brown et al. 2020 (arXiv:2005.14165); turns of the chat as in Tülu 3 (arXiv:2411.15124, section 7).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from engine.data import ChatTokenizer, Prompt, PromptReader, permutation
from engine.data.conversations import conversation, first_form, form_of, label_of
from engine.data.files import open_source
from engine.data.messages import Conversation, Message, Notes, note_lines
from engine.data.rows import BadRow
from engine.errors import UserError, nearest

SPARE = 32  # beyond N that are read where the first are taken: some may ask the question itself
SOURCES = ("source", "data_source")  # columns that say where a row is from


@dataclass(frozen=True)
class Question(Prompt):
    """A prompt with the key of what its row asks and its ground truth, whatever the template, the additions of the
    command line and the examples: the same under two models.
    """

    key: str = ""


@dataclass(frozen=True)
class Exemplar:
    """A worked answer: turns of user and assistant, the assistant's last. `asked` are its questions, spaces apart."""

    messages: list[Message]
    asked: frozenset[str]


@dataclass(frozen=True)
class FewShot:
    """`count` exemplars of those before each question, `form` turns or text; `drawn` under `seed`, or the first.

    `met` counts the questions that were read, and of those that are among the exemplars how many have others in their
    place, and how many fewer.
    """

    exemplars: tuple[Exemplar, ...] = ()
    count: int = 0
    form: str = "turns"
    drawn: bool = False
    seed: int = 0
    met: Counter = field(default_factory=Counter)

    @property
    def digest(self) -> str:
        """Of all exemplars that may be chosen from, the spare ones too."""
        return hashlib.sha256(json.dumps([e.messages for e in self.exemplars]).encode()).hexdigest()[:16]

    def chosen(self, key: str, question: str) -> list[Exemplar]:
        """Those before this question, in their order."""
        drawn = permutation(len(self.exemplars), self.seed, "few_shot", key).tolist() if self.drawn else None
        asked, met, found = _spaced(question), False, list[Exemplar]()
        for i in drawn or range(len(self.exemplars)):
            if len(found) == self.count:
                break
            if asked in self.exemplars[i].asked:
                met = True
            else:
                found.append(self.exemplars[i])
        self.met["left out"] += met
        self.met["short"] += len(found) < self.count
        return found

    def lines(self) -> list[str]:
        """What became of questions that are among the exemplars."""
        if not self.met["left out"]:
            return []
        fewer = f", {self.met['short']} of them with fewer than {self.count}" if self.met["short"] else ""
        return [
            f"few-shot: {self.met['left out']} prompts are among the examples themselves, and have others in their"
            f" place{fewer}"
        ]


def read_exemplars(
    name: str, count: int, chat: ChatTokenizer, *, form: str, drawn: bool, seed: int
) -> tuple[FewShot, list[str]]:
    """(the exemplars of a file, lines on what of it is not used). Raises UserError for a row that is none, and for
    fewer than `count`."""
    source = open_source(name, "train", None)
    first, found = first_form(source), list[Exemplar]()
    notes: Notes = Counter()
    for place, row in source.rows():
        if len(found) == count + SPARE and not drawn:
            break
        try:
            if isinstance(row, BadRow):
                raise row
            if (kind := form_of(row)) != first:
                raise BadRow(f"columns: the file begins with rows of {first}, this one is of {kind}")
            if label_of(row, is_answer=row.get("completion") is not None) is not None:
                raise BadRow("label: a row that says whether an answer was liked is no worked answer")
            found.append(_exemplar(conversation(row, kind, notes), chat, form, notes))
        except BadRow as problem:
            raise UserError(f"--few_shot_file {source.name}{place}: {problem}") from None
    if len(found) < count:
        raise UserError(f"--few_shot_file {name}: holds {len(found)} examples, --num_few_shot asks for {count}")
    return FewShot(tuple(found), count, form, drawn, seed), [f"{source.name}: {count} examples", *note_lines(notes)]


def _exemplar(said: Conversation, chat: ChatTokenizer, form: str, notes: Notes) -> Exemplar:
    """Raises BadRow for a conversation that is no worked answer, or that the chat template would change."""
    turns = [message for message in said.messages if message["role"] != "system"]
    if len(turns) < len(said.messages):
        notes["not used", "system turns of examples"] += 1
    if said.tools:
        notes["not used", "tools of examples"] += 1
    roles = [message["role"] for message in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise BadRow(
            f"messages: expected turns of user and assistant, the assistant's last, got {', '.join(roles[:6])}"
        )
    if extra := {key for message in turns for key in message} - {"role", "content", "name"}:
        raise BadRow(f"messages: expected turns of text alone, got {', '.join(sorted(extra))}")
    if form == "text" and len(turns) > 2:
        raise BadRow(f"messages: expected one question and one answer (--few_shot_as text), got {len(turns)} turns")
    if form == "turns":
        chat.spans(turns)
        text = chat.render([*turns, {"role": "user", "content": "?"}], add_generation_prompt=True)
        if any(message["content"].strip() not in text for message in turns):
            raise BadRow("messages: the chat template does not show the answer as it is: give --few_shot_as text")
    asked = frozenset(_spaced(message["content"]) for message in turns if message["role"] == "user")
    return Exemplar(turns, asked)


@dataclass(frozen=True)
class QuestionReader:
    """row → Question: as `reader` reads it, behind the exemplars. `source_column` says where a row is from; without it
    one of SOURCES, else the row's file.
    """

    reader: PromptReader
    few_shot: FewShot
    source_column: str | None = None

    def __call__(self, row: dict, notes: Notes) -> Question:
        """Raises BadRow."""
        said, ground_truth, dataset = self.reader.read(row, notes)
        key = key_of(said, ground_truth)
        named = SOURCES if self.source_column is None else (self.source_column,)
        column = next((column for column in named if isinstance(row.get(column), str) and row[column]), None)
        if column is None and self.source_column is not None:
            raise BadRow(f"{self.source_column}: expected text (--source_column){nearest(self.source_column, row)}")
        source = row[column] if column else ""
        notes.pop(("not used", column), None)
        chosen = self.few_shot.chosen(key, said.messages[-1]["content"]) if self.few_shot.count else []
        worded = self.reader.worded(said, notes)
        together = replace(worded, messages=self._behind(chosen, worded.messages))
        ids = self.reader.ids(together, notes)
        self.few_shot.met["read"] += 1
        return Question(ids, ground_truth, dataset, source, key)

    def _behind(self, chosen: list[Exemplar], messages: list[Message]) -> list[Message]:
        """The messages with the exemplars before the first that is not the system's, or before the question's text."""
        if not chosen:
            return messages
        template = self.reader.flags.prompt_template or "{prompt}"
        worded = [
            [
                *e.messages[:-2],
                e.messages[-2] | {"content": template.replace("{prompt}", e.messages[-2]["content"])},
                e.messages[-1],
            ]
            for e in chosen
        ]
        if self.few_shot.form == "text":
            blocks = [f"Question: {user['content']}\nAnswer: {answer['content']}\n\n" for user, answer in worded]
            question = f"Question: {messages[-1]['content']}\nAnswer:"
            return [*messages[:-1], messages[-1] | {"content": "".join(blocks) + question}]
        start = next(i for i, message in enumerate(messages) if message["role"] != "system")
        return [*messages[:start], *(turn for turns in worded for turn in turns), *messages[start:]]


def key_of(said: Conversation, ground_truth: Any) -> str:
    """64 bits that name what is asked and its answer."""
    content = json.dumps([said.messages, said.tools, ground_truth], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def told_apart(prompts: list[Prompt]) -> list[Question]:
    """The questions with a number behind the key of one that stands there again."""
    questions, seen = [prompt for prompt in prompts if isinstance(prompt, Question)], Counter[str]()
    numbered = []
    for question in questions:
        seen[question.key] += 1
        again = seen[question.key]
        numbered.append(question if again == 1 else replace(question, key=f"{question.key}-{again}"))
    return numbered


def _spaced(text: str) -> str:
    return " ".join(text.split())

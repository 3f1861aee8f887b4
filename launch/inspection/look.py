"""One pass over the rows: what each holds, as numbers and hashes of a fixed size, so that memory is bounded.

A kept example takes about 150 bytes (lengths, hashes of what is asked and answered, a sketch), whatever its length: 150
MB for a million. Texts are not kept; rows that are to be shown are read again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine.data.bad_rows import file_of, kind_of
from engine.data.conversations import asked_turns, conversation, form_of
from engine.data.cuts import UNCUT
from engine.data.judgements import EITHER_IS_NAMED, PROMPTS, Judgement
from engine.data.messages import Notes, read
from engine.data.preferences import conversations, said
from engine.data.prompts import ASKED, ReadPrompt
from engine.data.rows import BadRow, text
from engine.data.tokenise import Encoded, Encoder, Rows
from launch.inspection.likeness import PLACES, EvaluationSet, sketch_of, words_of

LISTED = 200  # bad rows that are kept by name
LABELS = 200  # sources within a dataset that are told apart
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """What a row says: what is asked, and what is answered, once or (a pair) twice."""

    asked: Messages
    answers: list[Messages]

    @property
    def messages(self) -> Messages:
        return [*self.asked, *(message for answer in self.answers for message in answer)]


@dataclass
class Looked:
    """An example, or a row without one: sequences as (tokens, trained tokens, those of them within the limit)."""

    lengths: list[tuple[int, int, int]]
    key: int
    said: Said
    truth: int = 0
    verifier: str = ""


class Reader(Protocol):
    """row → its examples, or why it is dropped. Raises BadRow."""

    @property
    def per_example(self) -> int: ...

    def __call__(self, row: dict, notes: Notes) -> list[Looked] | str: ...

    def shown(self, row: dict) -> list[Encoded]:
        """The sequences of each example of a row that is one, uncut."""

    def facts(self, row: dict) -> list[tuple[str, str]]:
        """What belongs to a row and is no token: (name, value)."""


def hashed(*values: Any) -> int:
    """63 bits that address a content."""
    content = json.dumps(values, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _key(*arrays: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.int64(array.nbytes).tobytes() + np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def measured(sequence: tuple[np.ndarray, np.ndarray], limit: int) -> tuple[int, int, int]:
    """(tokens, trained tokens, trained tokens within the limit); the first token is nobody's target."""
    ids, mask = sequence
    return len(ids), int(mask[1:].sum()), int(mask[1:limit].sum())


REST_UNREAD = "rows counted up to the limit alone, as the stage reads them: their rest cannot be tokenised"


@dataclass(frozen=True)
class AsFarAsItGoes:
    """A row read whole, to be counted; as the stage reads it, up to its limit, where the rest is what makes it bad."""

    whole: Callable[[dict, Notes], Any]
    cut: Callable[[dict, Notes], Any]

    def __call__(self, row: dict, notes: Notes) -> Any:
        noted: Notes = Counter()
        try:
            read = self.whole(row, noted)
        except BadRow:
            noted = Counter({(REST_UNREAD, ""): 1})
            read = self.cut(row, noted)  # which says why the stage cannot read it either
        notes.update(noted)
        return read


@dataclass(frozen=True)
class ConversationReader:
    """Rows of launch.sft. `encode` cuts nothing."""

    encode: Encoder
    text_column: str | None
    limit: int
    per_example: int = 1

    def __call__(self, row: dict, notes: Notes) -> list[Looked] | str:
        sequences = self.encode(row, notes)
        if isinstance(sequences, str):
            return sequences.replace(f" within {UNCUT} tokens", "")
        said_ = self._said(row)
        return [Looked([measured(s, self.limit)], _key(*s), said_) for s in sequences]

    def shown(self, row: dict) -> list[Encoded]:
        return [[sequence] for sequence in self.encode(row, Counter())]  # type: ignore[list-item]

    def facts(self, row: dict) -> list[tuple[str, str]]:
        return []

    def _said(self, row: dict) -> Said:
        if self.text_column is not None:
            return Said([], [[{"role": "assistant", "content": text(row, self.text_column)}]])
        messages = conversation(row, form_of(row)).messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return Said(messages[:last], [messages[last:]])


@dataclass(frozen=True)
class PairReader:
    """Rows of launch.dpo. `encode` cuts nothing."""

    encode: Encoder
    judgement: Judgement
    limit: int
    per_example: int = 2

    def __call__(self, row: dict, notes: Notes) -> list[Looked] | str:
        sequences = self.encode(row, notes)
        if isinstance(sequences, str):
            return sequences.replace(f" within {UNCUT} tokens", "")
        return [Looked([measured(s, self.limit) for s in sequences], _key(*sum(sequences, ())), self._said(row))]

    def shown(self, row: dict) -> list[Encoded]:
        return [self.encode(row, Counter())]  # type: ignore[list-item]

    def facts(self, row: dict) -> list[tuple[str, str]]:
        return []

    def _said(self, row: dict) -> Said:
        chosen, rejected = (side.messages for side in conversations(row, self.judgement))
        parting = next(
            i for i, (a, b) in enumerate(zip([*chosen, None], [*rejected, None], strict=False)) if not _same(a, b)
        )
        return Said(chosen[:parting], [chosen[parting:], rejected[parting:]])


def _same(a: dict | None, b: dict | None) -> bool:
    return a is not None and b is not None and said(a) == said(b)


@dataclass(frozen=True)
class ProblemReader:
    """Rows of launch.ppo and launch.grpo; `limit` is a prompt's."""

    read: ReadPrompt
    limit: int
    per_example: int = 1

    def __call__(self, row: dict, notes: Notes) -> list[Looked] | str:
        prompt = self.read(row, notes)
        asked = next(column for column in ASKED if row.get(column) is not None)
        messages = read(asked_turns(row, asked), asked, Counter()).messages
        while messages[-1]["role"] == "assistant":  # a worked answer, which the reader leaves out as well
            messages = messages[:-1]
        counted = int(len(prompt.ids) <= self.limit)
        truth = hashed(prompt.ground_truth, prompt.dataset)
        lengths = [(len(prompt.ids), counted, counted)]
        return [Looked(lengths, _key(prompt.ids), Said(messages, []), truth, prompt.verifier)]

    def shown(self, row: dict) -> list[Encoded]:
        ids = self.read(row, Counter()).ids
        return [[(ids, np.zeros(len(ids), bool))]]

    def facts(self, row: dict) -> list[tuple[str, str]]:
        prompt = self.read(row, Counter())
        return [("verifier", prompt.verifier), ("ground truth", str(prompt.ground_truth)[:2000])]


def asked_text(row: dict) -> str:
    """What the user says in a row of any form: the text of an evaluation's prompt. Raises BadRow."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        chosen, _ = conversations(row, EITHER_IS_NAMED)
        return _of_user(chosen.messages)
    column = next((c for c in dict.fromkeys((*ASKED, *PROMPTS)) if row.get(c) is not None), None)
    if column is None:
        raise BadRow(f"columns: expected what is asked, as one of {', '.join(ASKED)}, got {', '.join(sorted(row)[:6])}")
    return _of_user(read(asked_turns(row, column), column, Counter()).messages)


def _of_user(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


# --- many rows --------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[Any, bool]] = {  # name → (dtype, a number for each sequence of an example)
    "row": (np.int64, False),
    "tokens": (np.int32, True),
    "trained": (np.int32, True),
    "left": (np.int32, True),
    "key": (np.int64, False),
    "asked": (np.int64, False),
    "answers": (np.int64, True),
    "turns": (np.int32, False),
    "system": (np.bool_, False),
    "words": (np.int64, False),
    "label": (np.int16, False),
}


@dataclass
class Found:
    """What some rows hold: `columns` by example, and counts."""

    per_example: int
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    sketches: list[np.ndarray] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    bad: list[tuple[int, str, str]] = field(default_factory=list)  # (row, place, why)
    num_bad: int = 0
    files: Counter = field(default_factory=Counter)  # rows of each
    bad_files: Counter = field(default_factory=Counter)  # bad rows of each
    dropped: Counter = field(default_factory=Counter)
    notes: Notes = field(default_factory=Counter)
    forms: Counter = field(default_factory=Counter)
    verifiers: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    overlaps: list[tuple[int, int, int, float]] = field(default_factory=list)  # (row, set, prompt, share covered)
    overlapping: dict[int, set[int]] = field(default_factory=dict)  # set → rows that cover a prompt of it

    def add_bad(self, row: int, place: str, why: str) -> None:
        self.num_bad += 1
        self.bad_files[file_of(place)] += 1
        self.reasons[kind_of(why)] += 1
        if len(self.bad) < LISTED:
            self.bad.append((row, place, why))

    def closed(self) -> Found:
        """With arrays in place of lists."""
        for name, (dtype, by_sequence) in COLUMNS.items():
            shape = (-1, self.per_example) if by_sequence else (-1,)
            self.columns[name] = [np.array(self.columns[name], dtype).reshape(shape)]
        self.sketches = [np.array(self.sketches, np.uint16).reshape(-1, PLACES)]
        return self

    def label(self, name: str) -> int:
        """The number of a source within the dataset; those beyond the first 200 are one."""
        if name not in self.labels and len(self.labels) >= LABELS:
            name = "others"
        return self.labels.setdefault(name, len(self.labels))


@dataclass(frozen=True)
class Lens:
    """Rows → Found; it can be sent to a process."""

    read: Reader
    against: tuple[EvaluationSet, ...] = ()

    def __call__(self, rows: Rows) -> Found:
        found = Found(self.read.per_example, rows=len(rows))
        for number, (place, row) in enumerate(rows):
            found.files[file_of(place)] += 1
            noted: Notes = Counter()
            try:
                if isinstance(row, BadRow):
                    raise row
                examples = self.read(row, noted)
            except BadRow as bad:
                found.add_bad(number, place, str(bad))
                continue
            found.notes += noted
            if isinstance(examples, str):
                found.dropped[examples] += 1
                continue
            found.forms[_used(row, noted)] += 1
            self._add(found, number, row, examples)
        return found.closed()

    def _add(self, found: Found, number: int, row: dict, examples: list[Looked]) -> None:
        of_row = examples[0].said
        messages = [words_of(message["content"]) for message in of_row.messages]
        words = np.concatenate([np.zeros(0, np.uint64), *messages])
        sketch = sketch_of(words)
        found.overlaps += [
            (number, s, prompt, share)
            for s, evaluation in enumerate(self.against)
            for prompt, share in evaluation.covered_by(messages)
        ]
        source = row.get("source")
        label = found.label(source[:80] if isinstance(source, str) else "")
        for looked in examples:
            tokens, trained, left = zip(*looked.lengths, strict=True)
            answers = [looked.truth] if looked.verifier else [hashed(answer) for answer in looked.said.answers]
            values = {
                "row": number,
                "tokens": tokens,
                "trained": trained,
                "left": left,
                "key": looked.key,
                "asked": looked.key if looked.verifier else hashed(looked.said.asked),
                "answers": answers,
                "turns": sum(m["role"] == "user" for m in looked.said.asked),
                "system": any(m["role"] == "system" for m in looked.said.asked),
                "words": len(words),
                "label": label,
            }
            for name, value in values.items():
                found.columns[name].append(value)
            found.sketches.append(sketch)
            if looked.verifier:
                found.verifiers[looked.verifier] += 1


def _used(row: dict, noted: Notes) -> str:
    """The columns of a row that say something and were read."""
    unread = {which for what, which in noted if what == "not used"}
    return ", ".join(sorted(column for column, value in row.items() if value is not None and column not in unread))

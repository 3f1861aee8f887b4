"""Which of several answers is better, in rows that say so by a label or by scores.

Two answers, `response_a` and `response_b` for example, with a label's column or a column of scores each; or
`completions`, a list of answers with scores; or rows of one answer and its score, those with one prompt together
(HelpSteer).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.data import rows
from engine.data.files import Source
from engine.data.messages import Notes, parsed
from engine.data.rows import BadRow
from engine.errors import nearest

PAIRS = (
    ("response_a", "response_b"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response_0", "response_1"),
    ("answer_a", "answer_b"),
)
ANSWERS = ("response", "content", "text", "completion", "answer")  # the names of one of several completions' text
LISTS = ("completions", "responses", "answers")
SIGNED = ("overall_preference", "preference_strength")  # HelpSteer: below 0 the first is better, above it the second
INDEXED = ("better_response_id",)  # PKU-SafeRLHF: the number in the answer's name
PROMPTS = ("prompt", "question", "query", "instruction", "context", "conversations")
TOGETHER = (*PROMPTS, "input", "system", "tools")  # rows of one answer that agree in these are answers to one prompt
TIES = ("tie", "both", "neither", "equal", "none", "tie (bothbad)")


@dataclass(frozen=True)
class Judgement:
    """How the command line says which answer is better: a label's column and what its numbers mean, or scores."""

    column: str | None = None
    numbers: str | None = None  # 'sign' or 'index'
    scores: tuple[str, ...] | None = None


EITHER_IS_NAMED = Judgement()  # the row says chosen and rejected itself


class Tie(Exception):
    """A pair of which neither answer is better, and why."""


def judged(row: dict, judgement: Judgement, notes: Notes) -> dict:
    """The row with `chosen` and `rejected` in place of what they were found by. Raises BadRow, and Tie."""
    if (judgement.column or judgement.scores) and (row.get("chosen") is not None or row.get("rejected") is not None):
        raise BadRow("chosen: expected answers to be judged (--preference_column, --chosen_by_score), got judged ones")
    pair = next((pair for pair in PAIRS if all(row.get(column) is not None for column in pair)), None)
    if judgement.scores and len(judgement.scores) == 1:
        return _by_score(row, judgement.scores[0], notes)
    if judgement.column or judgement.scores:
        if pair is None:
            raise BadRow(
                f"columns: expected two answers, {' or '.join(' and '.join(pair) for pair in PAIRS)}, got"
                f" {', '.join(sorted(row)[:6])}"
            )
        read = {*pair, *(judgement.scores or (judgement.column,))}
        better, worse = _by_scores(row, pair, judgement.scores) if judgement.scores else _by_label(row, pair, judgement)
        rest = {column: value for column, value in row.items() if column not in read}
        return rest | {"chosen": row[better], "rejected": row[worse]}
    if row.get("chosen") is None and row.get("rejected") is None:
        if pair is not None:
            raise BadRow(
                f"chosen: got {' and '.join(pair)}: expected --preference_column, the column that says which is better,"
                " or --chosen_by_score with the columns of their scores"
            )
        if isinstance(row.get("completions"), list):
            raise BadRow("chosen: got completions: expected --chosen_by_score, the name of the score to choose by")
    return row


def _by_label(row: dict, pair: tuple[str, str], judgement: Judgement) -> tuple[str, str]:
    """(the better column, the worse one), as --preference_column says. Raises BadRow, and Tie."""
    column = str(judgement.column)
    if row.get(column) is None:
        raise BadRow(f"{column}: expected which answer is better, got nothing{nearest(column, row)}")
    label, suffixes = row[column], [name.removeprefix("response").removeprefix("answer").strip("_") for name in pair]
    number = number_in(label)
    if number is None:
        word = str(label).strip().lower()
        if word in TIES:
            raise Tie("labelled a tie")
        for i, suffix in enumerate(suffixes):
            if word in (suffix, pair[i], f"model_{suffix}", f"assistant_{suffix}", ("first", "second")[i]):
                return pair[i], pair[1 - i]
        raise BadRow(f"{column}: expected {' or '.join(suffixes)} or tie, got {str(label)[:40]!r}")
    meaning = judgement.numbers or ("sign" if column in SIGNED else "index" if column in INDEXED else "")
    if not meaning:
        raise BadRow(
            f"{column}: a number: expected --preference_numbers sign (below 0 the first is better, above it the second)"
            " or index (the number of the better one)"
        )
    if meaning == "sign":
        if number == 0:
            raise Tie("labelled a tie")
        return pair if number < 0 else (pair[1], pair[0])
    numbered = [int(suffix) if suffix.isdigit() else i for i, suffix in enumerate(suffixes)]
    if number not in numbered:
        raise BadRow(f"{column}: expected {' or '.join(map(str, numbered))}, the better one's number, got {label}")
    better = numbered.index(int(number))
    return pair[better], pair[1 - better]


def _by_scores(row: dict, pair: tuple[str, str], columns: tuple[str, ...]) -> tuple[str, str]:
    """(the better column, the worse one), by a column of scores for each. Raises BadRow, and Tie."""
    first, second = (_score(row, column, column) for column in columns)
    if first == second:
        raise Tie("equal scores")
    return pair if first > second else (pair[1], pair[0])


def _by_score(row: dict, name: str, notes: Notes) -> dict:
    """The row with the best and the worst of its completions. Raises BadRow, and Tie."""
    row = row | {column: parsed(row[column], column) for column in LISTS if isinstance(row.get(column), str)}
    column = next((column for column in LISTS if isinstance(row.get(column), list)), None)
    if column is None:
        raise BadRow(f"completions: expected a list of answers with {name}, got nothing{nearest('completions', row)}")
    answers = []
    for i, given in enumerate(row[column]):
        if not isinstance(given, dict):
            raise BadRow(f"{column}[{i}]: expected an answer with {name}, got {rows.kind(given)}")
        key = next((key for key in ANSWERS if given.get(key) is not None), None)
        if key is None:
            raise BadRow(f"{column}[{i}]: expected one of {', '.join(ANSWERS)}, got {', '.join(sorted(given)[:6])}")
        answers.append((_score(given, name, f"{column}[{i}].{name}"), given[key]))
        for unread in {k for k, value in given.items() if value is not None} - {key, name, name.split(".")[0]}:
            notes["not used", f"{column}[].{unread}"] += 1
    if len(answers) < 2:
        raise Tie("only one answer")
    best, worst = max(answers, key=lambda answer: answer[0]), min(answers, key=lambda answer: answer[0])
    if best[0] == worst[0]:
        raise Tie("equal scores")
    rest = {key: value for key, value in row.items() if key != column}
    return rest | {"chosen": best[1], "rejected": worst[1]}


def _score(row: dict, name: str, where: str) -> float:
    """A score by its name, or by a path of names: annotations.helpfulness.Rating. Raises BadRow."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    number = number_in(value)
    if number is None:
        got = f"nothing{nearest(name, row)}" if value is None else repr(str(value)[:40])
        raise BadRow(f"{where}: expected a score, got {got}")
    return number


def number_in(value: Any) -> float | None:
    """A finite number, or the text of one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def gathered(source: Source, judgement: Judgement) -> Source:
    """The source with rows of one answer each (prompt, response, score) gathered into one row for each prompt, where
    they follow each other; any other source as it is.
    """
    if not judgement.scores or len(judgement.scores) != 1:
        return source
    first = next((row for _, row in source.rows() if isinstance(row, dict)), {})
    if any(isinstance(first.get(column), list) for column in LISTS) or not isinstance(first.get("response"), str):
        return source
    name = judgement.scores[0].split(".")[0]

    def together() -> Iterator[tuple[str, dict | BadRow]]:
        place, head, key = "", None, ""
        for here, row in source.rows():
            if isinstance(row, BadRow):
                yield here, row
                continue
            rest = {column: value for column, value in row.items() if column not in ("response", name)}
            answer = {column: row[column] for column in ("response", name) if column in row}
            asked = {column: rest[column] for column in TOGETHER if rest.get(column) is not None}
            question = json.dumps(asked, default=str)
            if head is not None and asked and question == key:
                head["completions"].append(answer)
                head |= {column: value for column, value in rest.items() if head.get(column) is None}
                continue
            if head is not None:
                yield place, head
            place, head, key = here, rest | {"completions": [answer]}, question
        if head is not None:
            yield place, head

    return Source(source.name, source.fingerprint, together)

"""Tables of accuracies: what the caller hands over, and what files of launch.evaluate add up to."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError, nearest
from launch.reports.runs import as_number, names_of, rows_of

ROW = ("name", "accuracy", "low", "high")
MOST_ANSWERS = 200


@dataclass(frozen=True)
class Row:
    """One model's accuracy, with its interval where there is one, and what else its row says."""

    name: str
    accuracy: float
    low: float | None = None
    high: float | None = None
    also: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What each model answered to one prompt: model → (text, score or None)."""

    prompt: str
    truth: str
    answers: dict[str, tuple[str, float | None]]


@dataclass(frozen=True)
class Results:
    """The table at the top of the page."""

    title: str
    rows: list[Row]
    answers: list[Answer] = field(default_factory=list)
    note: str = ""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row.also))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(name for answer in self.answers for name in answer.answers))


# --- a table that is handed over --------------------------------------------------------------------------------------


def read_results(given: dict[str, Any] | list[Any] | str | Path) -> Results:
    """Of a JSON file, or of what it would hold (launch.report.report says which form). Raises UserError."""
    where = "results"
    if isinstance(given, str | Path):
        where = f"--results {given}"
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except OSError as problem:
            raise UserError(f"{where}: {problem.strerror}") from None
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{where}: not JSON ({problem})") from None
    if isinstance(given, list):
        given = {"rows": given}
    if not isinstance(given, dict) or not isinstance(given.get("rows", []), list):
        raise UserError(f"{where}: expected an object with a list `rows`")
    if unknown := given.keys() - {"title", "rows", "answers", "note"}:
        name = sorted(map(str, unknown))[0]
        raise UserError(f"{where}: unknown key {name}{nearest(name, ('title', 'rows', 'answers', 'note'))}")
    rows = [_row(row, f"{where}, row {number}") for number, row in enumerate(given.get("rows", []), 1)]
    answers = given.get("answers") or []
    if not isinstance(answers, list):
        raise UserError(f"{where}: expected a list `answers`")
    read = [_answer(a, f"{where}, answer {number}") for number, a in enumerate(answers, 1)]
    note = str(given.get("note") or "")
    if len(read) > MOST_ANSWERS:
        note = f"{note} {MOST_ANSWERS} of {len(read):,} answers are shown.".strip()
    return Results(str(given.get("title") or "Results"), rows, read[:MOST_ANSWERS], note)


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with name and accuracy")
    for key in ("name", "accuracy"):
        if key not in row:
            raise UserError(f"{where}: {key} is missing{nearest(key, map(str, row))}")
    numbers = {key: as_number(row[key]) for key in ROW[1:] if row.get(key) is not None}
    for key, number in numbers.items():
        if number is None or not 0 <= number <= 1:
            raise UserError(f"{where}: expected {key} in [0, 1], got {row[key]!r:.60}")
    if "accuracy" not in numbers:
        raise UserError(f"{where}: expected accuracy in [0, 1], got None")
    also = {str(key): plain(value) for key, value in row.items() if key not in ROW}
    return Row(str(row["name"]), numbers["accuracy"] or 0.0, numbers.get("low"), numbers.get("high"), also)


def _answer(row: Any, where: str) -> Answer:
    if not isinstance(row, dict) or not isinstance(row.get("answers"), dict):
        raise UserError(f"{where}: expected an object with prompt and answers, an object of model and text")
    found = {}
    for model, answer in row["answers"].items():
        text, score = (answer.get("text"), answer.get("score")) if isinstance(answer, dict) else (answer, None)
        found[str(model)] = ("" if text is None else str(text), as_number(score))
    return Answer(str(row.get("prompt", "")), str(row.get("truth") or row.get("ground_truth") or ""), found)


def plain(value: Any) -> str:
    """A value of a table in words."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# --- files of launch.evaluate -----------------------------------------------------------------------------------------


def read_evaluations(paths: Sequence[Path]) -> list[Results]:
    """For every file a table by verifier, with the interval that launch.evaluate prints. Raises UserError."""
    return [_evaluation(path, name) for path, name in zip(paths, names_of(list(paths)), strict=True)]


def _evaluation(path: Path, name: str) -> Results:
    counts: Counter[str] = Counter()
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"--evaluations {path}: no such file{nearest(path.name, siblings[:1000])}")
    rows = [row for row in rows_of(path, lambda kind: counts.update([kind])) if "score" in row and "response" in row]
    if not rows:
        raise UserError(f"--evaluations {path}: no row with response and score: is it of launch.evaluate --output?")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(label(row.get("dataset")), []).append(row)
    groups = dict(sorted(kinds.items()))
    table = [_accuracy(kind, group) for kind, group in groups.items()]
    if len(groups) > 1:
        table.append(_accuracy("all", rows))
    torn = f" {counts.total():,} torn lines are left out." if counts else ""
    lengths = [row.get("finish_reason") == "stop" for row in rows if "finish_reason" in row]
    ended = f" {np.mean(lengths):.1%} ended by themselves." if lengths else ""
    return Results(name, table, note=f"{len(rows):,} responses.{ended}{torn}")


def label(dataset: Any) -> str:
    return "+".join(sorted(map(str, dataset))) if isinstance(dataset, list) else str(dataset or "?").lower()


def _accuracy(name: str, rows: list[dict[str, Any]]) -> Row:
    """Prompts by samples, as launch.evaluate has them: a prompt is its `key`, else its text, of which there may be
    several.
    """
    from engine.train import interval  # takes torch along, which nothing else here does

    seen: Counter[tuple[str, str]] = Counter()
    scores: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        prompt = json.dumps([row["key"]] if "key" in row else [row.get("prompt"), row.get("ground_truth")])
        sample = f"{row.get('seed')}/{row.get('sample')}"
        seen[prompt, sample] += 1
        scores.setdefault((prompt, seen[prompt, sample]), []).append(_score(row))
    k = max(Counter(map(len, scores.values())).items(), key=lambda item: (item[1], item[0]))[0]
    whole = np.array([s for s in scores.values() if len(s) == k])
    mean, low, high = interval.accuracy(whole)
    left_out = len(scores) - len(whole) + int(np.isnan(whole).any(1).sum())
    also = {"prompts": f"{len(scores):,}", "samples": str(k)}
    if left_out:
        also["left out"] = f"{left_out:,} prompts without all verdicts"
    return Row(name, 0.0 if math.isnan(mean) else mean, low, high, also)


def _score(row: dict[str, Any]) -> float:
    """NaN: there is no verdict."""
    score = as_number(row["score"])
    known = score is not None and 0 <= score <= 1 and row.get("status") != "error"
    return float(score) if known and score is not None else math.nan

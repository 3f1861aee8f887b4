"""The form of a response: <think>…</think> and then <answer>…</answer>, each once, in this order, none empty.

The ground truth names the tags: {} for think and answer; {"tags": ["think"]} for a thought and then an answer in plain
text; {"tags": [...]} for others, in their order. {"opened": true} says that the prompt's template has already written
the first opening tag (as those of reasoning models do). With several tags nothing but white space stands before,
between and behind them. It judges the form alone: `dataset: ["math", "format"]` sums both.
open-instruct has no such verifier, so every mode is the default.
"""

import re
from typing import NamedTuple

from verifiers.strings import is_blank, nearest, shown
from verifiers.verdict import GroundTruthError, Verdict, failed, passed, read_structure

DEFAULT = ("think", "answer")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,30}")
MAX_TAGS = 8


class Form(NamedTuple):
    """The tags, in order, and whether the prompt has opened the first."""

    tags: tuple[str, ...]
    opened: bool


def verify(response: str, ground_truth: object, mode: str = "default") -> Verdict:
    """1 if the response has the form, else 0. Raises GroundTruthError; else total and linear."""
    tags, opened = parse(ground_truth)
    place = 0
    for i, tag in enumerate(tags):
        start, end = f"<{tag}>", f"</{tag}>"
        written = response.count(start), response.count(end)
        first = 0 if opened and i == 0 else 1
        if written != (first, 1):
            return failed(f"{written[0]} {start} and {written[1]} {end}, wanted {first} and 1")
        begin = response.find(start) if first else 0
        if begin < place or response[place:begin].strip():
            return failed(f"{start} does not stand {'where the one before ends' if i else 'at the start'}")
        begin, stop = begin + len(start) * first, response.find(end)
        if stop < begin or is_blank(response[begin:stop]):
            return failed(f"{start}{end} is empty or out of order")
        place = stop + len(end)
    rest = response[place:]
    if len(tags) == 1:
        return failed(f"no answer behind </{tags[0]}>") if is_blank(rest) else passed("in the form")
    return failed(f"text behind </{tags[-1]}>: {shown(rest, 30)}") if rest.strip() else passed("in the form")


def parse(ground_truth: object) -> Form:
    """The form that a ground truth asks for. Raises GroundTruthError."""
    row = read_structure(ground_truth, "ground_truth")
    if not isinstance(row, dict):
        raise GroundTruthError(f'ground_truth: expected {{}} or {{"tags": ["think", "answer"]}}, found {shown(row)}')
    for key in row:
        if key not in Form._fields:
            raise GroundTruthError(f"ground_truth: unknown key {shown(key)}{nearest(key, Form._fields)}")
    tags, opened = row.get("tags"), row.get("opened")
    tags, opened = DEFAULT if tags is None else tags, False if opened is None else opened
    if not isinstance(tags, (list, tuple)) or not all(isinstance(t, str) and NAME.fullmatch(t) for t in tags):
        raise GroundTruthError(f"ground_truth: tags must be a list of names without brackets, found {shown(tags)}")
    if not 1 <= len(tags) <= MAX_TAGS or len(set(tags)) < len(tags):
        raise GroundTruthError(f"ground_truth: tags must be 1 to {MAX_TAGS} different names, found {shown(tags)}")
    if not isinstance(opened, bool):
        raise GroundTruthError(f"ground_truth: opened must be true or false, found {shown(opened)}")
    return Form(tuple(tags), opened)

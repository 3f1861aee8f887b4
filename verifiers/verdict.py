"""What a verifier returns, and the reading of a ground truth that all verifiers share."""

import json
from ast import literal_eval as read_python_literal
from typing import NamedTuple

from verifiers.strings import shown

MAX_CHARACTERS = 256 * 1024  # a longer response is 'too long' to every verifier but the last-number rules
MAX_GROUND_TRUTH = 1024 * 1024


class Verdict(NamedTuple):
    """The outcome of one check.

    score: float in [0, 1]; its scale in a reward belongs to the launch file.
    reason: one line for a person ('extracted 41, expected 42').
    status: 'ok', or 'error' when there is no verdict (a bad ground truth, a worker that was killed): the row must
        be masked from training and counted, because its score is not a zero that the response earned.
    """

    score: float
    reason: str
    status: str = "ok"


def passed(reason: str) -> Verdict:
    """The verdict 1, with its reason."""
    return Verdict(1.0, reason)


def failed(reason: str) -> Verdict:
    """The verdict 0, with its reason."""
    return Verdict(0.0, reason)


def error(reason: str) -> Verdict:
    """No verdict, with what prevented it."""
    return Verdict(0.0, reason, "error")


class GroundTruthError(ValueError):
    """A row that no response could be judged by. Raised by `check`, before training, and never by `verify`."""


def read_structure(ground_truth: object, what: str) -> object:
    """A ground truth that may be JSON or a Python literal in a string (published rows have both) as an object.

    Raises GroundTruthError, naming `what`, when it is neither. A literal is data: nothing in it is executed.
    """
    if not isinstance(ground_truth, str):
        return ground_truth
    if len(ground_truth) > MAX_GROUND_TRUTH:
        raise GroundTruthError(f"{what}: {len(ground_truth)} characters is too long")
    try:
        return json.loads(ground_truth)
    except (ValueError, RecursionError):
        pass
    try:
        return read_python_literal(ground_truth)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise GroundTruthError(f"{what}: neither JSON nor a literal: {shown(ground_truth)}") from None

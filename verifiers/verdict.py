"""What a verifier returns, and the reading of a response that all verifiers share."""

import json
import re
import unicodedata
from ast import literal_eval as read_python_literal
from typing import NamedTuple

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
    return Verdict(1.0, reason)


def failed(reason: str) -> Verdict:
    return Verdict(0.0, reason)


def error(reason: str) -> Verdict:
    return Verdict(0.0, reason, "error")


class GroundTruthError(ValueError):
    """A row that no response could be judged by. Raised by `check`, before training, and never by `verify`."""


def shown(text: object, width: int = 60) -> str:
    """`text` on one short line that any terminal or log can print, for a reason."""
    line = " ".join(str(text)[: 4 * width].split()).encode("utf-8", "backslashreplace").decode("utf-8")
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= width else line[: width - 1] + "…"


def is_blank(response: str) -> bool:
    """True when a reader would see nothing: only spaces, control and format characters, or chat markers.

    An empty text obeys 'no commas', so a policy that may be paid for one learns to say nothing.
    """
    start = response[:4096]  # a visible character beyond 4096 invisible ones is degenerate as well
    start = re.sub(r"<\|[^|<>\s]{1,40}\|>|</?s>|</?think>|</?answer>", "", start)
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zs") for c in start)


def without_thinking(response: str) -> str:
    """The text after the last '</think>', without '<|assistant|>' and answer tags, stripped.

    Source: open-instruct e6c3044, ground_truth_utils.remove_thinking_section, which its IFEval verifiers call first.
    """
    text = response.replace("<|assistant|>", "").strip().split("</think>")[-1]
    return text.replace("<answer>", "").replace("</answer>", "").strip()


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

"""What can be asked of a response besides its verdict: the answer that the verifier reads in it, so that equal answers
can be counted (majority@n), and IFEval's loose verdict.

An answer is had by gsm8k (the number, whatever its spelling), math (the extracted text, compared as `math` compares),
string_matcher (the tagged text, normalised) and multiple_choice (the letter). ifeval, format, json_schema, string_f1,
several verifiers of one row and a user's own have no notion of one: no vote is defined for them.
"""

from __future__ import annotations

import hashlib
from typing import Any

from verifiers import answers, choice, gsm8k
from verifiers.custom import judged as judged_by_own
from verifiers.ifeval import google
from verifiers.math.equal import equal
from verifiers.math.extract import extract
from verifiers.route import known_name, verifier_name, verify
from verifiers.strings import is_blank
from verifiers.verdict import MAX_CHARACTERS, GroundTruthError, Verdict

VOTING = ("gsm8k", "math", "string_matcher", "multiple_choice")
VERDICT, ANSWER, LOOSE = "verdict", "answer", "loose"  # what can be asked
MAX_ANSWER = 400  # characters; a longer answer is the same only as itself


def asked_of(dataset: Any, ground_truth: Any) -> tuple[str, ...]:
    """The verdict, and what this row's verifier can tell besides."""
    if votes(dataset):
        return VERDICT, ANSWER
    return (VERDICT, LOOSE) if num_instructions(dataset, ground_truth) else (VERDICT,)


def judged(response: str, ground_truth: Any, dataset: Any, what: str = VERDICT, **options: Any) -> Verdict:
    """What a worker process of the pool says: the verdict, the loose one, or the answer as one (its text is the reason,
    the score 1, or 0 where there is none). Total."""
    if what == ANSWER:
        found = answer(response, ground_truth, dataset, options["mode"])
        return Verdict(0.0, "") if found is None else Verdict(1.0, found)
    options["loose"] = what == LOOSE
    return (judged_by_own if "module" in options else verify)(response, ground_truth, dataset, **options)


def num_instructions(dataset: Any, ground_truth: Any) -> int:
    """How many instructions IFEval's row has; 0 for other rows."""
    try:
        return len(google.parse(ground_truth)) if verifier_name(dataset, ground_truth) == "ifeval" else 0
    except GroundTruthError:  # another verifier's, or several
        return 0


def votes(dataset: object) -> bool:
    """Whether the verifier that `dataset` names reads an answer."""
    try:
        return known_name(dataset) in VOTING
    except GroundTruthError:
        return False


def answer(response: str, ground_truth: object, dataset: object, mode: str = "default") -> str | None:
    """The answer, or None where none can be read. Total, like `verify`: it never raises. In the modes of the references
    the answer is what their rule extracts; of `math`, which tries several, what the default extracts."""
    try:
        found = _answer(response, ground_truth, known_name(dataset), mode)
    except Exception:  # the promise above outranks our own mistakes; no answer is no vote
        return None
    if found is None or len(found) <= MAX_ANSWER:
        return found
    return f"{found[:80]}… {hashlib.sha256(found.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _answer(response: str, ground_truth: object, name: str, mode: str) -> str | None:
    if name == "gsm8k" and mode != "default":
        return gsm8k.reference_answer(response, mode).lower()
    if name == "gsm8k":
        number = gsm8k.value(gsm8k.answered(response)[0])
        return None if number is None or is_blank(response) else str(number)
    if len(response) > MAX_CHARACTERS:
        return None
    if name == "math":
        return None if is_blank(response) else extract(response)
    if name == "string_matcher":
        text = answers.tagged(response) if mode == "default" else answers.reference_tagged(response)
        if text is None or is_blank(text):
            return None
        return answers.normalised(text) if mode == "default" else answers.squad(text)
    if name == "multiple_choice":
        text = response.rpartition("</think>")[2]
        if "<think>" in text or is_blank(text):
            return None
        return choice.chosen(text[-choice.TAIL :], choice.parse(ground_truth).options)[0]
    return None


def same(a: str, b: str, dataset: object) -> bool:
    """Whether two answers of one verifier are the same."""
    return a == b or (isinstance(dataset, str) and known_name(dataset) == "math" and equal(a, b))

"""From a row's `dataset` field to its verifier.

The names are those of the published RLVR rows, in any case: gsm8k, math, ifeval, ifeval_old, string_matcher, string_f1
(also f1), and multiple_choice, format, json_schema. 'ifeval' looks at the ground truth: `func_name` is the RLVR form
that Tülu 3 carries under that name, `instruction_id` IFEval's own. What would run code of the model, or ask another
model, is refused by name. A user's own verifier has the names that its file declares (custom.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from verifiers import answers, choice, gsm8k, json_schema, tags
from verifiers.ifeval import google, tulu
from verifiers.math import extract_reference
from verifiers.math import verify as verify_math
from verifiers.strings import nearest, shown
from verifiers.verdict import MAX_CHARACTERS, GroundTruthError, Verdict, error, failed, read_structure

if TYPE_CHECKING:
    from verifiers.custom import Own

MODES = ("default", "reference", "tulu3")
# verify(response, ground truth, mode) and what reads the ground truth; both raise GroundTruthError
OTHERS: dict[str, tuple[Callable[[str, object, str], Verdict], Callable[[object], object]]] = {
    "string_matcher": (answers.verify_match, answers.accepted),
    "string_f1": (answers.verify_f1, answers.accepted),
    "multiple_choice": (choice.verify, choice.parse),
    "format": (tags.verify, tags.parse),
    "json_schema": (json_schema.verify, json_schema.parse),
}
VERIFIERS = ("gsm8k", "math", "ifeval", "ifeval_old", *OTHERS)
ALIASES = {"f1": "string_f1"}
NOT_HERE = (  # open-instruct's names, or how they begin, and why there is no such verifier
    ("code", "it judges by running code that the model wrote, and code is not executed here"),
    ("general", "it asks another model to judge, which is not done here"),
)


def verify(
    response: str,
    ground_truth: object,
    dataset: str | list[str],
    mode: str = "default",
    *,
    loose: bool = False,
    combine: str = "fraction",
    own: Own | None = None,
) -> Verdict:
    """The verdict on one response. Total: for any `response` and any ground truth it returns, and it never raises.

    response: the text of the policy, any str. ground_truth: of the row (a text, an object, or JSON). dataset: the row's
    verifier; a list of names with a list of ground truths is judged one by one and the scores are *summed*, as
    open-instruct e6c3044 does (the only case of a score above 1).
    mode: 'default' (right), 'reference' (what open-instruct e6c3044 rewards), 'tulu3' (what it rewarded when Tülu 3 was
    trained). IFEval only: loose (any of eight variants), combine 'fraction' or 'all' of a row's constraints. own: a
    user's verifier (custom.py), for rows that name it.
    A row that cannot be judged has status 'error', not a zero; `check` finds such rows beforehand. Same arguments,
    same verdict: nothing depends on the clock, on load or on what was asked before.
    """
    if isinstance(dataset, (list, tuple)):
        return verify_all(response, ground_truth, dataset, mode, loose=loose, combine=combine, own=own)
    try:
        check_mode(mode)
        if own is not None and own.is_named(dataset):
            return own.judge(response, ground_truth)
        name = verifier_name(dataset, ground_truth, own)
        if name == "gsm8k":
            return gsm8k.verify(response, gsm8k_label(ground_truth), mode)
        if len(response) > MAX_CHARACTERS:
            return failed(f"too long: {len(response)} characters")
        if name == "math":
            return verify_math(response, math_label(ground_truth), mode)
        if name in OTHERS:
            return OTHERS[name][0](response, ground_truth, mode)
        if name == "ifeval_old":
            return tulu.verify(response, ground_truth, mode)
        return google.verify(response, ground_truth, "default" if mode == "default" else "reference", loose, combine)
    except GroundTruthError as problem:
        return error(str(problem))
    except Exception as problem:  # the promise above outranks our own mistakes; counted and masked like any error
        return error(f"{type(problem).__name__}: {shown(problem)}")


def verify_all(
    response: str,
    ground_truths: object,
    datasets: list | tuple,
    mode: str,
    *,
    loose: bool,
    combine: str,
    own: Own | None = None,
) -> Verdict:
    """The sum over a row's verifiers; an error in one is an error of the row."""
    try:
        ground_truths = truths_for(datasets, ground_truths)
    except GroundTruthError as problem:
        return error(str(problem))
    verdicts = [
        verify(response, truth, name, mode, loose=loose, combine=combine, own=own)
        for truth, name in zip(ground_truths, datasets, strict=False)
    ]
    status = "error" if any(verdict.status == "error" for verdict in verdicts) else "ok"
    reasons = "; ".join(f"{name}: {verdict.reason}" for name, verdict in zip(datasets, verdicts, strict=False))
    return Verdict(sum(verdict.score for verdict in verdicts) if status == "ok" else 0.0, reasons, status)


def check(dataset: str | list[str], ground_truth: object, mode: str = "default", *, own: Own | None = None) -> None:
    """Raises GroundTruthError (a ValueError), in one line, for a row that `verify` could not judge: an unknown verifier
    (naming the nearest), one that is not had here (saying why), a label without a number, constraints that do not
    exist, a missing extra, a label that the user's own verifier refuses."""
    if isinstance(dataset, (list, tuple)):
        for name, truth in zip(dataset, truths_for(dataset, ground_truth), strict=True):
            check(name, truth, mode, own=own)
        return
    check_mode(mode)
    if own is not None and own.is_named(dataset):
        return own.check(ground_truth)
    name = verifier_name(dataset, ground_truth, own)
    if name == "gsm8k":
        gsm8k_label(ground_truth)
    elif name == "math":
        if not extract_reference(math_label(ground_truth)).strip():
            raise GroundTruthError("ground_truth: the boxed answer is empty")
    elif name in OTHERS:
        OTHERS[name][1](ground_truth)
    elif name == "ifeval_old":
        tulu.parse(ground_truth, mode)
    else:
        google.parse(ground_truth, "default" if mode == "default" else "reference")


def verifier_name(dataset: object, ground_truth: object, own: Own | None = None) -> str:
    """One of VERIFIERS. Raises GroundTruthError."""
    name = known_name(dataset, own)
    if name == "ifeval":
        row = read_structure(ground_truth, "ground_truth")
        return "ifeval_old" if isinstance(row, dict) and "func_name" in row else "ifeval"
    return name


def known_name(dataset: object, own: Own | None = None) -> str:
    """The verifier that a `dataset` names, one of VERIFIERS or of the names of `own`. Raises GroundTruthError."""
    if not isinstance(dataset, str):
        raise GroundTruthError(f"dataset: expected the name of a verifier, found {shown(dataset)}")
    name = dataset.strip().lower()
    name = ALIASES.get(name, name)
    known = (*VERIFIERS, *(own.names if own else ()))
    if name in known:
        return name
    for start, why in NOT_HERE:
        if name == start or name.startswith((start + "_", start + "-")):
            raise GroundTruthError(f"dataset: {shown(dataset)} is not here: {why} (--verifier_module takes your own)")
    close = nearest(name, known) or f" (known: {', '.join(known)})"
    raise GroundTruthError(f"dataset: unknown verifier {shown(dataset)}{close}")


def truths_for(datasets: list | tuple, ground_truth: object) -> list | tuple:
    """A ground truth for each verifier of a row; for one verifier it need not stand in a list. Raises
    GroundTruthError."""
    if len(datasets) == 1 and not (isinstance(ground_truth, (list, tuple)) and len(ground_truth) == 1):
        return [ground_truth]
    if not isinstance(ground_truth, (list, tuple)) or len(ground_truth) != len(datasets) or not datasets:
        raise GroundTruthError(f"ground_truth: expected a list of {len(datasets)}, one for each of dataset")
    return ground_truth


def check_mode(mode: str) -> None:
    """Raises GroundTruthError for a mode that is not one of MODES, naming the nearest."""
    if mode not in MODES:
        raise GroundTruthError(f"mode: unknown {shown(mode)}{nearest(mode, MODES)}; one of {', '.join(MODES)}")


def gsm8k_label(ground_truth: object) -> str:
    """A label as text, which must have a number in it. Raises GroundTruthError."""
    label = math_label(ground_truth)
    if not has_number(label):
        raise GroundTruthError(f"ground_truth: no number in {shown(label)}")
    return label


@lru_cache(maxsize=65536)
def has_number(label: str) -> bool:
    """True if the verifier of GSM8K finds a number in the label."""
    return gsm8k.value(gsm8k.NUMBER.search(gsm8k.plain(label)[:4096])) is not None


def math_label(ground_truth: object) -> str:
    """A label as text; a list of one is that one, as some published rows have it. Raises GroundTruthError."""
    if isinstance(ground_truth, list) and len(ground_truth) == 1:
        ground_truth = ground_truth[0]
    is_text = isinstance(ground_truth, (str, int, float)) and not isinstance(ground_truth, bool)
    if not is_text or not str(ground_truth).strip():
        raise GroundTruthError(f"ground_truth: expected a text, found {shown(ground_truth)}")
    return str(ground_truth)

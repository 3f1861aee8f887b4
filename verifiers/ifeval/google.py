"""IFEval: 25 instructions that a program can check (Zhou et al. 2023, arXiv:2311.07911): a row and its verdict.

The instructions themselves are in google_rules.py.
"""

import inspect
from collections.abc import Callable

from verifiers.ifeval import language
from verifiers.ifeval.arguments import typed_arguments
from verifiers.ifeval.google_rules import INSTRUCTIONS, RELATIONS, Regex
from verifiers.strings import is_blank, nearest, shown, without_thinking
from verifiers.verdict import GroundTruthError, Verdict, error, failed, read_structure

KEYWORDS = frozenset(("keyword", "keywords", "forbidden_words", "section_spliter"))  # arguments that hold keywords


def parse(ground_truth: object, mode: str = "default") -> list[tuple[str, dict]]:
    """The (instruction id, arguments) pairs of a row.

    ground_truth: {"instruction_id": [...], "kwargs": [...]} (or "instruction_id_list"), or a list of such, as an
    object, as JSON or as a Python literal; nulls among the arguments are dropped. Raises GroundTruthError for an
    unknown id (naming the nearest), an unknown, missing or badly typed argument.
    """
    rows = read_structure(ground_truth, "ground_truth")
    pairs: list[tuple[str, dict]] = []
    for row in rows if isinstance(rows, list) else [rows]:
        row = read_structure(row, "ground_truth")
        if not isinstance(row, dict):
            raise GroundTruthError(f"ground_truth: expected an object with instruction_id, found {shown(row)}")
        ids = row.get("instruction_id", row.get("instruction_id_list"))
        kwargs = row.get("kwargs")
        ids = ids if isinstance(ids, list) else [ids]
        kwargs = kwargs if isinstance(kwargs, list) else [kwargs] * len(ids)
        if len(ids) != len(kwargs):
            raise GroundTruthError(f"ground_truth: {len(ids)} instructions and {len(kwargs)} kwargs")
        pairs += [(name, arguments(name, given or {}, mode)) for name, given in zip(ids, kwargs, strict=False)]
    if not pairs:
        raise GroundTruthError("ground_truth: no instruction")
    return pairs


def arguments(name: str, given: dict, mode: str) -> dict:
    """The arguments of the instruction `name`, checked, without nulls; in mode 'reference' keywords as regular
    expressions. Raises GroundTruthError."""
    if not isinstance(name, str) or name not in INSTRUCTIONS:
        raise GroundTruthError(f"ground_truth: unknown instruction {shown(name)}{nearest(name, INSTRUCTIONS)}")
    if not isinstance(given, dict):
        raise GroundTruthError(f"{name}: expected an object of arguments, found {shown(given)}")
    given = {key: value for key, value in given.items() if value is not None}
    typed = typed_arguments(name, inspect.signature(INSTRUCTIONS[name]).parameters, given)
    for key in ("relation", "let_relation", "capital_relation"):
        if key in typed and typed[key] not in RELATIONS:
            raise GroundTruthError(f"{name}: {key} must be 'at least' or 'less than', found {shown(typed[key])}")
    for key in {"keyword", "section_spliter"} & set(typed):
        typed[key] = typed[key].strip()
    if name.startswith(("language:", "change_case:english")) and not language.is_available():
        raise GroundTruthError(f"{name} needs langdetect: pip install 'triptych[ifeval]'")
    if mode == "reference":
        for key in KEYWORDS & set(typed):
            words = typed[key]
            typed[key] = Regex(words) if isinstance(words, str) else [Regex(word) for word in words]
    return typed


def follow(
    response: str, name: str, kwargs: dict, loose: bool = False, blank: Callable[[str], bool] = is_blank
) -> tuple[bool, str]:
    """(whether one instruction is followed, what was seen). A response that is `blank` follows none.

    loose: any of eight texts may follow it: the response as it is or without '*', each whole, without its first line,
    without its last, without both (Zhou et al. 2023, section 2.3).
    """
    rule = INSTRUCTIONS[name]
    seen = "empty response"
    for text in variants(response) if loose else [response]:
        if not blank(text):
            followed, seen = rule(text, **kwargs)
            if followed:
                return True, seen
    return False, seen


def variants(response: str) -> list[str]:
    """The eight texts of the loose metric: with and without the first line, the last line and the asterisks."""
    lines = response.split("\n")
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return texts + [text.replace("*", "") for text in texts]


def verify(
    response: str, ground_truth: object, mode: str = "default", loose: bool = False, combine: str = "fraction"
) -> Verdict:
    """The fraction of a row's instructions that the response follows, or with combine='all' whether it follows all.

    default: the response as it stands (Google's strict; `loose` for its loose metric).
    reference: open-instruct e6c3044, IFEvalVerifier: thinking and answer tags removed first, keywords are regular
    expressions. Never raises: a bad ground truth is a Verdict with status 'error'.
    """
    try:
        pairs = parse(ground_truth, mode)
    except GroundTruthError as problem:
        return error(str(problem))
    text = without_thinking(response) if mode == "reference" else response
    blank = is_blank if mode == "default" else is_white
    if blank(text):
        return failed("empty response")
    results = [(name, *follow(text, name, kwargs, loose, blank)) for name, kwargs in pairs]
    score = sum(followed for _, followed, _ in results) / len(results)
    score = float(score == 1.0) if combine == "all" else score
    reasons = [f"{'' if followed else 'NOT '}{name}: {seen}" for name, followed, seen in results]
    return Verdict(score, "; ".join(reasons))


def is_white(text: str) -> bool:
    """True for a text of white space alone: what counts as empty to the reference."""
    return not text.strip()

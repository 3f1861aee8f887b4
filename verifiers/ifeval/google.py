"""Instructions that a program can check: a row of IFEval, IFEvalG or IFBench and its verdict.

Zhou et al. 2023, arXiv:2311.07911; Pyatkin et al. 2025, arXiv:2507.02833. The table of instructions is in
instructions.py.
"""

from verifiers.ifeval.instructions import GOOGLE, IFBENCH, arguments, rule
from verifiers.strings import is_blank, shown, without_thinking
from verifiers.verdict import GroundTruthError, Verdict, error, failed, read_structure

MAX_READ = 64 * 1024  # characters; a longer response follows no instruction of IFEvalG or IFBench


def parse(ground_truth: object, mode: str = "default") -> list[tuple[str, dict]]:
    """The (instruction id, arguments) pairs of a row.

    ground_truth: {"instruction_id": [...], "kwargs": [...]} (or "instruction_id_list"), or a list of such, as an
    object, as JSON or as a Python literal; nulls among the arguments are dropped. Raises GroundTruthError for an
    unknown id (naming the nearest), an unknown, missing or badly typed argument.
    """
    given = ground_truth[0] if isinstance(ground_truth, list) and len(ground_truth) == 1 else ground_truth
    rows = read_structure(given, "ground_truth")
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


def follow(response: str, name: str, kwargs: dict, loose: bool = False, mode: str = "default") -> tuple[bool, str]:
    """(whether one instruction is followed, what was seen). A blank response follows none.

    loose: any of eight texts may follow it: the response as it is or without '*', each whole, without its first line,
    without its last, without both (Zhou et al. 2023, section 2.3).
    """
    if name not in GOOGLE and len(response) > MAX_READ:
        return False, f"{len(response)} characters, more than {MAX_READ}"
    followed_by, blank = rule(name, mode), is_white if mode == "reference" else is_blank
    seen = "empty response"
    for text in variants(response) if loose else [response]:
        if not blank(text):
            followed, seen = followed_by(text, **kwargs)
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
    expressions; a row with an instruction of IFBench as IFBench db69a6f, which removes nothing.
    Never raises: a bad ground truth is a Verdict with status 'error'.
    """
    try:
        pairs = parse(ground_truth, mode)
    except GroundTruthError as problem:
        return error(str(problem))
    of_ifbench = any(name in IFBENCH for name, _ in pairs)
    text = without_thinking(response) if mode == "reference" and not of_ifbench else response
    if is_blank(text) if mode == "default" else is_white(text):
        return failed("empty response")
    results = [(name, *follow(text, name, kwargs, loose, mode)) for name, kwargs in pairs]
    score = sum(followed for _, followed, _ in results) / len(results)
    score = float(score == 1.0) if combine == "all" else score
    reasons = [f"{'' if followed else 'NOT '}{name}: {seen}" for name, followed, seen in results]
    return Verdict(score, "; ".join(reasons))


def is_white(text: str) -> bool:
    """True for a text of white space alone: what counts as empty to the reference."""
    return not text.strip()

r"""MATH: does the response settle on the answer of the problem?

`default`: extract finds the answer, equal compares it. `reference`: open-instruct e6c3044's MathVerifier
(open_instruct.reference). Both are total, and bounded by the length of what they read.
"""

from functools import lru_cache

from verifiers.math.equal import equal
from verifiers.math.extract import extract, extract_reference
from verifiers.math.open_instruct import reference
from verifiers.strings import is_blank, shown
from verifiers.verdict import MAX_CHARACTERS, Verdict, failed, passed


def verify(response: str, ground_truth: str, mode: str = "default") -> Verdict:
    """1 if the response's answer equals the one in `ground_truth` (LaTeX, or a solution with its answer boxed), else 0.

    Errors: none. Source: hendrycks et al. 2021 (arXiv:2103.03874) for the task; docs/verifiers.md for the conventions.
    """
    if len(response) > MAX_CHARACTERS:
        return failed(f"too long: {len(response)} characters")
    if mode != "default":
        return reference.verify(response, str(ground_truth))
    if is_blank(response):
        return failed("empty response")
    expected, found = _answer_of(str(ground_truth)), extract(response)
    if found is None:
        return failed(f"no answer found, expected {shown(expected)}")
    text = f"extracted {shown(found)}, expected {shown(expected)}"
    return passed(text) if equal(found, expected) else failed(text)


_answer_of = lru_cache(maxsize=4096)(extract_reference)

r"""Short answers: is what stands in the last <answer>…</answer> the label, or how many of its words?

`string_matcher` is equality, `string_f1` the F1 of the words, both after SQuAD's normalisation (Rajpurkar et al. 2016,
arXiv:1606.05250: case, punctuation, articles, white space). A label is a text, or a list of texts each of which is
accepted. As in open-instruct, string_matcher wants the tags, and string_f1 without them takes the whole response.
Default: what SQuAD's rule loses is kept where it is the answer: an article that is all there is ('A', of a list of
choices), sign, point and operators of numbers, the marks of 'C++' and 'A-'; typographic punctuation is punctuation.
`reference`: open-instruct's StringMatcherVerifier and F1Verifier, exactly.
Left out: numbers in words, spellings, abbreviations.
"""

import json
import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache

from verifiers.strings import is_blank, shown
from verifiers.verdict import GroundTruthError, Verdict, failed, passed

MAX_ANSWER = 2048  # characters: a longer text in place of an answer is none (unless the label is that long)
MAX_LABEL = 16 * 1024
MAX_ACCEPTED = 256
ARTICLES = frozenset(("a", "an", "the"))
DASHES = re.compile("[\u2010-\u2015\u2212]")
# what is not a letter, digit or space, but belongs to what stands beside it
KEPT = (
    r"(?<=\d)[.,/:-](?=\d)|(?<=\w)[*^+=<>](?=\w)"  # 3.5, 1/2, 10:30, 2-1, x^2
    r"|(?<![\w.)])-(?=[$€£]?\.?\d)|(?<![\w.])\.(?=\d)"  # -5, .5
    r"|(?<=\w)[+#](?!\w)|(?<=\w\+)\+(?!\w)|(?<=\w)-(?![\w-])"  # A+, C#, C++, A-
)
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
INVISIBLE = "\u00ad\u200b-\u200f\u2060\ufeff"
PUNCTUATION = re.compile(
    rf"(?=[!-/:-@\[-`{{-~“”‘’‚„«»‹›…·•¿¡′″、。，！？；：（）「」『』《》【】〈〉{INVISIBLE}])(?!{KEPT})."
)
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def verify_match(response: str, ground_truth: object, mode: str = "default") -> Verdict:
    """1 if the answer of the response equals one of the accepted ones, else 0. Raises GroundTruthError for a label that
    is none; else total and linear."""
    labels = accepted(ground_truth)
    answer = tagged(response) if mode == "default" else reference_tagged(response)
    if answer is None:
        return failed("no <answer>…</answer>")
    if mode != "default":
        found = squad(answer)
        equal = any(found == squad(label) for label in labels)
    else:
        if too_long(answer, labels) or is_blank(answer):
            return failed(f"not an answer: {shown(answer, 30)!r}, {len(answer)} characters")
        found = normalised(answer)
        equal = any(found == normalised(label) for label in labels)
    text = f"extracted {shown(found, 40)}, expected {shown(' | '.join(labels), 40)}"
    return passed(text) if equal else failed(text)


def verify_f1(response: str, ground_truth: object, mode: str = "default") -> Verdict:
    """The F1 of the words of the answer (else of the response) and of the accepted answer that is nearest. Raises
    GroundTruthError for a label that is none; else total and linear."""
    labels = accepted(ground_truth)
    text = response.rpartition("</think>")[2]
    if mode != "default":
        words = squad(text.replace("<answer>", "").replace("</answer>", "")).split()
        score = max(f1(words, squad(label).split()) for label in labels)
    else:
        answer = tagged(response)
        answer = text if answer is None and "<think>" not in text else answer or ""
        if too_long(answer, labels) or is_blank(answer):
            return failed(f"not an answer: {shown(answer, 30)!r}, {len(answer)} characters")
        words = normalised(answer).split()
        score = max(f1(words, normalised(label).split()) for label in labels)
    return Verdict(score, f"F1 {score:.2f} of {shown(' '.join(words[:20]), 40)} to {shown(' | '.join(labels), 40)}")


def accepted(ground_truth: object) -> tuple[str, ...]:
    """The accepted answers of a label: a text, a number, or a list of them, also as JSON. Raises GroundTruthError."""
    labels = ground_truth
    if isinstance(labels, str) and labels.lstrip().startswith("["):
        labels = json_list(labels)
    texts = tuple(map(str, labels)) if isinstance(labels, (list, tuple)) else (str(labels),)
    kinds = labels if isinstance(labels, (list, tuple)) else (labels,)
    if not texts or any(isinstance(x, bool) or not isinstance(x, (str, int, float)) for x in kinds):
        raise GroundTruthError(f"ground_truth: expected an answer or a list of answers, found {shown(ground_truth)}")
    if len(texts) > MAX_ACCEPTED or sum(map(len, texts)) > MAX_LABEL:
        raise GroundTruthError(f"ground_truth: more than {MAX_ACCEPTED} answers or {MAX_LABEL} characters")
    if any(is_blank(text) for text in texts):
        raise GroundTruthError("ground_truth: an accepted answer is empty")
    return texts


@lru_cache(maxsize=4096)
def json_list(text: str) -> tuple | str:
    """A text that is a JSON list as one; another text as itself ('[0, 1)' is an answer)."""
    try:
        labels = json.loads(text) if len(text) <= MAX_LABEL else text
    except (ValueError, RecursionError):
        return text
    return tuple(labels) if isinstance(labels, list) and all(isinstance(x, str) for x in labels) and labels else text


def tagged(response: str) -> str | None:
    """What stands in the last closed <answer>…</answer> behind the thinking; None without one."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") :].partition("</answer>")[0]


def too_long(answer: str, labels: tuple[str, ...]) -> bool:
    """Longer than any answer, and than twice the longest label."""
    return len(answer) > max(MAX_ANSWER, 2 * max(map(len, labels)))


def normalised(text: str) -> str:
    """SQuAD's normalisation, but for what KEPT says, and never to nothing: articles stay where there is no other word,
    punctuation where there is nothing else."""
    text = DASHES.sub("-", unicodedata.normalize("NFC", text).casefold())
    words = PUNCTUATION.sub("", THOUSANDS.sub("", text)).split()
    return " ".join([word for word in words if word not in ARTICLES] or words or text.split())


def f1(found: list[str], wanted: list[str]) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetitions."""
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


# --- open-instruct, as of 2026: ground_truth_utils.py, normalize_answer, StringMatcherVerifier, F1Verifier ------------


def squad(text: str) -> str:
    """SQuAD's own normalisation."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(ASCII_PUNCTUATION)).split())


def reference_tagged(response: str) -> str | None:
    """From the last opening tag, thinking or not, to the first closing one behind it, or to the end."""
    if "<answer>" not in response or "</answer>" not in response:
        return None
    return response.rpartition("<answer>")[2].partition("</answer>")[0]

"""GSM8K: is the final number of the response the number of the answer?

Default: the number declared after the last '####', in the last \\boxed{}, or after 'A:' or 'answer is'; without such a
declaration the last number of the text. Equality is exact, on the digits: 42 = 42.0 = $42 = 042 and 1,080 = 1080, no
float anywhere; '50 %' and '42 apples' are their numbers; a/b is a fraction.
`reference`: open-instruct e6c3044, GSM8KVerifier (string equality of the last number with the label as it stands).
`tulu3`: the same as it was when Tülu 3 was trained (the sign of an integer is lost).
Left out: numbers in words, thousands in other locales, '1e3'.
"""

import collections
import re
from collections.abc import Iterable
from fractions import Fraction

from verifiers.strings import is_blank, shown
from verifiers.verdict import Verdict, failed, passed

MAX_DIGITS = 400
# A minus belongs to the number unless it stands between two values: '-3', '= - 3', but 5-3 ends in 3.
NUMBER = re.compile(
    r"(?:(?<![\w).%])(?P<sign>[-+−])\s?)?\\?\$?\s?(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3}){1,40}(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![0-9])\.[0-9]+)(?:/(?P<denominator>[0-9]+)(?![0-9]|\.[0-9]))?"
)
DECLARED = re.compile(r"(?im)####|\\boxed\{|^[^\S\n]*(?:final\s+)?a(?:nswer)?\s*:|\banswer\s+is\b:?")
FRAC = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
HEDGE = re.compile(r"\s*(?:[,;|/]|or|and|to)\s*(?:or\s*|and\s*)?[-+−$\\]*\s*")
REFERENCE_NUMBER = {"reference": re.compile(r"[-+]?(?:\d*\.\d+|\d+)"), "tulu3": re.compile(r"[-+]?\d*\.\d+|\d+")}


def verify(response: str, ground_truth: str, mode: str = "default") -> Verdict:
    """1 if the response's final number equals `ground_truth`, else 0. Total: never raises; linear in a bounded tail."""
    if mode != "default":
        answer, label = reference_answer(response, mode), str(ground_truth)
        text = f"extracted {shown(answer)}, expected {shown(label)}"
        return passed(text) if answer.lower() == label.lower() else failed(text)
    expected = value(NUMBER.search(plain(str(ground_truth))[:4096]))
    if expected is None:
        return failed(f"no number in the label {shown(ground_truth)}")
    if is_blank(response):
        return failed("empty response")
    tail = plain(tail_with_digit(response.rpartition("</think>")[2]))
    match, hedged = declared(tail)
    found = match or last(NUMBER.finditer(tail))
    if hedged:
        return failed(f"two answers: {shown(hedged)}")
    if found is None:
        return failed(f"no number found, expected {shown(ground_truth)}")
    text = f"extracted {shown(found[0])}, expected {shown(ground_truth)}"
    return passed(text) if value(found) == expected else failed(text)


def tail_with_digit(text: str) -> str:
    """The 4 Ki characters before the last digit of `text`, if one is among its last 32 Ki: 10 MB cost little."""
    tail = text[-(1 << 15) :]
    if tail.isascii():
        digit = max(map(tail.rfind, "0123456789"))
    else:
        digit = max((match.start() for match in re.finditer(r"\d", tail)), default=-1)
    window = tail[max(0, digit - 4096) : digit + 64]
    whole = len(tail) == len(text) and digit <= 4096
    return window if whole else window.lstrip("0123456789,.+-") or window  # the cut may have gone through a number


def plain(text: str) -> str:
    """LaTeX's spellings of a number as plain text: {,} and thin spaces in thousands, simple fractions, bold marks."""
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\[,!]|,\\!)(?=[0-9]{3})", ",", text)
    return FRAC.sub(r"\1/\2", text).replace("**", "")


def declared(tail: str) -> tuple[re.Match | None, str | None]:
    """(the number that the last declaration names, None), or (None, the hedge) for 'it is 5 or 6', or (None, None)."""
    mark = last(DECLARED.finditer(tail))
    if mark is None:
        return None, None
    line = tail[mark.end() :].lstrip().split("\n", 1)[0][:4096].split("=")[-1]
    numbers = list(NUMBER.finditer(line))
    if len(numbers) > 1:
        between = line[numbers[0].end() : numbers[1].start()]
        if HEDGE.fullmatch(between) and value(numbers[0]) != value(numbers[1]):
            return None, line.strip()
    certain = len(numbers) == 1 or mark[0] == "####" or "boxed" in mark[0]
    return (numbers[0] if numbers and certain else None), None


def value(match: re.Match | None) -> Fraction | None:
    """The exact value of a match of NUMBER; None for no match, more than MAX_DIGITS digits, or division by zero."""
    if match is None or len(match[0]) > MAX_DIGITS or not int(match["denominator"] or 1):
        return None
    number = Fraction(match["number"].replace(",", "")) / int(match["denominator"] or 1)
    return -number if match["sign"] in ("-", "−") else number


def last(matches: Iterable[re.Match]) -> re.Match | None:
    """The last of some matches, or None."""
    return next(iter(collections.deque(matches, maxlen=1)), None)


def reference_answer(response: str, mode: str) -> str:
    """open-instruct's rule: a comma between two digits goes (one pass), then the last number, else the whole text."""
    if mode == "tulu3":
        response = response.split("<|assistant|>\n")[-1].strip()
    text = re.sub(r"(\d),(\d)", r"\1\2", tail_with_digit(response))
    match = last(REFERENCE_NUMBER[mode].finditer(text))
    return match[0] if match else response if len(response) < MAX_DIGITS else "(no number)"

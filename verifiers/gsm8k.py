"""GSM8K: is the final number of the response the number of the answer?

Default: the number declared after the last '####', in the last \\boxed{}, in <answer>, or after 'A:' or 'answer is';
without such a declaration the last number of the text. Equality is exact, on the digits: 42 = 42.0 = $42 = 042 and
1,080 = 1 080 = 1080, no float anywhere; '50 %' and '42 apples' are their numbers; a/b and 1 1/2 are fractions. A space
joins digits only as thousands are written: one to three digits, then groups of exactly three ('Step 1 080' is 80).
Of '6*7 = 42' and '42 = 6*7' the number is 42; arithmetic that is not worked out names no number. A remark in brackets
after a number ('42 (6 times 7)') is not the answer.
`reference`: open-instruct e6c3044, GSM8KVerifier (string equality of the last number with the label as it stands).
`tulu3`: the same as it was when Tülu 3 was trained (the sign of an integer is lost).
Left out: numbers in words, '1.080,50', '1e3'.
"""

import collections
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction

from verifiers.strings import is_blank, shown
from verifiers.verdict import Verdict, failed, passed

MAX_DIGITS = 400
WINDOW = 4096  # characters before the last digit that are read
CURRENCY = r"(?:\\?[$€£¥₹]\s?)?"
NUMBER = re.compile(
    rf"(?:(?P<sign>[-+])\s?)?{CURRENCY}(?:(?P<whole>[0-9]{{1,9}})\s(?=[0-9]{{1,9}}/))?"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3}){1,40}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:/(?P<denominator>[0-9]+)(?![0-9]|\.[0-9]))?"
)
DECLARED = re.compile(
    r"(?im)####(?!\s*(?:step|part|section|phase|case|problem|question|solution)\b)|\\(?:boxed|fbox)\s*\{|<answer>"
    r"|^[^\S\n]*[*_]*(?:the\s+)?(?:final\s+)?a(?:nswer)?[*_]*\s*:|\banswer[*_]*\s+(?:is|would\s+be|should\s+be)\b:?"
)
FRAC = re.compile(r"\\[dt]?frac(?:\{([0-9]+)\}|\s?([0-9]))(?:\{([0-9]+)\}|\s?([0-9]))")
HEDGE = re.compile(r"\s*(?:[,;|/]|or|and|to)\s*(?:or\s*|and\s*)?[$\\]*\s*")
OR = re.compile(r"[^0-9.,;:()]{0,40}\bor\b[^0-9.,;:()]{0,20}")  # '42 apples or 43'
TIMES = re.compile(r"\s*(?:[*×·÷^x]|\\times|\\cdot|\\div)[\s(]*")
REMARK = re.compile(r"(?<=[0-9A-Za-z%}$])[*_]*\s\(([^()\n]{0,300})\)?")
UNSURE = re.compile(r"(?i)\s*(?:or|maybe|perhaps|possibly|alternatively)\b|[\s$]*-?[0-9][0-9,.]*\??\s*$")
BEFORE_REMARK = re.compile(r"[^A-Za-z0-9]*[0-9][0-9.,]*%?(?:\s[A-Za-z]{1,20}){0,2}")
TOTAL = re.compile(r"(?i)\b(?:total|so|answer|altogether|thus|therefore)\b|=|i\.e")
STATED = re.compile(
    r"\s*(?:%|[A-Za-z$€£]+(?:\s+[A-Za-z]+){0,3})?[*_\s]*(?:$|[.;:!?—(]|,(?!\s*which\s[^0-9]{0,60}[0-9.,]+[^0-9]*$)|\bin\b|\bof\b)"
)
MEASURED = re.compile(r"[^0-9,;.]{0,40}\b(?:in|for|of|per|on|with|than|from)\b[^0-9,;.]{0,40}[0-9]")
SAYS = frozenset(str.split("is are was were be equals equal to of by at get gets becomes about exactly only or and"))
SENTENCE_END = re.compile(r"(?<=[0-9A-Za-z%)*}])[.!?]\s")
BESIDE_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]{0,80})\}\$?\s*(?:,|or|and|/)+\s*(?:or\s+|and\s+)?\$?$")
REFERENCE_NUMBER = {"reference": re.compile(r"[-+]?(?:\d*\.\d+|\d+)"), "tulu3": re.compile(r"[-+]?\d*\.\d+|\d+")}

# --- one spelling for what has many -----------------------------------------------------------------------------------

MARKS = {
    **dict.fromkeys("−﹣－‑–", "-"),
    **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\ufe0f\u20e3", ""),
    **{"，": ",", "．": ".", "％": "%", "＄": "$", "⁄": "/", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "≈": "="},
}
UNICODE = str.maketrans(MARKS)
THIN_THOUSANDS = re.compile("([0-9])[\u00a0\u2007\u2009\u202f'’](?=[0-9]{3}(?![0-9]))")
LATEX_THOUSANDS = re.compile(r"([0-9])(?:\{,\}|\\[,! ;:]|,\\!|~)(?=[0-9]{3})")
SPACED_THOUSANDS = re.compile(  # each look-behind after the digit, which is what the search jumps to
    r"[1-9](?<![0-9A-Za-z.,/].)(?<!tep .)(?<!No\. .)(?<!no\. .)(?<!umber .)(?<!art .)(?<!Day .)(?<!day .)(?<!eek .)"
    r"[0-9]{0,2}(?: [0-9]{3}){1,40}(?![0-9/]|,[0-9])"
)
UNIT_POWER = re.compile(r"\^(?<=[A-Za-z}].)\{?[0-9]\}?|[23]\b(?<=[0-9 ckd]m.|ft.)")


def plain(text: str) -> str:
    """`text` with one spelling for what has many: digits, signs and spaces of Unicode, thousands joined by commas,
    simple fractions as a/b; exponents of units, bold and code marks removed."""
    if not text.isascii():
        text = THIN_THOUSANDS.sub(r"\1,", re.sub(r"[^\D0-9]{1,400}", ascii_digits, text.translate(UNICODE)))
    if "\\" in text or "~" in text or "{" in text:
        text = FRAC.sub(spelled_fraction, LATEX_THOUSANDS.sub(r"\1,", text))
    if "^" in text or "2" in text or "3" in text:
        text = UNIT_POWER.sub("", text)
    text = text.replace("**", "").replace("__", "").replace("`", "")
    return SPACED_THOUSANDS.sub(lambda number: number[0].replace(" ", ","), text) if " " in text else text


def ascii_digits(match: re.Match) -> str:
    """Digits of another script as those of ASCII."""
    return str(int(match[0])).zfill(len(match[0]))


def spelled_fraction(match: re.Match) -> str:
    """A match of FRAC as a/b, after the whole number before it if there is one: 2 1/2."""
    top, bottom = (part for part in match.groups() if part is not None)
    return (
        f" {top}/{bottom}" if match.string[max(0, match.start() - 1) : match.start()].isdigit() else f"{top}/{bottom}"
    )


# --- the verdict ------------------------------------------------------------------------------------------------------


def verify(response: str, ground_truth: str, mode: str = "default") -> Verdict:
    """1 if the response's final number equals `ground_truth`, else 0. Total: never raises; linear in a bounded tail."""
    if mode != "default":
        answer, label = reference_answer(response, mode), str(ground_truth)
        text = f"extracted {shown(answer)}, expected {shown(label)}"
        return passed(text) if answer.lower() == label.lower() else failed(text)
    expected = value(NUMBER.search(plain(str(ground_truth))[:WINDOW]))
    if expected is None:
        return failed(f"no number in the label {shown(ground_truth)}")
    found, refused = answered(response)
    if refused:
        return failed(refused)
    if found is None:
        return failed(f"no number found, expected {shown(ground_truth)}" if response[:64].strip() else "empty response")
    text = f"extracted {shown(spelling(found))}, expected {shown(ground_truth)}"
    if value(found) != expected:
        return failed(text)
    return failed("empty response") if is_blank(response) else passed(text)  # '<|reserved_42|>' is no number


def answered(response: str) -> tuple[re.Match | None, str | None]:
    """(the number that the response settles on or None, why it is refused or None)."""
    tail = plain(tail_with_digit(response[-(1 << 15) :].rpartition("</think>")[2]))
    found, refused = declared(tail)
    if refused:
        return None, refused
    found = found or last_number(tail)
    return found, None


def tail_with_digit(text: str) -> str:
    """The WINDOW characters before the last digit of `text`, if one is among its last 32 Ki: 10 MB cost little."""
    tail = text[-(1 << 15) :]
    digit = max(map(tail.rfind, "0123456789")) if tail.isascii() else last_digit(tail)
    window = tail[max(0, digit - WINDOW) : digit + 64]
    whole = len(tail) == len(text) and digit <= WINDOW
    return window if whole else window.lstrip("0123456789,.+-") or window  # the cut may have gone through a number


def last_digit(text: str) -> int:
    """Where the last digit of any script stands in `text`, or -1."""
    for start in range(len(text) - len(text) % 256, -1, -256):
        if (match := last(re.finditer(r"\d", text[start : start + 256]))) is not None:
            return start + match.start()
    return -1


def declared(tail: str) -> tuple[re.Match | None, str | None]:
    """(the number that the last declaration names, None), or (None, why there is none: 'it is 5 or 6'), or (None, None)
    where nothing is declared for certain."""
    for mark in reversed(collections.deque(DECLARED.finditer(tail), maxlen=3)):
        line = declaration(tail, mark)
        if any(c in line for c in "0123456789"):
            break
    else:
        return None, None
    if "box" in mark[0] and (beside := BESIDE_BOX.search(tail, max(0, mark.start() - 100), mark.start())):
        line = f"{beside[1]} or {line}"
    if (hedged := unsure_remark(line)) is not None:
        return None, f"two answers: {shown(hedged)}"
    line = without_remarks(line)
    part, numbers = "", list[re.Match]()
    for part in reversed(line.split("=")):  # '6 * 7 = 42' and '42 = 6 * 7'
        numbers = list(numbers_of(part)) or numbers
        if numbers and numbers[0].string is part and not is_arithmetic(part, numbers):
            break
    else:
        return (None, f"not worked out: {shown(line)}") if numbers else (None, None)
    if len(numbers) > 1 and is_hedge(part, *numbers[:2]):
        return None, f"two answers: {shown(line)}"
    ends = STATED if line.startswith(part) else MEASURED  # 'so 5 * 66 = 330 pages in 2 weeks'
    immediate = starts_with_number(part) and ends.match(part, numbers[0].end())
    certain = len(numbers) == 1 or mark[0][0] in "#\\<" or immediate
    return (numbers[0] if certain else None), None


def declaration(tail: str, mark: re.Match) -> str:
    """What a declaration says: the inside of a box and an 'or' after it, else its line; of that the first sentence, if
    it begins with a number."""
    rest = tail[mark.end() :][:WINDOW]
    if mark[0].endswith("{"):
        depth = 1
        for brace in re.finditer(r"[{}]", rest):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                after = rest[brace.end() : brace.end() + 40]
                other = re.match(r"\$?\s*or\s+[^0-9\n]{0,20}[0-9][0-9.,]*", after)
                return rest[: brace.start()] + (other[0] if other else "")
    line = rest.lstrip().split("\n", 1)[0].split("</answer>", 1)[0]
    end = SENTENCE_END.search(line) if starts_with_number(line) else None
    return line[: end.start()] if end else line


def numbers_of(text: str) -> Iterator[re.Match]:
    """The matches of NUMBER in `text`, searched for between its first and its last digit alone."""
    first = re.search("[0-9]", text)
    if first is None:
        return iter(())
    return NUMBER.finditer(text, max(0, first.start() - 16), max(map(text.rfind, "0123456789")) + 1)


def starts_with_number(line: str) -> bool:
    """True if no letter stands before the first number of the line."""
    first = next(numbers_of(line), None)
    return first is not None and re.search(r"[^\W_]", line[: first.start()]) is None


def unsure_remark(line: str) -> str | None:
    """The line, if a remark in it offers another answer: '42 (or 43)', '42 (43?)'."""
    for remark in REMARK.finditer(line):
        numbers = next(numbers_of(line), None), NUMBER.search(remark[1])
        if (
            UNSURE.match(remark[1])
            and BEFORE_REMARK.fullmatch(line, 0, remark.start())
            and None not in numbers
            and value(numbers[0]) != value(numbers[1])
        ):
            return line
    return None


def without_remarks(line: str) -> str:
    """The line without the remarks in brackets after its first number: '42 (6 times 7)' is 42."""
    first = next(numbers_of(line), None)
    return line if first is None else line[: first.end()] + REMARK.sub(" ", line[first.end() - 1 :])[1:]


def is_arithmetic(part: str, numbers: list[re.Match]) -> bool:
    """True for what is still to be worked out: '6 * 7', '40 + 2', '50 - 8' alone; not for '42 - 8 of them red'."""
    if len(numbers) < 2:
        return False
    first, second = numbers[:2]
    if second["sign"] and not is_signed(second) and not part[first.end() : second.start()].strip("% $.)"):
        return second["sign"] == "+" or not re.search("[A-Za-z]", part[second.end() :])
    return TIMES.fullmatch(part, first.end(), second.start()) is not None


def is_hedge(part: str, first: re.Match, second: re.Match) -> bool:
    """True if the two numbers are offered as two answers: '42 or 43'; '42 or 42.0' is one."""
    between = (first.end(), second.start())
    joined = HEDGE.fullmatch(part, *between) or OR.fullmatch(part, *between)
    return joined is not None and value(first) != value(second)


def last_number(tail: str) -> re.Match | None:
    """The last number of the text; the one before it, if that has it as a remark in brackets: '42 (6 times 7)'."""
    digit = max(map(tail.rfind, "0123456789"))
    start = digit
    while start > max(0, digit - 3 * MAX_DIGITS) and tail[start - 1] in "0123456789.,/":
        start -= 1
    start = max(0, start - 16)  # a sign, a currency, the whole part of 1 1/2
    found = last(NUMBER.finditer(tail, start))
    if found is None:
        return None
    bracket = tail.rfind("(", max(0, found.start() - 300), found.start())
    if bracket <= 0 or tail.find(")", bracket, found.start()) >= 0 or "\n" in tail[bracket : found.start()]:
        return found
    line = tail[tail.rfind("\n", 0, bracket) + 1 : bracket][-80:]
    before = re.search(r"[0-9]%?(?:\s[A-Za-z]{1,20}){0,3}\s$", line)
    inside = tail[bracket + 1 :].split(")", 1)[0]
    if before is None or TOTAL.search(inside) or not re.search(r"[A-Za-z*+×/]", inside):
        return found
    return last(NUMBER.finditer(tail, max(0, bracket - 80), bracket))


def is_signed(match: re.Match) -> bool:
    """True if the sign before a number is its own: '-3', '= - 3', 'is - 3'; not in 5-3, '12 + 4', 'in all - 3', nor in
    the item '- 3' of a list."""
    if not match["sign"]:
        return False
    text, at = match.string, match.start()
    before = text[max(0, at - 40) : at]
    head, spaced = before.rstrip(), text[at + 1 : at + 2].isspace()
    if head == "" or "\n" in before[len(head) :]:
        return (head == "" and at <= 40) or not spaced
    attached = head == before
    if head[-1] in "$€£¥₹":
        return not head[:-1].rstrip("\\ ")[-1:].isdigit()
    if head[-1] in "0123456789)%}]":
        return False
    if head[-1] in ".!?":
        return not attached
    if not head[-1].isalpha():
        return True
    return not attached and (not spaced or re.split(r"[^A-Za-z]", head)[-1].lower() in SAYS)


def spelling(match: re.Match) -> str:
    """A number as it stands in the text, without a sign that is not its own."""
    return match[0] if is_signed(match) else match[0].lstrip("+- ")


def value(match: re.Match | None) -> Fraction | None:
    """The exact value of a match of NUMBER; None for no match, more than MAX_DIGITS digits, or division by zero."""
    if match is None or len(match[0]) > MAX_DIGITS or not int(match["denominator"] or 1):
        return None
    number = Fraction(match["number"].replace(",", "")) / int(match["denominator"] or 1)
    if match["whole"] and number < 1:
        number += int(match["whole"])
    return -number if match["sign"] == "-" and is_signed(match) else number


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

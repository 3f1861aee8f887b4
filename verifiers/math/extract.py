r"""Where in a response is the answer? In this order:

1. the last declaration: \boxed{...} (also \boxed 42, \fbox{...}) or a sentence 'Final Answer: The final answer is ...',
   'The answer is ...', 'Answer: ...', whichever comes last; boxes joined by 'and', by commas or as parts (a) and (b)
   are one list, unless the later corrects the earlier or follows from it;
2. the whole response, if it is nothing but an answer;
3. the last formula: $...$, $$...$$, \(...\) or \[...\];
4. the last number, unless an 'or' stands before it.
Thinking before '</think>' is not part of the response. Sources: the \boxed rule of hendrycks/math 985bdc1, the sentence
of Minerva (Lewkowycz et al. 2022, appendix D), joined boxes as in Math-Verify 5d148cf. Linear: only the last
candidates of each kind are looked at, and none is longer than MAX_LENGTH.
"""

import itertools
import re

from verifiers.math.spellings import INVISIBLE
from verifiers.math.tokens import FUNCTIONS, MAX_LENGTH

MAX_CANDIDATES = 24
MAX_TAIL = 65_536  # characters before the end within which an answer is declared in words
ZERO_WIDTH = re.compile("[" + "".join(map(chr, INVISIBLE)) + "]")
Box = tuple[int, int, str]  # start, end, content
DECLARATION = re.compile(r"(?i)answers?\**\s*(?:is\b|are\b|:|\n)\**\s*:?|####")
SENTENCE_END = re.compile(r"(?i)i hope|<\||\n\s*\n|(?<=\S)\n|(?<![0-9])\.\s+(?=[A-Z])|(?<=[0-9$])\.\s+(?=[A-Z])")
FORMULA = re.compile(r"(?s)\$\$[^$]+\$\$|\$[^$]+\$|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]")
BEFORE_FORMULA = re.compile(r"\$([^$\n]{1,150})\$,?\s(?:and|or)\s$")
BETWEEN_BOXES = re.compile(
    r"(?:\s|\$|\\\(|\\\)|\\\[|\\\]|\\q?quad|\\[,;: ]|[,;&]|\\text\s*\{|\}|\band\b|\bor\b|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
)
PART = re.compile(r"(?i)(?<![\w\\}^)(])\(\s*(?:[b-h]|i{1,3}|iv|v|[2-9])\s*\)|\b(?:part|case|question)\s+\(?\w\)?")
CORRECTION = re.compile(
    r"(?i)\b(?:no|not|but|wait|hmm|actually|instead|rather|so|hence|thus|therefore|then|correct\w*|again|final\w*|check\w*"
    r"|total|sum|which|because|since|also|the\s+answer|\\implies|\\Rightarrow)\b"
)
SPOKEN_NUMBER = re.compile(r"(?<![\w.])-?\\?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?(?:\s?\\?%)?")


def extract(response: str) -> str | None:
    """The text of the answer that the response settles on, or None."""
    text = response.rpartition("</think>")[2]
    if not text.isascii():
        text = text[: -4 * MAX_LENGTH] + ZERO_WIDTH.sub("", text[-4 * MAX_LENGTH :])
    if "<think>" in text:
        return None
    sentence, box = last_sentence(text), last_box(text)
    if box is not None and (sentence is None or box[1] > sentence[0]):
        return joined_boxes(text, box)
    if sentence is not None:
        return from_sentence(sentence[1])
    bare = text.strip()
    if len(bare) <= MAX_LENGTH and not is_prose(bare):
        return bare
    # a number said after all formulas: 'it grows by 100%.'
    last = re.split(r"[.!?]\$*\s", text[-MAX_LENGTH:].strip())[-1]
    has_formula = "$" in last or "\\" in last.replace("\\%", "")
    return (None if has_formula else last_number(last)) or last_formula(text) or last_number(text)


def extract_reference(answer: str) -> str:
    """The answer in a ground truth, which may be a whole solution: all the boxes of its last boxed sentence, else all
    of it."""
    boxes = boxes_from_end(answer)
    if not boxes:
        return answer
    contents = [boxes[0]]
    for box in boxes[1:]:
        between = answer[box[1] : contents[0][0]]
        joined = re.search(r"\band\b|\bor\b|,|\+", between) and not re.search(r"[.!?]\s", between)
        if len(between) > 60 or not (joined or PART.search(between)):
            break
        contents.insert(0, box)
    return " , ".join(content for _, _, content in contents)


# --- boxes ------------------------------------------------------------------------------------------------------------


def boxes_from_end(text: str) -> list[Box]:
    """(start, end, content) of the last MAX_CANDIDATES boxes, last first, none inside another."""
    boxes: list[Box] = []
    before = len(text)
    for _ in range(MAX_CANDIDATES):
        start = max(text.rfind("\\boxed", 0, before), text.rfind("\\fbox", 0, before))
        if start < 0:
            break
        before = start
        box = read_box(text, start)
        if box is not None and (not boxes or box[1] <= boxes[-1][0]):
            boxes.append(box)
    return boxes


def last_box(text: str) -> Box | None:
    """The last box of `text`, or None."""
    boxes = boxes_from_end(text)
    return boxes[0] if boxes else None


def read_box(text: str, start: int) -> Box | None:
    """The box whose command begins at `start`; None if its brace is not closed within MAX_LENGTH."""
    begin = start + (6 if text.startswith("\\boxed", start) else 5)
    head = text[begin : begin + MAX_LENGTH]
    inside = head.lstrip()
    begin += len(head) - len(inside)
    if not inside.startswith("{"):
        stop = re.search(r"\$|\n|\\\)|\\\]", inside)
        content = inside[: stop.start() if stop else len(inside)].strip()
        return (start, begin + len(content), content) if content else None
    depth = 0
    for brace in re.finditer(r"(?s)\\.|[{}]", inside):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return start, begin + brace.end(), inside[1 : brace.start()]
    return None


def joined_boxes(text: str, last: Box) -> str:
    """The content of the last box, with those of the boxes just before it that are joined to it as a list."""
    contents = [last[2]]
    boxes = boxes_from_end(text)
    for later, earlier in itertools.pairwise(boxes):
        if not belong_together(text[earlier[1] : later[0]]):
            break
        contents.insert(0, earlier[2])
    return " , ".join(contents)


def belong_together(between: str) -> bool:
    """True if two boxes with this text between them are one answer of two parts: 'and', ', y =', '. Part (b):', 'and
    the width is'; not if the second corrects the first or follows from it."""
    if len(between) > 80 or CORRECTION.search(between):
        return False
    if re.search(r"and\b|or\b|[,;]", between) and BETWEEN_BOXES.fullmatch(between):
        return True
    return bool(PART.search(between) or (re.search(r"\band\b", between) and not re.search(r"[.!?]\s|\n\s*\n", between)))


# --- sentences, formulas, numbers -------------------------------------------------------------------------------------


def last_sentence(text: str) -> tuple[int, str] | None:
    """(start, what is declared) of the last 'answer is ...' or 'answer: ...' among the last MAX_TAIL characters."""
    skipped = max(0, len(text) - MAX_TAIL)
    tail = text[skipped:]
    lower = tail.lower()
    lower = lower if len(lower) == len(tail) else tail  # a letter whose small form is two characters
    before = len(lower)
    for _ in range(MAX_CANDIDATES):
        found = max(lower.rfind("answer", 0, before), lower.rfind("####", 0, before))
        if found < 0:
            return None
        start = skipped + found
        if match := DECLARATION.match(text, start):
            rest = text[match.end() : match.end() + MAX_LENGTH].lstrip()
            formula = FORMULA.match(rest)
            end = SENTENCE_END.search(rest, formula.end() if formula else 0)
            declared = rest[: end.start() if end else len(rest)].strip().strip("*").strip()
            inner = DECLARATION.search(declared)
            declared = declared[inner.end() :].strip() if inner else declared
            if declared:
                return start, declared
        before = found
    return None


def from_sentence(declared: str) -> str:
    """The answer within a declaration: a box, the part after its last ' is ', a formula, or all of it."""
    if box := last_box(declared):
        return joined_boxes(declared, box)
    if is_prose(declared):
        tail = declared.rpartition(" is ")[2].rpartition(" are ")[2]
        return tail if not is_prose(tail) else last_formula(tail) or last_number(tail) or tail
    return declared


def is_prose(text: str) -> bool:
    """True if words of running text stand outside formulas and \\text{...}: 'Answer $9$', 'the volume is 120'."""
    bare = re.sub(r"\\text[a-z]*\s*\{[^{}]*\}|\\mbox\s*\{[^{}]*\}|\\[A-Za-z]+|\$\$?[^$]*\$\$?", " ", text)
    words = [
        word for word in re.findall(r"[^\W\d_]{2,}", bare) if word not in FUNCTIONS and not set(word) <= set("xyz")
    ]
    starts = re.match(r"\s*[^\W\d_]{2,}[\s:]", bare) is not None
    spoken = [word for word in words if word.lower() not in ("or", "and")]
    if len(spoken) <= (0 if starts else 1) or not (starts or len(words) > 3):
        return False
    return "$" in text or "\\" in text or any(c.isdigit() for c in text)


def last_formula(text: str) -> str | None:
    """The content of the last pair of $ (single or double), \\(...\\) or \\[...\\], with that of the formulas joined to
    it by 'and' or 'or'."""
    found: tuple[int, str | None] = (-1, None)
    begin = 0
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        end = text.rfind(closing)
        start = text.rfind(opening, 0, max(end, 0))
        content = text[start + len(opening) : end].strip(" $\n")
        if 0 <= start < end and end > found[0] and content and len(content) <= MAX_LENGTH:
            found, begin = (end + len(closing) - 1, content), start
    answer = found[1]
    for _ in range(MAX_CANDIDATES):  # '$x = 3$ and $x = 5$' are one answer
        before = BEFORE_FORMULA.search(text, max(0, begin - 200), begin) if answer else None
        if before is None:
            break
        answer, begin = f"{before[1]} , {answer}", before.start()
    return answer


def last_number(text: str) -> str | None:
    """The last number of the text's end, or None if it is one of several offered ('5 or 6')."""
    numbers = list(SPOKEN_NUMBER.finditer(text[-MAX_LENGTH:]))
    if not numbers:
        return None
    tail = text[-MAX_LENGTH:]
    if len(numbers) > 1 and re.fullmatch(
        r"\s*(?:,|or|and|/)\s*(?:or\s+)?", tail[numbers[-2].end() : numbers[-1].start()]
    ):
        return None
    return numbers[-1][0].strip("$\\ ,")

r"""Multiple choice: is the option that the response settles on the right one?

The label is a letter A to J ('B', '(B)', 'B) Paris'), or {"answer": "B", "options": ["Rome", "Paris"]}, whose answer
may also be an option's text; then an option's text counts as its letter. In this order:

1. the last declaration that names an option: \boxed{B}, <answer>B</answer>, 'the answer is (B)', 'Answer: B',
   'option is B', '#### B'; 'A or B', 'A and B', 'A/B', 'either', 'not B' there name none, and are wrong;
2. the lines that begin with a marked letter ('B.', 'B) Paris', '(B)', '**B**') or are one, if it is one letter;
3. the last line, if it holds one letter in brackets.
A bare 'A' or 'I' before a word is a word; a small letter counts in brackets or alone. Only the last 2,048 characters
behind '</think>' are read. open-instruct has no such verifier, so every mode is the default.
"""

import re
from typing import NamedTuple

from verifiers.answers import normalised
from verifiers.strings import is_blank, nearest, shown
from verifiers.verdict import GroundTruthError, Verdict, failed, passed, read_structure

LETTERS = "ABCDEFGHIJ"
TAIL = 2048
SPAN = 300  # of what follows a declaration
MAX_DECLARATIONS = 12
LABEL = re.compile(r"\s*[(\[]?([A-Ja-j])(?:[)\].:]*\s*|[)\].:]+\s*(\S.*))", re.DOTALL)
DECLARED = re.compile(r"(?i)\\boxed ?\{|<answer>|\banswer (?:is\b|=) ?:?|\banswer ?:|\b(?:option|choice) is\b:?|####")
# marks of bold, code and formulas around one letter say that it is a choice
MARKS = re.compile(r"(?:\*\*|__|[`$*])\s?[(\[]?([A-J])[)\]]?[.:)]?\s?(?:\*\*|__|[`$*])")
COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|mathit|textbf|textit|bf|rm)\s?\{([^{}]{0,200})\}")
LEAD = r"(?i:[\s:=]|\b(?:is|the|option|choice|letter|answer|correct|probably|clearly|definitely)\b){0,12}"
CHOICE = r"(?:[(\[]([A-Ja-j])[)\]]|([A-J])(?![\w'’&+/-]))"
NAMED = re.compile(LEAD + CHOICE)
SMALL = re.compile(r"[(\[]?([a-j])[)\].]*!?")
NONE = re.compile(rf"(?i){LEAD}(?:either|both|neither|between|not|one of)\b")
EXPLICIT = re.compile(r"\s*(?:$|[.,:;!?)\]}<>(–—-]|\b(?:or|and|nor|because|since|as|for|which|with)\b)")
# what a claim ends before, so that a reason may speak of other options
REASON = re.compile(r"(?i)\b(?:because|since|as|not|unlike|while|whereas|rather|so|where|which)\b|(?<=[a-z0-9)])[.!?] ")
NEXT = re.compile(r" ?(?:[(\[]([A-Ja-j])[)\]]|([A-J])(?=$|[(\[)\].,;]))")
ALSO = r"(?:\b(?:or|maybe|perhaps|possibly|even|also)\b ?){0,3}"
ANOTHER = re.compile(rf"(?:\b(?:or|and|nor)\b|[/,&;|])[/ ]?{ALSO}{LEAD}{CHOICE}")
MARKED = re.compile(
    r"\s*(?:\(([A-J])\)|\[([A-J])\]|([A-J])(?:\)|\.(?!\s?[A-Z]\.)|:(?<!A:))(?!\w)|[(\[]?([A-Ja-j])[)\].]*\s*$)"
)
BRACKETED = re.compile(r"\(([A-J])\)")


class Question(NamedTuple):
    """The right letter, and the options' texts as they compare, by letter; {} where they are not known."""

    letter: str
    options: dict[str, str]


def verify(response: str, ground_truth: object, mode: str = "default") -> Verdict:
    """1 if the response chooses the right option, else 0. Raises GroundTruthError; else total, bounded work."""
    question = parse(ground_truth)
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return failed("the thinking does not end")
    if is_blank(text):
        return failed("empty response")
    letter, why = chosen(text[-TAIL:], question.options)
    if letter is None:
        return failed(f"{why}, expected {question.letter}")
    text = f"chose {letter}, expected {question.letter}"
    return passed(text) if letter == question.letter else failed(text)


# --- the response -----------------------------------------------------------------------------------------------------


def chosen(text: str, options: dict[str, str]) -> tuple[str | None, str]:
    """(the letter that the text settles on or None, why there is none)."""
    text = COMMAND.sub(r"\1", re.sub(r"[^\S\n]+", " ", text))
    text = MARKS.sub(r"(\1)", text).replace("**", "").replace("__", "")
    declarations = list(DECLARED.finditer(text))[-MAX_DECLARATIONS:]
    for mark in reversed(declarations):
        letter, why = named(declared_span(text, mark), options)
        if letter or why:
            return letter, why
    lines = [line for line in text.split("\n") if line.strip()]
    marked = [(line, match) for line in lines if (match := MARKED.match(line))]
    letters = {letter_of(match) for _, match in marked}
    if len(letters) == 1:
        letter, why = named(marked[-1][0], options)
        return (letter, why) if letter or why else (letters.pop(), "")
    if marked and len(lines[-1].strip()) <= 3 and marked[-1][0] == lines[-1]:
        return letter_of(marked[-1][1]), ""
    if marked:
        return None, "several options"
    if not lines:
        return None, "no option"
    in_brackets = set(BRACKETED.findall(lines[-1]))
    if len(in_brackets) == 1 and not re.search(r"(?i)\bnot\b|n't\b", lines[-1]):
        return in_brackets.pop(), ""
    by_text = option_of(text, options) or option_of(lines[-1], options)
    return by_text, "" if by_text else "several options" if in_brackets else "no option"


def declared_span(text: str, mark: re.Match) -> str:
    """What a declaration declares, on one line: to the brace or tag that closes it, else to the end of the line (of the
    next one, where nothing follows on the same)."""
    rest = text[mark.end() : mark.end() + SPAN]
    if mark[0].endswith("{"):
        return " ".join(rest.partition("}")[0].split())
    if mark[0].startswith("<"):
        return " ".join(rest.partition("</")[0].split())
    return rest.strip().partition("\n")[0]


def named(span: str, options: dict[str, str]) -> tuple[str | None, str]:
    """(the letter that a span begins with, ''), (None, why) where it names several or none of them, (None, '') where it
    does not speak of options."""
    span = span.strip()
    if not MARKED.match(span) and (by_text := option_of(span, options)):
        return by_text, ""
    if small := SMALL.fullmatch(span):
        return small[1].upper(), ""
    if NONE.match(span):
        return None, f"no single option: {shown(span, 30)}"
    match = NAMED.match(span)
    if match is None or not explicit(match, span):
        return None, ""
    letter, rest = letter_of(match), span[match.end() :]
    body = rest.lstrip(" .):]")
    begin = len(rest) - len(body)
    end = REASON.search(rest, begin)
    claim = rest[: end.start() if end else None]
    others = [next_to] if (next_to := NEXT.match(claim)) else []
    for other in ANOTHER.finditer(claim):
        is_marked = other[1] is not None or claim[other.end() : other.end() + 1] in (")", ".", ":")
        others += [other] if (is_marked or other.start() <= begin + 1) and explicit(other, claim) else []
    if any(letter_of(other) != letter for other in others):
        return None, f"several options: {shown(span, 30)}"
    if (said := option_of(body, options)) and said != letter:
        return None, f"the letter and the text are of two options: {shown(span, 30)}"
    return letter, ""


def explicit(match: re.Match, text: str) -> bool:
    """False for a bare 'A' or 'I' that goes on as a sentence: 'A dog', 'I think'."""
    return match[1] is not None or match[2] not in ("A", "I") or EXPLICIT.match(text[match.end() :]) is not None


def letter_of(match: re.Match) -> str:
    """The letter of whichever group matched."""
    return next(group for group in match.groups() if group).upper()


def option_of(text: str, options: dict[str, str]) -> str | None:
    """The letter of the option whose text this is."""
    if not options or len(text) > 2 * SPAN:
        return None
    found = normalised(text)
    return next((letter for letter, option in options.items() if option == found), None)


# --- the label --------------------------------------------------------------------------------------------------------


def parse(ground_truth: object) -> Question:
    """The question of a label. Raises GroundTruthError."""
    if isinstance(ground_truth, (list, tuple)) and len(ground_truth) == 1:
        ground_truth = ground_truth[0]
    if isinstance(ground_truth, str) and (match := LABEL.fullmatch(ground_truth)):
        return Question(match[1].upper(), {match[1].upper(): normalised(match[2])} if match[2] else {})
    row = ground_truth
    if isinstance(row, str) and row.lstrip().startswith("{"):
        row = read_structure(row, "ground_truth")
    if not isinstance(row, dict):
        expected = 'a letter from A to J, or {"answer": "B", "options": ["Rome", "Paris"]}'
        raise GroundTruthError(f"ground_truth: expected {expected}, found {shown(ground_truth)}")
    for key in row:
        if key not in ("answer", "options"):
            raise GroundTruthError(f"ground_truth: unknown key {shown(key)}{nearest(key, ('answer', 'options'))}")
    options = options_of(row.get("options"))
    answer = row.get("answer")
    if not isinstance(answer, str):
        raise GroundTruthError(f"ground_truth: answer must be a letter or an option's text, found {shown(answer)}")
    match = LABEL.fullmatch(answer)
    letter = match[1].upper() if match and not match[2] else option_of(answer, options)
    if letter is None or (options and letter not in options):
        raise GroundTruthError(f"ground_truth: answer {shown(answer)} is none of the options")
    return Question(letter, options)


def options_of(options: object) -> dict[str, str]:
    """The options' normalised texts by letter, of a list, of an object letter → text, or of nothing. Raises
    GroundTruthError."""
    if options is None:
        return {}
    if isinstance(options, (list, tuple)) and len(options) <= len(LETTERS):
        options = dict(zip(LETTERS, options, strict=False))
    ours = isinstance(options, dict) and all(isinstance(key, str) and key.upper() in LETTERS for key in options)
    if not isinstance(options, dict) or not ours or len(options) < 2:
        raise GroundTruthError(
            f"ground_truth: options must be 2 to 10 texts, or letter to text, found {shown(options)}"
        )
    texts = {key.upper(): text for key, text in options.items() if key}
    if not all(isinstance(text, str) and not is_blank(text) and len(text) <= TAIL for text in texts.values()):
        raise GroundTruthError(f"ground_truth: options must be texts that are not empty, found {shown(options)}")
    found = {letter: normalised(text) for letter, text in texts.items()}
    if len(set(found.values())) < len(options):
        raise GroundTruthError(f"ground_truth: two options are the same: {shown(options)}")
    return found

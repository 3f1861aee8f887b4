r"""Answers in words: 'Evelyn', '\text{no solution}', the letter of a choice '\textbf{(B)}\ 5'."""

import re
from functools import lru_cache

FONTS = r"text|textbf|textit|textrm|textnormal|textsf|texttt|textup|mbox|mathrm|mathbf|mathit|mathsf|bf|rm|it"
FONT = re.compile(rf"\\(?:{FONTS})(?![a-z])\s*")
CHOICE = re.compile(
    rf"(?s)(?:\\(?:{FONTS})\s*\{{\s*(?:\(([A-J])\)|([A-J])[.):])\s*\}}|\(([A-J])\)(?=\s|$)|([A-J])[.):](?=\s|$)"
    r"|(?i:option|choice|answer)\s*:?\s*\(?([A-J])\)?\.?(?=\s|$))\s*(.*)"
)
LETTER = re.compile(rf"(?:\\(?:{FONTS})\s*\{{\s*)?\(?\s*(?:\\(?:{FONTS})\s*\{{\s*)?([A-J])\s*\}}?\s*\)?\s*\}}?[.:]?")
LABELS = re.compile(r"(?:[A-J]|[IVX]{1,4})(?:\s*(?:,|and\b|&)\s*(?:and\s+)?(?:[A-J]|[IVX]{1,4})){1,8}")
ARTICLE = re.compile(r"(?i)^(?:the|an|a)\s+(?=\S{3})")


def choice(text: str) -> tuple[str, str] | None:
    r"""(letter, what stands after it) of the answer to a question of choices: of '\textbf{(B)}\ 5' ('B', '5')."""
    if match := LETTER.fullmatch(text):
        return match[1], ""
    if match := CHOICE.fullmatch(text):
        *letters, rest = match.groups()
        return next(letter for letter in letters if letter), rest.strip()
    return None


def labels(text: str) -> list[str] | None:
    """The labels that a text lists, sorted: of 'A and C' and '(C), (A)' ['A', 'C']; None for any other text."""
    if not LABELS.fullmatch(bare := re.sub(r"[{}()]", "", FONT.sub("", text)).strip()):
        return None
    return sorted(re.findall(r"[A-Z]+", bare))


def same_words(prediction: str, answer: str) -> bool | None:
    """Whether two texts of words are the same, in any case and font, with or without an article and brackets around
    them; None if neither is words: 'Evelyn', '\\text{(C)}'. Bare single letters are variables: 'x' and 'X' are not
    words."""
    a, b = plain_words(prediction), plain_words(answer)
    if a is None or b is None:
        return None
    if len(a) == len(b) == 1:
        return a.casefold() == b.casefold() if "\\" in prediction + answer else None
    both = ARTICLE.sub("", a.casefold()) == ARTICLE.sub("", b.casefold())
    if not both and {a.lower(), b.lower()} & {"no", "on", "yes", "so", "is", "it", "am", "pm"}:
        return False
    return True if both else None if max(len(a), len(b)) <= 3 and " " not in a + b else False


@lru_cache(maxsize=4096)
def plain_words(text: str) -> str | None:
    r"""The words of a text of nothing else, without fonts and outer brackets: of '\text{(C)}' 'C'; None for '2x'."""
    bare = FONT.sub("", text)
    bare = re.sub(r"[{}]", "", bare).strip(" .,;:!\"'")
    while bare.startswith("(") and bare.endswith(")"):
        bare = bare[1:-1].strip()
    return " ".join(bare.split()) if re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ \-',.])*", bare) else None

"""IFEvalG's instructions about copies, paragraphs and brackets (open-instruct e6c3044, IFEvalG/instructions.py).

A rule is `name(text, **kwargs) -> (followed, what was seen)`. RULES are what the instructions say; REFERENCE the rules
of open-instruct where they do something else (docs/verifiers.md), to the letter. All are linear in the text.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from verifiers.ifeval.google_rules import Followed, exactly, no_mark, number_paragraphs
from verifiers.ifeval.sentences import count_sentences, cut_sentences, split_sentences, word_tokens
from verifiers.ifeval.words import MARKS, plain_words
from verifiers.strings import shown

# --- copies of the prompt ---------------------------------------------------------------------------------------------


def copied(text: str, original: str) -> Followed:
    """Whether the text is the original to the letter, but for white space around it."""
    same = text.strip() == original.strip()
    return same, f"{'' if same else 'not '}the text to copy"


def copied_in_any_case(text: str, original: str) -> Followed:
    """Whether the text is the original in any case, but for white space around it."""
    same = text.strip().lower() == original.strip().lower()
    return same, f"{'' if same else 'not '}the text to copy"


def copy(text: str, prompt_to_repeat: str) -> Followed:
    """The prompt verbatim."""
    return copied(text, prompt_to_repeat)


def copy_in_any_case(text: str, prompt_to_repeat: str) -> Followed:
    """The prompt, in any case."""
    return copied_in_any_case(text, prompt_to_repeat)


def several_copies(text: str, original: str, n: int, same: Callable[[str, str], Followed]) -> Followed:
    """Whether the text is n copies of the original with '******' between them."""
    parts = text.split("******")
    if len(parts) != n:
        return exactly(len(parts), n, "parts between '******'")
    wrong = sum(not same(part, original)[0] for part in parts)
    return not wrong, f"{wrong} of {n} parts are no copies"


def copying_multiple(text: str, prompt_to_repeat: str, N: int) -> Followed:
    """N copies of the prompt without change, with '******' between them."""
    return several_copies(text, prompt_to_repeat, N, copied)


def copying_multiple_in_any_case(text: str, prompt_to_repeat: str, N: int) -> Followed:
    """N copies in any case, with '******' between them."""
    return several_copies(text, prompt_to_repeat, N, copied_in_any_case)


def copy_span_idx(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> Followed:
    """The characters of the prompt from index n_start to index n_end, the end included."""
    return copied(text, prompt_to_repeat[n_start : n_end + 1])


def copy_span_without_its_end(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> Followed:
    """The characters from index n_start to the one before n_end, in any case."""
    return copied_in_any_case(text, prompt_to_repeat[n_start:n_end])


def repeat_phrase(text: str, phrase: str, small_n: int) -> Followed:
    """So many repetitions of the phrase with exactly one word between its first and its last replaced, in any case."""
    wanted = list(plain_words(phrase.lower()))
    words: deque[str] = deque(maxlen=len(wanted))
    changed = other = skip = 0
    for word in plain_words(text.lower()):
        words.append(word)
        skip -= 1
        if word == wanted[-1] and skip <= 0 and len(words) == len(wanted) and words[0] == wanted[0]:
            different = differences(words, wanted)
            changed, other = changed + (different == 1), other + (different == 0)
            skip = len(wanted) if different <= 1 else 0
        if changed > small_n:
            break
    seen = f"{changed} repetitions with one word replaced, {other} without; wanted {small_n}"
    return changed == small_n and not other, seen


def repeat_phrase_by_its_ends(text: str, phrase: str, small_n: int) -> Followed:
    """So many spans from the first word of the phrase to the next last word, within a line, all of the phrase's length
    and with exactly one other word. The ends are regular expressions and need not be whole words."""
    words = phrase.split()
    spans = []
    for span in spans_between(text, words[0], words[-1]):
        spans.append(span.split())
        if len(spans) > small_n or len(spans[-1]) != len(words):
            break
    wrong = [span for span in spans if len(span) != len(words) or differences(span, words) != 1]
    return len(spans) == small_n and not wrong, f"{len(spans)} repetitions, {len(wrong)} wrong; wanted {small_n}"


def differences(a: Iterable[str], b: Iterable[str]) -> int:
    """In how many places two lists of the same length differ."""
    return sum(x != y for x, y in zip(a, b, strict=True))


def spans_between(text: str, first: str, last: str) -> Iterator[str]:
    """What rf"{first} .*? {last}" finds, in one pass: after a failure nothing later in the line can succeed."""
    start, end = re.compile(f"(?:{first}) "), re.compile(f" (?:{last})")
    for line in text.split("\n"):
        place = 0
        while (head := start.search(line, place)) and (tail := end.search(line, head.end())):
            yield line[head.start() : tail.end()]
            place = tail.end()


# --- paragraphs, brackets, hyphens ------------------------------------------------------------------------------------


def paragraphs(text: str) -> Followed:
    """Two paragraphs with '***' between them."""
    return number_paragraphs(text, 2)


def paragraphs2(text: str) -> Followed:
    """Two paragraphs with two line breaks between them; a blank piece is allowed only first or last."""
    parts = text.split("\n\n")
    if any(not part.strip() for part in parts[1:-1]):
        return False, "an empty paragraph"
    return exactly(sum(bool(part.strip()) for part in parts), 2, "paragraphs")


DIVIDER = re.compile(r"\s?(?:\* \* \*|\*\*\*)\s?")


def counting_composition(text: str, n_sent: int, n_words: int) -> Followed:
    """Three paragraphs with '* * *' (or '***', the same divider to Markdown) between them, each of so many sentences
    of so many words; marks are no words."""
    parts = [part for part in DIVIDER.split(text, 4) if part.strip()]
    if len(parts) != 3:
        return exactly(len(parts), 3, "paragraphs")
    for part in parts:
        if (seen := count_sentences(part, n_sent + 1)) != n_sent:
            return exactly(seen, n_sent, "sentences in a paragraph")
        for sentence in split_sentences(part):
            if (seen := sum(1 for _ in plain_words(sentence))) != n_words:
                return exactly(seen, n_words, "words in a sentence")
    return True, f"3 paragraphs of {n_sent} sentences of {n_words} words"


def counting_composition_in_tokens(text: str, n_sent: int, n_words: int) -> Followed:
    """Three pieces at '***' alone, a final full stop being a word, and an empty piece having no sentences."""
    if text.count("***") < 2:
        return False, "fewer than 3 paragraphs"
    parts = re.split(r"\s?\*\*\*\s?", text, maxsplit=5)
    count = len(parts)
    for place, part in enumerate(parts):
        if not part.strip():
            if 0 < place < len(parts) - 1:
                return False, "an empty paragraph"
            count -= 1
        sentences = []
        for sentence in cut_sentences(part):
            sentences.append(sentence)
            if len(sentences) > n_sent:
                break
        if len(sentences) != n_sent:
            return exactly(len(sentences), n_sent, "sentences in a paragraph")
        for sentence in sentences:
            seen = sum(len(word_tokens(part)) for part in split_sentences(sentence))
            if seen != n_words:
                return exactly(seen, n_words, "tokens in a sentence")
    return exactly(count, 3, "paragraphs")


def sentence_hyphens(text: str) -> Followed:
    """Sentences joined by hyphens without spaces: no sentence or line ends before white space, no hyphen beside it."""
    text = text.strip()
    if re.search(r"\s-|-\s|\n", text):
        return False, "white space beside a hyphen, or a line break"
    joined = count_sentences(text, 2) == 1
    return joined, "sentences joined" if joined else "white space between sentences"


def sentence_hyphens_as_pieces(text: str) -> Followed:
    """The pieces between hyphens are the sentences of the text without hyphens, as far as there are both."""
    sentences = cut_sentences(text.replace("-", " "))
    for piece, sentence in zip(text.split("-"), sentences, strict=False):
        if piece != sentence:
            return False, f"{shown(piece, 30)} is not the sentence {shown(sentence, 30)}"
    return True, "the pieces between hyphens are sentences"


def square_brackets(text: str) -> Followed:
    """Every word in square brackets of its own; other marks may stand outside."""
    seen = 0
    for match in re.finditer(r"\S+", text):
        outside = re.sub(r"\[[^\[\]]*+\]", "", match[0])
        if outside.strip(MARKS):
            return False, f"{shown(match[0], 30)} is not in square brackets"
        seen += outside != match[0]
    return seen > 0, f"{seen} words in square brackets"


def square_brackets_at_the_ends(text: str) -> Followed:
    """Every piece between white space begins with '[' and ends with ']'."""
    for match in re.finditer(r"\S+", text):
        if not match[0].startswith("[") or not match[0].endswith("]"):
            return False, f"{shown(match[0], 30)} is not in square brackets"
    return True, "all in square brackets"


BIGRAM = re.compile(r"<<[^\s<>]+\s+[^\s<>]+>>")


def bigram_wrapping(text: str) -> Followed:
    """Every two words in <<double angular brackets>>; marks may stand outside, and a last odd word alone."""
    bigrams = place = 0
    outside: list[str] = []
    for match in BIGRAM.finditer(text):
        outside += plain_words(text[place : match.start()])
        if outside:
            break
        bigrams, place = bigrams + 1, match.end()
    else:
        last = plain_words(text[place:])
        outside += [word for word, _ in zip(last, range(2), strict=False)][1:]
    return bigrams > 0 and not outside, f"{bigrams} bigrams, then {shown(outside) if outside else 'the end'}"


def bigram_wrapping_by_places(text: str) -> Followed:
    """Of every two pieces between white space the first begins with '<<' and the second ends with '>>'."""
    pieces = re.finditer(r"\S+", text)
    for first, second in zip(pieces, pieces, strict=False):
        if not first[0].startswith("<<") or not second[0].endswith(">>"):
            return False, f"{shown(first[0], 20)} {shown(second[0], 20)} is not wrapped"
    return True, "all wrapped"


def punctuation_dot(text: str) -> Followed:
    """No full stop at all."""
    return no_mark(text, ".", "dots")


def punctuation_exclamation(text: str) -> Followed:
    """No exclamation mark at all."""
    return no_mark(text, "!", "exclamation marks")


RULES: dict[str, Callable[..., Followed]] = {
    "copy:copy": copy,
    "copy:copying_simple": copy,
    "copy:copying_multiple": copying_multiple,
    "copy:repeat_phrase": repeat_phrase,
    "new:copy_span_idx": copy_span_idx,
    "paragraphs:paragraphs": paragraphs,
    "paragraphs:paragraphs2": paragraphs2,
    "count:counting_composition": counting_composition,
    "detectable_format:sentence_hyphens": sentence_hyphens,
    "detectable_format:square_brackets": square_brackets,
    "detectable_format:bigram_wrapping": bigram_wrapping,
    "punctuation:punctuation_dot": punctuation_dot,
    "punctuation:punctuation_exclamation": punctuation_exclamation,
}
REFERENCE: dict[str, Callable[..., Followed]] = {
    "copy:copy": copy_in_any_case,
    "copy:copying_simple": copy_in_any_case,
    "copy:copying_multiple": copying_multiple_in_any_case,
    "copy:repeat_phrase": repeat_phrase_by_its_ends,
    "new:copy_span_idx": copy_span_without_its_end,
    "count:counting_composition": counting_composition_in_tokens,
    "detectable_format:sentence_hyphens": sentence_hyphens_as_pieces,
    "detectable_format:square_brackets": square_brackets_at_the_ends,
    "detectable_format:bigram_wrapping": bigram_wrapping_by_places,
}

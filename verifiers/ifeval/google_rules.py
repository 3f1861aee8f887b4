"""The 25 instructions of IFEval (Zhou et al. 2023, arXiv:2311.07911, table 1), a function each.

Rules: google-research's instruction_following_eval, which lm-evaluation-harness 4e7e0d4, IFBench db69a6f and
open-instruct e6c3044 repeat. They are the meaning of the benchmark, so its oddities are kept, each noted beside its
rule. Not kept (docs/verifiers.md): keywords used as regular expressions, and a missing argument drawn at random.
A rule is `name(text, **kwargs) -> (followed, what was seen)`; the annotations of its arguments are what a row must give
(arguments.py). All are linear in the text.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

from verifiers.ifeval import language
from verifiers.ifeval.sentences import count_capital_words, count_sentences, trained_sentences
from verifiers.strings import shown
from verifiers.verdict import GroundTruthError

Followed = tuple[bool, str]  # whether the instruction is followed, what was seen
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda seen, n: seen >= n,
    "less than": lambda seen, n: seen < n,
}


def counted(seen: int, relation: str, n: int, what: str) -> Followed:
    """Whether `seen` satisfies the relation to `n`; several rules stop counting once that is settled."""
    return RELATIONS[relation](seen, n), f"{seen} {what}, wanted {relation} {n}"


def exactly(seen: int, n: int, what: str) -> Followed:
    """Whether `seen` is `n`."""
    return seen == n, f"{seen} {what}, wanted {n}"


def occurrences(text: str, keyword: str, limit: int) -> int:
    """How often the keyword is in the text, in any case, counted up to `limit`."""
    if keyword and text.isascii() and is_plain(keyword):
        return min(text.lower().count(keyword.lower()), max(limit, 0))
    found = re.finditer(keyword_pattern(keyword), text, re.IGNORECASE) if keyword else ()
    return sum(1 for _ in islice(found, max(limit, 0)))


def is_plain(keyword: str) -> bool:
    """True for an ASCII keyword that means itself: that is no `Regex`, or one without a special character."""
    return keyword.isascii() and (not isinstance(keyword, Regex) or re.escape(keyword) == keyword)


def keyword_pattern(keyword: str) -> str:
    """The keyword itself; where it comes as a `Regex` (reference mode), what it means as one."""
    return str(keyword) if isinstance(keyword, Regex) else re.escape(keyword)


class Regex(str):
    """A keyword to be read as a regular expression, as the references read all of them. Only shapes whose work is
    linear: no repetition, no backward reference, no look-around, a few optional parts.
    """

    def __new__(cls, keyword: str) -> "Regex":
        if re.search(r"[*+{]|\\[0-9]|\(\?", keyword) or keyword.count("?") > 4:
            raise GroundTruthError(f"keyword {shown(keyword)} as a regular expression has no bound on its work")
        try:
            re.compile(keyword)
        except (re.error, RecursionError, OverflowError) as problem:
            raise GroundTruthError(f"keyword {shown(keyword)} as a regular expression: {problem}") from None
        return super().__new__(cls, keyword)


# --- keywords ---------------------------------------------------------------------------------------------------------


def existence(text: str, keywords: list) -> Followed:
    """Every keyword is in the text, as a substring, in any case."""
    missing = [word for word in keywords if word and not occurrences(text, word, 1)]
    return not missing, f"missing {shown(missing)}" if missing else "all keywords found"


def frequency(text: str, keyword: str, frequency: int, relation: str) -> Followed:
    """A substring, in any case, so often."""
    return counted(occurrences(text, keyword, frequency + 1), relation, frequency, f"times {shown(keyword, 20)}")


def forbidden_words(text: str, forbidden_words: list) -> Followed:
    """None of the words stands in the text as a whole word ('_' counts as a letter)."""
    found = [word for word in forbidden_words if has_word(text, word)]
    return not found, f"found {shown(found)}" if found else "no forbidden word"


def has_word(text: str, word: str) -> bool:
    """True if the word stands in the text as a whole word, in any case."""
    if isinstance(word, Regex):
        return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None
    return next(whole_words(text, word), None) is not None


def whole_words(text: str, word: str) -> Iterator[re.Match]:
    """Where the word or phrase stands in the text with no letter, digit or '_' on either side, in any case."""
    flags = re.IGNORECASE
    if text.isascii():  # most responses, and ten times as fast
        text, word, flags = text.lower(), word.lower(), re.NOFLAG
        if word not in text:
            return iter(())
    word = re.escape(word)
    return re.finditer(rf"{word}(?!\w)(?<!\w{word})", text, flags)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> Followed:
    """A letter, in any case, so often. The references draw another letter when it is not one of a-z."""
    return counted(text.lower().count(letter.strip().lower()), let_relation, let_frequency, f"times {shown(letter, 5)}")


# --- language and case ------------------------------------------------------------------------------------------------


def response_language(text: str, language: str) -> Followed:
    """Written in this language; a text whose language cannot be told passes."""
    return in_language(text, language)


def in_language(text: str, code: str) -> Followed:
    """Whether the text is in the language of that code, or in none that can be told."""
    same = language.is_language(text, code)
    found = "unknown" if same is None else code if same else "not " + code
    return same is not False, f"language {found}"


def english_capital(text: str) -> Followed:
    """All letters upper-case (at least one), in English."""
    return in_language(text, "en") if all_upper(text) else (False, "not all upper-case")


def english_lowercase(text: str) -> Followed:
    """All letters lower-case (at least one), in English."""
    return in_language(text, "en") if all_lower(text) else (False, "not all lower-case")


def all_upper(text: str) -> bool:
    """text.isupper(), which is slow."""
    return text == text.upper() != text.lower() if text.isascii() else text.isupper()


def all_lower(text: str) -> bool:
    """text.islower(), which is slow."""
    return text == text.lower() != text.upper() if text.isascii() else text.islower()


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> Followed:
    """Words in capitals ('I' and 'A1' are), as the Penn Treebank cuts words."""
    seen = count_capital_words(text, capital_frequency)
    return counted(seen, capital_relation, capital_frequency, "words in capitals")


# --- lengths ----------------------------------------------------------------------------------------------------------


def number_sentences(text: str, num_sentences: int, relation: str) -> Followed:
    """So many sentences (sentences.py)."""
    return counted(count_sentences(text, num_sentences), relation, num_sentences, "sentences")


def number_trained_sentences(text: str, num_sentences: int, relation: str) -> Followed:
    """As number_sentences, where nltk looks for them."""
    seen = sum(1 for _ in islice(trained_sentences(text), max(num_sentences, 0)))
    return counted(seen, relation, num_sentences, "sentences")


def number_words(text: str, num_words: int, relation: str) -> Followed:
    """Maximal runs of letters, marks, digits and '_': "don't" is two."""
    seen = 0
    for part in (text[: 64 * (num_words + 1)], text):  # the beginning often settles it
        if seen <= num_words:
            seen = sum(1 for _ in islice(word_pattern(part.isascii()).finditer(part), num_words + 1))
    return counted(seen, relation, num_words, "words")


@lru_cache(maxsize=2)
def word_pattern(ascii_only: bool = False) -> re.Pattern:
    r"""Words of letters, digits, '_' and combining marks, or 'हिन्दी' would be three: nltk 3.10's \w has marks
    and joiners besides what Python's has."""
    if ascii_only:
        return re.compile(r"\w+")
    ranges: list[list[int]] = []
    for c in (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)):
        if unicodedata.category(chr(c))[0] == "M":
            if ranges and ranges[-1][1] == c - 1:
                ranges[-1][1] = c
            else:
                ranges.append([c, c])
    marks = "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)
    return re.compile(rf"[\w\u200c\u200d{marks}]+")


def number_paragraphs(text: str, num_paragraphs: int) -> Followed:
    """Paragraphs between '***' dividers; an empty one is allowed only first or last and does not count."""
    parts = text.split("***")
    if any(not part.strip() for part in parts[1:-1]):
        return False, "an empty paragraph between dividers"
    return exactly(sum(bool(part.strip()) for part in parts), num_paragraphs, "paragraphs")


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> Followed:
    """So many paragraphs between blank lines, the n-th beginning with the word.

    The n-th is taken from a list with the blank ones still in it, while the count leaves them out: the reference's
    rule.
    """
    paragraphs = text.split("\n\n")
    count = sum(bool(part.strip()) for part in paragraphs)
    if not 1 <= nth_paragraph <= count:
        return False, f"{count} paragraphs, wanted the first word of number {nth_paragraph}"
    words = paragraphs[nth_paragraph - 1].strip().split(None, 1)
    word = words[0].lstrip("'").lstrip('"')[: 4 * len(first_word) + 40] if words else ""
    word = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    same = count == num_paragraphs and word == first_word.lower()
    seen = f"{count} paragraphs, wanted {num_paragraphs}; first word {shown(word, 20)}, wanted {shown(first_word)}"
    return same, seen


# --- content and format -----------------------------------------------------------------------------------------------


def count_brackets(text: str) -> int:
    """Non-overlapping [...] within one line."""
    count = 0
    for line in text.split("\n") if "[" in text else ():
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start + 1)) >= 0:
            count += 1
    return count


def number_placeholders(text: str, num_placeholders: int) -> Followed:
    """At least so many [placeholders]."""
    return counted(count_brackets(text), "at least", num_placeholders, "placeholders in square brackets")


def postscript(text: str, postscript_marker: str) -> Followed:
    """The marker, in any case, anywhere; white space may stand after the first dot of 'P.S.' and 'P.P.S'."""
    spaced = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = spaced.get(postscript_marker) or keyword_pattern(postscript_marker)
    none = postscript_marker in spaced and text.isascii() and "p." not in text.lower()  # soon said, of most responses
    found = not none and re.search(pattern, text, re.IGNORECASE) is not None
    return found, f"{'found' if found else 'no'} {shown(postscript_marker)}"


def number_bullet_lists(text: str, num_bullets: int) -> Followed:
    """Lines that begin with '*' (but not '**') or with '-', so '---' is one."""
    lines, seen = "\n" + text, 0
    for bullet in (r"\n[^\S\n]*\*[^*].*", r"\n[^\S\n]*-"):  # [^*] may be the line's end, and the next line its text
        seen += sum(1 for _ in islice(re.finditer(bullet, lines), max(num_bullets, 0) + 1))
    return exactly(seen, num_bullets, "bullets")


def constrained_response(text: str) -> Followed:
    """One of 'My answer is yes.', '... no.' and '... maybe.' is in the text, in this case of the letters."""
    found = any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))
    return found, f"{'one' if found else 'none'} of the three answers"


def number_highlighted_sections(text: str, num_highlights: int) -> Followed:
    """*one* and **two** within a line and not blank; '**x**' is found by both patterns only where its inside is."""
    single = sum(bool(found.strip("*").strip()) for found in re.findall(r"\*[^\n*]*\*", text))
    double = 0
    for found in re.findall(r"\*\*[^\n*]*\*\*", text):
        double += bool(found.removeprefix("**").removesuffix("**").strip())
    return counted(single + double, "at least", num_highlights, "highlighted parts")


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> Followed:
    """The word followed by a number, case-sensitive, at least so often (a group in a Regex counts again: re.split)."""
    mark = keyword_pattern(section_spliter)
    seen = sum(1 for _ in re.finditer(rf"{mark}\s?\d+", text)) * (1 + re.compile(mark).groups)
    return counted(seen, "at least", num_sections, f"sections marked {shown(section_spliter, 20)}")


def json_format(text: str) -> Followed:
    """JSON, alone or inside one code fence."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    return is_json(text.removesuffix("```").strip())


def is_json(text: str) -> Followed:
    """Whether the text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError, MemoryError) as problem:
        return False, f"not JSON: {shown(problem)}"
    return True, "JSON"


def title(text: str) -> Followed:
    """<<a title>> within a line, not blank."""
    for line in text.split("\n") if "<<" in text else ():
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True, "a title"
    return False, "no title in double angular brackets"


def two_responses(text: str) -> Followed:
    """Two different non-blank texts with '******' between them."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False, "an empty response between dividers"
    parts = [part.strip() for part in parts if part.strip()]
    return len(parts) == 2 and parts[0] != parts[1], f"{len(parts)} responses, {len(set(parts))} different; wanted 2"


def repeat_prompt(text: str, prompt_to_repeat: str) -> Followed:
    """Begins with the prompt, in any case."""
    same = text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    return same, f"{'begins' if same else 'does not begin'} with the prompt"


def end_checker(text: str, end_phrase: str) -> Followed:
    """Ends with the phrase, in any case, quotation marks aside."""
    same = text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    return same, f"{'ends' if same else 'does not end'} with {shown(end_phrase)}"


def quotation(text: str) -> Followed:
    """In double quotation marks."""
    text = text.strip()
    same = len(text) > 1 and text[0] == text[-1] == '"'
    return same, f"{'' if same else 'not '}in double quotation marks"


def no_comma(text: str) -> Followed:
    """No comma at all."""
    return no_mark(text, ",", "commas")


def no_mark(text: str, mark: str, what: str) -> Followed:
    """The mark is nowhere in the text."""
    return mark not in text, f"{text.count(mark)} {what}"


GROUPS: dict[str, tuple[Callable[..., Followed], ...]] = {
    "keywords": (existence, frequency, forbidden_words, letter_frequency),
    "language": (response_language,),
    "length_constraints": (number_sentences, number_paragraphs, number_words, nth_paragraph_first_word),
    "detectable_content": (number_placeholders, postscript),
    "detectable_format": (
        number_bullet_lists,
        constrained_response,
        number_highlighted_sections,
        multiple_sections,
        json_format,
        title,
    ),
    "combination": (two_responses, repeat_prompt),
    "startend": (end_checker, quotation),
    "change_case": (capital_word_frequency, english_capital, english_lowercase),
    "punctuation": (no_comma,),
}
INSTRUCTIONS: dict[str, Callable[..., Followed]] = {
    f"{group}:{rule.__name__}": rule for group, rules in GROUPS.items() for rule in rules
}
REFERENCE: dict[str, Callable[..., Followed]] = {"length_constraints:number_sentences": number_trained_sentences}

"""IFEval: 25 instructions that a program can check (Zhou et al. 2023, arXiv:2311.07911, table 1).

Rules: google-research's instruction_following_eval, which lm-evaluation-harness 4e7e0d4, IFBench db69a6f and
open-instruct e6c3044 repeat. They are the meaning of the benchmark, so its oddities are kept, each noted beside its
rule. Not kept (docs/verifiers.md): keywords used as regular expressions, and a missing argument drawn at random.
A rule is `name(text, **kwargs) -> (followed, what was seen)`; all are linear in the text.
"""

import inspect
import json
import re
import unicodedata
from functools import lru_cache
from itertools import islice

from verifiers.ifeval import language
from verifiers.ifeval.arguments import nearest, typed_arguments
from verifiers.ifeval.sentences import count_capital_words, count_sentences
from verifiers.verdict import GroundTruthError, Verdict, error, failed, is_blank, read_structure, shown, without_thinking

MODES = ("default", "reference")
RELATIONS = {"at least": lambda seen, n: seen >= n, "less than": lambda seen, n: seen < n}


def counted(seen: int, relation: str, n: int, what: str) -> tuple[bool, str]:
    """Whether `seen` satisfies the relation to `n`; several rules stop counting once that is settled."""
    return RELATIONS[relation](seen, n), f"{seen} {what}, wanted {relation} {n}"


def exactly(seen: int, n: int, what: str) -> tuple[bool, str]:
    return seen == n, f"{seen} {what}, wanted {n}"


def occurrences(text: str, keyword: str, limit: int) -> int:
    found = re.finditer(keyword_pattern(keyword), text, re.IGNORECASE) if keyword else ()
    return sum(1 for _ in islice(found, max(limit, 0)))


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


# --- keywords -----------------------------------------------------------------------------------------------------


def existence(text, keywords: list):
    """Every keyword is in the text, as a substring, in any case."""
    missing = [word for word in keywords if not re.search(keyword_pattern(word), text, re.IGNORECASE)]
    return not missing, f"missing {shown(missing)}" if missing else "all keywords found"


def frequency(text, keyword: str, frequency: int, relation: str):
    """A substring, in any case, so often."""
    return counted(occurrences(text, keyword, frequency + 1), relation, frequency, f"times {shown(keyword, 20)}")


def forbidden_words(text, forbidden_words: list):
    """None of the words stands in the text as a whole word ('_' counts as a letter)."""
    found = [word for word in forbidden_words if has_word(text, word)]
    return not found, f"found {shown(found)}" if found else "no forbidden word"


def has_word(text: str, word: str) -> bool:
    if isinstance(word, Regex):
        return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None
    if text.isascii() and word.lower() not in text.lower():
        return False  # most responses, and three times as fast
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def letter_frequency(text, letter: str, let_frequency: int, let_relation: str):
    """A letter, in any case, so often. The references draw another letter when it is not one of a-z."""
    return counted(text.lower().count(letter.strip().lower()), let_relation, let_frequency, f"times {shown(letter, 5)}")


# --- language and case ----------------------------------------------------------------------------------------------


def response_language(text, language: str):
    """Written in this language; a text whose language cannot be told passes."""
    return in_language(text, language)


def in_language(text: str, code: str) -> tuple[bool, str]:
    same = language.is_language(text, code)
    return same is not False, f"language {'unknown' if same is None else code if same else 'not ' + code}"


def english_capital(text):
    """All letters upper-case (at least one), in English."""
    return in_language(text, "en") if text.isupper() else (False, "not all upper-case")


def english_lowercase(text):
    """All letters lower-case (at least one), in English."""
    return in_language(text, "en") if text.islower() else (False, "not all lower-case")


def capital_word_frequency(text, capital_frequency: int, capital_relation: str):
    """Words in capitals ('I' and 'A1' are), as the Penn Treebank cuts words."""
    seen = count_capital_words(text, capital_frequency)
    return counted(seen, capital_relation, capital_frequency, "words in capitals")


# --- lengths --------------------------------------------------------------------------------------------------------


def number_sentences(text, num_sentences: int, relation: str):
    return counted(count_sentences(text, num_sentences), relation, num_sentences, "sentences")


def number_words(text, num_words: int, relation: str):
    """Maximal runs of letters, marks, digits and '_': "don't" is two."""
    seen = 0
    for part in (text[: 64 * (num_words + 1)], text):  # the beginning often settles it
        if seen <= num_words:
            words = re.finditer(r"\w+", with_marks_as_letters(part))
            seen = sum(1 for _ in islice(words, num_words + 1))
    return counted(seen, relation, num_words, "words")


def with_marks_as_letters(text: str) -> str:
    r"""Combining marks belong to a word (nltk 3.10's \w), or 'हिन्दी' would be three; Python's \w leaves them out."""
    return text if text.isascii() else text.translate(marks())


@lru_cache(maxsize=1)
def marks() -> dict[int, str]:
    characters = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    return {c: "a" for c in characters if unicodedata.category(chr(c))[0] == "M" or c in (0x200C, 0x200D)}


def number_paragraphs(text, num_paragraphs: int):
    """Paragraphs between '***' dividers; an empty one is allowed only first or last and does not count."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False, "an empty paragraph between dividers"
    return exactly(sum(bool(part.strip()) for part in parts), num_paragraphs, "paragraphs")


def nth_paragraph_first_word(text, num_paragraphs: int, nth_paragraph: int, first_word: str):
    """So many paragraphs between blank lines, the n-th beginning with the word.

    The n-th is taken from a list with the blank ones still in it, while the count leaves them out: the reference's rule.
    """
    paragraphs = text.split("\n\n")
    count = sum(bool(part.strip()) for part in paragraphs)
    if not 1 <= nth_paragraph <= count:
        return False, f"{count} paragraphs, wanted the first word of number {nth_paragraph}"
    words = paragraphs[nth_paragraph - 1].strip().split(None, 1)
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() if words else ""
    same = count == num_paragraphs and word == first_word.lower()
    return same, f"{count} paragraphs, wanted {num_paragraphs}; first word {shown(word, 20)}, wanted {shown(first_word)}"


# --- content and format ---------------------------------------------------------------------------------------------


def count_brackets(text: str) -> int:
    """Non-overlapping [...] within one line."""
    count = 0
    for line in text.split("\n") if "[" in text else ():
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start + 1)) >= 0:
            count += 1
    return count


def number_placeholders(text, num_placeholders: int):
    return counted(count_brackets(text), "at least", num_placeholders, "placeholders in square brackets")


def postscript(text, postscript_marker: str):
    """The marker, in any case, anywhere; white space may stand after the first dot of 'P.S.' and 'P.P.S'."""
    spaced = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = spaced.get(postscript_marker) or keyword_pattern(postscript_marker)
    found = re.search(pattern, text, re.IGNORECASE) is not None
    return found, f"{'found' if found else 'no'} {shown(postscript_marker)}"


def number_bullet_lists(text, num_bullets: int):
    """Lines that begin with '*' (but not '**') or with '-', so '---' is one."""
    stars = re.findall(r"(?m)^[^\S\n]*\*[^*].*$", text)  # [^*] may be the line's end, and the next line its text
    dashes = re.findall(r"(?m)^[^\S\n]*-.*$", text)
    return exactly(len(stars) + len(dashes), num_bullets, "bullets")


def constrained_response(text):
    found = any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))
    return found, f"{'one' if found else 'none'} of the three answers"


def number_highlighted_sections(text, num_highlights: int):
    """*one* and **two** within a line and not blank; '**x**' is found by both patterns only where its inside is."""
    single = sum(bool(found.strip("*").strip()) for found in re.findall(r"\*[^\n*]*\*", text))
    double = 0
    for found in re.findall(r"\*\*[^\n*]*\*\*", text):
        double += bool(found.removeprefix("**").removesuffix("**").strip())
    return counted(single + double, "at least", num_highlights, "highlighted parts")


def multiple_sections(text, section_spliter: str, num_sections: int):
    """The word followed by a number, case-sensitive, at least so often (a group in a Regex counts again: re.split)."""
    mark = keyword_pattern(section_spliter)
    seen = sum(1 for _ in re.finditer(rf"{mark}\s?\d+", text)) * (1 + re.compile(mark).groups)
    return counted(seen, "at least", num_sections, f"sections marked {shown(section_spliter, 20)}")


def json_format(text):
    """JSON, alone or inside one code fence."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    return is_json(text.removesuffix("```").strip())


def is_json(text: str) -> tuple[bool, str]:
    try:
        json.loads(text)
    except (ValueError, RecursionError, MemoryError) as problem:
        return False, f"not JSON: {shown(problem)}"
    return True, "JSON"


def title(text):
    """<<a title>> within a line, not blank."""
    for line in text.split("\n") if "<<" in text else ():
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True, "a title"
    return False, "no title in double angular brackets"


def two_responses(text):
    """Two different non-blank texts with '******' between them."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False, "an empty response between dividers"
    parts = [part.strip() for part in parts if part.strip()]
    return len(parts) == 2 and parts[0] != parts[1], f"{len(parts)} responses, {len(set(parts))} different; wanted 2"


def repeat_prompt(text, prompt_to_repeat: str):
    same = text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    return same, f"{'begins' if same else 'does not begin'} with the prompt"


def end_checker(text, end_phrase: str):
    """Ends with the phrase, in any case, quotation marks aside."""
    same = text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    return same, f"{'ends' if same else 'does not end'} with {shown(end_phrase)}"


def quotation(text):
    text = text.strip()
    same = len(text) > 1 and text[0] == text[-1] == '"'
    return same, f"{'' if same else 'not '}in double quotation marks"


def no_comma(text):
    return "," not in text, f"{text.count(',')} commas"


GROUPS = {
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
INSTRUCTIONS = {f"{group}:{rule.__name__}": rule for group, rules in GROUPS.items() for rule in rules}


# --- a row ----------------------------------------------------------------------------------------------------------


def parse(ground_truth: object, mode: str = "default") -> list[tuple[str, dict]]:
    """The (instruction id, arguments) pairs of a row.

    ground_truth: {"instruction_id": [...], "kwargs": [...]} (or "instruction_id_list"), or a list of such, as an
    object, as JSON or as a Python literal; nulls among the arguments are dropped. Raises GroundTruthError for an
    unknown id (naming the nearest), an unknown, missing or badly typed argument.
    """
    rows = read_structure(ground_truth, "ground_truth")
    pairs = []
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


def arguments(name: str, given: dict, mode: str) -> dict:
    if name not in INSTRUCTIONS:
        raise GroundTruthError(f"ground_truth: unknown instruction {shown(name)}{nearest(name, INSTRUCTIONS)}")
    given = {key: value for key, value in given.items() if value is not None}
    typed = typed_arguments(name, inspect.signature(INSTRUCTIONS[name]).parameters, given)
    for key in ("relation", "let_relation", "capital_relation"):
        if key in typed and typed[key] not in RELATIONS:
            raise GroundTruthError(f"{name}: {key} must be 'at least' or 'less than', found {shown(typed[key])}")
    for key in {"keyword", "section_spliter"} & set(typed):
        typed[key] = typed[key].strip()
    if name.startswith(("language:", "change_case:english")) and not language.is_available():
        raise GroundTruthError(f"{name} needs langdetect: pip install 'triptych[ifeval]'")
    if mode == "reference":
        for key in {"keyword", "keywords", "forbidden_words", "section_spliter"} & set(typed):
            words = typed[key]
            typed[key] = Regex(words) if isinstance(words, str) else [Regex(word) for word in words]
    return typed


def follow(response: str, name: str, kwargs: dict, loose: bool = False, blank=is_blank) -> tuple[bool, str]:
    """(whether one instruction is followed, what was seen). A response that is `blank` follows none.

    loose: any of eight texts may follow it: the response as it is or without '*', each whole, without its first line,
    without its last, without both (Zhou et al. 2023, section 2.3).
    """
    rule = INSTRUCTIONS[name]
    seen = "empty response"
    for text in variants(response) if loose else [response]:
        if not blank(text):
            followed, seen = rule(text, **kwargs)
            if followed:
                return True, seen
    return False, seen


def variants(response: str) -> list[str]:
    lines = response.split("\n")
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return texts + [text.replace("*", "") for text in texts]


def verify(response: str, ground_truth: object, mode: str = "default", loose: bool = False, combine: str = "fraction") -> Verdict:
    """The fraction of a row's instructions that the response follows, or with combine='all' whether it follows all.

    default: the response as it stands (Google's strict; `loose` for its loose metric).
    reference: open-instruct e6c3044, IFEvalVerifier: thinking and answer tags removed first, keywords are regular
    expressions. Never raises: a bad ground truth is a Verdict with status 'error'.
    """
    try:
        pairs = parse(ground_truth, mode)
    except GroundTruthError as problem:
        return error(str(problem))
    text = without_thinking(response) if mode == "reference" else response
    blank = is_blank if mode == "default" else lambda text: not text.strip()
    if blank(text):
        return failed("empty response")
    results = [(name, *follow(text, name, kwargs, loose, blank)) for name, kwargs in pairs]
    score = sum(followed for _, followed, _ in results) / len(results)
    score = float(score == 1.0) if combine == "all" else score
    return Verdict(score, "; ".join(f"{'' if followed else 'NOT '}{name}: {seen}" for name, followed, seen in results))

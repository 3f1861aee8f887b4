"""The 25 constraint functions of Tülu 3's RLVR (Lambert et al. 2024, arXiv:2411.15124, section 6.1).

Ground truth: {"func_name": ..., arguments, nulls dropped}, as an object or JSON.
`reference`: open-instruct e6c3044, if_functions.py through IFEvalVerifierOld, to the letter, the empty response that
is paid for saying nothing included. `tulu3`: the same where it was different when Tülu 3 was trained (four functions).
`default`: the same rules with the defects of DEFAULT mended, and nothing for an empty response.
A rule is `name(text, **arguments) -> bool`; all are linear in the text.
"""

import inspect
import re
from collections.abc import Callable
from itertools import islice

from verifiers.ifeval import language
from verifiers.ifeval.arguments import typed_arguments
from verifiers.ifeval.google_rules import all_lower, all_upper, count_brackets, has_word, is_json, whole_words
from verifiers.ifeval.google_rules import title as has_title
from verifiers.strings import is_blank, nearest, shown, without_thinking
from verifiers.verdict import GroundTruthError, Verdict, error, failed, passed, read_structure


def compare(seen: int, quantifier: str, n: int, around: int) -> bool:
    """'at least', 'at most', or 'around' (within `around`); no other quantifier is ever satisfied."""
    if quantifier == "around":
        return abs(seen - n) <= around
    return seen >= n if quantifier == "at least" else seen <= n if quantifier == "at most" else False


def count(pattern: str | re.Pattern, text: str, limit: int) -> int:
    """The number of matches, counted up to `limit`: more would not change the verdict, and a long text costs less."""
    return sum(1 for _ in islice(re.finditer(pattern, text), max(limit, 0)))


def tenth(n: int) -> int:
    """A tenth of `n`, at least 1: how far 'around' reaches."""
    return max(round(n * 0.1), 1)  # Python rounds halves to even: 25 -> 2, 35 -> 4


def verify_keywords(text: str, keyword_list: list) -> bool:
    """Every keyword is in the text, as a substring, in any case."""
    return all(word.lower() in text.lower() for word in keyword_list)


def verify_keyword_frequency(text: str, word: str, N: int) -> bool:
    """Exactly N of the runs of word characters are the word, in any case: "don't" never is."""
    word = word.lower()
    found = count(rf"{word}(?!\w)(?<!\w{word})", text.lower(), N + 1) if re.fullmatch(r"\w+", word) else 0
    return found == N


def validate_forbidden_words(text: str, forbidden_words: list) -> bool:
    """None of the words is in the text, as a substring, in any case."""
    return not any(word.lower() in text.lower() for word in forbidden_words)


def verify_letter_frequency(text: str, letter: str, N: int) -> bool:
    """Exactly N, and in this case of the letter."""
    return text.count(letter) == N


def validate_response_language(text: str, language: str) -> bool:
    """Written in the language of this code."""
    return detected(text) == language


def detected(text: str) -> str | None:
    """The code of the language of a text, or None."""
    return language.detect(text)


def verify_paragraph_count(text: str, N: int) -> bool:
    """Paragraphs between '* * *' ('***' is no divider); an empty one fails."""
    parts = text.split("* * *")
    return all(part.strip() for part in parts) and len(parts) == N


def validate_word_constraint(text: str, N: int, quantifier: str) -> bool:
    """So many words between white space, 'around' being ±10 %."""
    return compare(count(r"\S+", text, N + tenth(N) + 1), quantifier, N, tenth(N))


SENTENCE_END = re.compile(r"[.?!]\s(?<!\w\.\w.\s)(?<![A-Z][a-z]\.\s)")


def verify_sentence_constraint(text: str, N: int, quantifier: str) -> bool:
    """So many sentences, each ended by . ? or ! and white space, 'around' being ±1."""
    return compare(1 + count(SENTENCE_END, text, N + 2), quantifier, N, 1)


def validate_paragraphs(text: str, N: int, first_word: str, i: int) -> bool:
    """N pieces between blank lines, the i-th beginning with the word (a prefix; i = 0 is the last piece)."""
    parts = text.split("\n\n")
    return len(parts) == N and -N < i <= N and parts[i - 1].strip().startswith(first_word)


def verify_postscript(text: str, postscript_marker: str) -> bool:
    """The marker, and something after its first place."""
    place = text.find(postscript_marker)
    return place >= 0 and bool(text[place + len(postscript_marker) :].strip())


def validate_placeholders(text: str, N: int) -> bool:
    """At least N [placeholders]."""
    return count_brackets(text) >= N


def verify_bullet_points(text: str, N: int) -> bool:
    """Exactly N lines that begin with '*' or '-'."""
    return count(r"\n[^\S\n]*[*-]", "\n" + text, N + 1) == N


def validate_title(text: str) -> bool:
    """<<...>> within a line; nothing need be between."""
    lines = text.split("\n") if "<<" in text else ()
    return any((start := line.find("<<")) >= 0 and line.find(">>", start + 2) >= 0 for line in lines)


def validate_choice(text: str, options: list | str) -> bool:
    """One of the options is in the text (a text of options is its characters: whatever is not disjoint passes)."""
    return any(option in text for option in options)


def validate_highlighted_sections(text: str, N: int) -> bool:
    """*...* within a line, from any asterisk to the next: **bold** is two, '****' is two."""
    lines = text.split("\n") if "*" in text else ()
    return sum(line.count("*") // 2 for line in lines if "*" in line) >= N


def validate_sections(text: str, N: int, section_splitter: str) -> bool:
    """N pieces between the splitters; the first is dropped only if nothing at all is before the first splitter."""
    parts = text.split(section_splitter)
    return len(parts) - (parts[0] == "") == N


def validate_json_format(text: str) -> bool:
    """The text is JSON."""
    return is_json(text)[0]


def validate_repeat_prompt(text: str, original_prompt: str) -> bool:
    """Begins with the prompt, to the letter."""
    return text.startswith(original_prompt)


def validate_two_responses(text: str) -> bool:
    """Exactly one '******', with two different sides (one may be empty)."""
    parts = text.split("******")
    return len(parts) == 2 and parts[0].strip() != parts[1].strip()


def validate_uppercase(text: str) -> bool:
    """No letter is lower-case; '123' is upper-case."""
    return text == text.upper()


def validate_lowercase(text: str) -> bool:
    """No letter is upper-case; '123' is lower-case."""
    return text == text.lower()


CAPITALS = re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]*+(?!\w)")  # what \b[A-Z]+\b finds, sooner


def validate_frequency_capital_words(text: str, N: int, quantifier: str) -> bool:
    """So many words of A-Z alone, 'around' being ±10 %."""
    return compare(count(CAPITALS, text, N + tenth(N) + 1), quantifier, N, tenth(N))


def validate_end(text: str, end_phrase: str) -> bool:
    """Ends with the phrase, to the letter."""
    return text.endswith(end_phrase)


def validate_quotation(text: str) -> bool:
    """Begins and ends with a double quotation mark, which may be the same one."""
    return text.startswith('"') and text.endswith('"')


def validate_no_commas(text: str) -> bool:
    """No comma at all."""
    return "," not in text


FUNCTIONS: dict[str, Callable[..., bool]] = {
    rule.__name__: rule
    for rule in (
        *(verify_keywords, verify_keyword_frequency, validate_forbidden_words, verify_letter_frequency),
        *(validate_response_language, verify_paragraph_count, validate_word_constraint, verify_sentence_constraint),
        *(validate_paragraphs, verify_postscript, validate_placeholders, verify_bullet_points, validate_title),
        *(validate_choice, validate_highlighted_sections, validate_sections, validate_json_format),
        *(validate_repeat_prompt, validate_two_responses, validate_uppercase, validate_lowercase),
        *(validate_frequency_capital_words, validate_end, validate_quotation, validate_no_commas),
    )
}


def whole_word_frequency(text: str, word: str, N: int) -> bool:
    """Exactly N times the word or phrase as a whole, in any case."""
    return sum(1 for _ in islice(whole_words(text, word), max(N, 0) + 1)) == N


def any_option(text: str, options: list | str) -> bool:
    """One of the options stands in the text as a whole; a text of options is split at , / ; | and 'or'."""
    options = re.split(r"\s*[,/;|]\s*|\s+or\s+", options) if isinstance(options, str) else options
    options = [option for option in options if option.strip() and option in text]
    return any(re.search(rf"{option}(?!\w)(?<!\w{option})", text) for option in map(re.escape, options))


def marked_sections(text: str, N: int, section_splitter: str) -> bool:
    """An introduction before the first splitter is no section."""
    return text.count(section_splitter) == N


def filled_highlights(text: str, N: int) -> bool:
    """At least N parts between asterisks that are not blank; **bold** is one."""
    return sum(bool(part.strip()) for part in re.findall(r"\*(?![\n*])([^\n*]+)\*{1,3}", text)) >= N


def filled_quotation(text: str) -> bool:
    """In double quotation marks, with something between them."""
    return len(text.strip('"').strip()) > 0 and validate_quotation(text)


def filled_responses(text: str) -> bool:
    """Two different responses, neither of them blank."""
    return validate_two_responses(text) and all(part.strip() for part in text.split("******"))


DEFAULT: dict[str, Callable[..., bool]] = {
    "verify_keyword_frequency": whole_word_frequency,
    "validate_forbidden_words": lambda text, forbidden_words: not any(has_word(text, w) for w in forbidden_words),
    "validate_title": lambda text: has_title(text)[0],
    "validate_choice": any_option,
    "validate_sections": marked_sections,
    "validate_highlighted_sections": filled_highlights,
    "validate_quotation": filled_quotation,
    "validate_two_responses": filled_responses,
    "validate_uppercase": all_upper,
    "validate_lowercase": all_lower,
}


def choice_reversed(text: str, options: list | str) -> bool:
    """The text is a part of one of the options."""
    return any(text in option for option in options)


def sentences_without_exclamation(text: str, N: int, quantifier: str) -> bool:
    """As verify_sentence_constraint, but '!' ends no sentence."""
    ends = count(r"[.?]\s(?<!\w\.\w.\s)(?<![A-Z][a-z]\.\s)", text, N + 2)
    return compare(1 + ends, quantifier, N, 1)


def capital_words_exactly(text: str, N: int, quantifier: str) -> bool:
    """As validate_frequency_capital_words, but 'around' is exact."""
    return compare(count(CAPITALS, text, N + 1), quantifier, N, 0)


TULU3: dict[str, Callable[..., bool]] = {
    "validate_placeholders": lambda text, N: True,  # it returned a tuple, which is true
    "validate_choice": choice_reversed,
    "verify_sentence_constraint": sentences_without_exclamation,
    "validate_frequency_capital_words": capital_words_exactly,
}


def parse(ground_truth: object, mode: str = "default") -> tuple[str, dict]:
    """(function name, arguments) of a row. Raises GroundTruthError for an unknown function (naming the nearest), an
    unknown, missing or badly typed argument, a letter that is not one character, an empty splitter."""
    row = read_structure(ground_truth, "ground_truth")
    if not isinstance(row, dict) or not isinstance(row.get("func_name"), str):
        raise GroundTruthError(f"ground_truth: expected an object with func_name, found {shown(row)}")
    name = row["func_name"]
    if name not in FUNCTIONS:
        raise GroundTruthError(f"ground_truth: unknown func_name {shown(name)}{nearest(name, FUNCTIONS)}")
    given = {key: value for key, value in row.items() if value is not None and key != "func_name"}
    given = typed_arguments(name, inspect.signature(FUNCTIONS[name]).parameters, given)
    if len(given.get("letter", "a")) != 1:
        raise GroundTruthError(f"{name}: letter must be one character, found {shown(given['letter'])}")
    if given.get("section_splitter") == "":
        raise GroundTruthError(f"{name}: section_splitter is empty")
    if name == "validate_response_language" and not language.is_available():
        raise GroundTruthError(f"{name} needs langdetect: pip install 'triptych[ifeval]'")
    return name, given


def verify(response: str, ground_truth: object, mode: str = "default") -> Verdict:
    """1 if the response, without its thinking and answer tags, satisfies the row's function, else 0.

    Never raises: a bad ground truth, on which the reference raises as well, is a Verdict with status 'error'.
    """
    try:
        name, given = parse(ground_truth, mode)
    except GroundTruthError as problem:
        return error(str(problem))
    text = without_thinking(response)
    if mode == "default" and is_blank(text):
        return failed("empty response")
    if name == "validate_response_language" and detected(text) is None:
        return failed("no language can be told") if mode == "default" else error(f"{name}: no language can be told")
    rule = {"default": DEFAULT, "reference": {}, "tulu3": TULU3}[mode].get(name, FUNCTIONS[name])
    asked = ", ".join(f"{key}={shown(value, 30)}" for key, value in given.items())
    return passed(f"{name}({asked})") if rule(text, **given) else failed(f"NOT {name}({asked})")

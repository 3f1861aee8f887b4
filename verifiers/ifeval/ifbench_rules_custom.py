"""IFBench's instructions that are one task each (allenai/IFBench db69a6f, 'custom'), a function each.

A rule is `name(text) -> (followed, what was seen)`. RULES are what the instructions say; REFERENCE the rules of
IFBench's code where they do something else (docs/verifiers.md), to the letter. All are linear in the text.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Callable
from datetime import date
from itertools import islice, pairwise

from verifiers.ifeval.google_rules import Followed, exactly
from verifiers.ifeval.sentences import count_sentences
from verifiers.ifeval.word_lists import AFRICAN_COUNTRIES, NORTHERN_CAPITALS
from verifiers.ifeval.words import ASCII_MARKS, without_marks
from verifiers.strings import shown

ENDS = ASCII_MARKS + " "


def plain_letters(text: str) -> str:
    """The text without diacritics and without what is not ASCII: 'São' is 'Sao'."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


# --- lists ------------------------------------------------------------------------------------------------------------


def multiples(text: str) -> Followed:
    """The numbers of the text are 14, 21, 28, 35, 42 and 49, in this order."""
    found = [match[0] for match in islice(re.finditer(r"\d+", text), 7)]
    return found == ["14", "21", "28", "35", "42", "49"], f"numbers {shown(', '.join(found), 40)}"


def date_format_list(text: str) -> Followed:
    """Days of the calendar from 1769 to 1821 as YYYY-MM-DD, with commas between them."""
    return dates(text, is_day)


def date_format_list_with_day_0(text: str) -> Followed:
    """As date_format_list, but month 00, day 00 and February 29 of any year are dates."""
    return dates(text, is_almost_day)


def dates(text: str, is_date: Callable[[int, int, int], bool]) -> Followed:
    """Whether all that commas separate is a date."""
    for item in text.strip().split(","):
        found = re.fullmatch(r"(\d{4})-(\d{2})-(\d{2})", item.strip())
        if found is None or not 1769 <= int(found[1]) <= 1821 or not is_date(*map(int, found.groups())):
            return False, f"{shown(item, 20)} is no date of Napoleon's life"
    return True, "dates"


def is_day(year: int, month: int, day: int) -> bool:
    """True for a day of the calendar."""
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


def is_almost_day(year: int, month: int, day: int) -> bool:
    """True if no month has more days than it can have; months and days may be 0."""
    return month <= 12 and day <= (99, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month]


def reverse_newline(text: str) -> Followed:
    """52 or more countries of Africa (of 54) from Zimbabwe on, in reverse order of the alphabet, a line each.

    Any usual name of a country counts; numbers and marks before it are left out. What stands before Zimbabwe is not
    looked at."""
    if "Zimbabwe" not in text:
        return False, "no Zimbabwe"
    names = []
    for line in text[text.index("Zimbabwe") :].split("\n"):
        name = re.sub(r"^[\W\d_]+|(?<!\))[\W_]+$", "", plain_letters(line[:80]).replace(",", ""))
        if name:
            names.append(name.lower())
    countries = [AFRICAN_COUNTRIES.get(name) for name in names[:60]]
    if None in countries:
        return False, f"{shown(names[countries.index(None)], 30)} is no country of Africa"
    if len(names) > 54 or len(set(countries)) < max(52, len(names)):
        return False, f"{len(names)} lines, {len(set(countries))} countries"
    return names == sorted(names, reverse=True), f"{len(names)} countries"


def reverse_newline_of_anything(text: str) -> Followed:
    """52 or more lines from the first with Zimbabwe on, whatever they say, in reverse order of their characters."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip(ENDS))]
    start = next((n for n, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    if len(lines) - start < 52:
        return False, f"{len(lines) - start} lines from Zimbabwe on"
    found = [plain_letters(line) for line in lines[start:]]
    return found == sorted(found, reverse=True), f"{len(found)} lines from Zimbabwe on"


def european_capitals_sort(text: str) -> Followed:
    """The 28 capitals north of 45 degrees from north to south, with commas between them."""
    names = plain_letters(text[:4096]).strip().rstrip(".").replace("Kiev", "Kyiv").split(",")
    return capitals([name.strip() for name in names], list(NORTHERN_CAPITALS))


def european_capitals_without_kyiv(text: str) -> Followed:
    """As european_capitals_sort, for the 27 of IFBench's list."""
    names = [name.strip() for name in plain_letters(text).split(",") if name.strip()]
    return capitals(names, [name for name in NORTHERN_CAPITALS if name != "Kyiv"])


def capitals(names: list[str], wanted: list[str]) -> Followed:
    """Whether the names are those wanted."""
    wrong = next((a for a, b in zip(names, wanted, strict=False) if a != b), "")
    return names == wanted, f"{len(names)} names{f', {shown(wrong, 20)} in the wrong place' if wrong else ''}"


# --- questions and sentences ------------------------------------------------------------------------------------------


def mcq_count_length(text: str) -> Followed:
    """Four questions, each labelled 'Question' and its number, each longer than the one before, with five options
    (a to e) each; nothing before the first."""
    if not text.startswith("Question"):
        return False, "does not begin with 'Question'"
    parts = [part for part in re.split(r"Question \d+[.|):;]?", text, maxsplit=6) if part.strip()]
    if len(parts) != 4:
        return exactly(len(parts), 4, "questions")
    lengths = []
    for part in parts:
        question, options = "", 0
        for line in part.strip().split("\n"):
            if re.match(r"[A-Ea-e][.|)]\s*\w", line.strip()):
                options += 1
            elif not options:
                question += " " + line.strip()
        if options != 5:
            return exactly(options, 5, "options of a question")
        lengths.append(len(question.strip()))
    rising = all(a < b for a, b in pairwise(lengths))
    return rising, f"questions of {lengths} characters"


def word_reverse(text: str) -> Followed:
    """One sentence that names the bald eagle, its words in reverse order, marks aside."""
    words = without_marks(text.lower()).split()
    backward = " ".join(words[::-1])
    found = "bald eagle" in backward and count_sentences(backward, 2) == 1
    return found, f"{'the' if found else 'no'} bald eagle in reverse"


def character_reverse(text: str) -> Followed:
    """The bald eagle, letter by letter in reverse order, in any case."""
    found = "elgae dlab" in text.lower()
    return found, f"{'the' if found else 'no'} bald eagle in reverse"


# --- CSV --------------------------------------------------------------------------------------------------------------


def rows_of(text: str, limit: int, delimiter: str = ",") -> list[list[str]]:
    """The rows of a CSV text, up to `limit`; none if it is no CSV."""
    try:
        return list(islice(csv.reader(io.StringIO(text), delimiter=delimiter), limit))
    except csv.Error:  # a field of more than 128 KiB
        return []


def csv_city(text: str) -> Followed:
    """A header of five given names and seven rows of five fields, with commas between them."""
    rows = rows_of(text, 9)
    if len(rows) != 8 or rows[0] != ["ID", "Country", "City", "Year", "Count"]:
        return False, f"{len(rows)} rows, the first {shown(rows[:1], 40)}"
    return all(len(row) == 5 for row in rows), f"rows of {sorted({len(row) for row in rows})} fields"


def header(names: str, gap: str) -> re.Pattern:
    """The names in their order, each in quotation marks or not."""
    return re.compile(gap.join(f'(?:{name}|"{name}")' for name in names.split()) + "$")


SPECIAL = header("ProductID Category Brand Price Stock", ",[ \t]*")
QUOTED = header("StudentID Subject Grade Semester Score", "\t *")


def csv_special_character(text: str) -> Followed:
    """A header of five given names and 14 rows of five fields, one of which, in quotation marks, has a character that
    is no letter, digit or white space."""
    if not SPECIAL.match(text.split("\n", 1)[0].strip()):
        return False, "not the header"
    rows = rows_of(text.replace('"', '"""'), 16)  # so that the marks stay in the fields
    if len(rows) != 15:
        return exactly(len(rows), 15, "rows")
    for row in rows[1:]:
        if len(row) != 5:
            return exactly(len(row), 5, "fields of a row")
        if any(field.startswith('"') and has_special_character(field) for field in row):
            return True, "a field with a special character in quotation marks"
    return False, "no special character in quotation marks"


def has_special_character(field: str) -> bool:
    """True for a special character between the mark that the field begins with and another mark of its line."""
    inside = field[1:].split("\n", 1)[0].rpartition('"')[0]
    return re.search(r"[^\d\w\s]", inside) is not None


def csv_quotes(text: str) -> Followed:
    """A header of five given names and three rows of five fields, tabs between them, every field in quotation marks."""
    if not QUOTED.match(text.split("\n", 1)[0].strip()):
        return False, "not the header"
    rows = rows_of(text.replace('"', '"""'), 5, "\t")
    if len(rows) != 4 or any(len(row) != 5 for row in rows):
        return False, f"{len(rows)} rows, wanted 4 of 5 fields"
    bare = [field for row in rows for field in row if not (field.strip()[:1] == field.strip()[-1:] == '"')]
    return not bare, f"{len(bare)} fields without quotation marks"


RULES: dict[str, Callable[..., Followed]] = {
    "custom:multiples": multiples,
    "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline,
    "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse,
    "custom:european_capitals_sort": european_capitals_sort,
    "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character,
    "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
}
REFERENCE: dict[str, Callable[..., Followed]] = {
    "custom:reverse_newline": reverse_newline_of_anything,
    "custom:european_capitals_sort": european_capitals_without_kyiv,
    "custom:date_format_list": date_format_list_with_day_0,
}

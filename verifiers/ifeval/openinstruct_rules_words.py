"""IFEvalG's instructions about words and letters (open-instruct e6c3044, IFEvalG/instructions.py).

A rule is `name(text, **kwargs) -> (followed, what was seen)`. RULES are what the instructions say; REFERENCE the rules
of open-instruct where they do something else (docs/verifiers.md), to the letter. All are linear in the text.
"""

import re
from collections.abc import Callable, Iterable
from itertools import islice

from verifiers.ifeval.google_rules import Followed, counted, exactly, existence, has_word, letter_frequency, occurrences
from verifiers.ifeval.sentences import cut_sentences, split_sentences, word_tokens
from verifiers.ifeval.words import MARKS, plain_words, times_whole, tokens
from verifiers.strings import shown

# --- keywords ---------------------------------------------------------------------------------------------------------


def word_once(text: str, keyword: str) -> Followed:
    """The keyword is in the text: the prompt says 'include', not how often."""
    return existence(text, [keyword])


def word_exactly_once(text: str, keyword: str) -> Followed:
    """The keyword is in the text exactly once, as a substring, in any case."""
    return exactly(occurrences(text, keyword, 2), 1, f"times {shown(keyword, 20)}")


def word_count_different_numbers(text: str, keyword: str, frequency: int, relation: str = "") -> Followed:
    """The word stands in the text so many times, in any case. `relation` is not used: the prompt does not show it."""
    return exactly(times_whole(text, keyword, frequency + 1), frequency, f"times {shown(keyword, 20)}")


def word_count_by_relation(text: str, keyword: str, frequency: int, relation: str) -> Followed:
    """A substring, in any case, at least or less than so often."""
    return counted(occurrences(text, keyword, frequency + 1), relation, frequency, f"times {shown(keyword, 20)}")


def exclude_word_harder(text: str, keyword: str, instruction: str = "") -> Followed:
    """The word does not stand in the text, in any case. `instruction` is where the word came from: not used."""
    found = has_word(text, keyword)
    return not found, f"{'found' if found else 'no'} {shown(keyword, 20)}"


def exclude_word_between_spaces(text: str, keyword: str, instruction: str = "") -> Followed:
    """The word is not in the text with a space on either side."""
    found = f" {keyword} " in text
    return not found, f"{'found' if found else 'no'} {shown(keyword, 20)} between spaces"


def count_increment_word(text: str, keyword1: str, keyword2: str) -> Followed:
    """The first keyword once and the second twice, as whole words, in any case."""
    seen = times_whole(text, keyword1, 2), times_whole(text, keyword2, 3)
    return seen == (1, 2), f"keywords {seen[0]} and {seen[1]} times, wanted 1 and 2"


def count_increment_substring(text: str, keyword1: str, keyword2: str) -> Followed:
    """The first keyword once and the second twice, as substrings, in any case."""
    seen = occurrences(text, keyword1, 2), occurrences(text, keyword2, 3)
    return seen == (1, 2), f"keywords {seen[0]} and {seen[1]} times, wanted 1 and 2"


def first_of(word: str | list) -> str:
    """The word, or the first of a list, as some published rows have it."""
    return (word if isinstance(word, str) else word[0]).strip()


def keyword_specific_position(text: str, keyword: list | str, n: int, m: int) -> Followed:
    """The m-th word of the n-th sentence is the keyword, in any case; marks are no words."""
    sentence = next(islice(split_sentences(text), n - 1, None), "")
    found = next(islice(plain_words(sentence), m - 1, None), "")
    return found.lower() == first_of(keyword).strip(MARKS).lower(), f"word {m} of sentence {n}: {shown(found, 20)}"


def keyword_among_tokens(text: str, keyword: list | str, n: int, m: int) -> Followed:
    """The m-th token of the n-th sentence is the keyword, in this case; marks are tokens."""
    if first_of(keyword) not in text:
        return False, f"no {shown(first_of(keyword), 20)}"
    sentence = next(islice(cut_sentences(text), n - 1, None), "")
    found = next(islice(tokens(sentence), m - 1, None), "")
    return found == first_of(keyword), f"token {m} of sentence {n}: {shown(found, 20)}"


def palindrome(text: str) -> Followed:
    """A word of three letters or more that is the same from either end, or such a line, sentence or quotation of
    several words; case, spaces and marks aside."""
    for word in plain_words(text):
        if len(word) > 2 and word[0].lower() == word[-1].lower() and is_palindrome(word):
            return True, f"palindrome {shown(word, 20)}"
    for match in re.finditer(r"[^.?!\n\"“”]++", text):
        part = match[0].strip(MARKS + " ")
        if " " in part and part[0].lower() == part[-1].lower() and is_palindrome(part):
            return True, f"palindrome {shown(part, 40)}"
    return False, "no palindrome"


def is_palindrome(text: str) -> bool:
    """True if the letters and digits of the text, at least three, are the same from either end."""
    letters = re.sub(r"[\W_]", "", text.lower())
    return len(letters) > 2 and letters == letters[::-1]


def palindrome_piece(text: str) -> Followed:
    """A piece between white space that is the same from either end: 'a' and '-' are."""
    for match in re.finditer(r"\S+", text):
        if match[0] == match[0][::-1]:
            return True, f"palindrome {shown(match[0], 20)}"
    return False, "no palindrome"


# --- first and last words ---------------------------------------------------------------------------------------------


def every_sentence(words: Iterable[str], wanted: str, place: str) -> Followed:
    """Whether each of the words, one of each sentence, is the wanted one in any case."""
    for number, word in enumerate(words, 1):
        if word.lower() != wanted.lower():
            return False, f"{place} word of sentence {number} is {shown(word, 20)}, wanted {shown(wanted, 20)}"
    return True, f"every {place} word is {shown(wanted, 20)}"


def first_word_sent(text: str, first_word: list | str) -> Followed:
    """Every sentence begins with the word, in any case, marks aside."""
    words = (next(plain_words(sentence), "") for sentence in split_sentences(text))
    return every_sentence(words, first_of(first_word).strip(MARKS), "first")


def first_piece_of_sentences(text: str, first_word: list | str) -> Followed:
    """Every sentence begins with the word, which nothing but white space may follow."""
    words, wanted = ((sentence.split(None, 1) or [""])[0] for sentence in cut_sentences(text)), first_of(first_word)
    if not text.lstrip()[: 2 * len(wanted)].lower().startswith(wanted.lower()):  # soon said
        return False, f"does not begin with {shown(wanted, 20)}"
    return every_sentence(words, wanted, "first")


def last_word_sent(text: str, last_word: list | str) -> Followed:
    """Every sentence ends with the word, in any case, marks aside."""
    words = (last_plain_word(sentence) for sentence in split_sentences(text))
    return every_sentence(words, first_of(last_word).strip(MARKS), "last")


def last_piece_of_sentences(text: str, last_word: list | str) -> Followed:
    """Every sentence ends with the word: its last piece without any mark, which a piece of marks alone is not."""
    words, wanted = (last_piece(sentence) for sentence in cut_sentences(text)), first_of(last_word)
    if not last_piece(text[-1024 - len(wanted) :]).lower().endswith(wanted.lower()):  # soon said
        return False, f"does not end with {shown(wanted, 20)}"
    return every_sentence(words, wanted, "last")


def last_plain_word(text: str) -> str:
    """The last word of the text, marks aside; '' where it has none."""
    text = text.rstrip(MARKS + " \t\r\n")
    return (text.rsplit(None, 1) or [""])[-1].strip(MARKS)


def last_piece(text: str) -> str:
    """What follows the last white space, without what is neither letter, digit nor '_'."""
    return re.sub(r"[^\w\s]+", "", (text.rsplit(None, 1) or [""])[-1])


def first_word_answer(text: str, first_word: list | str) -> Followed:
    """The text begins with the word, in any case, marks aside."""
    word, wanted = next(plain_words(text), ""), first_of(first_word).strip(MARKS)
    return word.lower() == wanted.lower(), f"first word {shown(word, 20)}, wanted {shown(wanted, 20)}"


def first_piece_answer(text: str, first_word: str) -> Followed:
    """The text begins with the word, which nothing but white space may follow."""
    word = (text.split(None, 1) or [""])[0]
    return word.lower() == first_word.strip().lower(), f"first word {shown(word, 20)}, wanted {shown(first_word, 20)}"


def last_word_answer(text: str, last_word: list | str) -> Followed:
    """The text ends with the word, in any case, marks aside."""
    word, wanted = last_plain_word(text), first_of(last_word).strip(MARKS)
    return word.lower() == wanted.lower(), f"last word {shown(word, 20)}, wanted {shown(wanted, 20)}"


def last_piece_answer(text: str, last_word: str) -> Followed:
    """The last piece of the text without its marks is the word."""
    word = last_piece(text)
    return word.lower() == last_word.strip().lower(), f"last word {shown(word, 20)}, wanted {shown(last_word, 20)}"


def start_end(text: str) -> Followed:
    """Two words or more, the first and the last the same, in any case, and not even a mark after the last."""
    text = text.strip()
    last = (text.rsplit(None, 1) or [""])[-1]
    first, several = next(plain_words(text), ""), len(text.split(None, 1)) > 1
    same = several and first != "" and last.lstrip(MARKS).lower() == first.lower()
    return same, f"first {shown(first, 20)}, last {shown(last, 20)}"


def start_end_tokens(text: str) -> Followed:
    """Two tokens or more, the first and the last the same, in any case; a mark is a token."""
    first = list(islice(tokens(text), 2))
    ends = (*first[:1], *last_tokens(text)[-1:])
    return len(first) > 1 and ends[0].lower() == ends[-1].lower(), f"first and last {shown(ends, 40)}"


def last_tokens(text: str) -> list[str]:
    """The tokens of the end of the text."""
    end = text.rstrip()
    start = len(end)
    for _ in range(3):  # more than the last piece between white space, which sentences and contractions may join
        start = max(end.rfind(" ", 0, start), end.rfind("\n", 0, start), 0)
    return word_tokens(end[start:][-2048:])


# --- counts -----------------------------------------------------------------------------------------------------------


def lowercase_counting(text: str, N: int) -> Followed:
    """At most N words of a-z alone, counted with their repetitions."""
    seen = sum(1 for _ in islice(re.finditer(r"[a-z](?<!\w[a-z])[a-z]*+(?!\w)", text), max(N, 0) + 1))
    return seen <= N, f"{seen} lower-case words, wanted at most {N}"


def letter_counting(text: str, N: int, relation: str) -> Followed:
    """At least or less than so many letters, of any alphabet."""
    seen = sum(1 for _ in islice(re.finditer(r"[^\W\d_]", text), max(N, 0) + 1))
    return counted(seen, relation, N, "letters")


def latin_letter_counting(text: str, N: int, relation: str) -> Followed:
    """At least or less than so many of a-z and A-Z."""
    seen = sum(1 for _ in islice(re.finditer(r"[a-zA-Z]", text), max(N, 0) + 1))
    return counted(seen, relation, N, "letters")


def all_different(words: Iterable[str]) -> Followed:
    """Whether no word comes twice."""
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return False, f"{shown(word, 20)} comes twice"
        seen.add(word)
    return True, f"{len(seen)} different words"


def count_unique(text: str) -> Followed:
    """No word comes twice, in any case; marks are no words."""
    return all_different(word.lower() for word in plain_words(text))


def count_unique_tokens(text: str) -> Followed:
    """No token comes twice; a mark is a token, and case makes a difference."""
    return all_different(tokens(text))


def no_adjacent_consecutive(text: str) -> Followed:
    """No two neighbouring words begin with consecutive letters of the alphabet; marks aside."""
    before = ""
    for word in plain_words(text):
        letter = word[0].lower()
        if before.isascii() and before.isalpha() and letter.isascii() and ord(letter) - ord(before) == 1:
            return False, f"{before} before {letter}"
        before = letter
    return True, "no consecutive first letters"


def no_adjacent_consecutive_characters(text: str) -> Followed:
    """No piece between white space begins with the character that follows the first one of the piece before."""
    before = ""
    for match in re.finditer(r"\S+", text):
        first = match[0][0].lower()
        if before and (len(first) != 1 or len(before) != 1 or ord(first) - ord(before) == 1):
            return False, f"{shown(before)} before {shown(first)}"
        before = first
    return True, "no consecutive first characters"


RULES: dict[str, Callable[..., Followed]] = {
    "keywords:word_once": word_once,
    "keywords:word_count_different_numbers": word_count_different_numbers,
    "keywords:exclude_word_harder": exclude_word_harder,
    "keywords:keyword_specific_position": keyword_specific_position,
    "keywords:palindrome": palindrome,
    "keywords:start_end": start_end,
    "keywords:no_adjacent_consecutive": no_adjacent_consecutive,
    "first_word:first_word_sent": first_word_sent,
    "first_word:first_word_answer": first_word_answer,
    "last_word:last_word_sent": last_word_sent,
    "last_word:last_word_answer": last_word_answer,
    "count:lowercase_counting": lowercase_counting,
    "count:count_unique": count_unique,
    "count:count_increment_word": count_increment_word,
    "letters:letter_counting": letter_counting,
    "letters:letter_counting2": letter_frequency,
}
REFERENCE: dict[str, Callable[..., Followed]] = {
    "keywords:word_once": word_exactly_once,
    "keywords:word_count_different_numbers": word_count_by_relation,
    "keywords:exclude_word_harder": exclude_word_between_spaces,
    "keywords:keyword_specific_position": keyword_among_tokens,
    "keywords:palindrome": palindrome_piece,
    "keywords:start_end": start_end_tokens,
    "keywords:no_adjacent_consecutive": no_adjacent_consecutive_characters,
    "first_word:first_word_sent": first_piece_of_sentences,
    "first_word:first_word_answer": first_piece_answer,
    "last_word:last_word_sent": last_piece_of_sentences,
    "last_word:last_word_answer": last_piece_answer,
    "count:count_unique": count_unique_tokens,
    "count:count_increment_word": count_increment_substring,
    "letters:letter_counting": latin_letter_counting,
}

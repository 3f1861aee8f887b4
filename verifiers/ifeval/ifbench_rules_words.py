"""IFBench's instructions about words, names and numbers (allenai/IFBench db69a6f), a function each.

A rule is `name(text, **kwargs) -> (followed, what was seen)`. RULES are what the instructions say; REFERENCE the rules
of IFBench's code where they do something else (docs/verifiers.md), to the letter. All are linear in the text.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice, pairwise

from verifiers.ifeval.google_rules import Followed, counted, exactly, word_pattern
from verifiers.ifeval.parts_of_speech import starts_with_verb
from verifiers.ifeval.sentences import split_sentences, trained_sentences
from verifiers.ifeval.syllables import count_syllables
from verifiers.ifeval.word_lists import CONJUNCTIONS, PERSON_NAMES, PRONOUNS, STOP_WORDS
from verifiers.ifeval.words import ASCII_MARKS, MARKS, bare_words, plain_words, times_whole, tokens, without_marks
from verifiers.strings import shown

ENDS = ASCII_MARKS + " "  # what IFBench takes off the ends of a word
PRIMES = frozenset(n for n in range(2, 98) if all(n % d for d in range(2, n)))
CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")


def every(words: Iterable[str], holds: Callable[[str], object], what: str) -> Followed:
    """Whether something holds for every word, of which there is at least one."""
    word = None
    for word in words:
        if not holds(word):
            return False, f"{shown(word, 20)} {what}"
    return word is not None, "all words" if word is not None else "no words"


def every_if_any(words: Iterable[str], holds: Callable[[str], object], what: str) -> Followed:
    """Whether something holds for every word, of which there may be none."""
    followed, seen = every(words, holds, what)
    return followed or seen == "no words", seen


# --- counts -----------------------------------------------------------------------------------------------------------


def word_matches(text: str, limit: int) -> list[str]:
    """Runs of letters, marks, digits and '_', up to `limit`."""
    return [match[0] for match in islice(word_pattern(text.isascii()).finditer(text), limit)]


def word_count_range(text: str, min_words: int, max_words: int) -> Followed:
    """From so many words to so many ("don't" is two)."""
    seen = len(word_matches(text, max_words + 1))
    return min_words <= seen <= max_words, f"{seen} words, wanted {min_words} to {max_words}"


def distinct(words: Iterable[str], n: int) -> int:
    """How many different words there are, counted up to `n`."""
    seen: set[str] = set()
    for word in words:
        if len(seen) >= n:
            break
        seen.add(word)
    return len(seen)


def unique_word_count(text: str, N: int) -> Followed:
    """At least N different words, in any case."""
    return counted(distinct(plain_words(text.lower()), N), "at least", N, "different words")


def unique_pieces(text: str, N: int) -> Followed:
    """At least N different pieces between white space, ASCII marks around them aside; one of marks alone is one."""
    pieces = (match[0].strip(ENDS) for match in re.finditer(r"\S+", text.lower()))
    return counted(distinct(pieces, N), "at least", N, "different words")


def stop_words(text: str, percentage: int | float) -> Followed:
    """No more than so many per cent of the words are stop words ("don't" is two, both stop words)."""
    words = word_pattern(text.isascii()).findall(text)
    stops = sum(times for word, times in Counter(words).items() if word.lower() in STOP_WORDS)
    percent = 100 * stops / len(words) if words else 100.0
    return bool(words) and stops / len(words) * 100 <= percentage, f"{percent:.1f} % stop words, wanted {percentage}"


def conjunctions(text: str, small_n: int) -> Followed:
    """At least so many different ones of and, but, for, nor, or, so, yet."""
    found = (word for word in plain_words(text.lower()) if word in CONJUNCTIONS)
    return counted(distinct(found, small_n), "at least", small_n, "different conjunctions")


def conjunctions_as_written(text: str, small_n: int) -> Followed:
    """As conjunctions, but 'And', 'and' and 'and,' are different ones."""
    pieces = (match[0] for match in re.finditer(r"\S+", text))
    found = (piece for piece in pieces if piece.strip(ENDS).lower() in CONJUNCTIONS)
    return counted(distinct(found, small_n), "at least", small_n, "different conjunctions")


def person_names(text: str, N: int) -> Followed:
    """At least N different names of the prompt's list of fifty."""
    found = sum(name in text and re.search(rf"\b{name}\b", text) is not None for name in PERSON_NAMES)
    return counted(found, "at least", N, "different names")


def numbers(text: str, N: int) -> Followed:
    """Exactly N numbers in digits; '3.14', '1,000', '10:30' and '1/2' are one each, '5-6' is two."""
    found = re.finditer(r"\d+(?:[.,:/]\d+)*+", text)
    return exactly(sum(1 for _ in islice(found, N + 1)), N, "numbers")


def numbers_without_marks(text: str, N: int) -> Followed:
    """Exactly N runs of digits once all ASCII marks are deleted: '5-6' is 56."""
    return exactly(sum(1 for _ in islice(re.finditer(r"\d+", without_marks(text)), N + 1)), N, "numbers")


def pronouns(text: str, N: int) -> Followed:
    """At least N pronouns; 'she/her' is two."""
    text = text.replace("/", " ").lower()
    runs = re.finditer(r"[a-z]++", text)  # a pronoun is one, or the end of 'gimme' and 'lemme'
    if sum(1 for _ in islice((run for run in runs if run[0] in PRONOUNS or run[0].endswith("me")), N)) < N:
        return False, f"fewer than {N} pronouns"
    words = tokens(text)
    seen = sum(1 for _ in islice((word for word in words if word in PRONOUNS), N))
    return counted(seen, "at least", N, "pronouns")


def punctuation(text: str) -> Followed:
    """Each of . , ! ? ; : at least once, besides one '?!', '!?' or '‽'."""
    if not any(mark in text for mark in ("?!", "!?", "‽")):
        return False, "no interrobang"
    rest = text.replace("?!", "", 1)
    rest = text.replace("!?", "", 1) if len(rest) == len(text) else rest
    missing = [mark for mark in ".,!?;:" if mark not in rest]
    return not missing, f"missing {' '.join(missing)}" if missing else "all marks"


TIMES = (1, 2, 3, 5, 7)


def keywords_multiple(text: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> Followed:
    """The keywords once, twice, three, five and seven times, as whole words, in any case."""
    keywords = (keyword1, keyword2, keyword3, keyword4, keyword5)
    seen = tuple(times_whole(text, word, n + 1) for word, n in zip(keywords, TIMES, strict=True))
    return seen == TIMES, f"keywords {seen} times, wanted {TIMES}"


def keyword_substrings(
    text: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str
) -> Followed:
    """As keywords_multiple, but as substrings."""
    text = text.lower()
    seen = tuple(text.count(word.lower()) for word in (keyword1, keyword2, keyword3, keyword4, keyword5))
    return seen == TIMES, f"keywords {seen} times, wanted {TIMES}"


JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")


def words_japanese(text: str, N: int) -> Followed:
    """Every N-th word has Japanese characters; numbers and marks in that place pass."""
    for number, match in enumerate(re.finditer(r"\S+", text), 1):
        if number % N == 0:
            word = match[0].strip(ENDS)
            if word and not word.isdigit() and not JAPANESE.search(word):
                return False, f"word {number} is {shown(word, 20)}"
    return True, f"every word number {N} is Japanese"


# --- every word -------------------------------------------------------------------------------------------------------


def alphabet(text: str) -> Followed:
    """Every word begins with the letter after that of the word before, 'a' after 'z'; marks aside."""
    return next_letters(plain_words(text.lower()))


def alphabet_of_bare_words(text: str) -> Followed:
    """As alphabet, but only ASCII marks are taken off."""
    return next_letters(word.lower() for word in bare_words(text))


def next_letters(words: Iterable[str]) -> Followed:
    """Whether the first letters of the words are a run of a-z, round and round."""
    letter = ""
    for word in words:
        if "a" <= letter <= "z" and ord(word[0]) != (ord(letter) - 96) % 26 + 97:
            return False, f"{shown(word, 20)} after {letter}"
        letter = word[0]
        if not "a" <= letter <= "z":
            return False, f"{shown(word, 20)} begins with no letter of a-z"
    return letter != "", "letters in order" if letter else "no words"


def vowel(text: str) -> Followed:
    """One paragraph, of words with no more than three of a, e, i, o, u."""
    followed, seen = vowel_or_none(text)
    return followed and any(map(str.isalpha, text[:4096])), seen


def vowel_or_none(text: str) -> Followed:
    """As vowel, but no word is needed."""
    text = text.strip()
    if "\n" in text:
        return False, "more than one paragraph"
    text = text.lower()
    found = [letter for letter in "aeiou" if letter in text]
    return len(found) <= 3, f"vowels {' '.join(found)}, wanted three or fewer"


def consonants(text: str) -> Followed:
    """Every word has two consonants together; what has no letter is no word."""
    words = (word for word in plain_words(text.lower()) if any(map(str.isalpha, word)))
    return every(words, CONSONANTS.search, "has no two consonants together")


def consonants_of_pieces(text: str) -> Followed:
    """Every piece between white space has two consonants together; '-' has not."""
    pieces = (match[0] for match in re.finditer(r"\S+", text.lower()))
    return every(pieces, CONSONANTS.search, "has no two consonants together")


def palindrome(text: str) -> Followed:
    """At least ten words of five or more letters that are the same from either end, in any case; marks aside."""
    words = (word for word in bare_words(text) if len(word) >= 5 and word.isalpha())
    return ten_palindromes(words)


def palindrome_pieces(text: str) -> Followed:
    """As palindrome, but '12321' is a word."""
    return ten_palindromes(word for word in bare_words(text) if len(word) >= 5)


def ten_palindromes(words: Iterable[str]) -> Followed:
    """Whether ten of the words are palindromes."""
    found = (word for word in map(str.lower, words) if word == word[::-1])
    return counted(sum(1 for _ in islice(found, 10)), "at least", 10, "palindromes")


def prime_lengths(text: str) -> Followed:
    """Every word has a prime number of characters, its marks aside."""
    words = (re.sub(r"[\W_]", "", word) for word in plain_words(text))
    return every((word for word in words if word), lambda word: len(word) in PRIMES, "has no prime length")


def prime_lengths_of_bare_words(text: str) -> Followed:
    """As prime_lengths, but only ASCII marks are no characters, and no word is needed."""
    return every_if_any(bare_words(text), lambda word: len(word) in PRIMES, "has no prime length")


def repeats(text: str, small_n: int) -> Followed:
    """No word more often than so, in any case."""
    return no_more_often(plain_words(text.lower()), small_n)


def repeats_of_bare_words(text: str, small_n: int) -> Followed:
    """As repeats, of words without any ASCII mark: "its" and "it's" are one."""
    return no_more_often(bare_words(text.lower()), small_n)


def no_more_often(words: Iterable[str], n: int) -> Followed:
    """Whether no word comes more than n times."""
    seen: Counter[str] = Counter()
    for word in words:
        seen[word] += 1
        if seen[word] > n:
            return False, f"{shown(word, 20)} more than {n} times"
    return True, f"no word more than {n} times"


def no_consecutive(text: str) -> Followed:
    """No two neighbouring words begin with the same character, in any case; marks aside."""
    return no_same_initials(plain_words(text.lower()))


def no_consecutive_bare_words(text: str) -> Followed:
    """As no_consecutive, but only ASCII marks are taken off."""
    return no_same_initials(bare_words(text.lower()))


def no_same_initials(words: Iterable[str]) -> Followed:
    """Whether no two neighbouring words begin with the same character."""
    for first, second in pairwise(words):
        if first[0] == second[0]:
            return False, f"{shown(first, 20)} before {shown(second, 20)}"
    return True, "no two initials the same"


def odd_even_syllables(text: str) -> Followed:
    """Words with odd and with even numbers of syllables take turns (syllables.py, which is approximate)."""
    before = ""
    for word in bare_words(text.lower()):
        if before and (count_syllables(before) - count_syllables(word)) % 2 == 0:
            return False, f"{shown(before, 20)} before {shown(word, 20)}"
        before = word
    return True, "odd and even take turns"


# --- places -----------------------------------------------------------------------------------------------------------


def keywords_specific_position(text: str, keyword: str, n: int, m: int) -> Followed:
    """The m-th word of the n-th sentence is the keyword, in any case; marks are no words."""
    sentence = next(islice(split_sentences(text), n - 1, None), "")
    found = next(islice(plain_words(sentence), m - 1, None), "")
    return found.lower() == keyword.strip().strip(MARKS).lower(), f"word {m} of sentence {n}: {shown(found, 20)}"


def keyword_among_word_tokens(text: str, keyword: str, n: int, m: int) -> Followed:
    """As keywords_specific_position, but "don't" is two words."""
    sentence = next(islice(trained_sentences(text), n - 1, None), "")
    words = (token for token in tokens(sentence) if any(map(str.isalnum, token)))
    found = next(islice(words, m - 1, None), "")
    return found.lower() == keyword.strip().lower(), f"word {m} of sentence {n}: {shown(found, 20)}"


def words_position(text: str, keyword: str) -> Followed:
    """The second word and the last but one are the keyword, in any case; marks are no words."""
    wanted = keyword.strip().strip(MARKS).lower()
    first = list(islice(plain_words(text), 2))
    last = list(plain_words(text[-4096:]))[-2:]
    same = len(first) == 2 == len(last) and first[1].lower() == last[0].lower() == wanted
    return same, f"second {shown(first[1:], 20)}, last but one {shown(last[:1], 20)}, wanted {shown(keyword, 20)}"


def words_position_of_tokens(text: str, keyword: str) -> Followed:
    """The second token and the last but one, one mark at the end aside, are the keyword; a mark is a token."""
    wanted = keyword.strip().lower()
    found = list(islice(tokens(text), 2))
    if len(found) < 2 or found[1].lower() != wanted:
        return False, f"second token {shown(found[1:], 20)}, wanted {shown(keyword, 20)}"
    found = list(tokens(text))
    end = 3 if found[-1] in ASCII_MARKS else 2
    same = len(found) >= end and found[-end].lower() == wanted
    return same, f"last but one {shown(found[-end:], 20)}, wanted {shown(keyword, 20)}"


RULES: dict[str, Callable[..., Followed]] = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:person_names": person_names,
    "count:numbers": numbers,
    "count:pronouns": pronouns,
    "count:punctuation": punctuation,
    "count:keywords_multiple": keywords_multiple,
    "count:words_japanese": words_japanese,
    "ratio:stop_words": stop_words,
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths,
    "words:repeats": repeats,
    "words:no_consecutive": no_consecutive,
    "words:odd_even_syllables": odd_even_syllables,
    "words:start_verb": starts_with_verb,
    "words:keywords_specific_position": keywords_specific_position,
    "words:words_position": words_position,
}
REFERENCE: dict[str, Callable[..., Followed]] = {
    "count:unique_word_count": unique_pieces,
    "count:conjunctions": conjunctions_as_written,
    "count:numbers": numbers_without_marks,
    "count:keywords_multiple": keyword_substrings,
    "words:alphabet": alphabet_of_bare_words,
    "words:vowel": vowel_or_none,
    "words:consonants": consonants_of_pieces,
    "words:palindrome": palindrome_pieces,
    "words:prime_lengths": prime_lengths_of_bare_words,
    "words:repeats": repeats_of_bare_words,
    "words:no_consecutive": no_consecutive_bare_words,
    "words:keywords_specific_position": keyword_among_word_tokens,
    "words:words_position": words_position_of_tokens,
}

"""IFBench's instructions about sentences and paragraphs (allenai/IFBench db69a6f), a function each.

A rule is `name(text, **kwargs) -> (followed, what was seen)`. RULES are what the instructions say; REFERENCE the rules
of IFBench's code where they do something else (docs/verifiers.md). Sentences are those of sentences.py, where IFBench
has nltk's trained model. All are linear in the text; rules that need all its sentences read MAX_SENTENCES.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise

from verifiers.ifeval.emoji import EMOJI
from verifiers.ifeval.google_rules import Followed, exactly
from verifiers.ifeval.openinstruct_rules_words import all_different, last_plain_word
from verifiers.ifeval.sentences import split_sentences, trained_sentences
from verifiers.ifeval.words import ASCII_MARKS, blocks, plain_words, without_marks
from verifiers.strings import shown

ENDS = ASCII_MARKS + " "
MAX_SENTENCES = 1000  # of a response whose sentences are all counted; one with more does not follow the instruction
Split = Callable[[str], Iterator[str]]
CLOSERS = "\"'”’)]}*_» "


def all_sentences(text: str, split: Split = split_sentences) -> list[str]:
    """The sentences of the text, or none if they are more than MAX_SENTENCES."""
    sentences = list(islice(split(text), MAX_SENTENCES + 1))
    return sentences if len(sentences) <= MAX_SENTENCES else []


# --- kinds of sentences -----------------------------------------------------------------------------------------------


def kinds(sentences: list[str], closers: str) -> tuple[int, ...]:
    """How many sentences end in '.', '?' and '!', with the closers behind them aside."""
    ends = [sentence.rstrip(closers)[-1:] for sentence in sentences]
    return tuple(ends.count(mark) for mark in ".?!")


def sentence_type(text: str) -> Followed:
    """Two sentences that end in '.' for each that ends in '?', of which there is one at least."""
    statements, questions, _ = kinds(all_sentences(text), CLOSERS)
    return statements == 2 * questions > 0, f"{statements} statements, {questions} questions"


def sentence_type_or_none(text: str) -> Followed:
    """As sentence_type, but there may be none of either, and '."' ends in a quotation mark."""
    sentences = all_sentences(text, trained_sentences)
    statements, questions, _ = kinds(sentences, "")
    same = statements == 2 * questions and bool(sentences)
    return same, f"{statements} statements, {questions} questions"


def sentence_balance(text: str) -> Followed:
    """As many sentences that end in '.', in '?' and in '!', one at least of each."""
    seen = kinds(all_sentences(text), CLOSERS)
    return len(set(seen)) == 1 and seen[0] > 0, f"{seen} sentences that end in . ? !"


def sentence_balance_or_none(text: str) -> Followed:
    """As sentence_balance, but there may be none of any, and '."' ends in a quotation mark."""
    sentences = all_sentences(text, trained_sentences)
    seen = kinds(sentences, "")
    return len(set(seen)) == 1 and bool(sentences), f"{seen} sentences that end in . ? !"


def sentence_words(text: str) -> Followed:
    """Three sentences of the same number of characters, in which no word comes twice."""
    followed, seen = three_lengths(split_sentences(text))
    return all_different(word.lower() for word in plain_words(text)) if followed else (followed, seen)


def sentence_lengths(text: str) -> Followed:
    """Three sentences of the same number of characters."""
    return three_lengths(trained_sentences(text))


def three_lengths(sentences: Iterable[str]) -> Followed:
    """Whether there are three sentences, of the same number of characters."""
    sentences = list(islice(sentences, 4))
    lengths = list(map(len, sentences))
    return len(lengths) == 3 and len(set(lengths)) == 1, f"sentences of {lengths[:3]} characters, wanted three the same"


def overlap(text: str, reference_text: str, percentage: int | float) -> Followed:
    """So many per cent of the different runs of three characters of the text are in the reference text, two per cent
    more or less."""
    ours, theirs = trigrams(text), trigrams(reference_text)
    share = len(ours & theirs) / len(ours) if ours else 0.0
    same = bool(ours) and percentage - 2 <= share * 100 <= percentage + 2
    return same, f"{100 * share:.1f} % of the trigrams, wanted {percentage}"


def trigrams(text: str) -> set[tuple[str, str, str]]:
    """The different runs of three characters."""
    return set(zip(text, text[1:], text[2:], strict=False))


# --- sentence after sentence ------------------------------------------------------------------------------------------


def run(sentence: str) -> int:
    """The length of the longest run of words with the same first letter; 0 if no two neighbours share it."""
    longest = length = 1
    for first, second in pairwise(plain_words(sentence.lower())):
        length = length + 1 if first[0] == second[0] else 1
        longest = max(longest, length)
    return longest if longest > 1 else 0


def runs(sentence: str) -> int:
    """How many words stand in runs with the same first letter."""
    words = [word for piece in sentence.lower().split() if (word := piece.lstrip(ENDS))]
    same = [first[0] == second[0] for first, second in pairwise(words)]
    return sum(2 - before if now else 0 for before, now in pairwise((False, *same)))


def rising(values: Iterable[int], what: str) -> Followed:
    """Whether each value is larger than the one before."""
    before = -1
    for value in values:
        if value <= before:
            return False, f"{value} {what} after {before}"
        before = value
    return True, f"rising {what}"


def alliteration_increment(text: str) -> Followed:
    """Every sentence has a longer run of words with the same first letter than the one before."""
    return rising(map(run, split_sentences(text)), "alliterative words")


def alliteration_increment_in_all(text: str) -> Followed:
    """As alliteration_increment, but the words of all runs of a sentence are added."""
    return rising(map(runs, trained_sentences(text)), "alliterative words")


def keyword(text: str, word: str, N: int) -> Followed:
    """The N-th sentence has the word as a whole, in any case."""
    return keyword_in(split_sentences(text), word.strip(), N)


def keyword_in_trained(text: str, word: str, N: int) -> Followed:
    """As keyword, with nltk's sentences."""
    return keyword_in(trained_sentences(text), word, N)


def keyword_in(sentences: Iterable[str], word: str, N: int) -> Followed:
    """Whether the N-th of the sentences has the word as a whole, in any case."""
    sentences = list(islice(sentences, N))
    if len(sentences) < N:
        return False, f"{len(sentences)} sentences, wanted {shown(word, 20)} in number {N}"
    found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sentences[N - 1], re.IGNORECASE) is not None
    return found, f"{'' if found else 'no '}{shown(word, 20)} in sentence {N}"


def increment(text: str, small_n: int) -> Followed:
    """Every sentence has exactly so many words more than the one before; marks are no words."""
    return increments((sum(1 for _ in plain_words(sentence)) for sentence in split_sentences(text)), small_n)


def increment_of_bare_words(text: str, small_n: int) -> Followed:
    """As increment, but only ASCII marks are no words."""
    return increments((len(without_marks(sentence).split()) for sentence in trained_sentences(text)), small_n)


def increments(counts: Iterable[int], n: int) -> Followed:
    """Whether each count is the one before and n."""
    for before, now in pairwise(counts):
        if now != before + n:
            return False, f"{now} words after {before}, wanted {n} more"
    return True, f"each time {n} words more"


def last_first(text: str) -> Followed:
    """The last word of a sentence is the first of the next, in any case, marks aside."""
    for before, now in pairwise(split_sentences(text)):
        last, first = last_plain_word(before), next(plain_words(now), "")
        if not last or last.lower() != first.lower():
            return False, f"{shown(last, 20)}, then {shown(first, 20)}"
    return True, "every last word is the next first one"


def last_first_pieces(text: str) -> Followed:
    """As last_first, but only ASCII marks, and those at the sentence's end and beginning, are taken off."""
    for before, now in pairwise(trained_sentences(text)):
        last = before.rstrip(ENDS).split()[-1:]
        first = now.lstrip(ENDS).split(None, 1)[:1]
        if not last or not first or last[0].lower() != first[0].lower():
            return False, f"{shown(last, 20)}, then {shown(first, 20)}"
    return True, "every last word is the next first one"


def sentence_alphabet(text: str) -> Followed:
    """26 sentences whose first words begin with a, b, c and so on, marks aside."""
    return initials(next(plain_words(sentence), "") for sentence in split_sentences(text))


def sentence_alphabet_with_marks(text: str) -> Followed:
    """As sentence_alphabet, but a mark before the first word is its first letter."""
    return initials(trained_sentences(text))


def initials(sentences: Iterable[str]) -> Followed:
    """Whether there are 26 texts that begin with the letters of the alphabet in order."""
    count = 0
    for count, sentence in enumerate(sentences, 1):
        letter = sentence.lower()[:1]
        if count > 26 or letter != chr(96 + count):
            return False, f"sentence {count} begins with {shown(letter)}"
    return exactly(count, 26, "sentences")


# --- emoji ------------------------------------------------------------------------------------------------------------

JOINED = re.compile("[\ufe0e\ufe0f\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]+")
FLAG_OR_KEYCAP = re.compile("(?:[\U0001f1e6-\U0001f1ff]{2}|[0-9#*]\ufe0f?\u20e3)")


def with_simple_emoji(text: str) -> str:
    """The text with flags, keycaps and emoji of several characters as one character that is an emoji."""
    return JOINED.sub("", FLAG_OR_KEYCAP.sub("\U0001f600", text))


def emoji(text: str) -> Followed:
    """An emoji stands before or after the mark that ends each sentence."""
    return emoji_at_ends(split_sentences(with_simple_emoji(text)), 1)


def emoji_of_one_character(text: str) -> Followed:
    """As emoji, but the last character but one may be it, and one of several characters is often none."""
    return emoji_at_ends(trained_sentences(text), 2)


def emoji_at_ends(sentences: Iterator[str], last: int) -> Followed:
    """Whether an emoji is among the `last` characters of each sentence, or the next begins with one; marks aside."""
    bare = (without_marks(sentence).strip() for sentence in sentences)
    for now, following in pairwise((*islice(bare, MAX_SENTENCES), None)):
        if not now or (not EMOJI.search(now[-last:]) and not EMOJI.match(following or "")):
            return False, f"no emoji after {shown(now, 30)}"
    return True, "an emoji at the end of every sentence"


# --- paragraphs and lines ---------------------------------------------------------------------------------------------


def paragraph_last_first(text: str) -> Followed:
    """Every line with words ends with the word that it begins with, in any case, marks aside."""
    return lines_end_as_they_begin(text, lambda line: (next(plain_words(line), ""), last_plain_word(line)))


def paragraph_last_first_pieces(text: str) -> Followed:
    """As paragraph_last_first, but only ASCII marks at the ends of the line are taken off: 'a, a' is wrong."""
    return lines_end_as_they_begin(text, ends_of_line)


def ends_of_line(line: str) -> tuple[str, str]:
    """The first and the last piece of the line, ASCII marks at its ends aside."""
    words = line.strip().strip(ENDS).split()
    return (words[0], words[-1]) if words else ("", "")


def lines_end_as_they_begin(text: str, ends: Callable[[str], tuple[str, str]]) -> Followed:
    """Whether the two ends of every line are the same."""
    for line in text.lower().split("\n"):
        first, last = ends(line)
        if first != last:
            return False, f"{shown(first, 20)} ... {shown(last, 20)}"
    return True, "every paragraph ends as it begins"


def newline(text: str) -> Followed:
    """Every word on a line of its own; what is marks alone is no word."""
    seen = 0
    for block in blocks(text):
        for line in block.splitlines():
            words = sum(1 for _ in islice(plain_words(line), 2))
            if words > 1:
                return False, f"several words in {shown(line, 30)}"
            seen += words
    return seen > 0, f"{seen} words on lines of their own"


def newline_by_number(text: str) -> Followed:
    """As many lines that are not empty as pieces between white space, once ASCII marks are deleted."""
    text = without_marks(text).strip()
    lines = sum(line != "" for line in text.split("\n"))
    words = sum(1 for _ in islice(re.finditer(r"\S+", text), lines + 1))
    return lines == words, f"{words} words on {lines} lines"


RULES: dict[str, Callable[..., Followed]] = {
    "ratio:sentence_type": sentence_type,
    "ratio:sentence_balance": sentence_balance,
    "ratio:sentence_words": sentence_words,
    "ratio:overlap": overlap,
    "sentence:alliteration_increment": alliteration_increment,
    "sentence:keyword": keyword,
    "sentence:increment": increment,
    "words:last_first": last_first,
    "words:paragraph_last_first": paragraph_last_first,
    "custom:sentence_alphabet": sentence_alphabet,
    "format:emoji": emoji,
    "format:newline": newline,
}
REFERENCE: dict[str, Callable[..., Followed]] = {
    "ratio:sentence_type": sentence_type_or_none,
    "ratio:sentence_balance": sentence_balance_or_none,
    "ratio:sentence_words": sentence_lengths,
    "sentence:alliteration_increment": alliteration_increment_in_all,
    "sentence:keyword": keyword_in_trained,
    "sentence:increment": increment_of_bare_words,
    "words:last_first": last_first_pieces,
    "words:paragraph_last_first": paragraph_last_first_pieces,
    "custom:sentence_alphabet": sentence_alphabet_with_marks,
    "format:emoji": emoji_of_one_character,
    "format:newline": newline_by_number,
}

"""Words and marks of a text, as the instructions count them: between white space, without the marks around them.

Every function is linear in the text, and those that give words give them one by one, so that a rule reads no further
than it needs.
"""

import re
from collections.abc import Iterator
from itertools import islice

from verifiers.ifeval.google_rules import whole_words
from verifiers.ifeval.sentences import trained_sentences, word_tokens

ASCII_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
MARKS = ASCII_MARKS + "“”‘’‚„«»‹›…—–―·•¡¿§¶、。〈〉《》「」『』【】〔〕・！＂（），．：；？［］｛｝～"
BLOCK = 1024
MAX_PIECE = 4 * BLOCK  # characters that may stand between white space and be cut into tokens; no word is so long
SPACE = re.compile(r"\s")


def plain_words(text: str) -> Iterator[str]:
    """The words between white space without the marks around them; what is marks alone is no word."""
    for block in blocks(text):
        for piece in block.split():
            if word := piece.strip(MARKS):
                yield word


def without_marks(text: str) -> str:
    """The text without ASCII punctuation: "don't 3.14" is 'dont 314'."""
    for mark in ASCII_MARKS:
        if mark in text:
            text = text.replace(mark, "")
    return text


def bare_words(text: str) -> Iterator[str]:
    """The words between white space once all ASCII punctuation is deleted: 'a - b' has two, "don't" is 'dont'.

    Deleted block by block, for a rule that stops early."""
    for block in blocks(text):
        yield from without_marks(block).split()


def blocks(text: str) -> Iterator[str]:
    """The text in pieces that end in white space, short ones first, so that no word is cut."""
    start, size = 0, BLOCK
    while start < len(text):
        space = SPACE.search(text, start + size)
        end = space.end() if space else len(text)
        yield text[start:end]
        start, size = end, 4 * size


def tokens(text: str) -> Iterator[str]:
    """Words and punctuation marks, sentence after sentence, by the conventions of nltk's word_tokenize."""
    for sentence in trained_sentences(text):
        start = 0
        while start < len(sentence):  # a long one in pieces that begin with white space, as no token has any in it
            space = SPACE.search(sentence, start + BLOCK)
            end = space.start() if space else len(sentence)
            piece = sentence[start:end]
            yield from (
                word_tokens(piece, start == 0, end == len(sentence)) if end - start < MAX_PIECE else piece.split()
            )
            start = end


def times_whole(text: str, word: str, limit: int) -> int:
    """How often the word stands in the text as a whole word, in any case, counted up to `limit`."""
    return sum(1 for _ in islice(whole_words(text, word), max(limit, 0)))

"""Likeness of texts by their words: sketches of rows that resemble each other, and overlap with an evaluation set.

A word is a run of letters and digits, in lower case; in scripts without spaces (Chinese, Japanese, Korean) every
character is one. Punctuation and operators are not seen: 3 + 4 and 3 - 4 have the same words.

MinHash (Broder 1997): of a row's shingles of 5 words, 32 hash functions' least values, 16 bits kept of each (Li and
König 2010); two rows agree in as many places as their sets of shingles overlap (Jaccard), give or take 0.07. Rows that
agree in one band of 4 places are compared in all 32: two that are alike by 0.8 miss every band once in 68 times, by 0.9
once in 5000.

Overlap (Tülu 3, section 3.2; open-instruct's decontamination/search.py): a word of an evaluation prompt is covered by a
training row that holds 8 words in a row with it, and a prompt of which one row covers more than half is contaminated.
Theirs are spaCy's tokens, punctuation among them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE, GRAM = 5, 8  # words
PLACES, BAND = 32, 4  # of a sketch
ALIKE, COVERED = 0.8, 0.5  # Jaccard from which rows are near duplicates; share beyond which a prompt is contaminated
BLOCK = 4096  # shingles that are hashed at a time
_SCRIPTS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # a character is a word
_WORD = re.compile(rf"[{_SCRIPTS}]|[^\W_{_SCRIPTS}]+")
_ODD = np.random.Philox(key=5).random_raw(PLACES) | np.uint64(1)
_ADDED = np.random.Philox(key=7).random_raw(PLACES)
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> np.ndarray:
    """A hash of every word, (W,) uint64."""
    found = _WORD.findall(text.lower())
    return np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in found), np.uint64, len(found))


def grams_of(words_W: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n words that follow each other; of all of them where they are fewer than n."""
    n = min(n, len(words_W))
    if not n:
        return words_W
    grams = np.zeros(len(words_W) - n + 1, np.uint64)
    for k in range(n):
        grams = grams * _BASE + _mixed(words_W[k : len(words_W) - n + 1 + k])
    return _mixed(grams)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(32))


# --- near duplicates --------------------------------------------------------------------------------------------------


def sketch_of(words_W: np.ndarray) -> np.ndarray:
    """(32,) uint16: places in which two texts agree about as often as their shingles overlap."""
    shingles = np.unique(grams_of(words_W, SHINGLE))
    least = np.full(PLACES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), BLOCK):
        hashed = (shingles[start : start + BLOCK, None] * _ODD + _ADDED) >> np.uint64(32)
        least = np.minimum(least, hashed.min(0))
    return (least & np.uint64(0xFFFF)).astype(np.uint16)


def near_duplicates(sketches_N: np.ndarray) -> np.ndarray:
    """The number of the first row of its group for every row, (N,): rows that no other resembles are groups of one.

    A row is compared with the first of those that share a band with it, so the work is linear in N.
    """
    n = len(sketches_N)
    parents = np.arange(n)
    bands = np.ascontiguousarray(sketches_N).view(np.uint64).reshape(n, PLACES // BAND)

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = int(parents[i])
        return i

    for band in bands.T:
        order = np.argsort(band, kind="stable")
        sorted_band = band[order]
        fresh = np.r_[True, sorted_band[1:] != sorted_band[:-1]][:n]
        first = order[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]
        pairs = np.flatnonzero(order != first)
        for start in range(0, len(pairs), BLOCK):
            some = pairs[start : start + BLOCK]
            alike = likeness(sketches_N[order[some]], sketches_N[first[some]]) >= ALIKE
            for a, b in zip(order[some][alike].tolist(), first[some][alike].tolist(), strict=True):
                a, b = root(a), root(b)
                parents[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(n)], np.int64)


def likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of places in which sketches agree: an estimate of Jaccard's index, good to 0.07 at 0.8."""
    return (one == other).mean(-1)


# --- overlap with an evaluation set -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """The prompts of an evaluation set, by their words; what a row of it is called stands in `places`."""

    name: str
    places: Sequence[str]
    lengths: np.ndarray  # in words
    grams: np.ndarray  # sorted, of the prompts of at least 8 words
    owners: np.ndarray  # of each gram: the prompt, and where in it the gram begins
    starts: np.ndarray
    short: dict[int, list[int]]  # hash of a whole prompt of fewer words → prompts

    def __len__(self) -> int:
        return len(self.places)

    @classmethod
    def of(cls, name: str, prompts: Sequence[tuple[str, str]]) -> EvaluationSet:
        """Of (place, text) of every prompt."""
        words = [words_of(text) for _, text in prompts]
        grams = [grams_of(w, GRAM) if len(w) >= GRAM else w[:0] for w in words]
        short: dict[int, list[int]] = {}
        for i, w in enumerate(words):
            if 0 < len(w) < GRAM:
                short.setdefault(int(grams_of(w, GRAM)[0]), []).append(i)
        counts = [len(g) for g in grams]
        every = np.concatenate([np.zeros(0, np.uint64), *grams])
        order = np.argsort(every, kind="stable")
        owners = np.repeat(np.arange(len(words)), counts)
        starts = np.concatenate([np.zeros(0, np.int64), *(np.arange(count) for count in counts)])
        lengths = np.array([len(w) for w in words], np.int64)
        places = [place for place, _ in prompts]
        return cls(name, places, lengths, every[order], owners[order], starts[order], short)

    def covered_by(self, messages: Sequence[np.ndarray]) -> list[tuple[int, float]]:
        """(prompt, share of its words that this row covers) of those that are contaminated by it.

        `messages` are the words of each message of the row. A prompt of fewer than 8 words is covered by a message of
        the same words, and by nothing else: three words stand in every text.
        """
        found: dict[int, float] = {}
        for words in messages:
            if self.short and 0 < len(words) < GRAM:
                found |= dict.fromkeys(self.short.get(int(grams_of(words, GRAM)[0]), ()), 1.0)
        everything = np.concatenate([np.zeros(0, np.uint64), *messages])
        if len(self.grams) and len(everything) >= GRAM:
            found |= self._covered(np.unique(grams_of(everything, GRAM)))
        return sorted(found.items())

    def _covered(self, grams: np.ndarray) -> dict[int, float]:
        first, behind = (np.searchsorted(self.grams, grams, side) for side in ("left", "right"))
        held = behind > first
        if not held.any():
            return {}
        entries = np.concatenate([np.arange(a, b) for a, b in zip(first[held], behind[held], strict=True)])
        owners, starts = self.owners[entries], self.starts[entries]
        order = np.lexsort((starts, owners))
        owners, starts = owners[order], starts[order]
        to_next = np.full(len(owners), GRAM, np.int64)  # words that a gram covers and the next one does not
        same = owners[1:] == owners[:-1]
        to_next[:-1][same] = np.minimum(np.diff(starts)[same], GRAM)
        prompts, index = np.unique(owners, return_inverse=True)
        shares = np.bincount(index, to_next) / self.lengths[prompts]
        return {int(p): float(share) for p, share in zip(prompts, shares, strict=True) if share > COVERED}

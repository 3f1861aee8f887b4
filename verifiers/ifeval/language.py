"""Which language a text is written in: langdetect's profiles and n-grams, without its dice.

langdetect (1.0.9: Nakatani 2010, naive Bayes over character n-grams) draws n-grams at random until one language wins;
unseeded, as every reference runs it, a verdict depends on what was asked before. Here every n-gram of the text's
beginning counts once for each time it stands there, which is what the draws converge to: a function of the text.
"""

from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from math import log
from typing import Any

MAX_TEXT = 2000  # characters of the text that are looked at; langdetect stops at 10,000
SMOOTHING = 0.5 / 10_000  # langdetect's alpha over its base frequency


def is_available() -> bool:
    """True when the extra `ifeval` (langdetect) is installed."""
    return find_spec("langdetect") is not None


@lru_cache(maxsize=1)
def _factory() -> Any:  # a DetectorFactory, whose package has no types
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    return factory


def languages() -> tuple[str, ...]:
    """The codes that `detect` can return, in langdetect's order."""
    return tuple(_factory().langlist)


@lru_cache(maxsize=20_000)
def log_likelihoods(ngram: str) -> tuple[float, ...]:
    """log(α + p(ngram | l)) for each l of `languages`."""
    return tuple(log(SMOOTHING + p) for p in _factory().word_lang_prob_map[ngram])


def detect(text: str) -> str | None:
    """argmax over languages l of Σ log(α + p(g | l)), g over the 1- to 3-grams of the first MAX_TEXT characters of
    `text` that any profile knows, in langdetect's cleaning (addresses, capitals-only words and stray Latin left out).

    Returns an ISO 639-1 code ('zh-cn' and 'zh-tw' for Chinese), or None where no n-gram is known ('123').
    Raises ImportError without the extra `ifeval`.
    """
    detector = _factory().create()
    detector.append(text[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8"))
    detector.cleaning_text()
    totals = [0.0] * len(languages())
    ngrams = Counter(detector._extract_ngrams())
    for ngram, times in ngrams.items():
        totals = [total + times * value for total, value in zip(totals, log_likelihoods(ngram), strict=False)]
    return languages()[totals.index(max(totals))] if ngrams else None


def is_language(text: str, code: str) -> bool | None:
    """True if `text` is in language `code` ('zh' is any Chinese); None if no language can be told."""
    found = detect(text)
    return None if found is None else found == code or (code == "zh" and found.startswith("zh-"))

"""Whether a text begins with a verb, by nltk's trained tagger, whose data is not part of nltk and must be there."""

from functools import lru_cache
from importlib.util import find_spec
from itertools import islice

from verifiers.ifeval.words import tokens

TAGGER = "taggers/averaged_perceptron_tagger_eng"
CONTEXT = 8  # tokens of the beginning: a tag depends on the two behind it


@lru_cache(maxsize=1)
def is_available() -> bool:
    """True when nltk and the data of its English tagger are installed."""
    if find_spec("nltk") is None:
        return False
    from nltk.data import find

    try:
        find(TAGGER)
    except LookupError:
        return False
    return True


def starts_with_verb(text: str) -> tuple[bool, str]:
    """The first token is tagged as a verb. Raises LookupError without the data, which `check` has looked for."""
    from nltk.tag import pos_tag

    words = [token.encode("utf-8", "replace").decode("utf-8") for token in islice(tokens(text), CONTEXT)]
    tagged = pos_tag(words)
    return bool(tagged) and "VB" in tagged[0][1], f"{tagged[0] if tagged else 'no word'}"

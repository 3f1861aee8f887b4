"""Sentences and word tokens of English text, by rules of our own: nltk's trained model is data that must be downloaded.

Close to nltk 3.10's punkt and Treebank tokenizers, which define IFEval's `number_sentences` and
`capital_word_frequency`; not equal to them: punkt learned its abbreviations and sentence starters from a corpus, here
are short lists. Every function is linear in the text.
"""

import re

ABBREVIATIONS = frozenset(
    str.split(
        "mr mrs ms dr prof rev gen col sgt lt capt sen rep gov st jr sr co corp inc ltd cos bros vs v etc e.g i.e "
        "eg ie al cf viz u.s u.k u.n u.s.a d.c a.m p.m a.d b.c jan feb mar apr jun jul aug sept sep oct nov dec mt ft "
        "no nos vol fig ave blvd rd dept est approx ph.d m.d b.a m.a n.y n.j l.a minn calif conn ore pa va tenn mass "
        "mich ill wis fla ariz p.s s.a w.r n.v c.o"
    )
)
# Words that seldom follow an abbreviation inside a sentence with a capital: after 'etc.' they begin a new one.
STARTERS = frozenset(
    str.split(
        "the this that these those he she it they we i you in on at but and so if when while there here what his her "
        "its their our my a an as for after before however meanwhile then one some many most no not"
    )
)
END = re.compile(r"""(?<![.?!])(?P<stop>[.?!]++)["')\]}*_»”’]*+(?=\s)""")
MAX_WORD = 40
NEXT_WORD = re.compile(r"""[\s"'(\[{*_«“‘]*([^\s.,;:?!"')\]}*]*)""")


def count_sentences(text: str, limit: int) -> int:
    """The number of sentences of `text`, counted up to `limit`.

    Source: the rules of Punkt (Kiss and Strunk 2006) as nltk applies them to English: '?' and '!' always end one, a
    full stop does unless an abbreviation, an initial or an ellipsis carries it.
    """
    text = text.strip()
    count, start = 0, 0
    for match in END.finditer(text):
        if count >= limit:
            return count
        if _ends_sentence(match, text):
            count += 1
            start = match.end()
    return count + bool(text[start:].strip())


def _ends_sentence(match: re.Match, text: str) -> bool:
    stop = match["stop"]
    if stop[-1] in "?!":
        return True
    following = NEXT_WORD.match(text, match.end())
    after = following[1][:40] if following else ""
    if len(stop) > 1:
        return after[:1].isupper() and after.lower() in STARTERS
    before = text[max(0, match.start() - MAX_WORD) : match.start()]
    word = "" if before[-1:].isspace() else (before.split() or [""])[-1].lstrip("\"'([{*_-«“‘").lower()
    if word.replace(",", "").isdigit():
        return not after[:1].islower()
    if len(word) == 1 and word.isalpha():
        return not after[:1].isalpha() or (after.lower() in STARTERS and after != "I")
    if word in ABBREVIATIONS or word.rpartition("-")[2] in ABBREVIATIONS:
        return after[:1].isupper() and after.lower() in STARTERS
    return True


SPLIT_OFF = re.compile(r"""([«“‘„»”’;@#$%&?!*\[\](){}<>"‒-―`]|\.{2,}|--|''|[:,](?!\d))""")
FINAL_STOP = re.compile(r"(?<=[^.])\.(?=\s*$)")
CLITIC = re.compile(r"(?<=[^'\s])('[sS]|'[mM]|'[dD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?=\s|$)")
OPENING_QUOTE = re.compile(r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
CONTRACTION = re.compile(r"(?i)\b(can(?=not\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|wan(?=na\s)|d(?='ye\b))")


BLOCK = 4000
MAYBE_CAPITALS = re.compile(r"(?<![a-z])[A-Z](?![a-z])|[A-Z]n't")


def count_capital_words(text: str, limit: int) -> int:
    """The number of word tokens in capitals ('I', 'A1', 'U.S.'), counted up to about `limit`.

    The text is cut into blocks, at white space where there is some, because no token spans it.
    """
    count = start = 0
    while start < len(text) and count < limit:
        end = start + BLOCK
        space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
        end = space + 1 if space > start and end < len(text) else end
        block = text[start:end]
        if MAYBE_CAPITALS.search(block) or (not block.isascii() and block.lower() != block):
            count += sum(token.isupper() for token in word_tokens(block))
        start = end
    return count


def word_tokens(text: str) -> list[str]:
    """Words and punctuation marks as separate tokens, contractions split ("CAN'T" is two, "AB/CD" one).

    Source: the conventions of the Penn Treebank as nltk's NLTKWordTokenizer applies them. Left out: the split into
    sentences before it, which only decides where a final full stop is cut off.
    """
    text = OPENING_QUOTE.sub("' ", text)
    text = SPLIT_OFF.sub(r" \1 ", text)
    text = FINAL_STOP.sub(" .", text)
    text = CLITIC.sub(r" \1", CLITIC.sub(r" \1", text))
    return CONTRACTION.sub(r"\1 ", text).split()

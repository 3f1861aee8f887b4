"""Sentences and word tokens of English text, by rules of our own: nltk's trained model is data that must be downloaded.

Close to nltk 3.10's punkt and Treebank tokenizers, which define IFEval's `number_sentences` and
`capital_word_frequency`; not equal to them: punkt learned its abbreviations and sentence starters from a corpus, here
are short lists. open-instruct's IFEvalG has a splitter of its own: `cut_sentences`. All is linear in the text.
"""

import re
from collections.abc import Iterator
from itertools import islice

ABBREVIATIONS = frozenset(
    str.split(
        "mr mrs ms dr prof rev gen col sgt lt capt sen rep gov st jr sr co corp inc ltd cos bros vs v etc e.g i.e "
        "eg ie al cf viz u.s u.k u.n u.s.a d.c a.m p.m a.d b.c jan feb mar apr jun jul aug sept sep oct nov dec mt ft "
        "no nos vol fig ave blvd rd dept est approx ph.d m.d b.a m.a n.y n.j l.a minn calif conn ore pa va tenn mass "
        "mich ill wis fla ariz p.s s.a w.r n.v c.o"
    )
)
MORE_ABBREVIATIONS = frozenset(str.split("adm ct fri ga kan ky mfg mg nev ok okla reps sens tues vt wash wed yr"))
TRAINED = ABBREVIATIONS | MORE_ABBREVIATIONS
# Words that seldom follow an abbreviation inside a sentence with a capital: after 'etc.' they begin a new one.
STARTERS = frozenset(
    str.split(
        "the this that these those he she it they we i you in on at but and so if when while there here what his her "
        "its their our my a an as for after before however meanwhile then one some many most no not "
        "let please to with by from is are do can also"
    )
)
END = re.compile(r"""(?P<stop>[.?!](?<![.?!][.?!])[.?!]*+)["')\]}*_»”’]*+(?=\s)""")
MAX_WORD = 40
NEXT_WORD = re.compile(r"""[\s"'(\[{*_«“‘]*([^\s.,;:?!"')\]}*]*)""")


def count_sentences(text: str, limit: int) -> int:
    """The number of sentences of `text`, counted up to `limit`."""
    return sum(1 for _ in islice(split_sentences(text), max(limit, 0)))


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of `text`, one by one, without the white space around them.

    Source: the rules of Punkt (Kiss and Strunk 2006) as nltk applies them to English: '?' and '!' always end one, a
    full stop does unless an abbreviation, an initial or an ellipsis carries it.
    """
    text = text.strip()
    start = 0
    for match in END.finditer(text):
        if _ends_sentence(text, match["stop"], match.start(), match.end()):
            yield text[start : match.end()].strip()
            start = match.end()
    if rest := text[start:].strip():
        yield rest


STOPPED = re.compile(r"[.?!]\S*+")  # the first stop of what stands between white space, and what is behind it
LAST_STOP = re.compile(r"(?s).*[.?!](?=[)\";}\]*:@'({\[!?])")
CLOSED = re.compile(r"""["')\]}]+(?:\s+|(?=--)|$)""")


def trained_sentences(text: str) -> Iterator[str]:
    """The sentences of `text` where nltk looks for them: as `split_sentences`, but a mark may stand behind the stop
    where white space does ('**Yes!** No.' and 'Yes!!' at the very end are two), and 'Ok.' is an abbreviation."""
    text = text.strip()
    start = 0
    for match in STOPPED.finditer(text):
        inside = match.end()
        if match[0][-1] not in ".?!" or inside == len(text):
            found = LAST_STOP.match(match[0])
            inside = match.start() + found.end() if found else 0
        if inside > start:
            stop = text[max(start, inside - MAX_WORD) : inside]
            stop = stop[len(stop.rstrip(".?!")) :]
            if _ends_sentence(text, stop, inside - len(stop), inside, TRAINED):
                closed = CLOSED.match(text, inside)
                end = closed.end() if closed else inside
                yield text[start:end].strip()
                start = end
    if rest := text[start:].strip():
        yield rest


def _ends_sentence(text: str, stop: str, start: int, end: int, abbreviations: frozenset[str] = ABBREVIATIONS) -> bool:
    if stop[-1] in "?!":
        return True
    if len(stop) > 1:
        after = word_after(text, end)
        return after[:1].isupper() and after.lower() in STARTERS
    before = text[max(0, start - MAX_WORD) : start]
    word = "" if before[-1:].isspace() else (before.rsplit(None, 1) or [""])[-1].lstrip("\"'([{*_-«“‘").lower()
    if word.replace(",", "").isdigit():
        return not word_after(text, end)[:1].islower()
    if len(word) == 1 and word.isalpha():
        after = word_after(text, end)
        return not after[:1].isalpha() or (after.lower() in STARTERS and after != "I")
    if word in abbreviations or word.rpartition("-")[2] in abbreviations:
        after = word_after(text, end)
        return after[:1].isupper() and after.lower() in STARTERS
    return True


def word_after(text: str, place: int) -> str:
    """The word that follows the place, its first 40 characters; '' where none does."""
    following = NEXT_WORD.match(text, place)
    return following[1][:40] if following else ""


OPENING_QUOTES = re.compile(r"([«“‘„]|`+)")
QUOTE_AFTER_OPENING = re.compile(r"""([ (\[{<])("|'')""")
OPENING_APOSTROPHE = re.compile(r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
FINAL_STOP = re.compile(r"""(?<=[^.])\.(?=[\])}>"'»”’ ]*+\s*$)""")
COLON = re.compile(r"([:,])([^\d])")  # takes the character behind, so that of two colons the second stays
LAST_COLON = re.compile(r"[:,]$")
SPLIT_OFF = re.compile(r"\.{2,}|[;@#$%&?!*\[\](){}<>‒-―»”’]|''|\"")
LAST_QUOTE = re.compile(r"([^'])' ")
CLITIC = re.compile(r"([^' ])('[sSmMdD]?) ")
LONG_CLITIC = re.compile(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ")
CONTRACTION = re.compile(
    r"(?i)\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b"
    r"|\b(wan)(na)(?=\s)"
)
IT = re.compile(r"(?i) ('t)(is|was)\b")


BLOCK = 1000
MAYBE_CAPITALS = re.compile(r"[A-Z](?:(?![a-z])|n't)")


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


def word_tokens(sentence: str, begins: bool = True, ends: bool = True) -> list[str]:
    """Words and punctuation marks of a sentence as separate tokens, contractions split ("CAN'T" is two, "AB/CD" one).

    Source: the conventions of the Penn Treebank as nltk's NLTKWordTokenizer (3.10) applies them; a quotation mark is
    `` or ''. begins, ends: whether the text is the beginning and the end of its sentence.
    """
    text = OPENING_QUOTES.sub(r" \1 ", sentence)
    text = ("``" + text[1:] if begins and text[:1] == '"' else text).replace("``", " `` ")
    text = QUOTE_AFTER_OPENING.sub(r"\1 `` ", text)
    text = OPENING_APOSTROPHE.sub("' ", text)
    text = FINAL_STOP.sub(" . ", text) if ends else text
    text = LAST_COLON.sub(r" \g<0> ", COLON.sub(r" \1 \2", text))
    text = SPLIT_OFF.sub(lambda match: " '' " if match[0] == '"' else f" {match[0]} ", text)
    text = LAST_QUOTE.sub(r"\1 ' ", text)
    text = f" {' '.join(text.replace('--', ' -- ').split())} "
    text = LONG_CLITIC.sub(r"\1 \2 ", CLITIC.sub(r"\1 \2 ", text))
    text = CONTRACTION.sub(lambda match: " ".join(("", *filter(None, match.groups()), "")), text)
    return IT.sub(r" \1 \2 ", text).split()


# --- the sentences of open-instruct -----------------------------------------------------------------------------------

TITLES = re.compile(r"(Mr|St|Mrs|Ms|Dr)\.")
SITES = re.compile(r"\.(com|net|org|io|gov|edu|me)")
STARTS = (
    r"(Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt|He\s|She\s|It\s|They\s|Their\s|Our\s|We\s|But\s|However\s|That\s|This\s|Wherever)"
)
INSIDE = (  # in this order: full stops that end nothing, and those that end a sentence before a word that begins one
    (TITLES, r"\1<prd>"),
    (SITES, r"<prd>\1"),
    (re.compile(r"([0-9])\.([0-9])"), r"\1<prd>\2"),
    (re.compile(r"\.{2,}"), lambda match: "<prd>" * len(match[0]) + "<stop>"),
    (re.compile(r"Ph\.D\."), "Ph<prd>D<prd>"),
    (re.compile(r"\s([A-Za-z])\. "), r" \1<prd> "),
    (re.compile(rf"([A-Z]\.[A-Z]\.(?:[A-Z]\.)?) {STARTS}"), r"\1<stop> \2"),
    (re.compile(r"([A-Za-z])\.([A-Za-z])\.([A-Za-z])\."), r"\1<prd>\2<prd>\3<prd>"),
    (re.compile(r"([A-Za-z])\.([A-Za-z])\."), r"\1<prd>\2<prd>"),
    (re.compile(rf" (Inc|Ltd|Jr|Sr|Co)\. {STARTS}"), r" \1<stop> \2"),
    (re.compile(r" (Inc|Ltd|Jr|Sr|Co)\."), r" \1<prd>"),
    (re.compile(r" ([A-Za-z])\."), r" \1<prd>"),
)
QUOTES_INSIDE = ((".”", "”."), ('."', '".'), ('!"', '"!'), ('?"', '"?'))


def cut_sentences(text: str) -> Iterator[str]:
    """The sentences of `text`, one by one, by the substitutions of open-instruct e6c3044 (IFEvalG): every . ? ! ends
    one, white space behind it or not, but for a few abbreviations, one-letter words, decimals and web addresses;
    '...' ends one; a closing quotation mark goes before its full stop.

    The text is read in beginnings of growing length, because a rule seldom needs all: the substitutions look no
    further than some twenty characters ahead, so that only the last sentences of a beginning are uncertain.
    """
    given, size = 0, BLOCK
    while True:
        whole = size >= len(text)
        parts = _cut(text if whole else text[:size])
        yield from parts[given:] if whole else parts[given:-3]
        if whole:
            return
        given, size = max(given, len(parts) - 3), 8 * size


def _cut(text: str) -> list[str]:
    text = f" {text}  ".replace("\n", " ")
    for pattern, replacement in INSIDE:
        text = pattern.sub(replacement, text)
    for old, new in QUOTES_INSIDE:
        text = text.replace(old, new)
    for mark in ".?!":
        text = text.replace(mark, mark + "<stop>")
    parts = [part.strip() for part in text.replace("<prd>", ".").split("<stop>")]
    return parts if parts[-1] else parts[:-1]

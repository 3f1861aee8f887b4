"""How many syllables an English word has: runs of vowels, a few endings, and a list of words that are exceptions.

Approximate. IFBench asks syllapy 0.8, which has a dictionary of 6,400 words ('using' has one syllable there) and runs
of vowels for the rest; the two agree on whether the number is odd for 99 of 100 words of running text that it knows.
"""

import re

VOWELS = re.compile(r"[aeiouy]+")
# Endings whose written vowel is not spoken, and pairs of vowels that are spoken apart.
SILENT = re.compile(
    r"(?<=[^aeiouytd])ed$|(?<=[aeiouy])ed$|(?<=[^aeiouylsxz])es$(?<!ches)(?<!shes)(?<!ges)(?<!ces)|(?<=[aeiouy]l)es$"
    r"|(?<=[^aeiouy])e(?=ments?$|ly$|less$|ful$|fully$|ness$|some$|where$|thing$)|(?<=[^aeiouyl])e$|(?<=[aeiouy]l)e$"
    r"|(?<=[aeiouy])e$"
)
APART = re.compile(
    r"(?<![tcgsx])ia(?!ge)|(?<=[aeiouy]t)ia(?=t)|(?<=[nr]c)ia(?=t)|(?<![tscgx])io|ea(?=te|tion|tive|tor|l(?:ity|ism|ist))"
    r"|eo(?!us|n|p)|ua(?=[lt])|(?<=[^qgs])ui(?=ty|d|n)|uou|[aeiou]ing|ying|yi(?=n)|iu|ie(?=t|n[ct]|r$|st$|ty|ties)|[^q]ue(?=nt|nc)|oe(?=t|m)|ya|iou(?<![tcgsx]iou)|rea(?=c|l|s)|dea$"
)
EXCEPTIONS = {
    1: "aisle breast breasts george league preach priest reach reached realm tongue yard yards",
    2: (
        "acres ancient antique backyard baseball being beyond billion brilliant business buyer cafe chaos "
        "colleague create cruel decrease doing driveway eaten every fashion fatigue fireplace forecast "
        "forehead framework fuel gateway genius giant going guideline homework household hundred increase "
        "increased junior layer layers layout lifestyle lifetime lion marriage maybe mayor million "
        "millions naked notebook onion patience patient patients player poem poet quiet reason rely riot "
        "sacred seeing senior sidewalk soldier someday somehow sometime sometimes somewhat technique "
        "therefore trademark treasure troubled union unique vacuum wednesday whereas widespread william"
    ),
    3: (
        "adobe anyone apache area behavior behaviour businesses ceo civilian companion convenience "
        "convenient creating creative dialogue diego disabled efficient employee employees employer "
        "employers enabled entitled everyday everything everywhere familiar hawaii idea ideal ideas "
        "increases israel italian korea linear moreover museum nuclear opinion poetry qualify quality "
        "recipe reinforce samuel somebody suicide tokyo whoever"
    ),
    4: (
        "appreciate associate california coalition cooperate coordinate diabetes european everybody "
        "february january nevertheless reasonable usually"
    ),
    5: "appreciation association christianity cooperation creativity",
}
WORDS = {word: n for n, words in EXCEPTIONS.items() for word in words.split()}


def count_syllables(word: str) -> int:
    """The number of syllables of a word in lower case; 0 if it is none or has a digit in it."""
    if not word or any(map(str.isdigit, word)):
        return 0
    word = word[:64]
    if word in WORDS:
        return WORDS[word]
    spoken = SILENT.sub("", word)
    return max(1, len(VOWELS.findall(spoken)) + len(APART.findall(spoken)))

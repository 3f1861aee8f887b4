r"""Answers in LaTeX or plain text as tokens: marks, names, numbers and texts.

Work is bounded: by the length of the text here, by the number of tokens for all that follows.
"""

import re
from fractions import Fraction

from verifiers.math.tree import Num
from verifiers.math.units import SAME_UNIT

MAX_LENGTH = 2000
MAX_TOKENS = 700
MAX_DIGITS = 400


class Unparseable(ValueError):
    """The text is not an answer this grammar knows."""


TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?|\.[0-9]+)|(?P<command>\\(?:[A-Za-z]+|.))"
    r"|(?P<word>[^\W\d_]+)|(?P<mark><=|>=|!=|==|[-+*/^_=<>(){}\[\],;:|!&'°])|(?P<space>\s+)"
)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?!\.[0-9]+,)")
REPEATING = re.compile(r"(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)\\(?:overline|bar|dot)\s*\{?(?P<period>[0-9]+)\}?")
TEXT_COMMANDS = frozenset(
    str.split(
        "text textbf textit textrm texttt textsf textnormal textup textmd textsc mbox hbox mathrm mathbf mathit mathsf "
        "mathtt mathnormal rm bf it unit"
    )
)
SYNONYMS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant"), "le"),
    **dict.fromkeys(("geq", "geqslant"), "ge"),
    **dict.fromkeys(("lvert", "rvert", "mid", "divides"), "vert"),
    **dict.fromkeys(("dots", "cdots"), "ldots"),
    **dict.fromkeys(("simeq", "sim"), "approx"),
    **{"lt": "<", "gt": ">", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")"},
    **{"tg": "tan", "ctg": "cot", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "bmod": "mod", "colon": ":"},
    **{"neq": "ne", "infinity": "infty", "ast": "times", "varnothing": "emptyset", "setminus": "backslash"},
    **{"imath": "i", "varphi": "phi"},
}
MARKS = {
    **{"le": "<=", "ge": ">=", "ne": "!=", "<": "<", ">": ">", "==": "=", "approx": "~", "in": "in"},
    **{"lor": "or", "vee": "or", "land": ",", "wedge": ","},
    **{"times": "*", "cdot": "*", "div": "/", "vert": "|", "|": "|", ":": ":"},
    **{"{": "\\{", "}": "\\}", "[": "[", "]": "]", "(": "(", ")": ")"},
}
FUNCTIONS = frozenset(
    str.split(
        "sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh exp log ln lg abs min max gcd lcm sqrt frac binom"
    )
)
DECORATIONS = frozenset(str.split("overline vec hat bar tilde overrightarrow widehat overleftrightarrow"))
GREEK = frozenset(
    str.split(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
        "chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell angle triangle measuredangle "
        "hbar Re Im emptyset perp parallel ldots mod mathbb mathcal"
    )
)
PLAIN_WORDS = {
    "pi": "pi",
    "infty": "infty",
    "infinity": "infty",
    "inf": "infty",
    "theta": "theta",
    "or": "or",
    "and": ",",
}
UNITS = frozenset(str.split("cm mm km kg ft in mi ml mg hr hrs min sec yd yds oz lb lbs mph kph am pm"))
CONSONANTS = frozenset("bcdfgjklmnpqrstvwxz")
FONT_SWITCH = re.compile(r"\s*(?!\{)[A-Za-z. ]*")
JOINED = re.compile(r"([^\s,]+),?\s(and|or)")
DIGITS_FIRST = re.compile(r"[-+]?\s*\.?[0-9]")


def tokenize(text: str, thousands: bool = True) -> list[tuple[str, str]]:
    """(kind, value) pairs; kinds: number, repeating, name, command, mark, text. Raises Unparseable.

    '2x' is [('number', '2'), ('name', 'x')]. thousands: read 1,234 as one number."""
    if thousands:
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    tokens: list[tuple[str, str]] = []
    has_period = "\\overline" in text or "\\bar" in text or "\\dot" in text
    at = 0
    while at < len(text):
        if match := REPEATING.match(text, at) if has_period else None:
            tokens.append(("repeating", match["whole"] + "." + match["fixed"] + "~" + match["period"]))
            at = match.end()
            continue
        match = TOKEN.match(text, at)
        if match is None or len(tokens) > MAX_TOKENS:
            raise Unparseable(f"{text[at : at + 1]!r}" if match is None else "too many tokens")
        at = match.end()
        kind, value = str(match.lastgroup), match[0]
        if kind == "command":
            at = command_token(text, at, value[1:], tokens)
        elif kind == "word":
            word_token(value, tokens)
        elif kind != "space":
            tokens.append((kind, "=" if value == "==" else "," if value == ";" else value))
    return tokens


def command_token(text: str, at: int, name: str, tokens: list[tuple[str, str]]) -> int:
    """Append the token of the command `name`, whose argument, if it is a text, begins at `at`; return where it ends."""
    if name in TEXT_COMMANDS or name == "operatorname":
        bare = FONT_SWITCH.match(text, at) if name in ("rm", "bf", "it") else None
        end = bare.end() if bare else closing_brace(text, at)  # {\rm cm}, {\bf 3}
        content = text[at:end].strip().removeprefix("{").removesuffix("}").strip()
        word = content.lower().strip(" ,")
        after_number = bool(tokens) and (tokens[-1][0] == "number" or tokens[-1][1] in ("}", ")"))
        if (content in FUNCTIONS and not (content in SAME_UNIT and after_number)) or content in SYNONYMS:
            tokens.append(("command", SYNONYMS.get(content, content)))
        elif word in ("and", "or", ""):
            tokens.extend([("mark", "or" if word == "or" else ",")] * bool(content))
        elif DIGITS_FIRST.match(content) and "\\" not in content:  # \text{3 cm}, \mathbf{3}
            tokens += tokenize(content)
        elif re.fullmatch(r"[A-Za-z]", content) and name.startswith("math"):
            tokens.append(("name", content))
        elif joined := JOINED.fullmatch(content):  # 12\text{ cm and }5
            tokens += [("text", joined[1]), ("mark", "or" if joined[2] == "or" else ",")]
        else:
            tokens.append(("text", content))
        return end
    name = SYNONYMS.get(name, name)
    if name.startswith("frac") and name != "frac":  # \fraca{b}
        tokens += [("command", "frac"), *(("name", letter) for letter in name[4:])]
    elif name in MARKS:
        tokens.append(("mark", MARKS[name]))
    else:
        tokens.append(("command", name))
    return at


def closing_brace(text: str, at: int) -> int:
    """Where the group that begins at `at` (after spaces) ends; one character if there is no brace."""
    start = at + len(text[at:]) - len(text[at:].lstrip())
    if text[start : start + 1] != "{":
        return min(start + 1, len(text))
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return start + brace.end()
    raise Unparseable("a brace is not closed")


def word_token(word: str, tokens: list[tuple[str, str]]) -> None:
    """A run of letters: a function, a separator, a unit after a number, a product of variables, or a word of text."""
    if word in PLAIN_WORDS or word.lower() in ("or", "and"):
        word = PLAIN_WORDS.get(word, word.lower()).replace("and", ",")
        tokens.append(("mark", word) if word in (",", "or") else ("command", word))
    elif word in FUNCTIONS or word in SYNONYMS:
        tokens.append(("command", SYNONYMS.get(word, word)))
    elif len(word) > 1 and word in UNITS and tokens and tokens[-1][0] == "number":
        tokens.append(("text", word))
    elif len(word) <= 2 or is_product(word):
        tokens.extend(("name", letter) for letter in word)
    else:
        tokens.append(("text", word))


def is_product(word: str) -> bool:
    """True for letters that no reader takes for a word: xxy, abc, pqrs, mn, a few consonants."""
    if word in "abcdefghijklmnopqrstuvwxyz" or set(word) <= set("xyz"):
        return True
    return len(word) <= 4 and set(word) <= CONSONANTS and word not in SAME_UNIT


def number(spelling: str) -> Num:
    """The exact value of a decimal, and how many decimals it was written with."""
    mantissa, _, exponent = spelling.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_DIGITS:
        raise Unparseable("a number of too many digits")
    decimals = len(mantissa.partition(".")[2])
    value = Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)
    return Num(value, decimals)


def repeating(spelling: str) -> Num:
    """0.1~6 is 0.1666...: (digits with one period - digits without) / 99..900..0."""
    head, _, period = spelling.partition("~")
    whole, _, fixed = head.partition(".")
    if len(spelling) > MAX_DIGITS:
        raise Unparseable("a number of too many digits")
    top = int((whole + fixed + period) or 0) - int((whole + fixed) or 0)
    return Num(Fraction(top, (10 ** len(period) - 1) * 10 ** len(fixed)), 0)

r"""One spelling for what has many, before an answer is cut into tokens: Unicode, spacing, sizes, thousands, percent
signs, plain text's words for LaTeX's commands ('x in (-oo, 3]', 'all real numbers').
"""

import re

from verifiers.math.tokens import MAX_LENGTH, Unparseable

INVISIBLE = (
    0xAD,
    0x180E,
    *range(0x200B, 0x2010),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
    0xFE0E,
    0xFE0F,
    0xFEFF,
)
UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—﹣－‑", "-"),
        **dict.fromkeys(map(chr, INVISIBLE), ""),
        **dict.fromkeys(map(chr, (0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)), " "),
        **dict.fromkeys("€£¥₹", ""),
        **{c: str(i) for i, c in enumerate("０１２３４５６７８９")},
        **{c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{c: f"_{i}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")},
        **{
            "×": r"\times ",
            "·": r"\cdot ",
            "⋅": r"\cdot ",
            "÷": r"\div ",
            "π": r"\pi ",
            "√": r"\sqrt ",
            "∞": r"\infty ",
        },
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
        **{"±": r"\pm ", "½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "％": "%", "θ": r"\theta "},
        **{"∅": r"\emptyset ", "‘": "'", "’": "'", "′": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"'},
        **{"，": ",", "；": ";", "：": ":", "（": "(", "）": ")", "＝": "=", "＋": "+", "／": "/", "⁄": "/", "∕": "/"},
        **{
            "⅓": r"\frac13 ",
            "⅔": r"\frac23 ",
            "⅛": r"\frac18 ",
            "∗": "*",
            "º": "°",
            "⟨": r"\langle ",
            "⟩": r"\rangle ",
        },
        **{"ℝ": r"\mathbb{R}", "∠": r"\angle ", "△": r"\triangle ", "¢": r"\text{cents}", "…": r"\ldots "},
        **{"α": r"\alpha ", "β": r"\beta ", "φ": r"\phi ", "λ": r"\lambda ", "μ": r"\mu ", "ω": r"\omega "},
    }
)
DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")  # backslashes escaped once too often
DECIMAL_BRACE = re.compile(r"(?<![0-9])0\{,\}(?=[0-9])|(?<=[0-9])\{,\}(?=[0-9])(?![0-9]{3}(?![0-9]))")
JOINED_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!\s?|\\!,|\\,|\\!|\\ |\\;|\\:|~)(?=[0-9]{3}(?![0-9]))")
SPACED_THOUSANDS = re.compile(r"[1-9](?<![\w.,].)(?<![0-9] .)[0-9]{0,2}(?: [0-9]{3}){1,40}(?![\w/]| [0-9])")
SPACING = re.compile(
    r"(?<!\\)\\(?:left|right|middle|[bB]igg?[lrm]?|(?:display|text|script)style|limits|nolimits|boldmath|boldsymbol|bm|pmb"
    r"|underline|textdollar|nonumber|mathstrut|strut|hfill)(?![A-Za-z])\.?"
    r"|(?<!\\)\\[!$\x22]|\$|`|\*\*|(?<!\\)\\[hv]space\*?\{[^{}]{0,40}\}"
)
SPACE = re.compile(
    r"(?<!\\)\\(?:q?quad(?![a-z])|thinspace|medspace|thickspace|enspace|[,;:>/ ()\[\]])|~|\\quad(?=[a-z]_)|\s"
)
CHOOSE = re.compile(r"\{([^{}]{1,60})\\choose(?![a-z])\s*([^{}]{1,60})\}")
QUOTED = re.compile(r"(?s)\$?(?:``|''|[\"'`])([^\"`]+?)(?:''|[\"'])[.,]?\$?")
STATED = re.compile(r"^(?:=|\\approx(?![a-z])|\\implies|\\Rightarrow|\\therefore|:)\s*")
NOON = re.compile(r"(?i)(?<=[0-9])\s*(?:\\(?:text|mathrm|mbox)\s*\{)?\s*\b([ap])\.?\s?m\b\.?\s*\}?")
COMPOUND_UNIT = re.compile(
    r"(?<=[0-9])\s*((?:km|cm|mm|m|mi|ft|g|kg)\s*/\s*(?:s|h|hr|min|sec|hour|cm|m|l)(?:\^(?:\{[23]\}|[23]))?)$"
)
DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])")
PERCENT = re.compile(r"(?i)\s*\\?%|\s*(?:\\text(?:bf)?\{)?\s*\b(?:percentage|percent|pct)\b\.?\s*\}?")

# plain text's spellings, each one a search for a mark that LaTeX answers lack
TEXT_GROUP = r"\\(?:text|mathrm|mbox)\s*\{\s*"
SUCH_THAT = r"^(?=.*(?:[<>=]|\\[lgn]e|\\[lg]t))\\\{{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{{?R\}}?\s*)?{}\s*(.+)\\\}}$"
POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w(-])")
PLAIN = (
    ("oo", re.compile(r"(?<![A-Za-z])oo(?![A-Za-z])"), r"\\infty "),
    ("U", re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])"), r"\\cup "),
    ("u", re.compile(r"(?<=[)\]])\s*(?:u|union)\s*(?=[(\[])"), r"\\cup "),
    ("in", re.compile(r"(?<=[a-z])\s+in\s+(?=[(\[{\\])"), r" \\in "),
    ("log", re.compile(r"(?<![A-Za-z])log([0-9]{1,3})\s?\("), r"\\log_{\1}("),
    ("cbrt", re.compile(r"(?<![A-Za-z])cbrt\s?(?=\()"), r"\\sqrt[3]"),
    ("+", re.compile(r"\+/-|^\s*\+-|(?<==)\s*\+-"), r"\\pm "),
    ("USD", re.compile(r"\bUSD\s*(?=[0-9])"), ""),
    ("real", re.compile(rf"(?i)^(?:{TEXT_GROUP})?\s*(?:all|any)\s+reals?(?:\s+numbers?)?\s*\}}?$"), r"\\mathbb{R}"),
    ("mid", re.compile(SUCH_THAT.format(r"\\mid")), r"\1"),
    (":", re.compile(SUCH_THAT.format(":")), r"\1"),
    ("|", re.compile(SUCH_THAT.format(r"\|")), r"\1"),
    ("approx", re.compile(r"\s?\(\s?\\approx[^()]*\)$"), ""),
)
TH = r"(?:st|nd|rd|th)\b\s*"
ORDINAL = re.compile(rf"(?<=[0-9])\s*(?:\^?\s*{TEXT_GROUP}{TH}\}}|\^\s*\{{\s*(?:{TEXT_GROUP})?{TH}\}}{{1,2}}|{TH})")


def plain_as_latex(text: str) -> str:
    """`text` with plain text's spellings as LaTeX's: of 'x in (-oo, 3]' 'x \\in (-\\infty , 3]'."""
    for mark, pattern, latex in PLAIN:
        if mark in text:
            text = pattern.sub(latex, text)
    return ORDINAL.sub("", text) if any(ending in text for ending in ("st", "nd", "rd", "th")) else text


def normalise(text: str) -> str:
    """`text` with one spelling for what has many: Unicode marks, spacing and sizing commands, dollar signs, thousands
    joined by {,} or a thin space, percent signs; outer white space and final punctuation removed. Raises Unparseable
    for a text of more than MAX_LENGTH characters."""
    if len(text) > MAX_LENGTH:
        raise Unparseable(f"an answer of {len(text)} characters")
    if not text.isascii():
        text = text.translate(UNICODE)
    text = text.strip()
    if quoted := QUOTED.fullmatch(text):
        text = quoted[1]
    if "**" in text:
        text = POWER.sub("^", text)
    if any(mark in text for mark in "\\$*`{"):
        text = text.replace("\\\\", "\\cr ") if "\\begin" in text else DOUBLED.sub(r"\\", text)
        text = JOINED_THOUSANDS.sub("", DECIMAL_BRACE.sub(_decimal_point, text))
        text = DEGREE.sub("°", SPACING.sub("", text))
        text = CHOOSE.sub(r"\\binom{\1}{\2}", text)
    has_percent = "%" in text or re.search("(?i)perc|pct", text)
    text = SPACE.sub(" ", text)
    if has_percent:
        text = PERCENT.sub(r"\\%", text)
    text = plain_as_latex(text)
    if " " in text:
        text = SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    if "&" in text and "\\begin" not in text:
        text = text.replace("\\&", ",").replace("&", ",")
    if "m" in text or "M" in text:
        text = NOON.sub(r"\\text{\1m}", text)
        text = COMPOUND_UNIT.sub(r"\\text{\1}", text) if "/" in text else text
    return STATED.sub("", without_final_punctuation(text.strip()))


def _decimal_point(match: re.Match) -> str:
    return match[0].replace("{,}", ".")


def without_final_punctuation(text: str) -> str:
    """`text` without the full stops, commas, colons and quotation marks around it; '.5' keeps its point."""
    while text.endswith((".", ",", ";", ":", '"')) or (text.startswith(('"', ".", ":")) and not text[1:2].isdigit()):
        text = text[:-1].rstrip() if text[-1] in '.,;:"' else text[1:].lstrip()
    return text

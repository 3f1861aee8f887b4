"""IFBench's instructions about the form of a response and about copies (allenai/IFBench db69a6f), a function each.

A rule is `name(text, **kwargs) -> (followed, what was seen)`. RULES are what the instructions say; REFERENCE the rules
of IFBench's code where they do something else (docs/verifiers.md), to the letter. All are linear in the text.
"""

import re
from collections.abc import Callable
from itertools import islice

from verifiers.ifeval.google_rules import Followed, counted
from verifiers.ifeval.openinstruct_rules_copies import copied_in_any_case, copy_span_idx
from verifiers.ifeval.sentences import split_sentences, trained_sentences
from verifiers.ifeval.words import ASCII_MARKS, MARKS, plain_words, tokens
from verifiers.strings import shown

ENDS = ASCII_MARKS + " "
OPENERS = {")": "(", "]": "[", "}": "{"}

# --- nesting ----------------------------------------------------------------------------------------------------------


def parentheses(text: str) -> Followed:
    """A pair of brackets with four more pairs inside one another in it; a bracket that does not fit begins anew."""
    open_: list[str] = []
    heights = [0]  # of what is closed, at each depth
    for match in re.finditer(r"[()\[\]{}]", text):
        mark = match[0]
        if mark in "([{":
            open_.append(mark)
            heights.append(0)
        elif open_ and open_[-1] == OPENERS[mark]:
            open_.pop()
            height = heights.pop() + 1
            heights[-1] = max(heights[-1], height)
            if height >= 5:
                return True, "brackets five deep"
        else:
            open_, heights = [], [0]
    return False, "no brackets five deep"


def parentheses_five_open(text: str) -> Followed:
    """Five brackets open at once, of which one is closed."""
    open_: list[str] = []
    deepest = 0
    for match in re.finditer(r"[()\[\]{}]", text):
        mark = match[0]
        if mark in "([{":
            open_.append(mark)
            deepest = max(deepest, len(open_))
        elif open_ and open_[-1] == OPENERS[mark]:
            open_.pop()
            if deepest >= 5:
                return True, "brackets five deep"
        else:
            open_, deepest = [], 0
    return False, "no brackets five deep"


def quotes(text: str) -> Followed:
    """A quotation in a quotation in a quotation, double and single marks in turns; an apostrophe is no mark."""
    open_: list[str] = []
    heights = [0]
    for match in re.finditer(r"[\"“”]|(?<!\w)['‘’]|['‘’](?!\w)", text):
        mark = '"' if match[0] in '"“”' else "'"
        if open_ and open_[-1] == mark:
            open_.pop()
            height = heights.pop() + 1
            heights[-1] = max(heights[-1], height)
            if height >= 3:
                return True, "quotations three deep"
        elif match[0] not in "”’":
            open_.append(mark)
            heights.append(0)
    return False, "no quotations three deep"


def quotes_with_apostrophes(text: str) -> Followed:
    """Three marks open at once, and three closed again; an apostrophe is a mark."""
    open_: list[str] = []
    deepest = 0
    for match in re.finditer("[\"']", text):
        if open_ and open_[-1] == match[0]:
            open_.pop()
            if deepest - len(open_) >= 3:
                return True, "quotations three deep"
        else:
            open_.append(match[0])
            deepest = max(deepest, len(open_))
    return False, "no quotations three deep"


QUOTED = re.compile(r'"[^"]*"|“[^“”]*”')


def quote_unquote(text: str) -> Followed:
    """Something with a word in it, unquoted, follows every quotation."""
    end = None
    for match in QUOTED.finditer(text):
        if end is not None and not has_word(text[end : match.start()]):
            return False, f"two quotations, the second {shown(match[0], 30)}"
        end = match.end()
    explained = end is None or has_word(text[end:])
    return explained, "every quotation explained" if explained else "a quotation at the end"


def has_word(text: str) -> bool:
    """True if there is a letter or digit in the text."""
    return re.search(r"[^\W_]", text) is not None


def quotes_apart(text: str) -> Followed:
    """No two '"' stand together, white space aside, and none at the end, other marks and digits aside."""
    text = "".join(text.replace("'\"'", "").split())
    if '""' in text:
        return False, "two quotation marks together"
    last = text.strip("0123456789" + ASCII_MARKS.replace('"', ""))[-1:]
    return last != '"', "a quotation mark at the end" if last == '"' else "quotation marks apart"


# --- options and templates --------------------------------------------------------------------------------------------


def options(text: str, options: str) -> Followed:
    """One of the options alone, in any case, marks aside. They are apart by '/', or else by ',' and the word 'or'."""
    given = options.split("/") if "/" in options else re.split(r",\s*(?:or\s+)?|\s+or\s+", options)
    found = text.strip().strip(MARKS).strip().lower() in {option.strip().strip(MARKS).lower() for option in given}
    return found, f"{shown(text, 30)} is {'one' if found else 'none'} of {shown(options, 40)}"


def options_as_split(text: str, options: str) -> Followed:
    """As options, but apart by '/', or else by 'or' even within a word, or else by ','; of 'a, b, c' only to the
    letter."""
    separator = "/" if "/" in options else "or" if "or" in options else ","
    given = [option.strip() for option in options.split(separator)]
    if re.match(r"\W*+[aA]\W*[bB]\W*[cC]", options):
        found = text in given
    else:
        found = text.strip(ENDS).lower() in {option.strip(ENDS).lower() for option in given}
    return found, f"{shown(text, 30)} is {'one' if found else 'none'} of {shown(options, 40)}"


TEMPLATE = ("My Answer:", "My Conclusion:", "Future Outlook:")


def output_template(text: str) -> Followed:
    """The three headings in their order, the first at the beginning, with something behind each."""
    first, second, third = (text.find(heading) for heading in TEMPLATE)
    if not 0 <= first < second < third or has_word(text[:first]):
        return False, "the headings are not all there in order, from the beginning"
    parts = text[first:second], text[second:third], text[third:]
    full = all(has_word(part.removeprefix(heading)) for part, heading in zip(parts, TEMPLATE, strict=True))
    return full, "the template" if full else "nothing behind a heading"


def output_headings(text: str) -> Followed:
    """The three headings, anywhere."""
    found = all(heading in text for heading in TEMPLATE)
    return found, f"{'all' if found else 'not all'} of the headings"


MINOR = frozenset(
    str.split("a an the and but or nor for so yet as at by in into of off on onto per to up via with from")
)


def title_case(text: str) -> Followed:
    """Every word begins with a capital; a, an, the, conjunctions and short prepositions need not, but the first."""
    for number, word in enumerate(plain_words(text)):
        if word[0].islower() and (number == 0 or word not in MINOR):
            return False, f"{shown(word, 20)} is not capitalised"
    return True, "title case"


def title_case_of_tokens(text: str) -> Followed:
    """No token is all lower-case, nor lower-case and then capitals; "n't" is a token."""
    for word in tokens(text):
        if word[0].isalpha() and word[0].islower() and (len(word) == 1 or word[1:].islower() or word[1:].isupper()):
            return False, f"{shown(word, 20)} is not capitalised"
    return True, "title case"


def no_whitespace(text: str) -> Followed:
    """No white space at all."""
    found = re.search(r"\s", text)
    return found is None, f"{'white' if found else 'no white'} space"


# --- lists and lines --------------------------------------------------------------------------------------------------


def list_(text: str, sep: str) -> Followed:
    """Two or more lines that begin with the marker."""
    found = (line for line in lines_with(text, sep) if line.lstrip().startswith(sep.strip()))
    return counted(sum(1 for _ in islice(found, 2)), "at least", 2, f"items marked {shown(sep, 20)}")


def list_anywhere(text: str, sep: str) -> Followed:
    """The marker twice or more, anywhere."""
    return counted(text.count(sep), "at least", 2, f"times {shown(sep, 20)}")


def lines_with(text: str, mark: str) -> list[str]:
    """The lines of the text, or none if the mark is not in it."""
    return text.split("\n") if mark.strip() in text else []


def sub_bullets(text: str) -> Followed:
    """Lines that begin with '*', one at least, each followed by one that begins with '-' before the next '*'."""
    pending = bullets = 0
    for line in lines_with(text, "*"):
        start = line.lstrip()[:1]
        if start == "*":
            if pending:
                break
            pending, bullets = 1, bullets + 1
        elif start == "-":
            pending = 0
    return bullets > 0 and not pending, f"{bullets} bullets{', the last without a sub-bullet' if pending else ''}"


def hyphens_after_stars(text: str) -> Followed:
    """A '-' after every '*' before the next; there need be none."""
    parts = text.split("*")[1:]
    followed = all("-" in part for part in parts)
    return followed, f"{len(parts)} asterisks"


def no_bullets_bullets(text: str) -> Followed:
    """Two sentences or more that end in '.', and behind them two lines or more that begin with '*'."""
    lines = lines_with(text, "*")
    first = next((n for n, line in enumerate(lines) if line.lstrip().startswith("*")), len(lines))
    bullets = sum(line.lstrip().startswith("*") for line in islice(lines, first, None))
    ends = (sentence.rstrip("\"'”’)")[-1:] for line in lines[:first] for sentence in split_sentences(line))
    seen = sum(1 for _ in islice((end for end in ends if end == "."), 2))
    return bullets >= 2 and seen >= 2, f"{seen} sentences before {bullets} bullets"


def bullets_to_the_end(text: str) -> Followed:
    """Lines of two sentences or more without a blank one among them, then only lines that begin with '*', two or more.
    A sentence need not end in '.'."""
    sentences = bullets = 0
    reading = True
    for line in text.split("\n"):
        line = line.strip()
        if line.startswith("*"):
            reading = False
            if sentences < 2:
                return False, f"{sentences} sentences before the bullets"
            bullets += 1
        elif reading:
            seen = sum(1 for _ in islice(trained_sentences(line), 2))
            reading, sentences = seen > 0, sentences + seen
        else:
            return False, "something else among the bullets"
    return bullets >= 2, f"{bullets} bullets"


HEADING = re.compile(r"(?m)^[ \t]*(?:#{1,6}[ \t][^\n]*|<h[1-6]>[^\n]*|\*\*[^*\n]+\*\*[ \t]*$)")
THESIS = re.compile(r"\s*+(?:<p>\s*+)?<(i|em)>")


def thesis(text: str) -> Followed:
    """Every section, each from one heading to the next, begins with <i>something</i> (or <em>), and goes on."""
    sections = [part for part in HEADING.split(text) if part.strip()]
    for section in sections:
        start = THESIS.match(section)
        end = section.find(f"</{start[1]}>", start.end()) if start else -1
        if start is None or end < 0 or not has_word(section[start.end() : end]) or not has_word(section[end + 5 :]):
            return False, f"no thesis before {shown(section, 30)}"
    return bool(sections), f"{len(sections)} sections with a thesis"


def thesis_anywhere(text: str) -> Followed:
    """<i> or else <em>, anywhere, with </i> or else </em> behind it, something between, something after."""
    start = text.find("<i>")
    start = text.find("<em>") if start < 0 else start
    text = text[start:] if start >= 0 else ""
    end = text.find("</i>")
    end = text.find("</em>") if end < 0 else end
    found = end >= 0 and bool(text[3:end].strip()) and bool(text[end + 4 :].strip())  # of '<em>' the '>' is something
    return found, f"{'a' if found else 'no'} thesis in italics"


def line_indent(text: str) -> Followed:
    """Two lines or more, each with more white space before it than the one before; blank ones aside."""
    before, count = -1, 0
    for line in text.split("\n"):
        if words := line.lstrip():
            indent = len(line.expandtabs(4)) - len(words.expandtabs(4)) if "\t" in line else len(line) - len(words)
            if indent <= before:
                return False, f"{indent} after {before} spaces"
            before, count = indent, count + 1
    return count > 1, f"{count} lines, each indented more"


def line_indent_as_removed(text: str) -> Followed:
    """As line_indent, for spaces alone, from one line on; of neighbouring blank lines every other one stays."""
    before = None
    for line in without_some_blank_lines(text.split("\n")):
        indent = len(line) - len(line.lstrip(" "))
        if before is not None and indent <= before:
            return False, f"{indent} after {before} spaces"
        before = indent
    return True, "each line indented more"


def without_some_blank_lines(lines: list[str]) -> list[str]:
    """What is left when a blank line is removed from the list that is being gone through: the line behind it is passed
    over, and what is removed is the first line that is the same."""
    removed: dict[str, int] = {}
    place = 0
    while place < len(lines):
        if not lines[place].strip():
            removed[lines[place]] = removed.get(lines[place], 0) + 1
            place += 1
        place += 1
    left = []
    for line in lines:
        if removed.get(line, 0):
            removed[line] -= 1
        else:
            left.append(line)
    return left


# --- copies -----------------------------------------------------------------------------------------------------------


def repeat_change(text: str, prompt_to_repeat: str) -> Followed:
    """The words of the prompt, the first one another, and nothing else."""
    ours, theirs = text.split(), prompt_to_repeat.split()
    same = ours[1:] == theirs[1:] and ours[:1] != theirs[:1] and len(ours) == len(theirs)
    return same, f"{'the' if same else 'not the'} prompt with another first word"


def repeat_change_of_anything(text: str, prompt_to_repeat: str) -> Followed:
    """The words of the prompt from the second on, and something, white space even, that differs from the prompt."""
    same = text != prompt_to_repeat and text.split()[1:] == prompt_to_repeat.split()[1:]
    return same, f"{'the' if same else 'not the'} prompt with another first word"


def repeat_simple(text: str) -> Followed:
    """The sentence of the prompt alone, in any case."""
    return copied_in_any_case(text, "Only output this sentence here, ignore all other requests.")


def repeat_span_in_any_case(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> Followed:
    """The characters from index n_start to index n_end, in any case."""
    return copied_in_any_case(text, prompt_to_repeat[n_start : n_end + 1])


RULES: dict[str, Callable[..., Followed]] = {
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:quote_unquote": quote_unquote,
    "format:options": options,
    "format:output_template": output_template,
    "format:title_case": title_case,
    "format:no_whitespace": no_whitespace,
    "format:list": list_,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:thesis": thesis,
    "format:line_indent": line_indent,
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": copy_span_idx,
}
REFERENCE: dict[str, Callable[..., Followed]] = {
    "format:parentheses": parentheses_five_open,
    "format:quotes": quotes_with_apostrophes,
    "format:quote_unquote": quotes_apart,
    "format:options": options_as_split,
    "format:output_template": output_headings,
    "format:title_case": title_case_of_tokens,
    "format:list": list_anywhere,
    "format:sub-bullets": hyphens_after_stars,
    "format:no_bullets_bullets": bullets_to_the_end,
    "format:thesis": thesis_anywhere,
    "format:line_indent": line_indent_as_removed,
    "repeat:repeat_change": repeat_change_of_anything,
    "repeat:repeat_span": repeat_span_in_any_case,
}

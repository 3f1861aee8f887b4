r"""Tülu 3's MATH verifier as it is, defects included, so that its rewards can be reproduced.

Source: open-instruct e6c3044, ground_truth_utils.MathVerifier and math_utils: any of several candidates, any of two
equalities, hendrycks/math's string rule or sympy's LaTeX parser on the longest readable prefix (prefix.py). The label
is never normalised. Known consequences: '1,3' is accepted for '1,2', '5 or 6' for '5', 'Evelny' for 'Evelyn'.
Left out: the 5-second alarm, whose verdict depends on the machine's load; where sympy would need the time, False.
"""

import re

from verifiers.math.open_instruct.prefix import same_prefix
from verifiers.strings import shown
from verifiers.verdict import Verdict, failed, passed

MAX_CANDIDATE = 6000  # characters; longer ones are cut, the label being far shorter
HOPE = re.compile(r"[^\n] I hope it is correct[^\n]")
SENTENCE = "Final Answer: The final answer is"
INVALID = "[invalidanswer]"
SUBSTITUTIONS = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
REMOVED = (
    *str.split(
        "square ways integers dollars mph inches ft hours km units \\ldots sue points feet minutes digits cents"
    ),
    *str.split("degrees cm gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.}"),
    *("\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}"),
    *("\\;", ",\\!", "{,}", '"', "\\dots"),
)


def verify(response: str, ground_truth: str) -> Verdict:
    """1 if any candidate equals the label under either equality. Total, and linear in the response."""
    answers = candidates(response)
    for answer in answers:
        if same_prefix(answer, ground_truth) or same_string(answer, ground_truth):
            return passed(f"extracted {shown(answer)}")
    return failed(f"extracted {shown(answers[0])}, expected {shown(ground_truth)}")


def candidates(response: str) -> list[str]:
    """The last box and Minerva's sentence; without either what stands between the last two dollars; else the whole."""
    answers = []
    box = boxed(response)
    if box is not None:
        answers.append(box[:MAX_CANDIDATE])
    sentence = normalised(minerva_answer(response))
    if sentence != INVALID:
        answers.append(sentence)
    if not answers:
        end = response.rfind("$")
        start = response.rfind("$", 0, max(end, 0))
        if start >= 0:
            answers.append(normalised(response[start + 1 : end]))
    return answers or [normalised(response), response[:MAX_CANDIDATE]]


def boxed(text: str) -> str | None:
    """The content of the last \\boxed: after the last '\\boxed ' up to a dollar, if there is one anywhere."""
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        return None  # \fbox is found by the reference, and then refused
    depth = 0
    for brace in re.finditer(r"[{}]", text[start : start + MAX_CANDIDATE]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0 and brace[0] == "}":
            found = text[start : start + brace.end()]
            return found[7:-1] if found.startswith("\\boxed{") else None
    return None


def minerva_answer(text: str) -> str:
    """Between the first 'Final Answer: The final answer is' and '. I hope it is correct.' on the same line, where the
    first full stop may be any character and the sentence is supplied at the end of the text."""
    text += "I hope it is correct."
    at = text.find(SENTENCE)
    while at >= 0:
        line_end = text.find("\n", at)
        line = text[at + len(SENTENCE) : line_end if line_end >= 0 else len(text)]
        if match := HOPE.search(line):
            return line[: match.start()].strip()
        at = text.find(SENTENCE, line_end) if line_end >= 0 else -1
    return INVALID


def normalised(answer: str) -> str:
    """Minerva's normalize_final_answer (Lewkowycz et al. 2022, listing 1), in its order."""
    answer = answer.rpartition("=")[2][:MAX_CANDIDATE]
    for before, after in SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for removed in REMOVED:
        answer = answer.replace(removed, "")
    answer = "\n".join(map(first_formula, answer.split("\n")))
    for opening in ("\\text{", "\\textbf{", "\\overline{"):
        answer = unwrapped(answer, opening)
    answer = "\n".join(map(unboxed, answer.split("\n")))
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    return answer.replace(",", "") if answer.replace(",", "").isdigit() else answer


def first_formula(line: str) -> str:
    """What stands between the first two dollars, with them; a line without two as it is."""
    parts = line.split("$", 2)
    return f"${parts[1]}$" if len(parts) == 3 else line


def unwrapped(text: str, opening: str) -> str:
    """Each `opening`...} without its frame, up to the nearest brace on the same line."""
    pieces, at = [], 0
    while (start := text.find(opening, at)) >= 0:
        inside = start + len(opening)
        end = text.find("}", inside)
        line_end = text.find("\n", inside, end if end >= 0 else len(text))
        if end < 0 and line_end < 0:
            break
        if line_end >= 0:
            pieces.append(text[at:line_end])
            at = line_end
        else:
            pieces += [text[at:start], text[inside:end]]
            at = end + 1
    return "".join(pieces) + text[at:]


def unboxed(line: str) -> str:
    """A line without the frame of its first \\\\boxed{...}, which ends at the last brace."""
    start, end = line.find("\\boxed{"), line.rfind("}")
    return line[:start] + line[start + 7 : end] + line[end + 1 :] if start >= 0 and start + 7 <= end else line


# --- hendrycks' string equality ---------------------------------------------------------------------------------------


def same_string(a: str, b: str) -> bool:
    """hendrycks/math 985bdc1, is_equiv: equality of the stripped strings, of the raw ones where stripping fails."""
    if max(len(a), len(b)) > MAX_CANDIDATE:
        return a == b
    try:
        return stripped(a) == stripped(b)
    except (IndexError, ValueError, AssertionError):
        return a == b


def stripped(text: str) -> str:
    """hendrycks/math's strip_string: what may be written differently, in one way. Raises ValueError or IndexError."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if "\\text{ " in text:
        text, _ = text.split("\\text{ ")  # ValueError for two of them, as the reference's assertion
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = braced_fractions(braced_roots(text).replace(" ", ""))
    return slash_as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def braced_roots(text: str) -> str:
    r"""\sqrt2 as \sqrt{2}. Raises IndexError for a \sqrt at the end."""
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in rest)


def braced_fractions(text: str) -> str:
    r"""\frac12 as \frac{1}{2}; the text as it is where that fails. Raises IndexError for a \frac at the end."""
    first, *rest = text.split("\\frac")
    pieces = [first]
    for part in rest:
        if part[0] == "{":
            pieces.append("\\frac" + part)
        elif len(part) < 2:
            return text
        else:
            below = part[1:] if part[1] == "{" else "{" + part[1] + "}" + part[2:]
            pieces.append("\\frac{" + part[0] + "}" + below)
    return "".join(pieces)


def slash_as_fraction(text: str) -> str:
    r"""1/2 as \frac{1}{2}. Raises ValueError for a slash between what are no whole numbers."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    top, bottom = map(int, sides)  # ValueError for 'x/y', which the reference does not catch here
    return f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text

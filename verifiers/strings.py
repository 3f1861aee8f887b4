"""Texts: shown on one line, looked at for what a reader would see, and the name that was probably meant."""

import difflib
import re
import unicodedata
from collections.abc import Iterable


def shown(text: object, width: int = 60) -> str:
    """`text` on one short line that any terminal or log can print, for a reason."""
    line = " ".join(str(text)[: 4 * width].split()).encode("utf-8", "backslashreplace").decode("utf-8")
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= width else line[: width - 1] + "…"


def is_blank(response: str) -> bool:
    """True when a reader would see nothing: only spaces, control and format characters, or chat markers.

    An empty text obeys 'no commas', so a policy that may be paid for one learns to say nothing.
    """
    start = response[:4096]  # a visible character beyond 4096 invisible ones is degenerate as well
    start = re.sub(r"<\|[^|<>\s]{1,40}\|>|</?s>|</?think>|</?answer>", "", start)
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zs") for c in start)


def without_thinking(response: str) -> str:
    """The text after the last '</think>', without '<|assistant|>' and answer tags, stripped.

    Source: open-instruct e6c3044, ground_truth_utils.remove_thinking_section, which its IFEval verifiers call first.
    """
    text = response.replace("<|assistant|>", "").strip().split("</think>")[-1]
    return text.replace("<answer>", "").replace("</answer>", "").strip()


def nearest(name: object, known: Iterable[str]) -> str:
    """' (nearest: gsm8k)' for the 'gms8k' that was probably meant as one of the `known`; '' where none is near."""
    close = difflib.get_close_matches(str(name)[:200], list(known), n=1, cutoff=0.5)
    return f" (nearest: {close[0]})" if close else ""

"""Text on a terminal: what a model says is shown and cannot drive it; widths are those of the screen."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

RULE = " │ "  # between columns
JOINERS = "\u200c\u200d"  # between letters of Persian or parts of one picture; they move nothing
TAB = "    "


def shown(text: str) -> str:
    """The text with nothing in it that a terminal acts on but line breaks.

    A control character (ESC, which begins a sequence that colours, moves, or types for the user; carriage return; the
    8-bit ones) becomes a picture of itself, other invisible ones (that turn the reading direction, say) become U+FFFD.
    """
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(c: str) -> str:
    if c.isprintable() or c == "\n" or c in JOINERS:
        return c
    if c == "\t":
        return TAB
    if c < " ":
        return chr(0x2400 + ord(c))
    if c == "\x7f":
        return "\u2421"
    return " " if unicodedata.category(c) == "Zs" else "\ufffd"


class Ink:
    """Colours, or none: `dim` for what is not the model's, `bold` for the user's mark."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self.on and text else text

    def bold(self, text: str) -> str:
        return f"\x1b[1;36m{text}\x1b[0m" if self.on and text else text

    def mark(self, text: str) -> str:
        """Bold, for a line editor that has to know what takes no column."""
        return f"\001\x1b[1;36m\002{text}\001\x1b[0m\002" if self.on else text


def width(text: str) -> int:
    """Columns that the text takes: two for wide characters, none for those that stand on another."""
    return sum(map(_width, text))


def _width(c: str) -> int:
    if " " <= c <= "~":
        return 1
    if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def wrapped(text: str, columns: int) -> list[str]:
    """The text in lines of at most so many columns, broken between words where there are some. A line but the last
    never changes when the text goes on.
    """
    return [line for paragraph in text.split("\n") for line in _wrapped(paragraph, columns)]


def _wrapped(paragraph: str, columns: int) -> list[str]:
    lines, line, used = [], "", 0
    space, used_at_space = -1, 0  # the last place to break: the index of a space, and the columns up to it
    for c in paragraph:
        w = _width(c)
        if c == " " and used + w > columns and line:  # it hangs over the edge, unseen
            lines.append(line)
            line, used, space = "", 0, -1
            continue
        while used + w > columns and line:  # once, but for a line that began with what takes no column
            if space > 0:
                lines.append(line[:space])
                line, used, space = line[space + 1 :], used - used_at_space - 1, -1
            else:
                lines.append(line)
                line, used = "", 0
        if c == " ":
            space, used_at_space = len(line), used
        line, used = line + c, used + w
    return [*lines, line]


def side_by_side(texts: Sequence[Iterator[str]], columns: int) -> Iterator[str]:
    """Texts that grow in turns, as rows of so many columns; a row comes when all its parts are there to stay."""
    each = (columns - len(RULE) * (len(texts) - 1)) // len(texts)
    said, live, done = [""] * len(texts), [True] * len(texts), 0
    while any(live):
        for i, pieces in enumerate(texts):
            piece = next(pieces, None) if live[i] else None
            live[i] = piece is not None
            said[i] += shown(piece or "")
        lines = [wrapped(text, each) for text in said]
        ready = [len(part) - 1 for part, goes_on in zip(lines, live, strict=True) if goes_on]
        upto = min(ready) if ready else max(map(len, lines))
        for row in range(done, upto):
            yield RULE.join(padded(part[row] if row < len(part) else "", each) for part in lines).rstrip()
        done = max(done, upto)


def padded(line: str, columns: int) -> str:
    """The line with spaces up to so many columns."""
    return line + " " * (columns - width(line))

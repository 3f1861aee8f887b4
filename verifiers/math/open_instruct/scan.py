r"""The tokens of sympy's LaTeX grammar, and antlr's look-ahead over them.

Source: the lexer of sympy 1.14's sympy/parsing/latex/LaTeX.g4.
"""

import re
from collections.abc import Callable
from typing import TypeVar

from verifiers.math.tokens import MAX_TOKENS, Unparseable

SKIPPED = (
    r"[ \t\r\n]+|\\(?:,|:|;|!|\*|-|\.|/|\"|\(|=)|\\(?:thinspace|medspace|thickspace|quad|qquad|negthinspace|negmedspace"
    r"|negthickspace|left(?!\|)|right(?!\|)|vrule|vcenter|vbox|vskip|vspace|hfil)(?![A-Za-z])"
)
TOKEN = re.compile(
    rf"(?P<skip>{SKIPPED})|(?P<differential>d[ \t\r\n]*(?:[A-Za-z]|\\[A-Za-z]+))|(?P<letter>[A-Za-z])|(?P<digit>[0-9])"
    r"|(?P<bars>\\(?:left|right)\|)|(?P<equal>&[ \t\r\n]*=|=(?:[ \t\r\n]*&)?)|(?P<command>\\[A-Za-z]+)|(?P<quotes>'+)"
    r"|(?P<mark>\\[{}]|[-+*/(){}\[\]|_^:<>!.,])"
)
Read = TypeVar("Read")


class Unlexable(Unparseable):
    """A character that sympy's lexer does not know."""


class Scanner:
    """antlr looks ahead before it goes on: where what follows an operator or a bracket cannot be read, the expression
    ends before it ('5+\\\\sqrt2' is 5), unless an unknown character is met, which is an error wherever it stands."""

    def __init__(self, text: str):
        self.text, self.end = text, 0
        self.tokens: list[tuple[str, str]] = []
        self.at = self.depth = self.bars = 0
        self.dead: set[tuple[int, bool]] = set()  # where a factor could not be read: never tried twice

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        """The (kind, value) of the next token, or of the one `ahead` of it; ('end', '') after the last."""
        while len(self.tokens) <= self.at + ahead:
            self.tokens.append(self.scan())
        return self.tokens[self.at + ahead]

    def scan(self) -> tuple[str, str]:
        """The token at `end`, from where the text has not been read. Raises Unlexable."""
        while self.end < len(self.text):
            match = TOKEN.match(self.text, self.end)
            if match is None or len(self.tokens) > MAX_TOKENS:
                raise Unlexable(f"at {self.end}")
            self.end = match.end()
            kind = str(match.lastgroup)
            if kind != "skip":
                return (kind, "equal") if kind == "equal" else (kind, match[0])
        return ("end", "")

    def next(self) -> tuple[str, str]:
        """The next token, consumed."""
        token = self.peek()
        self.at += 1
        return token

    def take(self, *values: str) -> str:
        """The next token's value if it is one of `values` and no letter, consumed; else ''."""
        kind, value = self.peek()
        if kind != "letter" and value in values:
            self.at += 1
            return value
        return ""

    def expect(self, value: str) -> None:
        """Consume the next token, which must be `value`. Raises Unparseable."""
        if not self.take(value):
            raise Unparseable(f"expected {value}")

    def attempt(self, read: Callable[[], Read], start: int | None = None) -> Read | None:
        """What `read` reads, or None with the place (`start`, before the operator) restored where it cannot."""
        start = self.at if start is None else start
        depth, bars, key = self.depth, self.bars, (start, self.bars > 0)
        try:
            if key not in self.dead:
                return read()
        except Unlexable:
            raise
        except Unparseable:
            self.dead.add(key)
        self.at, self.depth, self.bars = start, depth, bars
        return None

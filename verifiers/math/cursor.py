"""A place in a list of tokens: what the parser's rules look at, take and expect."""

from verifiers.math.tokens import Unparseable

MAX_DEPTH = 30
END = ("end", "")


class Cursor:
    """The tokens, where the reading stands in them, and how deep it is nested in brackets (`depth`) and bars."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens = tokens
        self.at = self.depth = self.bars = 0

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        """The (kind, value) of the next token, or of the one `ahead` of it; ('end', '') after the last."""
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else END

    def mark(self) -> str:
        """The next token if it is a mark like '+', else ''."""
        kind, value = self.tokens[self.at] if self.at < len(self.tokens) else END
        return value if kind == "mark" else ""

    def take(self, *marks: str) -> str:
        """The next mark if it is one of `marks`, consumed; else ''."""
        kind, value = self.tokens[self.at] if self.at < len(self.tokens) else END
        if kind == "mark" and value in marks:
            self.at += 1
            return value
        return ""

    def expect(self, *marks: str) -> str:
        """The next mark, consumed, which must be one of `marks`. Raises Unparseable."""
        if found := self.take(*marks):
            return found
        raise Unparseable(f"expected {' or '.join(marks)}, found {self.peek()[1]!r}")

    def deeper(self) -> None:
        """Count one level for a chain of signs ('- - - x'), which no bracket counts."""
        self.depth += 1
        if self.depth > 4 * MAX_DEPTH:
            raise Unparseable("too many signs")

    def nest(self) -> None:
        """Count one level of nesting."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparseable("nested too deep")

    def raw_group(self, skip: int = 0) -> list[str]:
        """The spelling of a subscript, `skip` tokens on: the tokens of {...}, or one token."""
        self.at += skip
        if not self.take("{"):
            self.at += 1
            return [self.peek(-1)[1]]
        start, depth = self.at, 1
        while depth:
            if self.peek()[0] == "end":
                raise Unparseable("a brace is not closed")
            depth += (self.mark() == "{") - (self.mark() == "}")
            self.at += 1
        return [value for _, value in self.tokens[start : self.at - 1]]

    def raw_text(self) -> str:
        """The texts that follow one another as one text, consumed: 'no' 'solution' is 'no solution'."""
        words = []
        while self.peek()[0] == "text":
            words.append(self.peek()[1])
            self.at += 1
        return " ".join(words)

    def raw_unit(self) -> str:
        """A unit with its exponents and divisors as it is spelled, consumed: 'cm ^ 2', 'km / h'."""
        words: list[str] = []
        while self.peek()[0] == "text" or (words and self._continues_unit()):
            words.append(self.peek()[1] if self.mark() != "*" else "")  # m \cdot s
            self.at += 1
            if words[-1] == "^":
                words.append("".join(self.raw_group()))
        return " ".join(words)

    def _continues_unit(self) -> bool:
        mark, following = self.mark(), self.peek(1)[0]
        return (mark in ("^", "/") and following in ("number", "text", "mark")) or (mark == "*" and following == "text")

"""The rows of a file that is one JSON list, one at a time and in bounded memory: such files have any length.

A row that is JSON and no row that can be used (a key that stands twice, NaN) is a BadRow at its index, as it is in a
file of lines. Where the JSON itself is broken no one knows where the next row begins: the file is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from engine.data.rows import BadRow, kind

STEP, LONG_STEP = 2**18, 2**20  # bytes that are read at a time; where a row is longer, as many as there are of it
SPACE, NUMBER = re.compile(r"[ \t\n\r]*"), re.compile(r"[-+.eE0-9]*")


class Broken(Exception):
    """What is wrong with the file's JSON, and where."""


class _Window:
    """A text of which the part at hand is `text[at:]`; what is behind it has not been read."""

    def __init__(self, f: BufferedIOBase) -> None:
        self.f, self.decoder = f, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line = "", 0, 1

    def more(self) -> bool:
        """False at the file's end."""
        data = self.f.read(min(LONG_STEP, max(STEP, len(self.text) - self.at)))
        self.line += self.text.count("\n", 0, self.at)
        try:
            added = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise Broken(f"expected UTF-8, got byte {error.object[error.start]:#04x}") from None
        self.text, self.at = self.text[self.at :] + added, 0
        return bool(data)

    def next(self) -> str:
        """The next character that is no white space, '' at the file's end; it is not passed."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def line_of(self, position: int) -> int:
        return self.line + self.text.count("\n", 0, position)


class _Strict:
    """Python's decoder, with what `rows.parse_json` refuses noted in `problems` instead of raised: the row's end is
    wanted as well.
    """

    def __init__(self) -> None:
        self.problems: list[BadRow] = []
        self.decode = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        ).raw_decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            self.problems.append(BadRow(f"{key}: expected once in an object, got twice"))
        return found

    def _constant(self, name: str) -> None:
        self.problems.append(BadRow(f"expected JSON, got {name}"))

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError as error:
            self.problems.append(BadRow(f"expected JSON ({str(error)[:120]})"))
            return 0


def rows_of_list(f: BufferedIOBase, longest: int) -> Iterator[tuple[int, Any]]:
    """(index, row) of a list, a BadRow where there is none; also for one of more than `longest` characters. Raises
    Broken.
    """
    window, strict = _Window(f), _Strict()
    if window.next() != "[":
        found = _value(window, strict, longest)[0]
        raise Broken(f"expected a list of rows, got {kind(found)}")
    window.at += 1
    number = 0
    while number or window.next() != "]":
        if not window.next():
            raise Broken(f"expected JSON (the list does not end: line {window.line_of(window.at)})")
        found, length = _value(window, strict, longest)
        yield number, BadRow(f"longer than {longest:,} bytes") if length > longest else found
        number += 1
        if (then := window.next()) == "]":
            break
        if then != ",":
            raise Broken(f"expected JSON (Expecting ',' or ']' behind a row: line {window.line_of(window.at)})")
        window.at += 1
    window.at += 1
    if window.next():
        raise Broken(f"expected JSON (Extra data behind the list: line {window.line_of(window.at)})")


def _value(window: _Window, strict: _Strict, longest: int) -> tuple[Any, int]:
    """(the value that begins at hand, or a BadRow, its length), passed. Raises Broken."""
    window.next()
    while True:
        strict.problems.clear()
        try:
            found, end = strict.decode(window.text, window.at)
        except json.JSONDecodeError as error:
            if len(window.text) - window.at > longest:
                raise Broken(f"longer than {longest:,} bytes, and where the next row begins is not known") from None
            if window.more():
                continue
            raise Broken(f"expected JSON ({error.msg}: line {window.line_of(error.pos)})") from None
        except RecursionError as error:
            raise Broken(f"expected JSON ({error})") from None
        if NUMBER.match(window.text, end).end() == len(window.text) and window.more():  # type: ignore[union-attr]
            continue  # it may go on
        length, window.at = end - window.at, end
        return (strict.problems[0] if strict.problems else found), length

"""Secrets are not for reading: whatever a run prints or writes of itself goes through `redact`.

Known are the values of environment variables that are named as secrets are, passwords in addresses, and the forms in
which tokens are given out. Every command begins with `guard`: from then on all that the process prints goes through
here, whoever prints it, a library's warning and the traceback of an error that nobody expected too. What a dataset's
rows or a model say is written as it is, to files that are meant for it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, cast
from urllib.parse import quote

from engine.errors import UserError, on_one_line

MARK = "***"
SHORTEST = 8  # characters of a value that is taken for a secret
PIECE = 12  # characters of one's beginning or end, which a message that is cut short may show
NAMES = re.compile(r"(?:(?:^|_)(?:KEY|CREDENTIALS?)|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.IGNORECASE)
FORMS = (  # (what a text without such a secret rarely has, the secret, what is shown); each linear in the text
    (("://",), re.compile(r"(?<=://)[^/\s@'\"]{1,256}@"), f"{MARK}@"),
    (("Bearer ", "Basic "), re.compile(r"\b((?:Bearer|Basic) )[\w.~+/=-]{8,}"), rf"\1{MARK}"),
    (
        ("?", "&"),
        re.compile(r"([?&][\w-]{0,30}(?:token|key|secret|password|signature)=)[^&\s'\"]+", re.IGNORECASE),
        rf"\1{MARK}",
    ),
    (
        ("hf_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "sk-", "AKIA"),
        re.compile(r"(?<![A-Za-z0-9])(?:hf_|gh[pousr]_|sk-|AKIA)[A-Za-z0-9_-]{16,}"),
        MARK,
    ),
)
_hidden: set[str] = set()


def guard() -> None:
    """Hides the secrets of this process's environment in all that it prints from now on."""
    hide(os.environ)
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, s if isinstance(s, Discreet) else Discreet(s)) for s in (out, err))
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream in (out, err):  # made as it was imported
                handler.setStream(sys.stdout if handler.stream is out else sys.stderr)


class Discreet:
    """A stream on which no secret is written, and in all else the one behind it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream's; the number is the text's, also where less was written."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As a stream's."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide(environment: Mapping[str, str]) -> None:
    """The values of these variables that are secrets by their names are never shown from now on."""
    values = [value for name, value in environment.items() if NAMES.search(name) and _may_be_secret(value)]
    _hidden.update(shown for value in values for shown in _as_shown(value.strip()))


def _may_be_secret(value: str) -> bool:
    value = value.strip()
    return len(value) >= SHORTEST and not value.startswith(("/", "~", "."))


def _as_shown(value: str) -> Iterator[str]:
    """The value, and what becomes of it on one line, between quotes, and in an address."""
    yield from (value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe=""))
    yield from (on_one_line(value), " ".join(value.split()))


def redact(text: str) -> str:
    """The text with a mark in the place of every secret, and of what is left of one where the text was cut."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, MARK)
    for value in _hidden:
        text = _without_pieces(text, value)
    for signs, form, shown in FORMS:
        if any(sign in text for sign in signs):
            text = form.sub(shown, text)
    return text


def _without_pieces(text: str, value: str) -> str:
    """Without the beginnings and the ends of the value that are at least PIECE characters long."""
    if len(value) <= PIECE:
        return text
    while (at := text.find(value[:PIECE])) >= 0:
        end = at + _alike(text[at:], value)
        text = text[:at] + MARK + text[end:]
    while (end := text.find(value[-PIECE:]) + PIECE) >= PIECE:
        at = end - _alike(reversed(text[:end]), reversed(value))
        text = text[:at] + MARK + text[end:]
    return text


def _alike(a: Iterable[str], b: Iterable[str]) -> int:
    """How many characters the two begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False)))


def redacted(x: Any) -> Any:
    """What JSON or YAML is made of, its texts redacted before they are escaped. A number is no secret, also one that
    has the digits of a password: it stays a number.
    """
    if isinstance(x, str):
        return redact(x)
    if isinstance(x, Mapping):
        return {redacted(name): redacted(value) for name, value in x.items()}
    return [redacted(value) for value in x] if isinstance(x, list | tuple) else x


def check_flags(values: Mapping[str, object]) -> None:
    """Raises UserError for a flag with a secret in it: flags are kept in config.yaml and shown by every `ps`."""
    for name, value in values.items():
        words: Iterable = value if isinstance(value, tuple) else (value,)
        if any(isinstance(word, str) and redact(word) != word for word in words):
            raise UserError(
                f"--{name} holds a secret, which config.yaml would keep: log in by `hf auth login`, or give it in the"
                " environment"
            )

"""Secrets are not for reading: whatever a run prints or writes of itself goes through `redact`.

Known are the values of environment variables that are named as secrets are (the process that starts tells them, by
`hide`), passwords in addresses, and the forms in which tokens are given out. What a dataset's rows or a model say is
written as it is, to files that are meant for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import UserError

MARK = "***"
SHORTEST = 8  # characters of a value that is taken for a secret
NAMES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$")
FORMS = (  # each linear in the text
    (re.compile(r"(?<=://)[^/\s@'\"]{1,256}@"), f"{MARK}@"),
    (re.compile(r"\b((?:Bearer|Basic) )[\w.~+/=-]{8,}"), rf"\1{MARK}"),
    (re.compile(r"([?&][\w-]{0,30}(?:token|key|secret|password|signature)=)[^&\s'\"]+", re.IGNORECASE), rf"\1{MARK}"),
    (re.compile(r"(?<![A-Za-z0-9])(?:hf_|gh[pousr]_|sk-|AKIA)[A-Za-z0-9_-]{16,}"), MARK),
)
_hidden: set[str] = set()


def hide(environment: Mapping[str, str]) -> None:
    """The values of these variables that are secrets by their names are never shown from now on."""
    _hidden.update(value for name, value in environment.items() if NAMES.search(name) and _may_be_secret(value))


def _may_be_secret(value: str) -> bool:
    return len(value) >= SHORTEST and not value.startswith(("/", "~", ".")) and not value.isspace()


def redact(text: str) -> str:
    """The text with a mark in the place of every secret."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, MARK)
    for form, shown in FORMS:
        text = form.sub(shown, text)
    return text


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

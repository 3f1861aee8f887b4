"""What one row may be: strict JSON, and the fields that every form of rows reads.

A row that cannot be used raises BadRow with the field and what was expected; the reader adds file and line. Nothing is
coerced: a missing key, a number where text belongs, NaN, a duplicate key or invalid UTF-8 is a bad row, not a guess.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from engine.errors import nearest

ROLES = ("system", "user", "assistant", "tool")


class BadRow(Exception):
    """One row's defect, `field: expected ..., got ...`, on one line whatever the row holds."""

    def __init__(self, message: str) -> None:
        line = message[:400]
        if not line.isprintable():
            line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        super().__init__(line)


def parse_json(text: str | bytes) -> Any:
    """Strict JSON: no duplicate keys, no NaN or Infinity, valid UTF-8. Raises BadRow."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        row = dict(pairs)
        if len(row) != len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise BadRow(f"{key}: expected once in an object, got twice")
        return row

    def refuse(constant: str) -> None:
        raise BadRow(f"expected JSON, got {constant}")

    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=unique, parse_constant=refuse
        )
    except UnicodeDecodeError as error:
        raise BadRow(f"expected UTF-8, got byte {error.object[error.start]:#04x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"expected JSON ({str(error)[:120]})") from None


# --- fields -----------------------------------------------------------------------------------------------------------


def kind(value: Any) -> str:
    """What a JSON value is, in a message."""
    kinds = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)


def text(row: dict, field: str) -> str:
    """row[field], which must be text. Raises BadRow."""
    if field not in row:
        raise BadRow(f"{field}: expected text, got nothing{nearest(field, row)}")
    if not isinstance(row[field], str):
        raise BadRow(f"{field}: expected text, got {kind(row[field])}")
    return checked_text(row[field], field)


def checked_text(value: str, field: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{field}: expected text, got a lone surrogate in it") from None
    return value


def messages(value: Any, field: str) -> list[dict[str, str]]:
    """A conversation: a non-empty list of {role, content}, reduced to these two keys. Raises BadRow."""
    if not isinstance(value, list):
        raise BadRow(f"{field}: expected a list of messages, got {kind(value)}")
    if not value:
        raise BadRow(f"{field}: expected a list of messages, got an empty one")
    clean = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow(f"{field}[{i}]: expected an object with role and content, got {kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = kind(message[key]) if key in message else f"nothing{nearest(key, message)}"
                raise BadRow(f"{field}[{i}].{key}: expected text, got {got}")
        if message["role"] not in ROLES:
            raise BadRow(
                f"{field}[{i}].role: expected one of {', '.join(ROLES)}, got"
                f" {message['role'][:40]!r}{nearest(message['role'], ROLES)}"
            )
        clean.append({"role": message["role"], "content": checked_text(message["content"], f"{field}[{i}].content")})
    return clean

"""A tokenizer as the flags change it: control tokens added, and a chat template in place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from engine.errors import UserError, nearest

TULU = "tulu"  # of --chat_template, instead of a file


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(tokens that were not there with their new ids, tokens that were there with the ids that they keep), as
    --add_special_tokens asks.

    All of them are control tokens afterwards, also one that was an ordinary entry of the vocabulary. New ids follow the
    largest one in the order given. Raises UserError.
    """
    for i, token in enumerate(tokens):
        if not token.strip():
            raise UserError(f"--add_special_tokens: {token!r} is no token, it has no visible character")
        if token in tokens[:i]:
            raise UserError(f"--add_special_tokens: {token!r} is given twice")
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
    there = {token: i for token, i in ids.items() if token in vocabulary}
    return {token: i for token, i in ids.items() if token not in there}, there


def read_template(name: str) -> str:
    """The text of the file that --chat_template names. Raises UserError."""
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        siblings = [str(p) for p in path.parent.iterdir()] if not path.is_file() and path.parent.is_dir() else []
        why = "not UTF-8" if isinstance(error, ValueError) else "not readable" if path.exists() else "no such file"
        raise UserError(
            f"--chat_template {name}: {why}; expected a Jinja file, or {TULU}{nearest(name, [*siblings, TULU])}"
        ) from None
    if not text.strip():
        raise UserError(f"--chat_template {name}: the file is empty")
    return text

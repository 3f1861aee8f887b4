"""A page of examples with their masks: one file, without a network, for a browser.

What rows say is hostile: it is escaped by the template engine, and the page's policy lets nothing run or load but its
own style and script, which are named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from engine.data import ChatTokenizer
from engine.redact import redact, redacted

SHOWN_TOKENS = 3000  # of a sequence
LONGEST_PIECE = 16  # tokens that together make a character, at most
ROOM = Path(__file__).parent


@dataclass(frozen=True)
class Piece:
    """A token, or the tokens that together make a character."""

    text: str
    ids: str
    trained: bool
    control: bool
    cut: bool


@dataclass(frozen=True)
class Sequence_:
    """One sequence of an example: its name (chosen, rejected), pieces in runs of what they are, and how it is cut."""

    name: str
    runs: list[tuple[str, list[Piece]]]
    tokens: int
    trained: int
    hidden: int


@dataclass(frozen=True)
class Example:
    """What the page shows of a row."""

    place: str
    why: str
    label: str
    sequences: list[Sequence_]
    facts: list[tuple[str, str]]


def pieces(chat: ChatTokenizer, ids: np.ndarray, mask: np.ndarray, limit: int) -> Iterator[Piece]:
    """The text of every token; where several make one character, of them together."""
    decode = lambda some: chat.tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before, start = 0, 0  # where the last piece begins: some vocabularies read a token by the one before it
    while start < len(ids):
        end, known = start + 1, decode(ids[before:start])
        text = decode(ids[before:end])
        while "\ufffd" in text and end < min(len(ids), start + LONGEST_PIECE):
            end += 1
            text = decode(ids[before:end])
        shown = text[len(known) :] if text.startswith(known) else decode(ids[start:end])
        control = chat.control.fullmatch(shown.strip()) is not None
        yield Piece(shown, " ".join(map(str, ids[start:end])), bool(mask[start]), control, start >= limit)
        before, start = start, end


def sequence(chat: ChatTokenizer, name: str, ids: np.ndarray, mask: np.ndarray, limit: int) -> Sequence_:
    """A sequence as the page shows it: at most 3000 tokens of it."""
    shown = pieces(chat, ids[:SHOWN_TOKENS], mask[:SHOWN_TOKENS], limit)
    kind = lambda piece: "cut" if piece.cut else "trained" if piece.trained else "context"
    runs = [(name_of, list(run)) for name_of, run in groupby(shown, kind)]
    return Sequence_(name, runs, len(ids), int(mask.sum()), max(0, len(ids) - SHOWN_TOKENS))


def bracketed(chat: ChatTokenizer, ids: np.ndarray, mask: np.ndarray) -> str:
    """The text with its trained spans in double brackets, without what could move a terminal's cursor."""
    edges = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(ids)]
    said = ""
    for a, b in pairwise(edges):
        text = chat.tokenizer.decode(ids[a:b], skip_special_tokens=False)
        said += f"[[{text}]]" if b > a and mask[a] else text
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in said)


def render(title: str, summary: Sequence[str], examples: Sequence[Example], bad: Sequence[tuple[str, str]]) -> str:
    """The page; `bad` are (place, why) of rows that could not be read."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, script = ((ROOM / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    values: dict[str, Any] = {
        "title": redact(title),
        "summary": redacted(summary),
        "examples": examples,  # as they are: the page is for them
        "bad": redacted(bad),
        "labels": list(dict.fromkeys(example.label for example in examples)),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
    }
    return template.from_string((ROOM / "page.html").read_text(encoding="utf-8")).render(values)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

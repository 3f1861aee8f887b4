"""A model directory's tokenizer: opened, and asked what it does. Its files may come from anybody."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from engine.data.rows import BadRow
from engine.disk import disguised_in
from engine.errors import UserError

MARK_OF_THOUGHT = re.compile(r"[<\[]/?[\w:]{0,20}(?:think|thought|reason)[\w:]{0,20}[>\]]", re.IGNORECASE)
MAX_BYTES = 2**28  # of a tokenizer.json: the largest have an eighth of it
MAX_GROWTH = 64  # characters that replacements may make of one


def tokenised(tokenizer: Any, text: Any, **options: Any) -> Any:
    """What the tokenizer makes of a text or of several. Raises BadRow where it fails: its library bounds what a regular
    expression may try, and then ends in a panic.
    """
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which is no Exception
            raise
        raise BadRow(f"the tokenizer fails on it ({' '.join(str(error).split())[:120]})") from None


def template_of(tokenizer: Any, tools: list | None, where: str) -> str:
    """The chat template that it has for this. Raises UserError."""
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # several, and none by default
        raise UserError(f"{where}: no usable chat template ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(template, str):
        raise UserError(f"{where}: the chat template: expected text, got {str(template)[:40]}")
    return template


def check_growth(path: Path) -> None:
    """Raises UserError for a tokenizer whose replacements make a text of a few words one that fills the memory."""
    if not path.is_file():
        return
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes, no tokenizer")
    content = path.read_bytes()
    if b'"Replace"' not in content and b'"Prepend"' not in content:
        return
    try:
        described = json.loads(content)
        parts = [described.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    except (ValueError, AttributeError, RecursionError):
        return  # the library says what is wrong with it
    for part in parts:
        growth, todo = 1.0, [part]
        while todo:
            step = todo.pop()
            if isinstance(step, dict):
                growth *= _growth(step)
                todo += step.values()
            elif isinstance(step, list):
                todo += step
        if growth > MAX_GROWTH:
            raise UserError(f"{path}: its replacements make {growth:,.0f} characters of one, more than {MAX_GROWTH}")


def _growth(step: dict) -> float:
    """How much longer a text can be after this step."""
    if step.get("type") == "Prepend":
        return 1.0 if len(str(step.get("prepend", ""))) < 16 else float(MAX_GROWTH + 1)
    if step.get("type") != "Replace":
        return 1.0
    pattern = step.get("pattern")
    replaced = len(str(pattern["String"])) if isinstance(pattern, dict) and pattern.get("String") else 1
    return max(1.0, len(str(step.get("content", ""))) / replaced)


def opened(directory: Path) -> Any:
    """The library's tokenizer of a model directory. Raises UserError."""
    check_growth(directory / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the library and its Rust core raise whatever they do: the user reads one line
        why = disguised_in(directory) or "no usable tokenizer"
        if not any(directory.glob("tokenizer*")):
            why += ", no tokenizer.json: copy the tokenizer's files from the model that it was made from"
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{directory}: {why} ({said})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: needs a fast tokenizer (tokenizer.json)")
    return tokenizer


def control_of(tokenizer: Any) -> re.Pattern:
    """Matches a control token. The marks of a thought are none: rows have them in their contents, and templates read
    them there.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = {token for token in special | {tokenizer.eos_token} if token and not MARK_OF_THOUGHT.fullmatch(token)}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


def declared_ends(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """The end ids of the model's generation_config.json, at each of which the library's `generate` stops."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a generation config ({str(error)[:120]})") from None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise UserError(f"{path}: eos_token_id: expected a token id or a list of them, got {str(ends)[:80]}")
    return tuple(end for end in ends if 0 <= end < vocab_size)


def splits_faithfully(tokenizer: Any, end_of_turn: str, directory: Path) -> bool:
    """False for vocabularies that put a space before the first word of whatever they are given, or let a control token
    eat what follows.
    """
    try:
        return _splits_faithfully(tokenizer, end_of_turn)
    except BadRow as why:
        raise UserError(f"{directory}: {why}") from None


def _splits_faithfully(tokenizer: Any, end_of_turn: str) -> bool:
    pieces = ["a word", "another\n", end_of_turn, "\n and", " more"]
    ids = [i for piece in pieces for i in tokenised(tokenizer, piece, add_special_tokens=False)["input_ids"]]
    whole = tokenised(tokenizer, end_of_turn + "\n and", add_special_tokens=False)["input_ids"]
    apart = tokenised(tokenizer, "\n and", add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return decoded == "".join(pieces) and whole[-len(apart) :] == apart

"""Rows of a dataset, from a hub id, a directory, .jsonl, .json or .parquet, each with the place it stands at.

A row that cannot be used raises BadRow with the field and what was expected; the reader adds file and line. Nothing is
coerced: a missing key, a number where text belongs, NaN, a duplicate key or invalid UTF-8 is a bad row, not a guess.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError, nearest

SUFFIXES = (".jsonl", ".json", ".parquet")
ROLES = ("system", "user", "assistant", "tool")
MAX_ROW_BYTES = 64 * 2**20


class BadRow(Exception):
    """One row's defect: `field: expected ..., got ...`."""


@dataclass(frozen=True)
class Source:
    """Rows of one dataset. `fingerprint` changes whenever the rows do; `rows()` yields (place, row or BadRow)."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, dict | BadRow]]]


def open_source(name: str, split: str, revision: str | None) -> Source:
    """Raises UserError if nothing is there or it cannot be read as a dataset."""
    path = Path(name).expanduser()
    if path.is_file():
        return _from_files(name, [path])
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.name not in ("dataset_info.json", "state.json"))
        if files:
            return _from_files(name, files)
        return _from_library(name, split, revision, local=True)
    if path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") != 1:
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: no such file or directory{nearest(name, siblings)}")
    return _from_library(name, split, revision, local=False)


def _from_files(name: str, files: list[Path]) -> Source:
    digest = hashlib.sha256()
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError(f"{file}: expected a file ending in {', '.join(SUFFIXES)}")
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    return Source(name, digest.hexdigest(), lambda: (row for file in files for row in readers[file.suffix](file)))


def _from_library(name: str, split: str, revision: str | None, local: bool) -> Source:
    import datasets

    try:
        if local and (Path(name) / "state.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises whatever its back ends do: the user reads one line
        raise UserError(f"{name}: cannot be loaded as a dataset ({type(error).__name__}: {' '.join(str(error).split())[:160]})") from None
    return Source(name, data._fingerprint, lambda: ((f"{name}[{split}]:{i}", row) for i, row in enumerate(data)))


def parse_json(text: str | bytes) -> Any:
    """Strict JSON: no duplicate keys, no NaN or Infinity, valid UTF-8. Raises BadRow."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [key for key, _ in pairs]
            raise BadRow(f"{next(k for k in keys if keys.count(k) > 1)}: stands twice in one object")
        return row

    def refuse(constant: str) -> None:
        raise BadRow(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON ({str(error)[:120]})") from None


def _jsonl(file: Path) -> Iterator[tuple[str, dict | BadRow]]:
    with open(file, "rb") as f:
        number = 0
        while line := f.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                yield f"{file}:{number}", BadRow(f"longer than {MAX_ROW_BYTES >> 20} MiB")
                while line and not line.endswith(b"\n"):
                    line = f.readline(MAX_ROW_BYTES)
                continue
            if not line.strip():
                continue
            try:
                row = parse_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                yield f"{file}:{number}", row if isinstance(row, dict) else BadRow(f"expected an object, got {type(row).__name__}")
            except BadRow as bad:
                yield f"{file}:{number}", bad


def _json(file: Path) -> Iterator[tuple[str, dict | BadRow]]:
    try:
        rows = parse_json(file.read_bytes())
    except BadRow as bad:
        raise UserError(f"{file}: {bad}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of rows, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        yield f"{file}:[{i}]", row if isinstance(row, dict) else BadRow(f"expected an object, got {type(row).__name__}")


def _parquet(file: Path) -> Iterator[tuple[str, dict | BadRow]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(file).iter_batches(batch_size=1024)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{file}:row {number}", row
                number += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a readable parquet file ({str(error)[:160]})") from None


# --- fields -------------------------------------------------------------------------------------------------------------------


def text(row: dict, field: str) -> str:
    """row[field], which must be text. Raises BadRow."""
    if field not in row:
        raise BadRow(f"{field}: missing{nearest(field, row)}")
    if not isinstance(row[field], str):
        raise BadRow(f"{field}: expected text, got {type(row[field]).__name__}")
    return checked_text(row[field], field)


def checked_text(value: str, field: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{field}: holds a lone surrogate, which is not text") from None
    return value


def messages(value: Any, field: str) -> list[dict[str, str]]:
    """A conversation: a non-empty list of {role, content}, reduced to these two keys. Raises BadRow."""
    if not isinstance(value, list):
        raise BadRow(f"{field}: expected a list of messages, got {type(value).__name__}")
    if not value:
        raise BadRow(f"{field}: empty")
    clean = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow(f"{field}[{i}]: expected an object with role and content, got {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = type(message[key]).__name__ if key in message else "nothing"
                raise BadRow(f"{field}[{i}].{key}: expected text, got {got}")
        if message["role"] not in ROLES:
            raise BadRow(f"{field}[{i}].role: {message['role'][:40]!r} is not one of {', '.join(ROLES)}{nearest(message['role'], ROLES)}")
        clean.append({"role": message["role"], "content": checked_text(message["content"], f"{field}[{i}].content")})
    return clean

"""Rows of a dataset, from a hub id, a directory, .jsonl, .json or .parquet, each with the place it stands at.

A row that cannot be used is a BadRow; the reader adds file and line.

A place is what stands behind the dataset's name: `:8` is line 8 of a file, `/part.jsonl:8` line 8 of a directory's
file, `[train]:8` row 8 of a split. Rows of .json and .parquet are counted from 0 like those of a split, lines from 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.rows import BadRow, kind, parse_json
from engine.errors import UserError, nearest, require

SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_ROW_BYTES = 64 * 2**20
SPLITS = "train|training|test|testing|validation|valid|val|dev|eval|evaluation"
LIBRARY_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Source:
    """Rows of one dataset. `fingerprint` changes whenever the rows do; `rows()` yields (place, row or BadRow)."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, dict | BadRow]]]


def open_source(name: str, split: str, revision: str | None) -> Source:
    """Raises UserError if nothing is there or it cannot be read as a dataset."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return _from_files(path, {path: ""})
        if path.is_dir():
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                return _from_library(name, split, revision, saved=True)
            if files := _of_split(path, split):
                return _from_files(path, {file: f"/{file.relative_to(path)}" for file in files})
        elif path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") != 1:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{name}: no such file or directory{nearest(path.name, siblings)}")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    return _from_library(name, split, revision, saved=False)


def _of_split(directory: Path, split: str) -> list[Path]:
    """The data files below a directory that are named after the split; if none is, those that are named after no split.

    So train-00000.parquet and test-00000.parquet side by side are not one dataset. Raises UserError if only other
    splits are there.
    """
    places = {
        p: str(p.relative_to(directory))
        for p in sorted(directory.rglob("*"))
        if p.suffix in SUFFIXES and p.name not in LIBRARY_FILES
    }
    places = {p: place for p, place in places.items() if not re.search(r"(^|/)\.", place)}
    named = [p for p, place in places.items() if _names(re.escape(split), place)]
    unnamed = [p for p, place in places.items() if not _names(SPLITS, place)]
    if places and not named and not unnamed:
        raise UserError(f"{directory}: no file of the split {split} among {', '.join([*places.values()][:4])}")
    return named or unnamed


def _names(words: str, path: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9])({words})(?![A-Za-z0-9])", path) is not None


def _from_files(path: Path, places: dict[Path, str]) -> Source:
    """`places`: every file with what stands before its line numbers."""
    digest = hashlib.sha256()
    for file in places:
        if file.suffix not in SUFFIXES:
            raise UserError(f"{file}: expected a file ending in {', '.join(SUFFIXES)}")
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest() + file.suffix.encode())
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}

    def rows() -> Iterator[tuple[str, dict | BadRow]]:
        for file, place in places.items():
            for number, row in readers[file.suffix](file):
                good = isinstance(row, (dict, BadRow))
                yield f"{place}:{number}", row if good else BadRow(f"expected an object, got {kind(row)}")

    return Source(str(path), digest.hexdigest(), rows)


def _from_library(name: str, split: str, revision: str | None, saved: bool) -> Source:
    require("datasets", f"{name}: a dataset of the hub, or one that was saved to disk,")
    import datasets

    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split, revision=revision)
        if isinstance(data, dict):
            data = data[split]
        fingerprint = data._fingerprint
    except Exception as error:  # the library raises whatever its back ends do: the user reads one line
        what = (
            "cannot be loaded as a dataset"
            if Path(name).is_dir()
            else "is no local file or directory, and cannot be loaded from the hub"
        )
        raise UserError(f"{name}: {what} ({type(error).__name__}: {' '.join(str(error).split())[:160]})") from None
    return Source(name, fingerprint, lambda: ((f"[{split}]:{i}", row) for i, row in enumerate(data)))


Numbered = Iterator[tuple[int, Any]]  # rows of one file; a BadRow where there is none


def _jsonl(file: Path) -> Numbered:
    with open(file, "rb") as f:
        number = 0
        while line := f.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_ROW_BYTES:
                yield number, BadRow(f"longer than {MAX_ROW_BYTES:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = f.readline(MAX_ROW_BYTES)
            elif line.strip():
                try:
                    yield number, parse_json(line)
                except BadRow as bad:
                    yield number, bad


def _json(file: Path) -> Numbered:
    """A list of rows, or lines of objects under the wrong name, as some tools write them."""
    with open(file, "rb") as f:
        if f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
            yield from _jsonl(file)
            return
    try:
        rows = parse_json(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except BadRow as bad:
        raise UserError(f"{file}: {bad}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of rows, got {kind(rows)}")
    yield from enumerate(rows)


def _parquet(file: Path) -> Numbered:
    require("pyarrow", f"{file}: a parquet file")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(file).iter_batches(batch_size=1024):
            for i in range(batch.num_rows):
                try:
                    yield number, batch.slice(i, 1).to_pylist()[0]
                except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time beyond the calendar
                    yield number, BadRow(f"not readable ({str(error)[:120]})")
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({' '.join(str(error).split())[:160]})") from None

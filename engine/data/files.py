"""Rows of a dataset, each with the place it stands at, from

- a file: .jsonl, .json, .csv, .tsv, .parquet, .arrow; the text ones also as .gz and .zst (engine/data/readers.py);
- a directory: its data files of the split; or one that `save_to_disk` of datasets wrote;
- a pattern: 'data/*.jsonl', 'data/**/train-*.parquet';
- the hub: OWNER/NAME, or OWNER/NAME:CONFIG.

A row that cannot be used is a BadRow; the reader adds file and line.

A place is what stands behind the dataset's name: `:8` is line 8 of a file, `/part.jsonl:8` line 8 of a directory's
file, `[train]:8` row 8 of a split. Rows of .json lists, .parquet and .arrow are counted from 0 like those of a split,
lines from 1; a row of .csv or .tsv stands where it begins.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.data.inside import check_inside
from engine.data.readers import check_name, is_data, read_file, suffixes
from engine.data.rows import BadRow, kind
from engine.errors import UserError, nearest, require

SPLITS = "train|training|test|testing|validation|valid|val|dev|eval|evaluation"
LIBRARY_FILES = r"dataset_info\.json|dataset_infos\.json|dataset_dict\.json|state\.json|cache-.*\.arrow"
HUB_PATIENCE = 10  # seconds for the hub's first answer
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")  # as names of directories


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
            return _from_files(path, [path])
        if path.is_dir():
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                return _from_library(str(path), None, split, revision, saved=True)
            if files := _of_split(path, _data_files(path), split):
                return _from_files(path, files)
            return _from_library(str(path), None, split, revision, saved=False)
        root, rest = _existing(path)
        if re.search(r"[*?[]", rest):
            return _from_files(root, _matching(name, root, rest, split))
        hub, colon, config = name.partition(":")
        local = hub.startswith((".", "/", "~")) or is_data(path) or is_data(Path(hub)) or Path(hub).exists()
        if local or hub.count("/") != 1 or (colon and not config):
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{name}: no such file or directory{nearest(path.name, siblings)}")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    return _from_library(hub, config or None, split, revision, saved=False)


# --- which files ------------------------------------------------------------------------------------------------------


def _data_files(directory: Path) -> list[Path]:
    """The data files below a directory, but for what is hidden and what the library keeps for itself."""
    found = [p for p in sorted(directory.rglob("*")) if _holds_rows(p) and p.is_file()]
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(directory).parts)]


def _holds_rows(path: Path) -> bool:
    return is_data(path) and not re.fullmatch(LIBRARY_FILES, path.name)


def _of_split(directory: Path, files: list[Path], split: str) -> list[Path]:
    """Those of the files that are named after the split; if none is, those that are named after no split.

    So train-00000.parquet and test-00000.parquet side by side are not one dataset. Raises UserError if only other
    splits are there.
    """
    places = {p: str(p.relative_to(directory)) for p in files}
    named = [p for p, place in places.items() if _names(re.escape(split), place)]
    unnamed = [p for p, place in places.items() if not _names(SPLITS, place)]
    if places and not named and not unnamed:
        raise UserError(f"{directory}: no file of the split {split} among {_some(places.values())}")
    return named or unnamed


def _names(words: str, path: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9])({words})(?![A-Za-z0-9])", path) is not None


def _existing(path: Path) -> tuple[Path, str]:
    """The part of a path that is a directory, whatever characters it is named with, and the rest."""
    root, parts = Path(), [*path.parts]
    while parts and (root / parts[0]).is_dir():
        root /= parts.pop(0)
    return root, "/".join(parts)


def _matching(name: str, root: Path, pattern: str, split: str) -> list[Path]:
    """The files below `root` that a pattern matches: all if it names a split itself, else as those of a directory.

    Raises UserError if there is none, and for a matched directory whose data files are not matched.
    """
    matched = [root / place for place in glob.glob(pattern, root_dir=root, recursive=True)]
    files = sorted(p for p in matched if p.is_file() and not re.fullmatch(LIBRARY_FILES, p.name))
    if not files:
        there = [p.name for p in root.iterdir() if not p.name.startswith(".")]
        raise UserError(f"{name}: matches no file; {root} has {_some(sorted(there)) or 'none'}")
    for directory in sorted(p for p in matched if p.is_dir()):
        if left := set(_data_files(directory)) - {*files}:
            raise UserError(f"{name}: matches {directory}, and not {min(left).name} in it: a pattern is of files")
    return files if _names(SPLITS, pattern) else _of_split(root, files, split)


def _some(names: Iterable[str]) -> str:
    names = [*names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_once(root: Path, files: list[Path]) -> None:
    """Raises UserError for the same rows in two formats, as their names tell: x.jsonl and x.parquet, or csv/x.csv."""
    seen: dict[tuple[str, ...], Path] = {}
    for file in files:
        folders = [part for part in file.parent.relative_to(root).parts if part not in FORMATS]
        stem = file.name.removesuffix("".join(suffixes(file)))
        other = seen.setdefault((*folders, stem), file)
        if other != file:
            raise UserError(
                f"{root}: {other.relative_to(root)} and {file.relative_to(root)} look like the same rows twice:"
                " name one of them"
            )


# --- what they hold ---------------------------------------------------------------------------------------------------


def _from_files(path: Path, files: list[Path]) -> Source:
    digest = hashlib.sha256()
    for file in files:
        check_name(file)
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest() + "".join(suffixes(file)).encode())
    if files != [path]:
        _check_once(path, files)

    def rows() -> Iterator[tuple[str, dict | BadRow]]:
        for file in files:
            place = "" if file == path else f"/{file.relative_to(path)}"
            for number, row in read_file(file):
                good = isinstance(row, (dict, BadRow))
                yield f"{place}:{number}", row if good else BadRow(f"expected an object, got {kind(row)}")

    return Source(str(path), digest.hexdigest(), rows)


def _check_hub(name: str, cache: Path) -> None:
    """Raises ConnectionError where the hub cannot be reached and the dataset is in no cache: the library would ask six
    times, in half a minute.
    """
    if Path(name).is_dir() or (cache / name.replace("/", "___")).is_dir():
        return
    require("huggingface_hub", f"{name}: a dataset of the hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=HUB_PATIENCE)
    except (HfHubHTTPError, OfflineModeIsEnabled):  # an answer, which the library reads better
        return
    except Exception as error:  # whatever the transport of the hub's client raises
        raise ConnectionError(f"the hub does not answer: {error}; name files, or try again with a network") from None


def _from_library(name: str, config: str | None, split: str, revision: str | None, saved: bool) -> Source:
    """A dataset that was saved to disk, one of the hub, or a directory whose files only the library reads."""
    require("datasets", f"{name}: a dataset of the hub, or one that was saved to disk,")
    import datasets

    shown = f"{name}:{config}" if config else name
    if Path(name).is_dir():
        check_inside(Path(name))
    try:
        if saved:
            data = datasets.load_from_disk(name)
        else:
            _check_hub(name, Path(datasets.config.HF_DATASETS_CACHE))
            data = datasets.load_dataset(name, config, split=split, revision=revision)
        if isinstance(data, dict):
            data = data[split]
        fingerprint = f"{data._fingerprint}:{config}" if config else data._fingerprint
    except Exception as error:  # the library raises whatever its back ends do: the user reads one line
        text = " ".join(str(error).split())
        listed = re.search(r"(?:available configs|Available): \[([^]]*)\]", text)
        if listed and not Path(name).is_dir():
            configs = re.findall(r"'([^']+)'", listed[1])
            got = f"got {config}{nearest(config, configs)}" if config else f"as in {name}:{configs[0]}"
            raise UserError(f"{shown}: expected a configuration, one of {', '.join(configs)}, {got}") from None
        what = (
            "cannot be loaded as a dataset"
            if Path(name).is_dir()
            else "is no local file or directory, and cannot be loaded from the hub"
        )
        raise UserError(f"{shown}: {what} ({type(error).__name__}: {text[:160]})") from None
    return Source(shown, fingerprint, lambda: ((f"[{split}]:{i}", row) for i, row in enumerate(data)))

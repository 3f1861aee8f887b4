"""What a dataset's own files may name: files of its own directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from engine.errors import UserError

MAX_BYTES = 2**22  # of a description
MAX_CARD = 2**16  # characters of a card's head


def check_inside(directory: Path) -> None:
    """Raises UserError where the state, the splits or the card of a dataset's directory name a file outside of it."""
    for place in [directory, *(p for p in directory.iterdir() if p.is_dir())]:
        for state, field in (("state.json", "_data_files"), ("dataset_dict.json", "splits")):
            if (place / state).is_file():
                for name in _texts(_described(place / state).get(field)):
                    if PurePosixPath(name).name != name:
                        raise UserError(f"{place / state}: {field}: expected names of files beside it, got {name[:80]}")
    for name in _of_the_card(directory / "README.md"):
        if name.startswith(("/", "~")) or ".." in PurePosixPath(name).parts or "://" in name:
            raise UserError(f"{directory}/README.md: data_files: expected files of this directory, got {name[:80]}")


def _described(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no description of a dataset that save_to_disk wrote")
    return content


def _texts(value: Any) -> Iterator[str]:
    todo = [value]
    while todo:
        x = todo.pop()
        if isinstance(x, str):
            yield x
        todo += x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()


def _of_the_card(path: Path) -> Iterator[str]:
    """All that the head of a card says under data_files or data_dir."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as f:
        head = f.read(MAX_CARD)
    if not head.startswith("---"):
        return
    text = head.split("\n---", 1)[0].removeprefix("---")
    if "data_files" not in text and "data_dir" not in text:
        return
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # of which a few make a million
            raise UserError(f"{path}: its head has aliases, which are not read")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{path}: its head is not YAML") from None
    todo = [content]
    while todo:
        x = todo.pop()
        if isinstance(x, dict):
            for key, value in x.items():
                if key in ("data_files", "data_dir"):
                    yield from _texts(value)
                else:
                    todo.append(value)
        elif isinstance(x, list):
            todo += x

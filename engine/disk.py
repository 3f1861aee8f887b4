"""Files that are not what their name says, as a clone or a browser leaves them, and files that cannot be written."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

POINTER = b"version https://git-lfs.github.com/spec/"
PAGES = (b"<!doctype html", b"<html", b"<?xml")


def disguised(path: Path) -> str:
    """What stands in place of the file that is meant, and what to do about it; '' where nothing tells."""
    try:
        with open(path, "rb") as f:
            start = f.read(256)
    except OSError:
        return ""
    if start.startswith(POINTER):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(PAGES):
        return "a web page, not the file itself: the download was refused or led to a page, download it again"
    return ""


def disguised_in(directory: Path) -> str:
    """The same for the files of a model's directory, with the name of the first."""
    for path in sorted(p for p in directory.glob("*") if p.is_file()) if directory.is_dir() else ():
        if what := disguised(path):
            return f"{path.name} is {what}"
    return ""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """safetensors tells in words why a file cannot be written: here it is the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None

"""Files that are not what their name says, as a clone or a browser leaves them, and files that cannot be written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from engine import progress, signals
from engine.errors import explained

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


def only_mine(path: str, flags: int) -> int:
    """For `open(..., opener=)`: a file of this user's alone, and no link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def write_new(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """A new file in the place of what has its name: a link that stands there is removed, never followed."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)


def fresh_directory(path: Path, mode: int = 0o777) -> None:
    """An empty directory in the place of what has its name."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, mode=mode)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def remove(path: Path) -> None:
    """What is half removed has no step's name: it goes at the next start. As far as the disk lets it."""
    gone = path.with_name(f"tmp-{path.name}")
    with contextlib.suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """The names in it outlive the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_in_turn(descriptor: int) -> None:
    """An open file's lock, once whoever has it lets go. Raises Stopped if this process is asked to end meanwhile."""
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            signals.end_if_asked("while another run had the lock")
            progress.note("waiting for another run")
            time.sleep(0.1)


def keep(path: Path) -> None:
    """What was written of a file, or of a directory and all below it, outlives the machine: to be called before it gets
    a name by which it is taken for whole. Raises OSError.
    """
    below = [of for of in sorted(path.rglob("*")) if not of.is_symlink()] if path.is_dir() else []
    for of in (*below, path):
        descriptor = os.open(of, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def system_error(error: BaseException, path: str = "") -> OSError | None:
    """What the system said, where `error` is that, comes of it, or repeats its number in words, as libraries do."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    number = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), path or None) if number else None


def in_words(error: BaseException) -> str:
    """One line: what the system refused and what to do about it, or what else went wrong."""
    found = system_error(error)
    words = explained(found) if found is not None else str(error) or type(error).__name__
    return " ".join(words.split())[:400]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Libraries written in Rust tell in words why a file cannot be written: here it is the OSError that it was."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = system_error(error, str(path))
        if found is None:
            raise
        raise found from None

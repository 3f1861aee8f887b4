"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """Bad input: `launch` prints the message as one line and exits with status 2, without a traceback."""


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' for the most similar of `names`, or ''."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


ELSEWHERE = "give another --output_dir or --cache_dir"
TODO = {
    errno.ENOSPC: f"free some, or {ELSEWHERE}",
    errno.EDQUOT: f"free some, or {ELSEWHERE}",
    errno.EFBIG: f"raise the limit on a file's size (ulimit -f), or {ELSEWHERE}",
    errno.EROFS: ELSEWHERE,
    errno.EIO: f"look at the disk, or {ELSEWHERE}",
    errno.ESTALE: f"mount it again, or {ELSEWHERE}",
    errno.ENOTCONN: f"mount it again, or {ELSEWHERE}",
    errno.EACCES: f"change its permissions, or {ELSEWHERE}",
    errno.EPERM: f"change its permissions, or {ELSEWHERE}",
}


def explained(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    todo = f": {TODO[error.errno]}" if error.errno in TODO else ""
    return f"{error.filename or 'a file'}: {error.strerror or error}{todo}"


READER_GONE = 141  # the status of a program whose reader, such as `head`, has read enough


def reader_gone() -> int:
    """The status to end with after a BrokenPipeError; what is still to be written, at the exit too, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_GONE


def in_one_line(command: Callable[[], Any]) -> None:
    """Runs a command of one process, without torch: what it returns is the exit status; one line and status 2 for what
    the user or the system did wrong, 130 after Ctrl-C. Commands of ranks have `engine.world.main`.
    """
    from engine import redact, terminal  # which know this file

    redact.guard()
    try:
        status, line = command(), ""
    except UserError as error:
        status, line = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except BrokenPipeError:
        status, line = reader_gone(), ""
    except OSError as error:
        if error.filename is None and error.errno not in TODO:
            raise
        status, line = 2, f"error: {explained(error)}"
    if line:
        terminal.error(on_one_line(line))
    sys.exit(status)


def require(package: str, for_what: str) -> None:
    """Raises UserError where an optional package, which `for_what` (a flag, a file) needs, is missing or cannot be
    imported.
    """
    try:
        importlib.import_module(package)
    except Exception as error:  # half an installation raises whatever it likes
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = (
            "which is not installed"
            if missing
            else f"which cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        )
        raise UserError(f"{for_what} needs the package {package}, {why}: pip install {package}") from None


def on_one_line(text: str) -> str:
    """For a terminal: what files and models say may hold line breaks and control sequences, and have any length."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}"

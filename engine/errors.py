"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable


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
    errno.EROFS: ELSEWHERE,
    errno.EACCES: f"change its permissions, or {ELSEWHERE}",
    errno.EPERM: f"change its permissions, or {ELSEWHERE}",
}


def explained(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    todo = f": {TODO[error.errno]}" if error.errno in TODO else ""
    return f"{error.filename or 'a file'}: {error.strerror or error}{todo}"


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

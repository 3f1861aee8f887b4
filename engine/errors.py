"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: `launch` prints the message as one line and exits with status 2, without a traceback."""


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' for the most similar of `names`, or ''."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""

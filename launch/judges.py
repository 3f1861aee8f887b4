"""A user's own verifier (--verifier_module) and the checks of rows, with refusals in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import UserError
from verifiers import Checker, ModuleError, pin


def pinned(module: str | None) -> str | None:
    """The --verifier_module with its sha256, once it has been loaded in a process of its own. Raises UserError."""
    if module is None:
        return None
    try:
        module = pin(module)
    except ModuleError as problem:
        raise UserError(f"--verifier_module {problem}") from None
    with checker("default", module):
        return module


@contextmanager
def checker(mode: str, module: str | None) -> Iterator[Checker]:
    """`check(dataset, ground_truth)`, which raises ValueError for a row that could not be judged. Raises UserError for
    a module that cannot be loaded."""
    try:
        with Checker(mode, module) as check:
            yield check
    except ModuleError as problem:
        raise UserError(f"--verifier_module {problem}") from None

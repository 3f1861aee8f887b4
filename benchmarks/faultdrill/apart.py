"""A case in a process of its own: one that hangs, dies or takes memory is seen, and what a control plants ends with
it.
"""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable
from pathlib import Path

from tests import ranks

Work = Callable[[Path], str]


def apart(work: Work, directory: Path, *, hook: str = "", limit: float = 30.0, growth_mb: int | None = None) -> str:
    """What `work`, which can be sent to a process, says of a directory; or that it hung, died, or grew by more than
    `growth_mb`. `hook` ('module:function') is called before it.
    """
    process = ranks.context.Process(target=_child, args=(work, directory, hook, growth_mb))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"hung for {limit:g} s"
    said = directory / "said"
    return said.read_text(encoding="utf-8") if said.is_file() else f"died with status {process.exitcode}"


def _child(work: Work, directory: Path, hook: str, growth_mb: int | None) -> None:
    if hook:
        module, _, function = hook.partition(":")
        vars(importlib.import_module(module))[function]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = work(directory)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if growth_mb is not None and grown > growth_mb and not said:
        said = f"grew by {grown} MB"
    (directory / "said").write_text(said, encoding="utf-8")

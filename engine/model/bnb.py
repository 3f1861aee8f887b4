"""bitsandbytes, without the code that it would download."""

from __future__ import annotations

import importlib.util
import logging
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any


def installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


@lru_cache
def bitsandbytes() -> ModuleType:
    """The package, imported when first needed.

    On a CPU with AVX512-bf16 its import asks the package `kernels`, if that is there, for native code from a hub.
    Nothing of ours needs that kernel, and no code is taken from outside at run time: during the import `kernels` cannot
    be found.
    """
    missing = object()
    hidden = sys.modules.get("kernels", missing)
    modules: dict[str, Any] = sys.modules
    modules["kernels"] = None  # the import system's own way to say: not here
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn that the kernel is missing
    try:
        import bitsandbytes as package
        import bitsandbytes.functional
    finally:
        logger.setLevel(level)
        if hidden is missing:
            del sys.modules["kernels"]
        else:
            modules["kernels"] = hidden
    return package

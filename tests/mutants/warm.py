"""A process in a copy of the tree that has imported what all tests import of others, and forks once for every run.

It imports nothing of the project, so that a run sees the files as they are when it begins. A line of its input is a
JSON list [tests, seconds, file of the output]; a line of its output is the run's exit status, null after a time-out.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

OPTIONS = ("-o", "addopts=", "-q", "-x", "-rfE", "--tb=no", "--strict-markers", "-m", "not gpu and not drill")
PRELOADED = (
    *("pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("hypothesis", "numpy", "mpmath", "safetensors.torch", "transformers.models.llama.modeling_llama"),
    *("transformers.generation", "torch._subclasses.fake_tensor", "bitsandbytes", "yaml", "tqdm"),
)


def main() -> None:
    here = Path.cwd()
    found = importlib.util.find_spec("engine")
    if found is None or found.origin is None or not Path(found.origin).resolve().is_relative_to(here.resolve()):
        sys.exit(f"`import engine` finds {found and found.origin}, not the copy in {here}")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # as engine/model/bnb.py has it
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # an optional package: what needs it is skipped
            importlib.import_module(name)
    del sys.modules["kernels"]
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        tests, seconds, output = json.loads(line)
        child = os.fork()
        if not child:
            _run(tests, output)
        answers.write(json.dumps(_wait(child, seconds)) + "\n")


def _run(tests: list[str], output: str) -> None:
    """In the child: the tests, as a session of their own, and no return."""
    os.setsid()
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(1, 2)
    import pytest

    status = 1
    try:
        options = [*OPTIONS, "-p", "no:cacheprovider", f"--basetemp={Path.cwd().parent / (Path.cwd().name + '-tmp')}"]
        seeded = ["--hypothesis-seed=0"] if "hypothesis" in sys.modules else []
        status = int(pytest.main([*options, *seeded, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait(child: int, seconds: float) -> int | None:
    """The exit status of a child, negative for a signal; None: it took longer. What it started ends with it."""
    end, status = time.monotonic() + seconds, None
    while time.monotonic() < end:
        done, how = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(how)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


if __name__ == "__main__":
    main()

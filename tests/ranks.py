"""Runs a launch file through its real entry point on N ranks, forked from one warm process (a bare torchrun start takes
seconds).

The forkserver imports torch, transformers and the launch files once and never runs an operation, so its children are
clean.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

context = multiprocessing.get_context("forkserver")
STAGES = ["launch.dpo", "launch.sft", "launch.ppo", "launch.grpo"]
context.set_forkserver_preload(["transformers.models.llama.modeling_llama", *STAGES])


@dataclass
class Result:
    codes: list[int]
    output: str  # of all ranks, standard output and error

    @property
    def ok(self) -> bool:
        return all(code == 0 for code in self.codes)


def _child(module: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    import torch

    torch.set_num_threads(1)
    from engine import config, world
    from engine.flags import StageFlags
    from launch import commands
    from launch.seeds import each_seed

    stage = importlib.import_module(module)
    hook = environment.get("TRIPTYCH_TEST_HOOK")
    if hook:
        name, function = hook.rsplit(":", 1)
        plant = getattr(importlib.import_module(name), function)
        plant(argv) if inspect.signature(plant).parameters else plant()
    with contextlib.suppress(BrokenPipeError):
        entry = stage.train if hasattr(stage, "train") else getattr(stage, module.rpartition(".")[2])
        is_stage = issubclass(stage.Config, StageFlags)
        if is_stage:
            entry = partial(each_seed, stage.train)
        world.main(lambda: entry(config.parse(stage.Config, argv, elsewhere=commands)), resumable=not is_stage)


def start(module: str, argv: list[str], ranks: int, log: Path, hook: str = "") -> list:
    """The started processes. `hook` ('module:function') is called in each child before the stage."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment |= {"TRIPTYCH_TEST_HOOK": hook, "CUDA_VISIBLE_DEVICES": ""}
        process = context.Process(target=_child, args=(module, [str(a) for a in argv], environment, str(log)))
        process.start()
        processes.append(process)
    return processes


def launch(
    argv: list,
    ranks: int = 1,
    module: str = "launch.dpo",
    log: Path | None = None,
    hook: str = "",
    timeout: float = 240,
) -> Result:
    """Runs `python -m module argv` on `ranks` ranks to the end."""
    log = log or Path(os.environ.get("PYTEST_TMP", "/tmp")) / f"triptych-{os.getpid()}-{id(argv)}.log"
    log.unlink(missing_ok=True)
    processes = start(module, argv, ranks, log, hook)
    failed = False
    for process in processes:
        process.join(5 if failed else timeout)
        failed |= process.exitcode != 0
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return Result([process.exitcode for process in processes], log.read_text(errors="replace") if log.exists() else "")

"""Memory that ran out, in one line: what took it, and what launch.plan would change."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from engine import progress
from engine.errors import UserError
from engine.flags import StageFlags
from engine.world import World
from launch.planner.dry_run import suggested

PLANNED_WITHIN = 90.0  # seconds, in which the other ranks wait
IN_WORDS = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of a plain RuntimeError


def ran_out(error: BaseException) -> bool:
    """Whether the device or the host had no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in IN_WORDS)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextlib.contextmanager
def of_memory(stage: str, config: StageFlags, world: World) -> Iterator[None]:
    """Raises UserError for memory that ran out in the body; of several ranks at once, one speaks."""
    try:
        yield
        return
    except (RuntimeError, MemoryError, OSError) as error:
        if not ran_out(error):
            raise
        where = f"rank {world.rank}, {progress.words()}, --micro_batch_tokens {config.micro_batch_tokens}"
        first = (str(error).strip().splitlines() or ["no memory"])[0][:160]
        error.with_traceback(None)  # whose frames hold what filled the memory
    if world.store.add("out_of_memory", 1) > 1:
        with contextlib.suppress(RuntimeError):  # a rank that ends has the launcher end the others
            world.store.wait(["out_of_memory_said"], timedelta(seconds=PLANNED_WITHIN + 30))
        sys.exit(2)
    line = f"out of memory ({where}): {first}; {_advice(stage, config, world)}"
    world.store.set("out_of_memory_said", "")
    raise UserError(line)


def _advice(stage: str, config: StageFlags, world: World) -> str:
    """launch.plan's, or the cheapest change that was not made yet."""
    with contextlib.suppress(MemoryError, OSError):
        if line := suggested(stage, config, world, PLANNED_WITHIN):
            return f"launch.plan: {line.partition(':')[0]}"
    halved = max(config.max_seq_length or 0, config.micro_batch_tokens // 2)
    if halved < config.micro_batch_tokens:
        return f"try --micro_batch_tokens {halved}, which changes no result"
    if config.gradient_checkpointing != "full":
        return "try --gradient_checkpointing full, which changes no result"
    return f"python -m launch.plan {stage} says what the same flags need"


def stage_of(train: object) -> str:
    """sft of launch/sft.py, also where that is the program that was started."""
    return Path(sys.modules[train.__module__].__file__ or "").stem

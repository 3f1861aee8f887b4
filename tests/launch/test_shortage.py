"""Memory that runs out: one line with step, phase and --micro_batch_tokens, and what would help."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import torch

from engine import world
from engine.errors import UserError
from launch import sft, shortage
from tests.launch.test_equivalence import Runs


@pytest.mark.parametrize(
    "hook, codes, ranks",
    [
        pytest.param("no_memory_on_rank_1_at_step_3", {1, 2}, "1", marks=pytest.mark.drill),  # it plans
        ("no_memory_on_any_rank_at_step_3", {2}, "01"),
    ],
)
def test_memory_that_runs_out_is_one_line(hook, codes, ranks, tmp_path, embedded_dir):
    runs = Runs("sft", tmp_path, {"cache_dir": tmp_path / "cache", "max_steps": 4, "sample_tokens": 0})
    full = runs.launch("full", 2, hook)
    assert set(full.codes) == codes and "Traceback" not in full.output, full.output
    (line,) = [line for line in full.output.splitlines() if line.startswith("error: out of memory")]
    where, _, advice = line.removeprefix("error: out of memory (").partition("): ")
    assert where in [f"rank {rank}, step 3, computing, --micro_batch_tokens 8192" for rank in ranks]
    assert "allocate" in advice and advice.endswith("; try --micro_batch_tokens 4096, which changes no result"), line


def raising(error: BaseException):
    here = dataclasses.replace(world.start(), store=torch.distributed.HashStore())
    with shortage.of_memory("sft", sft.Config(micro_batch_tokens=6000, max_seq_length=4096), here):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 1"),
    ],
)
def test_what_is_no_memory(error, monkeypatch):
    """And what launch.plan suggests, where it does."""
    monkeypatch.setattr(shortage, "suggested", lambda *_: "it fits with --use_lora: 1.0 of 2.0 GiB, at best 3 s")
    with pytest.raises(
        UserError,
        match=r"^out of memory \(rank 0, .*, --micro_batch_tokens 6000\): .*; launch.plan: it fits with --use_lora$",
    ):
        raising(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(errno.ENOSPC, "full"), ValueError("no")])
def test_what_is_something_else(error):
    with pytest.raises(type(error)):
        raising(error)

"""Under torchrun: a rank that dies is started again with the others at the first try, and a signal to torchrun is
answered by a checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.families import save_family
from tests.launch.test_equivalence import digest
from tests.sizes import ROOT

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def flags(tmp_path_factory, embedded_dir) -> dict:
    root = tmp_path_factory.mktemp("torchrun")
    return {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, initializer_range=0.05),
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_conversations,
        "batch_size": 12,
        "max_steps": 60,
        "micro_batch_tokens": 300,
        "save_steps": 10,
        "sample_tokens": 0,
    }


def torchrun(output_dir: Path, flags: dict, *options: str) -> subprocess.Popen:
    words = [w for name, value in (flags | {"output_dir": output_dir}).items() for w in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "launch.sft", *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def worker(of: subprocess.Popen, rank: int) -> int:
    """The process of that rank."""
    for children in Path(f"/proc/{of.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{pid}/environ").read_text():
                return int(pid)
    raise AssertionError("torchrun has no such worker")


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    process = torchrun(run, flags)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return run


@pytest.mark.parametrize("attempt", range(5))
def test_a_killed_rank_is_started_again_at_the_first_try(attempt, flags, uninterrupted, tmp_path):
    process = torchrun(tmp_path / "run", flags, "--max-restarts", "1")
    wait_for(tmp_path / "run" / "checkpoints" / f"step-{10 * (1 + attempt):06d}")
    os.kill(worker(process, attempt % 2), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "resuming after step " in said
    assert digest(tmp_path / "run") == digest(uninterrupted)


@pytest.mark.parametrize("to", ["torchrun", "one rank", "all processes"])
def test_a_signal_is_answered_by_a_checkpoint(to, flags, uninterrupted, tmp_path):
    """By torchrun's own within its half a minute; a restart does not begin again what was asked to end."""
    process = torchrun(tmp_path / "run", flags, "--max-restarts", "2")
    wait_for(tmp_path / "run" / "checkpoints" / "step-000010")
    workers = [worker(process, rank) for rank in (0, 1)]
    for pid in {"torchrun": [process.pid], "one rank": workers[1:], "all processes": [*workers, process.pid]}[to]:
        os.kill(pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=240)
    assert process.returncode not in (0, 85), said  # torchrun's own status, whatever its workers' was
    (*_, line) = [line for line in said.splitlines() if line.startswith("stopped: ")]
    assert line.startswith("stopped: SIGTERM, after step "), said
    if to == "one rank":
        assert "exitcode  : 85" in said or "exitcode: 85" in said, said
    again = torchrun(tmp_path / "run", flags)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "resuming after step " in said, said
    assert digest(tmp_path / "run") == digest(uninterrupted)

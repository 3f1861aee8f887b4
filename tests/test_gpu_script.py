"""`make gpu`'s script, rehearsed: a killed run goes on where it was, a section that fails is a line, what is chosen
wrongly is named.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import BOXES, ROOT

MANY = {"facts", "loss", "attention", "rollout", "profile", "ppo"}  # sections of several figures


def start(directory: Path, *flags: str, before: str = "") -> subprocess.Popen:
    """The script as a shell starts it, after the shell's command `before`; in a session of its own."""
    (directory / "tmp").mkdir(exist_ok=True)
    env = os.environ | {
        "OUT": str(directory / "out"),
        "TMPDIR": str(directory / "tmp"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = ["bash", "-c", f'{before or "true"}; exec "$@"', "-", sys.executable, "-m", "benchmarks.gpu", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def rows(directory: Path) -> list[dict]:
    path = directory / "out" / "gpu.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes_of(directory: Path) -> list[int]:
    """Those that were started with this $OUT."""
    found, mark = [], f"OUT={directory / 'out'}\0".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        # it ended, or is another user's; of one that is dead but not waited for, the file is empty
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="needs /proc")
def test_killed_run_goes_on_and_failing_sections_are_lines(tmp_path):
    """No file may be larger than 64 KiB, so no model can be saved: 'sft eager' and 'rollout' must fail, and what
    follows must still run.
    """
    flags = ("--rehearse", "--only", "tests", "loss", "sft eager", "rollout")
    killed = start(tmp_path, *flags, before="ulimit -f 64")
    wait_until(lambda: len(rows(tmp_path)) == 2 or killed.poll() is not None, 60)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.stdout.read()
    wait_until(lambda: not processes_of(tmp_path), 10)  # nothing of it is left on the device
    with open(tmp_path / "out" / "gpu.jsonl", "a") as f:
        f.write('{"section": "sft ea')  # as a kill in the middle of a line leaves it

    resumed = start(tmp_path, *flags, before="ulimit -f 64")
    said, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 1, said
    assert "loss: done already" in said
    torn = (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()
    assert torn.pop(2) == '{"section": "sft ea'
    machine, *sections = map(json.loads, torn)
    assert machine["sources"] and machine["rehearsal"] and machine["torch"]
    expected = {"loss": True, "sft eager": False, "rollout": False, "tests": True}
    assert [(row["section"], row["ok"]) for row in sections] == list(expected.items()), said
    assert sections[0]["figures"]["linear_loss"]
    assert "File too large" in sections[1]["note"] and "skipped" in sections[3]["note"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.jsonl", "gpu.log", "gpu.txt"}
    summary = (tmp_path / "out" / "gpu.txt").read_text()
    assert summary in said and "FAIL  sft eager" in summary and "ok    loss" in summary
    assert not list((tmp_path / "tmp").glob("triptych-gpu-*"))  # nor the killed run's


def test_unknown_section_is_one_line_with_the_nearest_name(tmp_path):
    process = start(tmp_path, "--skip", "atention")
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert len(said.splitlines()) == 1 and "did you mean attention?" in said


@pytest.mark.drill
def test_rehearsal_runs_every_section_and_an_interrupted_one_is_summarised(tmp_path):
    interrupted = start(tmp_path, "--rehearse", "--only", "loss", "attention")
    wait_until(lambda: len(rows(tmp_path)) == 2, 60)
    interrupted.terminate()
    said, _ = interrupted.communicate(timeout=20)
    assert interrupted.returncode == 130, said
    assert [(row["section"], row["note"][:11]) for row in rows(tmp_path)[1:]] == [
        ("loss", ""),
        ("attention", "interrupted"),
    ]
    assert "FAIL  attention" in said and "linear_loss" in said

    began = time.monotonic()
    whole = start(tmp_path, "--rehearse", "--again")
    said, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, said
    assert time.monotonic() - began < 240  # 3 minutes of two cores that are not busy
    found = {row["section"]: row for row in rows(tmp_path)[3:]}
    assert list(found) == list(BOXES)
    assert all(row["ok"] for row in found.values())
    assert all(len(found[name]["figures"]) >= 2 for name in MANY)
    assert len(said) < 12_000  # what is shown of a remote command's output

"""--report_to against the real packages, offline: values come back as they were written, a resumed run is one run."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import elsewhere, log, provenance, world
from engine.errors import UserError
from engine.flags import RunFlags
from tests import needs

ROOT = Path(__file__).parents[2]


def sessions(kind: str, directory: Path) -> None:
    """Six steps, killed, resumed after the fourth, up to the eighth."""
    (directory / "config.yaml").write_text("learning_rate: 0.1\nmixer_list: [a, 1.0]\n")
    for start, end in ((0, 6), (4, 8)):
        metrics = log.Metrics(directory, world.start(), start=start, total=8, report_to=kind)
        if not start:
            metrics.write(0, {"eval/accuracy": 0.25})
        for step in range(start + 1, end + 1):
            metrics.write(step, {"loss": step + start / 10, "odd": math.nan, "said": "text"})
        metrics.write(end, {"eval/accuracy": 0.5})
        metrics.close()


@needs.tensorboard
def test_tensorboard_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sessions("tensorboard", tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"loss", "odd", "eval/accuracy"}
    found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in read.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.4), (6, 6.4), (7, 7.4), (8, 8.4)]
    assert [event.step for event in read.Scalars("eval/accuracy")] == [0, 8]
    # a run that starts anew in the same directory forgets all of them
    log.Metrics(tmp_path, world.start(), start=0, total=8, report_to="tensorboard").close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert read.Tags()["scalars"] == [] or read.Scalars("loss") == []


@needs.wandb
def test_weights_and_biases_goes_on_with_the_same_run(tmp_path):
    """In a process of its own, offline: it leaves threads behind. Read back from the file that would be sent."""
    program = f"""
import pathlib
from tests.engine.test_elsewhere import sessions
sessions("wandb", pathlib.Path({str(tmp_path)!r}))
"""
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name = (tmp_path / "wandb_run.txt").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{name}"}
    assert [steps_of(file) for file in files] == [[0, 1, 2, 3, 4, 5, 6], [5, 6, 7, 8]]


def steps_of(path: Path) -> list[int]:
    """The steps of the records of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in logged(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            keys = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(int(keys["_step"]))
    return steps


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, in them pieces of checksum, size and kind; a
    head of seven bytes.
    """
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last of several
            yield whole
            whole = b""


@needs.wandb
def test_weights_and_biases_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**given):
        raise wandb.errors.UsageError("api_key not configured\n(no-tty). call wandb.login")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"--report_to wandb: api_key not configured \(no-tty\).* WANDB_MODE=offline"):
        elsewhere.elsewhere("wandb", tmp_path, 0)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_absent_is_one_line_before_any_work(package, tmp_path, monkeypatch):
    """The check of a configuration, which is the first thing that a stage does, and opens nothing."""
    from launch import sft  # not above: the process of the test before this one reads this file

    monkeypatch.setitem(sys.modules, package, None)
    expected = f"--report_to {package} needs the package {package}, which is not installed: pip install {package}"
    with pytest.raises(UserError, match=re.escape(expected)):
        RunFlags(report_to=package).check_run()
    with pytest.raises(UserError, match=re.escape(expected)):
        sft.train(sft.Config(report_to=package, output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")))
    assert not list(tmp_path.iterdir())


def test_where_a_run_comes_from(tmp_path, monkeypatch):
    facts = provenance.facts(world.start(), 7)
    assert facts["total_steps"] == "7" and facts["machine"].startswith("1 x ") and "triptych " in facts["version"]
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert "commit" not in provenance.facts(world.start(), 7)
    (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git" / "packed-refs").write_text(
        f"# pack-refs\n{'b' * 40} refs/heads/main\n{'c' * 40} refs/heads/amain\n"
    )
    assert provenance.facts(world.start(), 7)["commit"] == "b" * 12
    (tmp_path / ".git" / "refs" / "heads" / "main").write_text("a" * 40 + "\n")
    assert provenance.facts(world.start(), 7)["commit"] == "a" * 12
    (tmp_path / ".git" / "HEAD").write_text("d" * 40 + "\n")
    assert provenance.facts(world.start(), 7)["commit"] == "d" * 12

"""Disks that are full, read-only or gone while a run writes: one line, nothing lost, nothing left over."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families import save_family
from tests.launch.test_equivalence import Runs, digest, trajectory


@pytest.fixture(scope="module")
def runs(tmp_path_factory, embedded_dir) -> Runs:
    root = tmp_path_factory.mktemp("disks")
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, initializer_range=0.05),
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_pairs,
        "batch_size": 12,
        "max_steps": 10,
        "learning_rate": 2e-3,
        "micro_batch_tokens": 500,
        "save_steps": 2,
    }
    return Runs("dpo", root, flags)


@pytest.fixture(scope="module")
def uninterrupted(runs):
    return runs.run("uninterrupted", 2)


@contextlib.contextmanager
def disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of that size, unmounted in the end."""
    directory.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield directory
    finally:
        while not subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False).returncode:
            pass


def said(output: str) -> list[str]:
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith(("error: ", "warning: "))]


def left_over(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if re.match(r"tmp-|.*\.partial$", path.name)]


OWED = r"warning: checkpoint not written: .*; training goes on, it is tried again after every step, the previous .*"


def test_a_checkpoint_that_cannot_be_written_is_owed(runs, uninterrupted):
    """Files may not be larger than some size, on every rank, for a while: one warning, and no step without its try."""
    name = "owed"
    result = runs.launch(name, 2, "no_file_above_100_kib_from_step_3_to_6")
    assert result.ok, result.output
    (warning,) = said(result.output)
    assert re.fullmatch(OWED, warning) and "File too large: raise the limit on a file's size" in warning, warning
    assert "a checkpoint is written again, of step 6" in result.output
    assert digest(runs.root / name) == digest(uninterrupted) and not left_over(runs.root / name)


def test_what_cannot_be_exported_can_be_resumed(runs, uninterrupted):
    """Without room until the end the run ends there, in one line, with its last checkpoint."""
    name = "not_exported"
    result = runs.launch(name, 2, "no_file_above_100_kib_from_step_3")
    assert result.codes == [2, 2], result.output
    warning, error = said(result.output)
    assert re.fullmatch(OWED, warning)
    assert re.fullmatch(r"error: .*final is not written: .*: File too large: raise the limit .*", error), error
    assert [p.name for p in (runs.root / name / "checkpoints").iterdir()] == ["step-000002"]
    assert not left_over(runs.root / name) and not (runs.root / name / "final").exists()
    again = runs.launch(name, 2, log="again")
    assert again.ok and "resuming after step 2" in again.output
    assert digest(runs.root / name) == digest(uninterrupted)
    assert trajectory(runs.root / name) == trajectory(uninterrupted)


def test_a_disk_without_a_byte(runs, uninterrupted):
    """For a while: nothing is copied that has no room."""
    with disk(runs.root / "small", "4m"):
        full = runs.launch("small/run", 2, "fill_the_disk_of_the_run_from_step_3_to_6", log="small")
        assert full.ok, full.output
        (warning,) = said(full.output)
        assert re.fullmatch(OWED, warning) and re.search(r"has 0\.0 MiB left and one takes \d\.\d: free some", warning)
        assert digest(runs.root / "small" / "run") == digest(uninterrupted)
        assert trajectory(runs.root / "small" / "run") == trajectory(uninterrupted)


def test_a_disk_that_stays_full(runs, uninterrupted):
    with disk(runs.root / "full", "4m"):
        run = runs.root / "full" / "run"
        full = runs.launch("full/run", 2, "fill_the_disk_of_the_run_at_step_3", log="full")
        assert full.codes == [2, 2] and len([line for line in said(full.output) if line.startswith("error: ")]) == 1
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"] and not left_over(run)
        (run / "filler").unlink()
        assert runs.launch("full/run", 2, log="full.2").ok
        assert digest(run) == digest(uninterrupted) and trajectory(run) == trajectory(uninterrupted)


def test_caches_on_a_full_disk(runs, uninterrupted, tmp_path):
    """Tokens must be there, reference numbers need not: those that a run computed are used by it alone."""
    with disk(tmp_path / "cache", "64k"):
        none = runs.launch("no_tokens", 2, cache_dir=tmp_path / "cache")
        assert none.codes == [2, 2] and not left_over(tmp_path / "cache"), none.output
        (error,) = said(none.output)
        assert re.fullmatch(r"error: .*/cache/tokens/.*: No space left on device: free some, or give .*", error)
    with disk(tmp_path / "other" / "reference", "4k"):
        uncached = runs.launch("no_reference", 2, cache_dir=tmp_path / "other")
        assert uncached.ok, uncached.output
        (warning,) = said(uncached.output)
        assert re.fullmatch(
            r"warning: reference: not cached: .*No space left on device: .*; this run goes on .*", warning
        )
        assert digest(runs.root / "no_reference") == digest(uninterrupted)
        assert not [p for p in (tmp_path / "other" / "reference").rglob("*") if "rows-" in p.name]
        only = runs.launch("only", 2, cache_dir=tmp_path / "other", cache_logprobs_only="true")
        assert only.codes == [2, 2] and said(only.output)[-1].startswith("error: the reference cache is not written: ")


# --- --checkpoint_dir -------------------------------------------------------------------------------------------------


def test_checkpoints_on_another_disk(runs, uninterrupted, tmp_path):
    """It is one run's, found again from its directory; read-only for a while, a checkpoint is owed."""
    with disk(tmp_path / "disk", "8m"):
        elsewhere = tmp_path / "disk"
        read_only = runs.launch("apart", 2, "checkpoints_read_only_from_step_3_to_6", checkpoint_dir=elsewhere)
        assert read_only.ok and "a checkpoint is written again, of step 6" in read_only.output, read_only.output
        (warning,) = said(read_only.output)
        assert re.fullmatch(OWED, warning) and "Read-only file system: give another --output_dir" in warning, warning
        assert sorted(p.name for p in elsewhere.glob("step-*")) == ["step-000006", "step-000008"]
        assert (runs.root / "apart" / "checkpoints").readlink() == elsewhere
        assert digest(runs.root / "apart") == digest(uninterrupted)
        other = runs.launch("apart_too", 1, checkpoint_dir=elsewhere)
        assert other.codes == [2] and said(other.output) == [
            f"error: --checkpoint_dir {elsewhere} is that of the run {runs.root / 'apart'}: give another"
        ]
        moved = runs.launch("apart", 1, log="moved", checkpoint_dir=tmp_path / "third")
        assert moved.codes == [2] and f"this run's checkpoints are in {elsewhere}: give that" in moved.output
    there = runs.launch("uninterrupted", 2, log="there", checkpoint_dir=tmp_path / "fourth")
    assert there.codes == [2, 2] and "move them, or leave it out" in there.output


def test_a_disk_that_goes_while_a_run_writes(runs, uninterrupted, tmp_path):
    """Nothing is written in its place below the directory where it was mounted; with it, the run is resumed."""
    with disk(tmp_path / "disk", "8m"):
        gone = runs.launch("gone", 2, "unmount_checkpoints_at_step_3", checkpoint_dir=tmp_path / "disk")
        assert gone.ok and digest(runs.root / "gone") == digest(uninterrupted), gone.output
        (warning,) = said(gone.output)
        assert re.fullmatch(OWED, warning) and "is gone, or another disk: mount it again" in warning
        assert list((tmp_path / "disk").iterdir()) == []

"""Totals and rows: sums over micro-batches and ranks, and what stays in a file when a run is resumed."""

from __future__ import annotations

import dataclasses
import json
import resource

import pytest
import torch

from engine import log, world


def test_totals_are_sums_over_micro_batches_and_ranks(monkeypatch):
    """Of tensors in fp64 (2^24 + 1 is no fp32 number), and of Python's numbers; what was never added is 0."""
    totals = log.Totals(world.start())
    for _ in range(3):
        totals.add({"a": torch.tensor([2.0**24, 1.0]), "b": 0.5})
    assert totals.reduce(("a", "b", "c")) == {"a": 3 * (2**24 + 1), "b": 1.5, "c": 0}
    monkeypatch.setattr(world.World, "sum", lambda self, x: self.size * x)
    totals.world = dataclasses.replace(totals.world, size=4)
    assert totals.reduce(("b",)) == {"b": 6.0}


@pytest.mark.parametrize("start, kept", [(0, []), (2, [1, 2, 2]), (3, [1, 2, 2, 3])])
def test_a_resumed_file_is_cut_back_to_the_resumed_step(start, kept, tmp_path):
    """A step may have several rows; a last one that is torn is none."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 2, 3)) + '{"step": 3, "los', encoding="utf-8"
    )
    file = log.JsonLines(path, start)
    file.write({"step": 9})
    read = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]  # written out at once
    assert read == [*kept, 9]
    file.close()


def test_a_row_that_cannot_be_written_is_owed(tmp_path, capsys):
    """Not a part of it stays; one warning; it comes with the next that can, or is named as lost at the end."""
    path, (soft, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = log.JsonLines(path, 0)
    file.write({"step": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        file.write({"step": 2})
        file.write({"step": 3})
        assert path.read_text(encoding="utf-8") == '{"step": 1}\n'
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith(f"warning: {path}: File too large: raise the limit") and said.endswith("with later ones")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        file.write({"step": 4})
        assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 2, 3, 4]
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        file.write({"step": 5})
        file.close()
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"; 1 row is lost for {path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "damage, kept",
    [
        (lambda rows: rows[:1] + rows[2:], [1, 3]),
        (lambda rows: [rows[0], rows[1].replace(b"2.5", b"2.4"), rows[2]], [1, 2, 3]),
        (lambda rows: [rows[0], b"\xff\x00\n", rows[2]], [1, 3]),
        (lambda rows: [rows[0], b"[2]\n", b'{"step": "2"}\n', b"7\n", rows[2]], [1, 3]),
        (lambda rows: [], []),
    ],
)
def test_rows_that_are_not_what_was_written_are_named(damage, kept, tmp_path, capsys):
    """Where a checkpoint has their digest; what can be read stays, and they are those to the next."""
    path = tmp_path / "metrics.jsonl"
    file = log.JsonLines(path, 0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": step + 0.5})
    known = file.digest
    file.write({"step": 4})
    file.close()
    assert log.JsonLines(path, 3, known).digest == known and not capsys.readouterr().out
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    again = log.JsonLines(path, 3, known)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == kept
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(
        f"warning: {path} was damaged, or changed: of its rows up to step 3, {len(kept)} can be read"
    )
    assert log.JsonLines(path, 3, again.digest).digest == again.digest and not capsys.readouterr().out
    log.JsonLines(path, 3)
    assert not capsys.readouterr().out  # an earlier version's checkpoint has none

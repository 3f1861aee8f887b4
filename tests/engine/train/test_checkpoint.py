"""Checkpoints in one process: what comes back, which one is taken, what is refused, what is kept."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import signals, world
from engine.errors import UserError
from engine.flags import OptimizerFlags
from engine.train import Run, optim
from engine.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def here():
    return world.start()


class Trained:
    """A small module and its optimizer, of which every step moves everything."""

    def __init__(self, root, here, *, keep: int = 9, identity: str = "a", **settings) -> None:
        torch.manual_seed(0)
        self.here, self.module = here, nn.Linear(3, 2)
        self.optimizer = optim.adamw(self.module, OptimizerFlags(), here)
        known = {"identity": {"model": identity}, "settings": {"beta": 5.0} | settings}
        self.checkpoints = Checkpoints(root, here, {"policy": (self.module, self.optimizer)}, keep=keep, **known)

    def train(self, steps: int) -> Trained:
        for _ in range(steps):
            (self.module(torch.ones(1, 3)) ** 2).sum().backward()
            optim.step(self.optimizer, self.here, lr=0.1, max_norm=1.0)
        return self

    def save(self, *steps: int) -> Trained:
        for step in steps:
            self.checkpoints.save(step, {"num_tokens": 10 * step})
            self.checkpoints.wait()
        return self

    def numbers(self) -> list[torch.Tensor]:
        moments = [optim.moments(self.optimizer, p) for p in self.module.parameters()]
        steps = [self.optimizer.state[p]["step"] for p in self.module.parameters()]
        return [*(p.detach() for p in self.module.parameters()), *(x for m in moments for x in m.values()), *steps]


def test_what_was_trained_comes_back_and_goes_on_alike(here, tmp_path):
    """Weights, moments, and the optimizer's own step, which its bias corrections hang on."""
    before = Trained(tmp_path, here).train(3).save(3)
    after = Trained(tmp_path, here).train(1)
    state = after.checkpoints.resume("auto")
    assert (state["step"], state["num_tokens"], state["world_size"]) == (3, 30, 1)
    assert all(map(torch.equal, before.numbers(), after.numbers()))
    assert all(map(torch.equal, before.train(2).numbers(), after.train(2).numbers()))


@pytest.mark.parametrize(
    "changed, said", [({"beta": 0.1}, "with --beta 5.0, now it is 0.1"), ({"identity": "b"}, "another model")]
)
def test_a_checkpoint_of_another_run_is_refused(changed, said, here, tmp_path):
    Trained(tmp_path, here).train(1).save(1)
    with pytest.raises(UserError, match=said):
        Trained(tmp_path, here, **changed).checkpoints.resume("auto")


def names(root) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_the_newest_are_kept_by_number(here, tmp_path):
    Trained(tmp_path, here, keep=2).train(1).save(999_998, 999_999, 1_000_000)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert Trained(tmp_path, here, keep=2).checkpoints.resume("auto")["step"] == 1_000_000


def test_an_older_one_that_is_half_removed_goes_at_the_next_start(here, tmp_path, monkeypatch):
    """The process ends between two files of it: what is left has no step's name."""
    trained = Trained(tmp_path, here, keep=1).train(1).save(1)
    removed = shutil.rmtree

    def half(path, **options):
        if "step-000001" in path.name:
            (path / "COMPLETE").unlink()
        else:
            removed(path, **options)

    monkeypatch.setattr(shutil, "rmtree", half)
    trained.save(2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000002", "tmp-step-000001"]
    assert Trained(tmp_path, here, keep=1).checkpoints.resume("auto")["step"] == 2
    assert names(tmp_path) == ["step-000002"]


def test_the_newest_sound_one_is_taken(here, tmp_path, capsys):
    """A flipped bit, a missing manifest: named or passed over; what is newer than the one taken is put aside."""
    Trained(tmp_path, here).train(1).save(1, 2, 3)
    assert Trained(tmp_path, here).checkpoints.resume("never") is None
    whole = tmp_path / "checkpoints" / "step-000003"
    (shard,) = whole.glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert Trained(tmp_path, here).checkpoints.resume("auto")["step"] == 2
    assert f"{shard.name} is damaged" in capsys.readouterr().out
    assert names(tmp_path) == ["abandoned-step-000003", "step-000001", "step-000002"]
    (tmp_path / "checkpoints" / "step-000002" / "COMPLETE").unlink()
    capsys.readouterr()
    assert Trained(tmp_path, here).checkpoints.resume("auto")["step"] == 1
    assert "step-000002 is not used: it is incomplete: it has no COMPLETE" in capsys.readouterr().out
    with pytest.raises(UserError, match="is incomplete"):
        Trained(tmp_path, here).checkpoints.resume(str(tmp_path / "checkpoints" / "step-000002"))
    shutil.rmtree(tmp_path / "checkpoints")
    assert Trained(tmp_path, here).checkpoints.resume("auto") is None


def test_when_held_out_data_is_looked_at():
    """Every so many steps, and after the last; without a number, after the last alone."""
    run = lambda every: SimpleNamespace(plan=SimpleNamespace(total=10), flags=SimpleNamespace(eval_steps=every))
    steps = lambda every: [done for done in range(1, 11) if Run.evaluates(run(every), done)]
    assert (steps(4), steps(0), steps(5)) == ([4, 8, 10], [10], [5, 10])


@pytest.mark.parametrize(
    "manifest, said",
    [
        ("{}", "its manifest, COMPLETE, lists no weights"),
        ("[]", "its manifest, COMPLETE, lists no weights"),
        ("", "its manifest, COMPLETE, is damaged"),
        ('{"state.json": {}}', "its manifest, COMPLETE, lists no weights"),
        ('{"shard.safetensors": {"bytes": 1, "sha256": "0"}}', "its manifest, COMPLETE, lists no state.json"),
        ('{"../a.safetensors": {}, "state.json": {}}', "shard-.* is not in its manifest"),
        ("more", "other.safetensors is not in its manifest"),
        (None, "it is incomplete: it has no COMPLETE"),
    ],
)
def test_a_manifest_that_does_not_say_what_is_there_is_refused(manifest, said, here, tmp_path, capsys):
    """The one before is taken, with a word; where it was named, none is."""
    Trained(tmp_path, here).train(1).save(1, 2)
    path = tmp_path / "checkpoints" / "step-000002"
    if manifest is None:
        (path / "COMPLETE").unlink()
    elif manifest == "more":
        shutil.copy(next(path.glob("shard-*")), path / "other.safetensors")
    else:
        (path / "COMPLETE").write_text(manifest)
    with pytest.raises(UserError, match=f"--resume {path}: {said}"):
        Trained(tmp_path, here).checkpoints.resume(str(path))
    capsys.readouterr()
    assert Trained(tmp_path, here).checkpoints.resume("auto")["step"] == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(f"warning: checkpoint {path} is not used: {said}", line)


def test_nothing_is_begun_without_room(here, tmp_path, capsys, monkeypatch):
    """For what the last one took, or for the tensors; owed until there is."""
    trained, free = Trained(tmp_path, here).train(1), {"bytes": 10}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free["bytes"]))
    trained.save(1, 2)
    (said,) = capsys.readouterr().out.splitlines()
    assert "checkpoints has 0.0 MiB left and one takes 0.0: free some; training goes on" in said
    assert names(tmp_path) == [] and signals.vote() and trained.checkpoints.newest == 0
    free["bytes"] = 100 * 2**20
    trained.save(3)
    assert names(tmp_path) == ["step-000003"] and not signals.vote()
    assert "a checkpoint is written again, of step 3" in capsys.readouterr().out
    sizes = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step-000003").iterdir())
    for bytes_free, written in ((sizes - 1, False), (sizes, True)):
        free["bytes"] = bytes_free
        trained.save(4)
        assert (tmp_path / "checkpoints" / "step-000004").is_dir() == written


def test_the_older_one_stays_until_the_newer_was_read_back(here, tmp_path, capsys, monkeypatch):
    trained = Trained(tmp_path, here, keep=1).train(1).save(1)
    publish = Checkpoints._publish

    def flipping(self, partial, step, *rest):
        publish(self, partial, step, *rest)
        (shard,) = (self.root / f"step-{step:06d}").glob("shard-*")
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)

    monkeypatch.setattr(Checkpoints, "_publish", flipping)
    trained.save(2)
    assert names(tmp_path) == ["step-000001"] and signals.vote()
    assert re.search("not written: read again, shard-.* is damaged; training goes on", capsys.readouterr().out)
    monkeypatch.setattr(Checkpoints, "_publish", publish)
    trained.save(3)
    assert names(tmp_path) == ["step-000003"]


def test_a_checkpoint_under_another_steps_name_is_passed_over(here, tmp_path, capsys):
    """What is a copy elsewhere keeps its name, or has one that is no step's."""
    Trained(tmp_path, here).train(1).save(1, 2)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step-000001", root / "step-000009")
    shutil.copytree(root / "step-000002", tmp_path / "kept")
    capsys.readouterr()
    assert Trained(tmp_path, here).checkpoints.resume("auto")["step"] == 2
    assert "step-000009 is not used: it is a copy of step 1 under another name" in capsys.readouterr().out
    assert Trained(tmp_path, here).checkpoints.resume(str(tmp_path / "kept"))["step"] == 2


def test_what_an_earlier_version_did_not_note_of_a_model_is_no_difference(here, tmp_path):
    """Its weights it did."""
    Trained(tmp_path, here).train(1).save(1)
    now = Trained(tmp_path, here)
    now.checkpoints.identity |= {"model's config.json": "0"}
    assert now.checkpoints.resume("auto")["step"] == 1
    now.save(2)
    now.checkpoints.identity |= {"model's config.json": "1"}
    with pytest.raises(UserError, match=r"another model's config\.json"):
        now.checkpoints.resume("auto")
    lacking = Trained(tmp_path, here)
    lacking.checkpoints.identity = {"value model": "b"}
    with pytest.raises(UserError, match="another value model"):
        lacking.checkpoints.resume("auto")

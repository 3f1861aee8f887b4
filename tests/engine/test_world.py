"""Ranks that share a store, here in one process: agreeing, failing together, and how a process ends."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from engine import world
from engine.errors import UserError


@pytest.fixture
def ranks(monkeypatch):
    """Rank 0 and rank 1 of a machine with one store, whose calls have the same names."""
    store = dist.HashStore()
    monkeypatch.setattr(world, "_calls", itertools.repeat(0))
    alone = world.start()
    return [dataclasses.replace(alone, rank=rank, local_rank=rank, size=2, store=store) for rank in range(2)]


def test_ranks_agree_or_say_what_differs(ranks):
    ranks[0].agree("dataset", "abc")
    ranks[1].agree("dataset", "abc")
    with pytest.raises(UserError, match="rank 1 has another dataset than rank 0"):
        ranks[1].agree("dataset", "abd")


def test_the_others_fail_with_the_first(ranks):
    def fails():
        raise UserError("the disk is full")

    for rank in ranks:
        with pytest.raises(UserError, match="the disk is full"):
            rank.once("tokens", fails if rank.rank == 0 else list)
    store = dist.HashStore()
    again = [dataclasses.replace(rank, store=store) for rank in ranks]
    assert [rank.once("tokens", lambda rank=rank: rank.rank) for rank in again] == [0, 1]


def test_a_rank_waits_for_the_first_as_long_as_it_takes(ranks):
    """In one wait: one that times out is a warning on the screen, and looking now and then misses a first rank that
    speaks and ends.
    """
    assert world.FOREVER.days >= 7
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(ranks[1].once, "tokens", lambda: "read")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        ranks[0].once("tokens", list)
        assert waiting.result(timeout=20) == "read"


@pytest.mark.parametrize("cores, size, expected", [(8, 2, 4), (8, 3, 2), (1, 2, 1)])
def test_a_rank_takes_its_share_of_the_cores(cores, size, expected, ranks, monkeypatch):
    monkeypatch.setattr(world, "available_cores", lambda: cores)
    assert dataclasses.replace(ranks[0], size=size).cores == expected


def raises(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "command, status, said",
    [
        (lambda: None, 0, ""),
        (raises(UserError("no such file")), 2, "error: no such file\n"),
        (raises(FileNotFoundError(2, "No such file", "x.json")), 2, "error: x.json: No such file\n"),
        (raises(KeyboardInterrupt()), 130, "interrupted; the same command goes on from the last checkpoint\n"),
    ],
)
def test_how_a_process_ends(command, status, said, capsys, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(SystemExit) as end:
        world.main(command)
    assert end.value.code == status and capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        dist.DistStoreError("wait timeout after 1800000ms, keys: /first/1/x"),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234"),
    ],
)
def test_what_says_that_another_rank_is_gone_is_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(SystemExit) as end:
        world.main(raises(error))
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("error: rank 0: another rank died or stopped answering; ")
    assert said.count("\n") == 1 and str(error) in said


@pytest.mark.parametrize("error", [OSError("of no file"), RuntimeError("a bug"), ZeroDivisionError()])
def test_a_mistake_of_ours_is_a_traceback(error, monkeypatch, capsys):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(SystemExit) as end:
        world.main(raises(error))
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("Traceback") and type(error).__name__ in said.splitlines()[-1]

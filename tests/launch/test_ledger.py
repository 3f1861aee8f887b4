"""The planner's costs by hand: what overlaps, collectives, updates, workspaces, and what a plan says of disk."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.hardware import DEVICES
from engine.model.bnb import bitsandbytes
from launch.planner import foreign
from launch.planner.ledger import Cost, Ledger
from tests import needs
from tests.launch.test_plan_arithmetic import planned

H100 = DEVICES["h100-80gb"]


def test_what_overlaps_takes_the_longest_and_what_follows_is_added():
    cost = Cost(flops=1.0, moved=2.0, computing=3.0, communicating=5.0, hauling=4.0)
    assert cost.seconds == 5 and (cost + cost).seconds == 10 and (cost * 0.5).seconds == 2.5
    assert (cost - cost).seconds == 0 and (cost + cost).flops == 2


def test_an_update_reads_and_writes_every_tensor():
    ledger, tensors = Ledger(H100), [torch.zeros(10**7), torch.zeros(10**7, dtype=torch.uint8)]
    ledger.touch(tensors)
    moved = 2 * 5 * 10**7
    assert ledger.costs["start"].moved == moved
    assert ledger.costs["start"].computing == pytest.approx(moved / (0.9 * 3.35e12))


@needs.bitsandbytes
def test_an_update_in_8_bits_is_of_a_gradient_a_weight_and_two_moments():
    ledger = Ledger(H100)
    names = {
        name: torch.zeros(n, dtype=torch.uint8) for name, n in (("g", 1), ("p", 10), ("state1", 100), ("state2", 1000))
    }
    with foreign.followed(ledger, cuda=False):
        for kernel in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
            getattr(bitsandbytes().functional, kernel)(**names)
    assert ledger.costs["start"].moved == 2 * 2 * 1111


def test_an_all_reduce_moves_what_an_all_gather_and_a_reduce_scatter_do():
    ledger, x = Ledger(H100, ranks=8), torch.zeros(10**6)
    once = H100.collective(4e6, 8, 8)
    for name, times in (("c10d.allgather_", 1), ("c10d.reduce_scatter_", 1), ("c10d.allreduce_", 2)):
        before = ledger.costs["start"].communicating
        ledger._count("collective", name, ([x],), {}, [])
        assert ledger.costs["start"].communicating - before == pytest.approx(times * once)


def test_between_nodes_the_network_decides():
    slow = 1e9 * (3 / 4) / (0.75 * 400e9)
    assert H100.collective(1e9, 32, 8) == pytest.approx(max(slow, 1e9 * (7 / 8) / (0.75 * 450e9)), rel=1e-2)
    l40s = DEVICES["rtx4090-24gb"]
    assert l40s.collective(1e9, 16, 8) == pytest.approx(1e9 * (1 / 2) / (0.75 * 12.5e9), rel=1e-2)


def test_a_workspace_is_in_the_peak_and_gone_afterwards():
    with FakeTensorMode(), Ledger(H100, block=1) as ledger:
        a = torch.empty(100)
        ledger.workspace(1000)
        assert ledger.total == 400 and ledger.peak.total == 1400 and a.numel()
        ledger.workspace(500)
        assert ledger.peak.total == 1400


def test_the_disk_of_pairs_and_of_two_models():
    assert planned("sft", num_examples=10, mean_tokens=100).disk["tokenised data"] == 10 * (500 + 28)
    pairs = planned("dpo", num_examples=10, mean_tokens=100, reference="cache").disk
    assert pairs["tokenised data"] == 2 * 10 * (500 + 28) and pairs["reference cache"] == 24 * 20
    found = [planned(stage, parameters=1000, slots=1, num_examples=10).disk for stage in ("sft", "ppo", "grpo")]
    assert [disk["final/"] for disk in found] == [2000, 4000, 2000]  # PPO's value model is exported too
    assert ["tokenised data" in disk for disk in found] == [True, False, False]


def test_what_is_written_in_place_is_no_new_storage():
    with FakeTensorMode(), Ledger(H100, block=1) as ledger:
        a = torch.empty(100)
        a.add_(1).mul_(2)
        b = a.add_(a)
        assert ledger.total == ledger.peak.total == 400 and b is a


def test_what_is_repeated_has_the_rows_that_were_asked_for():
    """Else those of the micro-batch: counts have no numbers here."""
    with FakeTensorMode(), Ledger(H100) as ledger:
        ledger.rows = 7
        x_S, counts_S = torch.empty(3), torch.empty(3, dtype=torch.int64)
        assert len(x_S.repeat_interleave(counts_S, output_size=5)) == 5
        assert len(x_S.repeat_interleave(counts_S)) == 7

"""The planner's arithmetic on made-up numbers: reserved memory, disk, waves of rollouts, micro-batches of a rank."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks.plan import words
from engine.config import parse
from engine.data.packing import pack
from engine.hardware import DEVICES
from launch.planner import plans, search
from launch.planner.ledger import Cost, Peak
from launch.planner.report import total_steps
from launch.planner.stages import RLVR, Rehearsed, Work

H100 = DEVICES["h100-80gb"]
GIB = 2**30


def flags(stage: str, **named):
    module, config_class = plans.STAGES[stage]
    return parse(config_class, words(module.DEFAULTS | named))


def seconds(x: float) -> Cost:
    return Cost(computing=x)


def planned(
    stage: str = "sft",
    *,
    peak: int = GIB,
    trained: int = 1000,
    parameters: int = 1000,
    units: int = 8,
    micro_batches: int = 1,
    slots: int = 0,
    device=H100,
    **named,
) -> plans.Plan:
    """A plan of made-up measurements: every part takes a number of seconds that is a power of ten of its own."""
    rollout = (
        {"hand-over": seconds(1e-1), "prefill": seconds(1e-2), "decode": seconds(1e-3), "evaluate": seconds(1e-4)}
        if stage in RLVR
        else {}
    )
    seen = Rehearsed(
        parameters=parameters,
        trained=trained,
        peak=Peak(peak),
        peaks={"update": Peak(peak)},
        micro_batch=seconds(10.0),
        last=seconds(100.0),
        optimizer=seconds(1000.0),
        tokens=500,
        model_flops=1e12,
        gradient_sync=("every", ""),
        dtype=torch.bfloat16,
        compute=torch.bfloat16,
        rollout=rollout,
        slots=slots,
    )
    return plans.Plan(stage, flags(stage, **named), device, 1, Work((100,), (100,), micro_batches, units), seen)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserved", [0, GIB, 3 * GIB])
def test_what_is_outside_the_allocator_is_needed_too(reserved):
    """The peak, 2 % that the allocator loses, and the context: it fits to the byte."""
    needed = round(1.02 * 10 * GIB) + reserved
    p = planned(peak=10 * GIB, device=dataclasses.replace(H100, reserved=reserved, memory=needed))
    assert p.needed == needed and p.fits
    assert not dataclasses.replace(p, device=dataclasses.replace(p.device, memory=needed - 1)).fits


def test_a_cpu_loses_nothing_between_blocks():
    assert planned(peak=10 * GIB, device=dataclasses.replace(H100, name="cpu", reserved=7)).needed == 10 * GIB + 7


def test_an_estimate_counts_what_is_reserved(monkeypatch):
    """Of 12 layers from 2 and 3, in every phase: the larger at the end need not be the larger at first."""
    peaks = {2: {"forward": Peak(100), "update": Peak(150)}, 3: {"forward": Peak(160), "update": Peak(160)}}
    made = lambda stage, config, lm_config, value_config, device: SimpleNamespace(
        seen=SimpleNamespace(peaks=peaks[lm_config.num_hidden_layers]),
        seconds=float(lm_config.num_hidden_layers),
        tokens=2,
    )
    monkeypatch.setattr(search, "make", made)
    p = planned(device=dataclasses.replace(H100, reserved=1000))
    needed, time = search.estimate(p, p.config, SimpleNamespace(num_hidden_layers=12), None)
    assert needed == 100 + 10 * 60 + 1000 and time == pytest.approx(12 / 2)


# --- disk -------------------------------------------------------------------------------------------------------------

BYTES = {  # of a trained number: its master and both of its moments
    ("float32", "adamw"): 4 + 4 + 4,
    ("bfloat16", "adamw"): 2 + 2 + 2,
    ("float32", "adamw_8bit"): 4 + 2 * (1 + 4 / 256),
    ("bfloat16", "adamw_8bit"): 2 + 2 * (1 + 4 / 256),
}


@pytest.mark.parametrize("master, optimizer", BYTES)
def test_a_checkpoint_holds_masters_and_both_moments(master, optimizer):
    """And so many of them at a time as are kept, and one that is being written."""
    size = round(1_000_000 * BYTES[master, optimizer])
    found = planned(trained=1_000_000, master_dtype=master, optimizer=optimizer, save_steps=10, save_total_limit=3).disk
    assert found["a checkpoint"] == size and found["checkpoints, one being written"] == 4 * size
    assert (
        planned(trained=1_000_000, master_dtype=master, optimizer=optimizer, save_steps=0).disk[
            "checkpoints, one being written"
        ]
        == 0
    )


def test_only_what_is_trained_is_in_a_checkpoint_and_everything_in_the_export():
    found = planned(trained=10, parameters=1000, use_lora=True).disk
    assert found["a checkpoint"] == 120 and found["final/"] == 2 * 1000  # in the checkpoint's bfloat16
    assert planned(trained=10, parameters=1000, use_lora=True, export_adapter=True).disk["final/"] == 4 * 10
    assert planned(parameters=1000, export_dtype="float32").disk["final/"] == 4 * 1000


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_micro_batch_of_a_step_takes_its_time(n):
    p = planned(micro_batches=n)
    assert p.parts == pytest.approx({"forward and backward": 10 * (n - 1) + 100, "optimizer": 1000})
    assert p.seconds == pytest.approx(10 * (n - 1) + 1100) and p.tokens == 500 * n
    assert p.mfu == pytest.approx(n * 1e12 / p.seconds / H100.flops)


@pytest.mark.parametrize("stage", RLVR)
@pytest.mark.parametrize("units, slots, waves", [(1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 4, 3), (64, 1, 64)])
def test_responses_beyond_the_slots_are_decoded_in_further_waves(units, slots, waves, stage):
    p = planned(
        stage, units=units, slots=slots, micro_batches=3, response_length=200, num_ppo_epochs=4, num_mini_batches=2
    )
    assert p.parts == pytest.approx(
        {
            "hand-over": 0.1,
            "prefill": 0.01 * units,
            "decode": 0.001 * 200 * waves,
            "evaluate": 3 * 1e-4,
            "update": 4 * (2 * 10 + 100),
            "optimizer": 4 * 2 * 1000,
        }
    )
    assert p.mfu == pytest.approx(4 * 3 * 1e12 / p.seconds / H100.flops)  # of four passes over three micro-batches


@pytest.mark.parametrize("stage", plans.STAGES)
@pytest.mark.parametrize(
    ("named", "steps"),
    [
        ({"num_examples": 100}, 4),  # the short last one is a step
        ({"num_examples": 100, "num_train_epochs": 3}, 12),
        ({"num_examples": 20, "num_train_epochs": 3}, 3),
        ({"num_examples": 100, "max_steps": 2}, 2),
        ({"num_examples": 100, "max_steps": 30}, 30),  # whatever the epochs
        ({"max_steps": 30}, 30),
        ({}, None),
    ],
)
def test_steps_are_those_that_the_run_takes(stage, named, steps):
    assert total_steps(planned(stage, batch_size=32, **({"num_train_epochs": 1} | named))) == steps


# --- a rank's work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("budget", [254, 600, 2048])
@pytest.mark.parametrize("stage, of_a_unit", [("sft", 1), ("dpo", 2), ("ppo", 1), ("grpo", 1)])
def test_micro_batches_are_those_that_packing_makes_on_a_rank(stage, of_a_unit, budget, ranks):
    """48 units of 128 tokens a sequence, which feed 127 each, packed as a step is packed."""
    named = {"batch_size": 12, "num_samples_per_prompt": 4} if stage in RLVR else {"batch_size": 48}
    work = Work.of(stage, flags(stage, micro_batch_tokens=budget, **named), ranks, 128)
    packed = pack([of_a_unit * 127] * 48, budget, ranks)
    assert work.units == 48 // ranks and {len(batches) for batches in packed} == {work.micro_batches}
    assert len(work.typical) == of_a_unit * max(len(positions) for batches in packed for positions in batches)
    assert work.full[:of_a_unit] == work.typical[:of_a_unit] == (127,) * of_a_unit and sum(work.full) <= max(
        budget, of_a_unit * 127
    )


def test_ranks_share_what_does_not_divide():
    """13 conversations on 4 ranks: at most 4 each, of which 3 fit a micro-batch; of half the length, all at once."""
    config = flags("sft", batch_size=13, micro_batch_tokens=300)
    longest = Work.of("sft", config, 4, 101)
    assert (longest.units, longest.micro_batches, longest.full, longest.typical) == (4, 2, (100,) * 3, (100,) * 2)
    shorter = Work.of("sft", config, 4, 101, mean=51.0)
    assert (shorter.units, shorter.micro_batches, shorter.full, shorter.typical) == (4, 1, (100,) * 3, (50,) * 4)

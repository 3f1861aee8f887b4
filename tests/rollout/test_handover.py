"""The hand-over in buckets: to the bit what one gather a parameter gives, in few collectives and bounded memory; on one
rank without a copy.
"""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import world
from engine.data.batch import micro_batch
from engine.model.adapters.lora import Adapters
from rollout import Request, Sampler, SamplingParams, handover, room
from rollout.handover import Moving, Place
from tests import ranks
from tests.families import load, save_family
from tests.rollout.handover_stage import CASES, MODULES

UNEVEN = {"vocab_size": 511, "intermediate_size": 57}  # rows that neither 2 nor 3 divide
BLOCKS = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 511, "head_dim": 16}  # whole NF4 blocks


@pytest.fixture(scope="module")
def here():
    return world.start()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_buckets_give_what_one_gather_a_parameter_gives(count, tmp_path, embedded_dir):
    """Tied and untied, in both dtypes, under adapters, in NF4, trained whole; one bucket, and many."""
    tied = save_family("llama_biased", tmp_path / "tied", embedded_dir[0], **UNEVEN)
    untied = save_family("qwen3", tmp_path / "untied", embedded_dir[0], **BLOCKS)
    argv = ["--tied", tied, "--untied", untied, "--output", tmp_path / "seen.json"]
    result = ranks.launch(argv, count, module="tests.rollout.handover_stage", log=tmp_path / "log")
    assert result.ok, result.output
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {key.rpartition(" ")[0] for key in seen} == set(CASES)
    for key, found in seen.items():
        case, _, limit = key.rpartition(" ")
        first, second = found["rounds"]
        for seen_then in (first, second):
            assert len(seen_then["buckets"]) == seen_then["planned"]
            assert count > 1 or not seen_then["buckets"] + seen_then["wholes"]
        if count == 1:
            continue
        assert max(first["buckets"]) <= int(limit) and sum(first["buckets"]) >= found["bytes"]
        assert len(first["buckets"]) <= -(-1.2 * found["bytes"] // int(limit))  # the padding of short tensors
        assert (len(first["wholes"]) > 0) == (case in ("lora", "nf4", "saved"))
        if int(limit) == 2**25:
            assert len(first["buckets"]) == 1 and len(first["wholes"]) <= 1
        if "adapters" not in CASES[case]:
            assert second == first
        else:  # merged layers, and what is trained whole
            assert (sum(second["buckets"]) > 0) == (case != "nf4 frozen")
            assert sum(second["buckets"]) < 0.7 * sum(first["buckets"])


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(1, 5), st.integers(2, 400), st.randoms(use_true_random=False))
def test_pieces_reach_their_places(shapes, count, limit, random):
    """Every rank's padded chunks, simulated: whole tensors, rows and columns of them, whatever the bucket."""
    kinds = [random.choice(["whole", "rows", "columns"]) for _ in shapes]
    wholes = [torch.randn(shape) for shape in shapes]
    moving, expected = [], []
    for kind, w in zip(kinds, wholes, strict=True):
        dimension = {"whole": 0, "rows": 0, "columns": 1}[kind]
        first = random.randrange(w.shape[dimension])
        size = random.randrange(w.shape[dimension] - first + 1)
        place = None if kind == "whole" else Place(dimension, first, size)
        part = w if place is None else w.narrow(dimension, first, size)
        expected.append(part)
        moving.append(Moving(torch.full(part.shape, torch.nan), lambda: None, w.shape, True, place))
    before, handover.BUCKET = handover.BUCKET, limit
    try:
        plan = handover.buckets(moving, count)
    finally:
        handover.BUCKET = before
    for bucket in plan:
        for piece in bucket:
            (w,) = (w for w, one in zip(wholes, moving, strict=True) if one is piece.moving)
            chunks = handover._per_rank(w.shape, count)
            padded = torch.full((count * chunks,), torch.nan)
            padded[: w.numel()] = w.flatten()
            handover._put(piece, padded.view(count, chunks)[:, piece.start : piece.stop])
        widest = max(row for _, row in shapes)
        assert 4 * count * sum(piece.stop - piece.start for piece in bucket) <= max(limit, 4 * count * widest)
    for one, part in zip(moving, expected, strict=True):
        assert torch.equal(one.target, part)
    for one, after in itertools.pairwise(plan):  # a bucket closes where the next row does not fit
        assert 4 * count * (sum(p.stop - p.start for p in one) + max(row for _, row in shapes)) > limit, after


# --- on one rank ------------------------------------------------------------------------------------------------------


def a_batch(here):
    return micro_batch([(np.arange(5, 45), np.arange(40) > 3)], (0,), here.device)


def sampler_of(policy, here, dtype=torch.float32) -> Sampler:
    return Sampler(policy.lm.config, policy, here, dtype=dtype, max_length=32, slots=2)


def logprobs_of(sampler: Sampler) -> list[float]:
    """Of one greedy response."""
    request = Request(np.arange(5, 15), 0)
    (rollout,) = sampler.generate([request], SamplingParams(max_new_tokens=6, temperature=0), seed=0, step=0)
    return rollout.logprobs_t1.tolist()


def test_one_rank_samples_from_the_policys_own_tensors(here, tmp_path, embedded_dir):
    """No copy, an update is seen, training is not disturbed, and addresses stay."""
    policy = load(save_family("llama_biased", tmp_path / "m", embedded_dir[0]), here)
    sampler = sampler_of(policy, here)
    theirs = {name: p.to_local() for name, p in policy.lm.named_parameters()}
    own = dict(sampler.lm.named_parameters())
    assert {name: p.data_ptr() for name, p in own.items()} == {name: p.data_ptr() for name, p in theirs.items()}
    assert not any(p.requires_grad for p in own.values())
    before = policy.logprobs(a_batch(here))  # leaves what FSDP has gathered: it is not taken for the weights
    sampler.load(policy)
    first = logprobs_of(sampler)
    assert torch.equal(policy.logprobs(a_batch(here)), before)
    gathered = sampler_of(policy, here)
    assert own["model.norm.weight"].data_ptr() != gathered.lm.model.norm.weight.data_ptr()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    policy.logprobs(a_batch(here)).sum().backward()
    optimizer.step()
    policy.release()
    sampler.load(policy)
    assert logprobs_of(sampler) != first
    copied = handover.skeleton(policy.lm.config, "sdpa", torch.float32, here.device)
    handover.load(copied, policy.lm, here)
    gathered.load(policy)
    assert logprobs_of(gathered) == logprobs_of(sampler)
    for name, p in copied.named_parameters():
        assert torch.equal(p, own[name]) and p.data_ptr() != own[name].data_ptr()
        assert own[name].data_ptr() == theirs[name].data_ptr()


def test_a_policy_that_moved_is_copied(here, tmp_path, embedded_dir):
    """Where its tensors came to lie elsewhere, the sampler keeps its addresses and follows by copies."""
    policy = load(save_family("qwen3", tmp_path / "m", embedded_dir[0]), here)
    sampler = sampler_of(policy, here)
    addresses = [p.data_ptr() for p in sampler.lm.parameters()]
    norm = policy.lm.model.norm.weight
    norm._local_tensor = norm.to_local().detach().clone().mul_(3.0)
    sampler.load(policy)
    assert torch.equal(sampler.lm.model.norm.weight, norm.to_local())
    assert addresses == [p.data_ptr() for p in sampler.lm.parameters()]


def test_another_policy_is_refused_where_weights_are_shared(here, tmp_path, embedded_dir):
    directory = save_family("qwen3", tmp_path / "m", embedded_dir[0])
    policy, other = load(directory, here), load(directory, here)
    sampler = sampler_of(policy, here)
    with pytest.raises(ValueError, match="every policy takes a sampler of its own"):
        sampler.load(other)
    copies = sampler_of(policy, here, torch.bfloat16)  # shares nothing
    copies.load(policy)
    copies.load(other)


def test_under_adapters_only_merged_layers_are_copied(here, tmp_path, embedded_dir):
    """The rest is shared once and for all; so it is where the base is in 4 bits."""
    directory = save_family("qwen3", tmp_path / "m", embedded_dir[0], **BLOCKS)
    for four_bit in (False, True):
        adapters = Adapters(4, 8.0, False, MODULES, 1, four_bit=four_bit)
        policy = load(directory, here, adapters=adapters)
        sampler = sampler_of(policy, here)
        own = dict(sampler.lm.named_parameters())
        frozen = {name: p.to_local() for name, p in policy.lm.named_parameters() if name in own}
        shared = {name for name, p in frozen.items() if own[name].data_ptr() == p.data_ptr()}
        matrices = {f"{name}.weight" for name in MODULES}
        if four_bit:
            matrices = {name for name, p in own.items() if "proj" in name}
        assert shared == own.keys() - matrices
        sampler.load(policy)
        first = {name: p.clone() for name, p in own.items()}
        for name, p in policy.lm.named_parameters():
            if name.endswith("lora_B"):
                p.to_local().detach().normal_()
        sampler.load(policy)
        changed = {name for name, p in own.items() if not torch.equal(p, first[name])}
        assert changed == {f"{name}.weight" for name in MODULES}


# --- weights that are there for a rollout alone -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_given_back_is_there_again_after_the_next_load(dtype, adapted, here, tmp_path, embedded_dir):
    """What is the policy's own stays; a copy takes nothing meanwhile, frozen weights too, and comes back whole."""
    directory = save_family("qwen3", tmp_path / "m", embedded_dir[0])
    adapters = Adapters(4, 8.0, False, MODULES, 1) if adapted else None
    policy = load(directory, here, adapters=adapters)
    sampler = Sampler(policy.lm.config, policy, here, dtype=dtype, max_length=32, slots=2, weights="gathered")
    requests = [Request(np.arange(5, 15), i, max_new_tokens=8) for i in range(2)]
    drawn = []
    for _ in range(2):
        sampler.load(policy)
        drawn.append([r.response_ids.tolist() for r in sampler.generate(requests, SamplingParams(), seed=1, step=2)])
        sampler.release()
        left = {name for name, p in sampler.lm.named_parameters() if p.untyped_storage().nbytes()}
        assert left == {name for name, _ in sampler.lm.named_parameters() if name in sampler.lm.origin.shared}
    assert drawn[0] == drawn[1] and bool(left) == (dtype == torch.float32)


def test_weights_are_kept_where_a_third_of_the_memory_is_left():
    flags = lambda how, ahead=0: SimpleNamespace(rollout_weights=how, rollout_ahead=ahead)
    chosen = lambda how, beside, memory=90: room.weights(flags(how), 20, beside, memory)
    assert (chosen("auto", 40), chosen("auto", 41), chosen("auto", 10**9, None)) == ("shared", "gathered", "shared")
    assert (chosen("keep", 80), chosen("gather", 0), chosen("gather", 0, None)) == ("shared", "gathered", "gathered")
    assert room.weights(flags("auto", ahead=1), 20, 80, 90) == "apart"


def test_what_training_will_hold(here, tmp_path, embedded_dir):
    """A gradient and two moments of every number that is trained, in fp32 or in eight bits."""
    policy = load(save_family("llama", tmp_path / "m", embedded_dir[0]), here)
    n = sum(p.numel() for p in policy.parameters())
    assert room.to_come([policy], "adamw") == 12 * n and room.to_come([policy, policy], "adamw_8bit") == 12 * n
    assert room.copy_of(policy.lm, torch.bfloat16) == 2 * n
    for p in list(policy.parameters())[1:]:
        p.requires_grad_(False)
    assert room.to_come([policy], "adamw") == 12 * next(policy.parameters()).numel()

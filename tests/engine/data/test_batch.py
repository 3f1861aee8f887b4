"""Packing: nothing lost, nothing over budget, ranks level; and the micro-batch that comes of it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import packing
from engine.data.batch import micro_batch, sum_by_sequence
from engine.data.packing import pack

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=80), st.integers(1, 2500), st.integers(1, 9))
@settings(deadline=None, max_examples=300)
def test_pack_places_every_example_once_within_the_budget(tokens, budget, ranks):
    packed = pack(tokens, budget, ranks)
    assert len(packed) == ranks and len({len(bins) for bins in packed}) == 1
    placed = [i for bins in packed for b in bins for i in b]
    assert sorted(placed) == list(range(len(tokens)))
    for b in (b for bins in packed for b in bins):
        assert sum(tokens[i] for i in b) <= budget or len(b) == 1
        assert b == sorted(b)
    # no more bins than first-fit could be forced to use: two lightest bins of a rank's share always exceed one budget
    assert len(packed[0]) <= -(-(2 * -(-sum(tokens) // budget) + len(tokens)) // ranks) + 1


def test_pack_is_level_at_the_size_of_the_recipe():
    """128 sequences of the mixture's lengths on 8 ranks: the busiest carries at most 1.02 of the mean."""
    generator = np.random.Generator(np.random.Philox(key=0))
    for _ in range(20):
        tokens = np.clip(generator.lognormal(6.2, 0.9, 128), 8, 4096).astype(int).tolist()
        loads = [sum(tokens[i] for b in bins for i in b) for bins in pack(tokens, 16384, 8)]
        assert max(loads) <= 1.02 * sum(loads) / 8


def test_ranks_carry_equal_loads():
    """Four examples over the budget on two ranks: the longest and the shortest together."""
    per_rank = pack([90, 20, 80, 10], 5, 2)
    assert sorted(sorted(i for bin in bins for i in bin) for bins in per_rank) == [[0, 3], [1, 2]]


def test_pack_of_a_whole_dataset_takes_few_attempts():
    """Every second sequence over half the budget, where the volume says nothing of the bins needed."""

    attempts, original = [], packing._emptiest_first
    packing._emptiest_first = lambda *args: attempts.append(1) or original(*args)
    try:
        (bins,) = pack([1100, 700] * 2000, 2048, 1)
    finally:
        packing._emptiest_first = original
    assert sum(map(len, bins)) == 4000 and len(attempts) < 40 and len(bins) <= 2200


def test_micro_batch_is_shifted_once():
    """The docstring's example, by hand."""
    batch = micro_batch([(np.array([5, 6, 7]), np.array([0, 0, 1])), (np.array([8, 9]), np.array([1, 1]))], (4, 2), CPU)
    assert batch.ids_T.tolist() == [5, 6, 8] and batch.positions_T.tolist() == [0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 3] and batch.cu_seqlens.dtype == torch.int32
    assert batch.rows_R.tolist() == [1, 2] and batch.targets_R.tolist() == [7, 9]
    assert batch.counts_S.tolist() == [1, 1] and batch.cuts == (0, 1, 2)
    assert batch.examples == (4, 2) and batch.num_tokens == 3 and batch.max_seqlen == 2


def test_empty_micro_batch_has_one_token_that_does_not_count():
    batch = micro_batch([], (), CPU)
    assert batch.lengths == (1,) and not len(batch.rows_R) and batch.num_tokens == 0


@given(st.lists(st.integers(1, 300), max_size=90))
@settings(deadline=None, max_examples=100)
def test_a_stream_rounded_up_is_the_stream_and_a_tail(lengths):
    batch = micro_batch([(np.arange(2, n + 3), np.ones(n + 1, bool)) for n in lengths], range(len(lengths)), CPU)
    stream, tokens = batch.rounded_up(), sum(batch.lengths)
    assert (
        len(stream.ids_T) == len(stream.positions_T)
        and len(stream.ids_T) % 128 == 120
        and 0 <= len(stream.ids_T) - tokens < 128
    )
    assert (
        stream.ids_T[:tokens].tolist() == batch.ids_T.tolist()
        and stream.positions_T[:tokens].tolist() == batch.positions_T.tolist()
    )
    tail = len(stream.ids_T) - tokens
    assert stream.positions_T[tokens:].tolist() == list(range(tail))
    assert stream.lengths == batch.lengths + ((tail,) if tail else ())
    bounds = stream.cu_seqlens.tolist()
    assert torch.equal(stream.bounds, stream.cu_seqlens) and torch.equal(batch.bounds, batch.cu_seqlens)
    assert (
        stream.cu_seqlens.dtype == torch.int32
        and bounds[: len(batch.lengths) + 1] == batch.cu_seqlens.tolist()
        and set(bounds[len(batch.lengths) + 1 :]) == {len(stream.ids_T)}
    )
    assert len(bounds) in (65, 129) and (len(bounds) == 65 or len(lengths) >= 64)
    assert stream.max_seqlen >= max(stream.lengths) and stream.max_seqlen in (128, 256, 512)
    assert batch.num_tokens == sum(lengths)


@given(st.lists(st.lists(st.floats(-50, 0), max_size=9), min_size=1, max_size=12))
@settings(deadline=None, max_examples=100)
def test_sum_by_sequence(values):
    flat = torch.tensor([x for v in values for x in v], dtype=torch.float64, requires_grad=True)
    sums = sum_by_sequence(flat, torch.tensor([len(v) for v in values]))
    torch.testing.assert_close(sums, torch.tensor([sum(v) for v in values], dtype=torch.float64))
    if len(flat):
        weights = torch.arange(1.0, len(values) + 1, dtype=torch.float64)
        (weights * sums).sum().backward()
        assert flat.grad.tolist() == [float(i + 1) for i, v in enumerate(values) for _ in v]

"""8-bit moments of several ranks on one: what each holds, and its numbers read back by the blocks that they had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.train import adamw8bit
from engine.train.adamw8bit import SIGNED, AdamW8bit, Layout, dynamic_map
from tests import needs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "shape, ranks, per_rank, blocks, eight_bit, aligned, state_bytes",
    [
        ((64, 64), 1, 4096, 16, True, True, 2 * (4096 + 4 * 16)),
        ((64, 63), 1, 4032, 16, False, True, 8 * 4032),
        ((90, 151), 2, 45 * 151, 27, True, False, 2 * (90 * 151 + 4 * 2 * 27)),
        ((91, 151), 2, 46 * 151, 28, True, False, 2 * (91 * 151 + 4 * 2 * 28)),
        ((65, 128), 4, 17 * 128, 9, False, False, 8 * 65 * 128),
        ((65, 256), 3, 22 * 256, 22, True, True, 2 * (65 * 256 + 4 * 3 * 22)),
    ],
)
def test_what_a_rank_holds(shape, ranks, per_rank, blocks, eight_bit, aligned, state_bytes):
    """The first ranks hold a row more; blocks are of a shard, and all ranks hold as many scales."""
    layout = Layout(torch.Size(shape), ranks)
    found = (layout.per_rank, layout.blocks, layout.eight_bit, layout.aligned, layout.state_bytes)
    assert found == (per_rank, blocks, eight_bit, aligned, state_bytes)


def written(x: torch.Tensor, ranks: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes like x, scales of all ranks) as so many ranks hold a moment, by bitsandbytes' own quantiser."""
    layout, values = Layout(x.shape, ranks), dynamic_map(signed, CPU)
    codes, scales = [], torch.zeros(ranks * layout.blocks)
    for rank, shard in enumerate(x.flatten().split(layout.per_rank)):
        found = adamw8bit.bitsandbytes().functional.quantize_blockwise(shard, code=values, blocksize=256)
        codes.append(found[0].flatten())
        scales[rank * layout.blocks :][: len(found[1].absmax)] = found[1].absmax
    return torch.cat(codes).view(x.shape), scales


def moment(shape: tuple[int, ...], signed: bool) -> torch.Tensor:
    """Numbers whose size changes by far from block to block."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).flatten()
    x = x * torch.logspace(-3, 3, len(x))
    return (x if signed else x.abs()).view(shape)


def near(found: torch.Tensor, x: torch.Tensor) -> bool:
    """Within two roundings of 8 bits of the largest number around."""
    around = nn.functional.max_pool1d(x.flatten().abs()[None, None], 1025, 1, 512)[0, 0]
    return bool(((found.flatten() - x.flatten()).abs() <= 0.03 * around).all())


@needs.bitsandbytes
@pytest.mark.parametrize("shape, ranks", [((90, 151), 2), ((91, 151), 3), ((65, 256), 3), ((64, 256), 2)])
def test_one_rank_takes_over_the_moments_of_several(shape, ranks):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = AdamW8bit([p])
    optimizer.moments(p)
    read = {}
    for key, signed in SIGNED.items():
        read[key], read[f"{key}_scale"] = written(moment(shape, signed), ranks, signed)
    held = optimizer.moments(p, ranks)
    assert {name: (t.shape, t.dtype) for name, t in held.items()} == {n: (t.shape, t.dtype) for n, t in read.items()}
    for name, t in held.items():
        t.copy_(read[name])
    moved = Layout(torch.Size(shape), ranks).per_rank % 256 > 0
    assert optimizer.adopt(p, held, ranks) == moved
    state, now = optimizer.state[p], Layout(torch.Size(shape), 1)
    for key, signed in SIGNED.items():
        values = dynamic_map(signed, CPU)
        found = adamw8bit._dequantise(state[key].flatten(), state[f"{key}_scale"], now, 0, values)
        assert near(found, moment(shape, signed)), key


@needs.bitsandbytes
@pytest.mark.parametrize("first", [0, 100, 256, 45 * 151, 45 * 151 + 300])
def test_numbers_from_any_place_on(first):
    """Of 2 ranks' shards, as a rank of another layout reads its own."""
    x = moment((90, 151), True)
    codes, scales = written(x, 2, True)
    layout = Layout(x.shape, 2)
    found = adamw8bit._dequantise(codes.flatten()[first:], scales, layout, first, dynamic_map(True, CPU))
    whole = adamw8bit._dequantise(codes.flatten(), scales, layout, 0, dynamic_map(True, CPU))
    assert torch.equal(found, whole[first:]) and near(whole, x)

"""NF4: frozen weights in 4 bits, as bytes that can be cut by rows, so that every rank holds 1 / N of them.

    w = s_b q_c  c: one of 16 fixed values q in [-1, 1] (4 bits, two a byte),  s_b = max |w| of its block of 64 (fp32)

Double quantisation holds the scales in 8 bits as well: s_b = o + u_g d_c, d one of 256 fixed values, u_g the largest |s
- o| of a group of 256 blocks, o the mean of all of a matrix's scales.

Blocks never straddle rows (64 divides their length), so codes (O, I / 2) and scales (O, I / 64) are cut by FSDP like
the matrix itself. All are Parameters of bytes, the fp32 scales too: a cast scale is a wrong weight. They are in every
state dict under their names; nothing lives beside them in Python objects. Their dtype, HELD, is a floating one of one
byte, since FSDP of torch 2.11 makes each of its parameters with a gradient first, which bytes cannot have; nothing
computes in it: what is held is only ever copied, and read as `uint8` here.

The quantiser and the kernels are bitsandbytes'; source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), sections 3 and
4.

O output features · I input features · T tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from engine.model.bnb import bitsandbytes

BLOCK, GROUP = 64, 256
HELD = torch.float8_e5m2


def shapes(out_features: int, in_features: int, double: bool) -> dict[str, tuple[int, int]]:
    """The shapes of the tensors of bytes that hold a matrix. Raises ValueError where 64 does not divide the rows."""
    if in_features % BLOCK:
        raise ValueError(f"rows of {in_features} weights are not whole blocks of {BLOCK}")
    blocks = in_features // BLOCK
    found = {"codes": (out_features, in_features // 2), "scales": (out_features, blocks if double else 4 * blocks)}
    if double:
        found["groups"] = (-(-out_features * blocks // GROUP) + 1, 4)  # u of every group and, last, o
    return found


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales (O, I / 64) fp32) of some rows of a matrix: the same whatever rows are quantised together."""
    bitsandbytes()  # registers the kernels
    if not len(weight_OI):
        return weight_OI.new_empty((0, weight_OI.shape[1] // 2), dtype=torch.uint8), weight_OI.new_empty(
            (0, weight_OI.shape[1] // BLOCK), dtype=torch.float32
        )
    codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(weight_OI.contiguous(), BLOCK, "nf4", torch.uint8)
    return codes.view(weight_OI.shape[0], -1), scales.view(weight_OI.shape[0], -1)


def quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (O, I / 64), groups (G + 1, 4)) of a whole matrix's scales."""
    offset = scales.mean()
    codes, sizes = torch.ops.bitsandbytes.quantize_blockwise.default(
        (scales - offset).flatten(), dynamic_map(scales.device), GROUP
    )
    return codes.view(scales.shape), torch.cat([sizes.flatten(), offset[None]]).view(-1, 1).view(torch.uint8)


@lru_cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values d of bitsandbytes' dynamic 8-bit code."""
    return bitsandbytes().functional.create_dynamic_map().to(device)


@torch.library.custom_op("triptych::nf4_dequantise", mutates_args=())
def _dequantise(codes: Tensor, scales: Tensor, groups: Tensor | None, dtype: torch.dtype, first_row: int) -> Tensor:
    bitsandbytes()
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    if groups is None:
        scales = scales.view(torch.float32)
    else:
        values = groups.contiguous().view(torch.float32).flatten()
        block = torch.arange(scales.numel(), device=scales.device) + first_row * scales.shape[1]
        scales = dynamic_map(scales.device)[scales.flatten().int()] * values[block // GROUP] + values[-1]
    if not rows:
        return torch.empty(0, columns, dtype=dtype, device=codes.device)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        codes.reshape(-1, 1), scales.reshape(-1), BLOCK, "nf4", [rows, columns], dtype
    )


@_dequantise.register_fake
def _(codes: Tensor, scales: Tensor, groups: Tensor | None, dtype: torch.dtype, first_row: int) -> Tensor:
    return codes.new_empty((codes.shape[0], 2 * codes.shape[1]), dtype=dtype)


def dequantise(codes: Tensor, scales: Tensor, groups: Tensor | None, dtype: torch.dtype, first_row: int = 0) -> Tensor:
    """The rows of a matrix that start at `first_row`, (O, I), from what is held. `groups` are the whole matrix's; None:
    the scales are fp32.
    """
    groups = None if groups is None else groups.view(torch.uint8)
    return _dequantise(codes.view(torch.uint8), scales.view(torch.uint8), groups, dtype, first_row)


class Linear(torch.autograd.Function):
    """y = x W^T of a frozen W in NF4, dequantised once per pass and kept by neither: the backward pass holds the bytes
    alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales, groups)
        return x @ dequantise(codes, scales, groups, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, groups = ctx.saved_tensors
        return grad @ dequantise(codes, scales, groups, grad.dtype), None, None, None

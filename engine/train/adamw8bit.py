"""AdamW whose moments are held in 8 bits, by blocks of 256 numbers of this rank's shard.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        w = (1 - lr d) w - lr m^ / (sqrt(v^) + eps)

in fp32, with m^ = m / (1 - b1^t), v^ = v / (1 - b2^t) and decay d. Between steps x = m or v is a byte c a number and an
fp32 scale s a block:

    x_i ~ s_b q_c(i)    s_b = max |x| in block b,   q: 256 fixed values in (-1, 1] (for v in [0, 1]), denser towards 0

Blocks are counted from the first number of a shard, as a kernel sees it, so they depend on the number of ranks. A
tensor whose full shard, ceil(rows / ranks) * columns, is under 4096 numbers keeps fp32 moments: it would gain nothing.
That number is the same on every rank, also where a rank's own shard is shorter or empty.

On a CPU bitsandbytes (0.50) finds codes in a table of 1 / 32768 of a block's scale, so a 0 beside larger numbers is
held as 2e-5 of it: a weight without a gradient, in a block with others that have one, moves by some 0.3 % of lr a step.

The kernels are bitsandbytes'; source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv
2110.02861). Left out on purpose: fp32 moments for embeddings, which the paper needs for training from scratch, and
paging to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from engine.model.bnb import bitsandbytes
from engine.model.shards import local, local_rows, sharded_like

BLOCK, SMALLEST = 256, 4096
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@dataclass(frozen=True)
class Layout:
    """How the moments of a tensor of this shape are held by each of `ranks` ranks."""

    shape: torch.Size
    ranks: int

    @classmethod
    def of(cls, p: Tensor) -> Layout:
        return cls(p.shape, p.device_mesh.size() if isinstance(p, DTensor) else 1)

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape[1:])

    @property
    def per_rank(self) -> int:
        """Numbers in a full shard."""
        return -(-self.shape[0] // self.ranks) * self.columns if self.shape else 1

    @property
    def eight_bit(self) -> bool:
        return self.per_rank >= SMALLEST

    @property
    def blocks(self) -> int:
        """Scales that a rank holds; those of a shorter shard are padded with zeros, so that all ranks hold the same
        number.
        """
        return -(-self.per_rank // BLOCK)

    @property
    def aligned(self) -> bool:
        """Whether the blocks are those of the whole tensor: number i is in block i // 256 on any such layout."""
        return self.per_rank % BLOCK == 0 or self.per_rank >= self.shape.numel()

    @property
    def state_bytes(self) -> int:
        """Bytes of both moments, over all ranks."""
        return 2 * (self.shape.numel() + 4 * self.ranks * self.blocks) if self.eight_bit else 8 * self.shape.numel()


class AdamW8bit(torch.optim.Optimizer):
    """State of a parameter: step (a host number), exp_avg and exp_avg_sq, cut as it is: codes in uint8, or fp32 where
    it is small; with codes, exp_avg_scale and exp_avg_sq_scale, fp32, 1-D, `Layout.blocks` on every rank. No moment is
    ever a 16-bit float, whatever the parameter is.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient; the gradients stay."""
        kernels = bitsandbytes().functional
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                moments, step = self.moments(p), self.state[p]["step"]
                step += 1
                if not local(p).numel():
                    continue
                assert local(p).is_contiguous()  # the kernels walk over memory
                m, v, *scales = (local(moment) for moment in moments.values())
                common = {
                    "optimizer_name": "adam",
                    "g": local(p.grad).contiguous(),
                    "p": local(p),
                    "state1": m,
                    "state2": v,
                    "beta1": group["betas"][0],
                    "beta2": group["betas"][1],
                    "eps": group["eps"],
                    "step": int(step),
                    "lr": group["lr"],
                    "weight_decay": group["weight_decay"],
                }
                if scales:
                    m_scale, v_scale = (scale[: -(-m.numel() // BLOCK)] for scale in scales)
                    m_map, v_map = (dynamic_map(signed, m.device) for signed in SIGNED.values())
                    kernels.optimizer_update_8bit_blockwise(
                        **common, beta3=0.0, alpha=0.0, qmap1=m_map, qmap2=v_map, absmax1=m_scale, absmax2=v_scale
                    )
                else:
                    kernels.optimizer_update_32bit(**common)

    @torch.no_grad()
    def moments(self, p: Tensor, ranks: int | None = None) -> dict[str, Tensor]:
        """The state of a parameter without its step, made (zero) where there is none.

        Given `ranks`, tensors to read into what a run of so many ranks wrote, for `adopt`: moments cut as they are now,
        of the type that they had there, and the scales of all ranks. What can be read in place is read in place.
        """
        now, state = Layout.of(p), self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in SIGNED:
                zeros = torch.zeros_like(local(p), dtype=torch.uint8 if now.eight_bit else torch.float32)
                state[key] = sharded_like(zeros, p)
            for key in SIGNED if now.eight_bit else ():
                scales = torch.zeros(now.blocks, device=zeros.device)
                state[f"{key}_scale"] = (
                    DTensor.from_local(scales, p.device_mesh, p.placements, run_check=False)
                    if isinstance(p, DTensor)
                    else scales
                )
        held = {key: moment for key, moment in state.items() if key != "step"}
        if ranks in (None, now.ranks):
            return held
        then = Layout(p.shape, ranks)
        dtype = torch.uint8 if then.eight_bit else torch.float32
        found = {
            key: held[key] if held[key].dtype == dtype else sharded_like(torch.empty_like(local(p), dtype=dtype), p)
            for key in SIGNED
        }
        whole = {f"{key}_scale": torch.empty(ranks * then.blocks, device=local(p).device) for key in SIGNED}
        return found | (whole if then.eight_bit else {})

    @torch.no_grad()
    def adopt(self, p: Tensor, read: dict[str, Tensor], ranks: int) -> bool:
        """Takes over what `moments(p, ranks)` has read; returns whether numbers were rounded again, which every rank
        answers alike.

        Where the blocks of both layouts are those of the whole tensor, scales are only dealt out anew; else this shard
        is dequantised by the blocks of then and, if it is held in 8 bits now, quantised by those of now.
        """
        now, then, state = Layout.of(p), Layout(p.shape, ranks), self.state[p]
        if ranks == now.ranks or not (now.eight_bit or then.eight_bit):
            return False
        first = (local_rows(p).start or 0) * now.columns
        same_blocks = now.eight_bit and then.eight_bit and now.aligned and then.aligned
        for key, signed in SIGNED.items():
            held, moment = local(state[key]), local(read[key]).flatten()
            if same_blocks:
                scales = read[f"{key}_scale"][first // BLOCK :][: -(-held.numel() // BLOCK)]
            else:
                if then.eight_bit:
                    moment = _dequantise(moment, read[f"{key}_scale"], then, first, dynamic_map(signed, held.device))
                if not now.eight_bit:
                    held.copy_(moment.view_as(held))
                    continue
                codes, scales = _quantise(moment, dynamic_map(signed, held.device))
                held.copy_(codes.view_as(held))
            local(state[f"{key}_scale"])[: len(scales)] = scales
        return now.eight_bit and not same_blocks

    def describe(self, names: dict[Tensor, str]) -> str:
        """One line: what is held in 8 bits, what is not, and what a number costs."""
        layouts = {p: Layout.of(p) for group in self.param_groups for p in group["params"]}
        small = [names[p] for p, layout in layouts.items() if not layout.eight_bit]
        numbers = sum(p.numel() for p in layouts)
        packed = sum(p.numel() for p, layout in layouts.items() if layout.eight_bit)
        state_bytes = sum(layout.state_bytes for layout in layouts.values())
        rest = f"; fp32 for {len(small)} with under {SMALLEST} numbers a rank, the first {small[0]}" if small else ""
        return (
            f"optimizer: 8-bit moments for {len(layouts) - len(small)} of {len(layouts)} tensors"
            f" ({packed / numbers:.1%} of the numbers), {state_bytes / numbers:.2f} bytes a number{rest}"
        )


def _dequantise(codes: Tensor, scales: Tensor, then: Layout, first: int, values: Tensor) -> Tensor:
    """The numbers from `first` on of a tensor, (n,) fp32, from their codes (n,) and the scales of all of `then.ranks`
    ranks.
    """
    kernels, found = bitsandbytes().functional, torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rank in range(then.ranks):  # a block ends where its rank's shard ended
        start, stop = max(first, rank * then.per_rank), min(first + len(codes), (rank + 1) * then.per_rank)
        if start >= stop:
            continue
        block, before = divmod(start - rank * then.per_rank, BLOCK)
        mine = slice(start - first, stop - first)
        piece = pad(codes[mine], (before, 0))  # the kernel begins at the beginning of a block
        block_scales = scales[rank * then.blocks + block :][: -(-len(piece) // BLOCK)]
        found[mine] = kernels.dequantize_blockwise(
            piece, absmax=block_scales.contiguous(), code=values, blocksize=BLOCK
        )[before:]
    return found


def _quantise(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (n,), scales (ceil(n / 256),)) of n numbers."""
    if not len(x):
        return x.to(torch.uint8), x
    codes, state = bitsandbytes().functional.quantize_blockwise(x, code=values, blocksize=BLOCK)
    return codes, state.absmax


@lru_cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values q, ascending. Made on a thread of its own, which no mode reaches: a plan's fake tensors must not
    be kept here.
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(lambda: bitsandbytes().functional.create_dynamic_map(signed=signed).to(device)).result()

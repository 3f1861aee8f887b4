"""A run without its machine: a world of any size in one process, on tensors that have shapes and no numbers.

Within `rehearsal` the engine's own code runs as it is, under a ledger. What stands in for the GPU, when one is planned
for:

    attention      an operator that keeps what a flash kernel keeps (its output and an fp32 log-sum-exp per head and
                   token) and takes its workspace (fp32 query gradients, one key and value gradient a query head);
                   registered as the backend PLANNED
    offloading     a stream whose copies cost the link's time, to memory that is not the device's

The head's passes are operators already, which have a shape without numbers. Collectives are torch's fake process
group's: they move nothing, and what is allocated around them is real FSDP's doing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from engine.data.packing import Packing
from engine.hardware import Device
from engine.model import attention
from engine.model.offload import CopyStream
from engine.model.policy import Root
from engine.world import World
from launch.planner import foreign
from launch.planner.ledger import ACTIVATIONS, HEAD, HOST, KV_CACHE, Ledger
from rollout.cache import PagedCache

PLANNED = "planned"


class PlannedWorld(World):
    """Rank 0 of `size`; every other rank says what it says."""

    def gather(self, x: Any) -> list[Any]:
        """What every rank would say."""
        return [x] * self.size

    def say(self, *lines: str, last: bool = False) -> None:
        """Nothing."""

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Nothing."""


class PlannedStream(CopyStream):
    """What is offloaded lies in host memory, and travels over the link to it."""

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        super().__init__(device)
        self.ledger = ledger

    def host_like(self, x: Tensor) -> Tensor:
        """Host memory of its shape."""
        with self.ledger.allocating(HOST):
            return super().host_like(x)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """The time of a copy."""
        self.ledger.haul(source)


class PlannedCache(PagedCache):
    """A cache whose memory is seen as such, and that has numbers nowhere."""

    def __init__(self, *arguments: Any, ledger: Ledger) -> None:
        super().__init__(*arguments)
        self.ledger = ledger

    def allocate(self, device: torch.device) -> None:
        """Pools of fake tensors."""
        with self.ledger.allocating(KV_CACHE):
            for index, layer in self.layers.items():
                shape = self.counts[layer.window], layer.kv_heads, self.block
                self.keys[index] = torch.zeros(*shape, layer.key_size, dtype=layer.dtype, device=device)
                self.values[index] = torch.zeros(*shape, layer.value_size, dtype=layer.dtype, device=device)


@contextlib.contextmanager
def rehearsal(
    device: Device, size: int, *, per_node: int, fused: float = 1.0
) -> Iterator[tuple[PlannedWorld, Ledger, FakeTensorMode]]:
    """(world, ledger, mode) of a rehearsal of `size` ranks. No process group may exist yet. Raises UserError."""
    import torch.testing._internal.distributed.fake_pg as fake  # registers the backend

    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ranks",))
        world = PlannedWorld(0, size, 0, torch.device("cpu"), mesh, dist.HashStore(), device.memory)
        cpu = device.name == "cpu"
        ledger = Ledger(device, ranks=size, per_node=per_node, block=1 if cpu else 512, fused=fused)
        with foreign.followed(ledger, cuda=not cpu), FakeTensorMode(allow_non_fake_inputs=True) as mode, ledger:
            yield world, ledger, mode
    finally:
        dist.destroy_process_group()


def follow(root: Root, ledger: Ledger) -> None:
    """What the root's forward allocates is activations until the last hidden states are there, and the head's after
    that.
    """
    outside: list[str] = []

    def enters(*_: Any) -> None:
        outside.append(ledger.kind)
        ledger.kind = ACTIVATIONS

    def has_hidden(*_: Any) -> None:
        ledger.kind = HEAD

    def leaves(*_: Any) -> None:
        ledger.kind = outside.pop()

    root.register_forward_pre_hook(enters)
    root.lm.base_model.register_forward_hook(has_hidden)
    root.register_forward_hook(leaves, prepend=True)


# --- attention --------------------------------------------------------------------------------------------------------


def visible_pairs(lengths: tuple[int, ...], window: int | None = None) -> float:
    """Pairs of a query and a key that it sees, over all sequences."""
    whole = [n * (n + 1) // 2 for n in lengths if window is None or window >= n]
    banded = [window * n - window * (window - 1) // 2 for n in lengths if window is not None and window < n]
    return float(sum(whole) + sum(banded))


def _attend(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, packing: Packing, *, scale, window, softcap, sinks_N
) -> Tensor:
    flops = 4.0 * q_TNH.shape[1] * q_TNH.shape[2] * visible_pairs(packing.lengths, window)
    return flash_attention(q_TNH, k_TKH, v_TKH, flops, 0)[0]


@torch.library.custom_op("triptych::planned_attention", mutates_args=())
def flash_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, flops: float, workspace: int) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of fake tensors."""
    raise NotImplementedError("fake tensors only")


@flash_attention.register_fake
def _(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, flops: float, workspace: int) -> tuple[Tensor, Tensor]:
    lse_NT = q_TNH.new_empty((q_TNH.shape[1], len(q_TNH)), dtype=torch.float32)
    return torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device), lse_NT


@torch.library.custom_op("triptych::planned_attention_backward", mutates_args=())
def flash_attention_backward(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    flops: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients."""
    raise NotImplementedError("fake tensors only")


@flash_attention_backward.register_fake
def _(grad_TNH, q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, flops, workspace) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TNH, k_TKH, v_TKH))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.flops = inputs[3]


def _backward(ctx: Any, grad_TNH: Tensor, _: Tensor) -> tuple:
    q_TNH, k_TKH, v_TKH, out_TNH, lse_NT = ctx.saved_tensors
    expanded = 2 * q_TNH.numel() * q_TNH.element_size() if k_TKH.shape[1] < q_TNH.shape[1] else 0
    workspace = 4 * (q_TNH.numel() + lse_NT.numel()) + expanded
    saved = q_TNH, k_TKH, v_TKH, out_TNH, lse_NT
    grads = flash_attention_backward(grad_TNH.contiguous(), *saved, 2.5 * ctx.flops, workspace)
    return (*grads, None, None)


flash_attention.register_autograd(_backward, setup_context=_save)
attention.add_backend(PLANNED, lambda: _attend)

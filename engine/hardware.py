"""What a machine can do: memory, arithmetic and links of the devices that a plan may be made for.

Figures of the data sheets, and beside them the share that programs reach: matrix products 80 % of the dense bf16 figure
(measured on an H200), memory 90 % (4.3 of 4.8 TB/s there), links 75 %. A time made of them is a floor that no run goes
below.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from engine import world
from engine.errors import UserError, nearest

MATMUL, MEMORY, LINK = 0.80, 0.90, 0.75  # reachable shares


@dataclass(frozen=True)
class Device:
    """One device of a cluster, and how it reaches the others."""

    name: str
    memory: int  # bytes that the driver reports
    flops: float  # dense bf16 matrix products, of the data sheet
    flops_fp32: float  # fp32 matrix products as torch runs them by default, without TF32
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to and from its neighbours in a node, each way
    network: float  # bytes/s of a whole node to other nodes, each way
    host: float  # bytes/s to and from the host's memory, as reached
    attention: float  # share of `flops` that flash-attention 2, the kernel inside torch, reaches
    launch: float = 5e-6  # seconds below which no operation goes, from Python
    replay: float = 1.5e-6  # and of a CUDA graph
    reserved: int = 3 * 2**30 // 2  # context, libraries' workspaces, NCCL's buffers: outside the allocator

    def seconds(self, flops: float, moved: float, *, kind: str = "", launch: float | None = None) -> float:
        """The time of one operation: the longest of its arithmetic, its bytes and its launch. `kind`: matmul | fp32 |
        attention.
        """
        launch = self.launch if launch is None else launch
        rate = {
            "matmul": MATMUL * self.flops,
            "fp32": MATMUL * self.flops_fp32,
            "attention": self.attention * self.flops,
        }.get(kind)
        return max(flops / rate if rate else 0.0, moved / (MEMORY * self.bandwidth), launch)

    def collective(self, moved: float, ranks: int, per_node: int) -> float:
        """The time of an all-gather or reduce-scatter of `moved` bytes (whole), the slower of the links in a node and
        between nodes.
        """
        nodes = -(-ranks // per_node)
        inside = min(ranks, per_node)
        seconds = moved * (inside - 1) / inside / (LINK * self.link)
        if nodes > 1:
            seconds = max(seconds, moved * (nodes - 1) / nodes / (LINK * self.network))
        return seconds + 20e-6 if ranks > 1 else 0.0


MIB, TERA, GIGA = 2**20, 1e12, 1e9
DEVICES = {
    d.name: d
    for d in (
        Device("h100-80gb", 81_559 * MIB, 989 * TERA, 67 * TERA, 3.35 * TERA, 450 * GIGA, 400 * GIGA, 45 * GIGA, 0.35),
        Device("h200-141gb", 143_771 * MIB, 989 * TERA, 67 * TERA, 4.8 * TERA, 450 * GIGA, 400 * GIGA, 45 * GIGA, 0.35),
        Device("a100-80gb", 81_920 * MIB, 312 * TERA, 19.5 * TERA, 2.04 * TERA, 300 * GIGA, 200 * GIGA, 22 * GIGA, 0.6),
        Device("a100-40gb", 40_960 * MIB, 312 * TERA, 19.5 * TERA, 1.56 * TERA, 300 * GIGA, 200 * GIGA, 22 * GIGA, 0.6),
        Device("l40s-48gb", 46_068 * MIB, 362 * TERA, 91.6 * TERA, 0.864 * TERA, 32 * GIGA, 50 * GIGA, 22 * GIGA, 0.5),
        Device(
            "rtx4090-24gb", 24_564 * MIB, 165 * TERA, 82.6 * TERA, 1.01 * TERA, 32 * GIGA, 12.5 * GIGA, 22 * GIGA, 0.6
        ),
        Device("b200-180gb", 183_359 * MIB, 2250 * TERA, 80 * TERA, 8.0 * TERA, 900 * GIGA, 400 * GIGA, 45 * GIGA, 0.2),
    )
}


def device(name: str, ranks_per_node: int) -> Device:
    """The device of that name; 'cpu' is this machine, measured now, its memory shared by the ranks. Raises
    UserError.
    """
    name = name.lower()
    if name == "cpu":
        return _this_machine(ranks_per_node)
    if name not in DEVICES:
        names = [*DEVICES, "cpu"]
        raise UserError(f"--gpu {name} is not one of {', '.join(names)}{nearest(name, names)}")
    return DEVICES[name]


def emulates_bfloat16() -> bool:
    """Whether this processor has no instructions for bfloat16, so that torch rounds and widens every number by others;
    False where torch cannot tell.
    """
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return known.get("architecture") == "x86_64" and not (known.get("avx512_bf16") or known.get("amx_bf16"))


def of_gpu(device: torch.device) -> Device | None:
    """The data sheet of this CUDA device: of the cards of its name, that of the nearest memory; None: not in the
    table.
    """
    name = torch.cuda.get_device_name(device).lower().replace(" ", "").replace("geforce", "")
    memory = torch.cuda.get_device_properties(device).total_memory
    alike = [known for known in DEVICES.values() if known.name.partition("-")[0] in name]
    return min(alike, key=lambda known: abs(known.memory - memory), default=None)


def _this_machine(ranks: int) -> Device:
    n = 512
    a, b = torch.ones(n, n), torch.empty(n, n)
    fp32 = 2 * n**3 / _best(lambda: torch.mm(a, a, out=b))
    a16 = a.bfloat16()
    bf16 = 2 * n**3 / _best(lambda: a16 @ a16)
    x, y = torch.ones(2**23), torch.empty(2**23)
    bandwidth = 2 * x.nbytes / _best(lambda: y.copy_(x))
    share: dict[str, Any] = {
        "reserved": 0,
        "launch": 5e-6,
        "attention": 0.3,
        "link": bandwidth / 4,
        "network": 1 * GIGA,
        "host": bandwidth,
    }
    return Device(
        "cpu", world.host_memory() // ranks, bf16 / MATMUL, fp32 / MATMUL, bandwidth=bandwidth / MEMORY, **share
    )


def _best(work) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best

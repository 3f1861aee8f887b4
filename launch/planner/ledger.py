"""The ledger: what a program's tensors take and what its operations cost, kept while it runs on fake tensors.

    live     bytes of every storage between its allocation and the moment that its last tensor dies; a view adds
             nothing, and what is resized (so FSDP frees and refills gathered weights) is followed
    peak     the largest sum of live bytes, what it is made of, and the phase in which it occurs
    cost     per phase: FLOPs and bytes of every operation, and the sum of their times on a device (engine/hardware.py);
             collectives are counted apart

A storage has a kind: the one that was current when it was allocated, until `mark` says better. Nothing is computed:
answers that depend on data (`.item()`, the truth of a tensor) are 1.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.hardware import Device

aten = torch.ops.aten
# kinds of storages
WEIGHTS, GATHERED, GRADIENTS, HEAD, ACTIVATIONS = "weights", "gathered weights", "gradients", "loss head", "activations"
REFERENCE, VALUE, SAMPLER, KV_CACHE, OPTIMIZER = (
    "reference copy",
    "value model",
    "sampler's weights",
    "KV cache",
    "optimizer",
)
BATCH = "other"
HOST = "host memory"  # the kind that is not the device's
DEVICE_OF = torch.ops.prim.device.default


@dataclass
class Cost:
    """Of one phase: operations, FLOPs, bytes of memory traffic, and seconds of computing, of collectives and to and
    from the host, which overlap.
    """

    operations: float = 0.0
    flops: float = 0.0
    moved: float = 0.0
    computing: float = 0.0
    communicating: float = 0.0
    hauling: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.computing, self.communicating, self.hauling)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(getattr(self, f.name) * factor for f in fields(Cost)))

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1.0


@dataclass(frozen=True)
class Peak:
    """The most that was live at once."""

    total: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    phase: str = ""


class Ledger(TorchDispatchMode):
    """Entered within a FakeTensorMode (and around what runs in it)."""

    def __init__(
        self, device: Device, *, ranks: int = 1, per_node: int = 8, block: int = 512, fused: float = 1.0
    ) -> None:
        """`block`: allocations are rounded up to it (CUDA's caching allocator: 512). `fused`: the share of the traffic
        of operations without matrix products that is left when a compiler fuses them.
        """
        super().__init__()
        self.device, self.ranks, self.per_node, self.block, self.fused = device, ranks, per_node, block, fused
        self.kind, self.phase_name = BATCH, "start"
        self.live: dict[str, int] = {}
        self.total = 0
        self.peak = Peak()
        self.peaks: dict[str, Peak] = {}  # by phase
        self.costs: dict[str, Cost] = {"start": Cost()}
        self.paused = False  # operations leave no trace
        self.positions = 0.0  # that a response's next token reads of the cache
        self.launch: float | None = None  # seconds below which no operation goes; None: the device's
        self.rows = 0  # what repeat_interleave over counts gives where it is not told: those of the micro-batch
        self._entries: dict[int, list] = {}  # storage → [bytes, kind, weak reference]
        self._plans: dict[Any, str] = {}  # operator → how it is counted

    # --- kinds and phases ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """New storages are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """Peak and costs are also kept under this name."""
        before, self.phase_name = self.phase_name, name
        self.costs.setdefault(name, Cost())
        self._look()
        try:
            with self.allocating(kind):
                yield
        finally:
            self.phase_name = before

    def mark(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """The storages of these tensors are of this kind."""
        for t in tensors:
            if t is not None and (entry := self._entries.get(_storage(t)._cdata)):
                self._add(entry[1], -entry[0])
                self._add(kind, entry[0])
                entry[1] = kind

    def kind_of(self, t: Tensor) -> str:
        entry = self._entries.get(_storage(t)._cdata)
        return entry[1] if entry else ""

    # --- memory -------------------------------------------------------------------------------------------------------

    def note(self, t: Tensor) -> None:
        """Counts a tensor's storage, unless it is counted already."""
        if t.device.type == "meta":
            return
        storage = _storage(t)
        key, size = storage._cdata, -(-storage.nbytes() // self.block) * self.block
        entry = self._entries.get(key)
        if entry is None:
            reference = weakref.ref(storage, lambda _: self._freed(key))
            self._entries[key] = [size, self.kind, reference]
            self._add(self.kind, size)
        elif entry[0] != size:
            self._add(entry[1], size - entry[0])
            entry[0] = size

    def workspace(self, size: int) -> None:
        """Memory that an operation takes and gives back."""
        if self.total + size > min(self.peak.total, self.peaks.get(self.phase_name, self.peak).total):
            self._add(self.kind, size)
            self._add(self.kind, -size)

    def _freed(self, key: int) -> None:
        size, kind, _ = self._entries.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] = self.live.get(kind, 0) + size
        if kind != HOST:
            self.total += size
        if size > 0:
            self._look()

    def _look(self) -> None:
        """Keeps what is live now where it is the most so far."""
        if self.total > self.peak.total:
            self.peak = Peak(self.total, dict(self.live), self.phase_name)
        if self.phase_name not in self.peaks or self.total > self.peaks[self.phase_name].total:
            self.peaks[self.phase_name] = Peak(self.total, dict(self.live), self.phase_name)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """A storage that was counted has another size from now on."""
        if entry := self._entries.get(storage._cdata):
            rounded = -(-size // self.block) * self.block
            self._add(entry[1], rounded - entry[0])
            entry[0] = rounded

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):  # most of all calls
            return args[0].fake_device
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes first, and calls again with the shards
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = _how(func)
        if plan == "answer":
            return _one(args[0])
        if plan == "repeats":
            known = kwargs.get("output_size")
            out = args[0].new_empty(self.rows if known is None else known)
        else:
            out = func(*args, **kwargs)
        if plan in ("view", "nothing") or self.paused:
            return out
        outputs = _tensors(out, [])
        for t in outputs:
            self.note(t)
        if plan != "new" and not (outputs and outputs[0].device.type == "meta"):
            self._count(plan, func, args, kwargs, outputs or _tensors(args, []))
        return out

    def touch(self, tensors: list[Tensor]) -> None:
        """The cost of an operation that the ledger does not see: every tensor is read and written."""
        moved = 2 * sum(map(_bytes, tensors))
        self.costs[self.phase_name].moved += moved
        self.costs[self.phase_name].computing += self.device.seconds(0, moved)

    def haul(self, t: Tensor) -> None:
        """A copy to or from the host."""
        self.costs[self.phase_name].hauling += _bytes(t) / self.device.host

    def _count(self, plan: str, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
        cost = self.costs[self.phase_name]
        moved, flops, kind = 0.0, 0.0, ""
        if plan == "collective":
            moved = max(_bytes(t) for t in _tensors(args, []))
            factor = 2 if "allreduce" in str(func) else 1
            cost.communicating += factor * self.device.collective(moved, self.ranks, self.per_node)
            return
        if plan == "lookup":
            moved = 2 * sum(map(_bytes, outputs))
        elif plan == "statistics":  # one read of the logits, three numbers a row
            moved = _bytes(args[0]) + 3 * _bytes(outputs[0])
        elif plan == "gradient":  # one read of the logits, one write
            moved = 2 * _bytes(args[0])
        elif plan == "pages":  # of every response, what its query sees
            q, keys, values, window = args[0], args[1], args[2], args[6]
            seen = len(q) * (self.positions if window is None else min(window, self.positions))
            moved = seen * (_bytes(keys[0, :, 0]) + _bytes(values[0, :, 0])) + 2 * _bytes(outputs[0])
            flops, kind = 2.0 * seen * q.shape[1] * (keys.shape[3] + values.shape[3]), "attention"
        elif plan == "put":  # into a few places: the values are read and written
            moved = 2 * _bytes(args[2])
        else:
            moved = sum(map(_bytes, _tensors(args, _tensors(list(kwargs.values()), [])))) + sum(map(_bytes, outputs))
            flops, kind = self._flops(plan, args, outputs)
            if plan == "add":  # the total is read and written
                moved = sum(map(_bytes, args)) + _bytes(args[0])
        if not flops:
            moved *= self.fused
        cost.operations += 1
        cost.flops += flops
        cost.moved += moved
        cost.computing += self.device.seconds(flops, moved, kind=kind, launch=self.launch)

    def _flops(self, plan: str, args: tuple, outputs: list[Tensor]) -> tuple[float, str]:
        if plan.startswith("mm"):
            a, b = args[int(plan[2:])], outputs[0]
            kind = "fp32" if a.dtype == torch.float32 else "matmul"
            return 2.0 * b.numel() * a.shape[-1], kind
        if plan == "add":  # total += a b
            total, a = args[:2]
            return 2.0 * total.numel() * a.shape[-1], "fp32" if a.dtype == torch.float32 else "matmul"
        if plan == "attention":  # our stand-in: what it costs is its last argument
            flops, workspace = args[-2:]
            self.workspace(workspace)
            return flops, "attention"
        if plan.startswith("sdpa"):  # (..., L, H) each; causal is not seen here, but sequences come one by one
            q, k = (args[1], args[2]) if plan == "sdpa5" else (args[0], args[1])
            products = 5 if plan == "sdpa5" else 2
            return (
                products
                * 2.0
                * math.prod(q.shape[:-1])
                * k.shape[-2]
                * q.shape[-1]
                / (2 if q.shape[-2] == k.shape[-2] else 1),
                "fp32",
            )
        return 0.0, ""


def _storage(t: Tensor) -> torch.UntypedStorage:
    return (t.to_local() if isinstance(t, DTensor) else t).untyped_storage()


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _tensors(x: Any, found: list[Tensor]) -> list[Tensor]:
    if isinstance(x, Tensor):
        found.append(x)
    elif isinstance(x, (list, tuple)):
        for y in x:
            _tensors(y, found)
    return found


def _one(t: Tensor) -> Any:
    return True if t.dtype == torch.bool else 1.0 if t.is_floating_point() else 1


MATMULS = {
    aten.mm: "mm0",
    aten.addmm: "mm1",
    aten.addmm_: "mm1",
    aten.bmm: "mm0",
    aten.baddbmm: "mm1",
    aten._grouped_mm: "mm0",
}
LOOKUPS = {aten.embedding, aten.index_select, aten.gather, aten.index, aten.slice_backward}


def _how(func: Any) -> str:
    """How an operator is counted."""
    packet, namespace = func.overloadpacket, func.namespace
    name = packet._qualified_op_name.partition("::")[2]
    if packet is aten._local_scalar_dense or packet is aten.equal:
        return "answer"
    if func is aten.repeat_interleave.Tensor:
        return "repeats"
    if packet in MATMULS:
        return MATMULS[packet]
    if packet in LOOKUPS:
        return "lookup"
    if packet is aten.index_put_:
        return "put"
    if namespace in ("prim", "profiler"):
        return "nothing"
    if namespace == "c10d":
        return (
            "collective"
            if any(word in name for word in ("allgather", "reduce_scatter", "allreduce", "all_gather"))
            else "nothing"
        )
    if namespace == "triptych":
        kinds = {"logits_statistics": "statistics", "logits_gradient_": "gradient", "add_product_": "add"}
        if name in kinds:
            return kinds[name]
        if name == "_paged_attention" or name == "paged_attention":
            return "pages"
        if "attention" in name:
            return "attention"
    if name.startswith("_scaled_dot_product"):
        return "sdpa5" if "backward" in name else "sdpa2"
    if name.startswith(("empty", "new_empty")):
        return "new"
    if func.is_view or name in ("detach", "_unsafe_view", "lift_fresh", "alias", "view", "_to_copy_view"):
        return "view"
    return "other"

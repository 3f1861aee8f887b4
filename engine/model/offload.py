"""--activation_offload: what a layer saves for the backward pass waits in host memory.

It travels over a stream beside the computing one. With full recomputation of layers, what is saved are their inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from engine.model.policy import Root

SMALL = 2**16  # bytes of a tensor that is not worth moving


def offload_layers(root: Root, stream: CopyStream) -> None:
    """Of every decoder layer but the last, whose tensors would come back at once."""
    *first, _ = root.lm.base_model.layers
    for layer in first:
        layer.forward = _offloading(layer.forward, layer, stream)


def _offloading(forward: Callable, layer: nn.Module, stream: CopyStream) -> Callable:
    def forward_and_send(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # of the weights FSDP keeps or gathers again what is needed; what comes by keyword (rotary tables, boundaries)
        # is all layers'
        saved = SavedTensors(stream, [*layer.parameters(), *layer.buffers(), *tree_leaves(kwargs)])
        with saved_tensors_hooks(saved.pack, saved.unpack):
            out = forward(*args, **kwargs)
        saved.sent()
        return out

    return forward_and_send


class CopyStream:
    """Between a device and its host: a stream beside the computing one (CUDA), and who was sent last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: weakref.ref[SavedTensors] | None = None
        # (when they will have been copied, tensors that must live until then)
        self.leaving: list[tuple[Any, list[Tensor]]] = []

    def host_like(self, x: Tensor) -> Tensor:
        """Host memory of its shape, pinned for CUDA."""
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=self.stream is not None)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """After all that is computed so far; CUDA: beside what is computed next."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: Any) -> None:
        """The computing stream waits, not the host."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)


class SavedTensors:
    """What one layer saved in one forward pass, by number: on the host, and from its backward pass on again on the
    device.

    Autograd's hooks hold this and nothing in it holds them, so it is freed with the graph, without the collector.
    """

    def __init__(self, stream: CopyStream, staying: Iterable[Any]) -> None:
        self.stream = stream
        self.staying = {x.untyped_storage()._cdata for x in staying if isinstance(x, Tensor)}
        self.before = stream.last  # the layer whose backward pass is next
        stream.last = weakref.ref(self)
        self.numbers: dict[tuple, int] = {}  # of a tensor that is saved twice, once
        self.leaving: list[Tensor] = []  # held, so that no other tensor takes their memory, and their name
        self.host: list[Tensor] = []
        self.device: list[Tensor | None] = []
        self.uses: list[int] = []
        self.arrival: Any = None

    def pack(self, x: Tensor) -> Tensor | int:
        if x.untyped_storage()._cdata in self.staying or x.nbytes < SMALL or x.device != self.stream.device:
            return x
        if any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)):
            return x  # expanded: it is smaller than it looks
        name = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        if name not in self.numbers:
            self.numbers[name] = len(self.host)
            self.leaving.append(x.detach())
            self.host.append(self.stream.host_like(x))
            self.device.append(None)
            self.uses.append(0)
            self.stream.copy(self.host[-1], x.detach())
        number = self.numbers[name]
        self.uses[number] += 1
        return number

    def sent(self) -> None:
        """After the layer's forward pass. The memory of the layer before is free once it is copied, which has had this
        layer's time.
        """
        stream = self.stream
        stream.leaving.append((stream.mark(), self.leaving))
        self.leaving, self.numbers = [], {}
        while len(stream.leaving) > 1:
            stream.wait(stream.leaving.pop(0)[0])

    def unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.uses[packed] == 0:  # a graph that was kept for a second backward pass
            return self.host[packed].to(self.stream.device)
        if self.device[packed] is None:
            self.fetch()
        self.stream.wait(self.arrival)
        self.stream.leaving.clear()  # what comes back was sent later than whatever is still leaving
        if self.before is not None and (before := self.before()) is not None:
            before.fetch()
        self.before = None
        self.uses[packed] -= 1
        x = self.device[packed]
        assert x is not None, "fetched above"
        if self.uses[packed] == 0:
            self.device[packed] = None
        return x

    def fetch(self) -> None:
        """Begins to bring back what is not here."""
        device = self.stream.device
        for i, host in enumerate(self.host):
            if self.device[i] is None and self.uses[i]:
                here = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
                self.stream.copy(here, host)
                self.device[i] = here
        self.arrival = self.stream.mark()

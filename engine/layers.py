"""What a decoder layer keeps for the backward pass, where that waits, and how the layer runs.

    --gradient_checkpointing   of a layer is kept                                           and in the backward pass is run again
      none                     all that autograd saves                                      nothing
      selective                its input, the results of matrix products and of attention   norms, rotary embeddings, activations, dequantisation
      full                     its input                                                    the layer
    --activation_offload       what is kept waits in host memory (pinned, over a stream of its own)
    --compile                  one graph without breaks, for any number of tokens and sequences

Each wraps `layer.forward`, inside FSDP's hooks: weights are gathered when it runs, forward and again in the backward
pass. Training has no random state, so none is kept. Offloading is outermost and sees what remains to be saved: with
full recomputation, the inputs. Eager selective recomputation holds the products itself, so they stay on the device, and
of its layers, too, only the inputs travel.

T tokens of the stream · D hidden.
"""

from __future__ import annotations

import importlib.util
import logging
import sysconfig
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engine.world import compiler

PRODUCTS = {  # and the argument whose last dimension is summed over
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::bmm": 0,
    "aten::baddbmm": 1,
    "aten::linear": 0,
    "aten::_scaled_mm": 0,
    "aten::_grouped_mm": 0,
}
CHEAP = 128  # a product of so few terms, such as an adapter's, takes no longer than writing its result
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
    "triptych::packed_attention",
    "triptych::rehearsed_attention",
}
SMALL = 2**16  # bytes of a tensor that is not worth moving


def recompute_layers(root: nn.Module, mode: str = "full") -> None:
    """Every decoder layer runs again in the backward pass, whole ('full') or but for products and attention
    ('selective').
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _what_to_keep)
    for layer in root.lm.base_model.layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def _what_to_keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name()
    keep = name in ATTENTION or (name in PRODUCTS and args[PRODUCTS[name]].shape[-1] > CHEAP)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# --- torch.compile
# ------------------------------------------------------------------------------------------------------------


def compile_layers(root: nn.Module) -> None:
    """torch.compile on every decoder layer: equal layers share a graph, and the stream comes rounded up, so that none
    is compiled twice.
    """
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(
        logging.ERROR
    )  # its advice, on selective recomputation in place, is heeded
    torch._dynamo.config.recompile_limit = (
        64  # of one code object: kinds of layers x models x adapters x with or without gradients
    )
    for layer in root.lm.base_model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)
    hidden = root.hidden
    root.hidden = lambda batch: hidden(batch.rounded_up())


def why_not_compile(device: torch.device) -> str:
    """What --compile lacks on this machine, or ''."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h, of the package python3-dev) are not installed"
    if device.type == "cuda":
        return "" if compiler("$CC", "gcc", "clang") else "there is no C compiler (gcc, clang or $CC)"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # another torch: by its documentation
        get_cpp_compiler = partial(compiler, "$CXX", "g++")
    try:
        found = get_cpp_compiler()
    except RuntimeError:  # torch._inductor.exc.InvalidCxxCompiler
        found = None
    return "" if found else "there is no C++ compiler (g++ or $CXX)"


# --- offloading
# ---------------------------------------------------------------------------------------------------------------


def offload_layers(root: nn.Module) -> None:
    """What every decoder layer but the last saves for the backward pass waits in host memory; the last one's would come
    back at once.
    """
    *first, _ = root.lm.base_model.layers
    road = _Road(next(root.parameters()).device)
    for layer in first:
        layer.forward = _offloading(layer.forward, layer, road)


def _offloading(forward: Callable, layer: nn.Module, road: _Road) -> Callable:
    def forward_and_send(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # of the weights FSDP keeps or gathers again what is needed; what comes by keyword (rotary tables, boundaries)
        # is all layers'
        load = _Load(road, [*layer.parameters(), *layer.buffers(), *tree_leaves(kwargs)])
        with saved_tensors_hooks(load.pack, load.unpack):
            out = forward(*args, **kwargs)
        load.sent()
        return out

    return forward_and_send


class _Road:
    """Between a device and its host: a stream beside the computing one (CUDA), and who was sent last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: weakref.ref[_Load] | None = None
        self.leaving: list[
            tuple[Any, list[Tensor]]
        ] = []  # (when they will have been copied, tensors that must live until then)

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


class _Load:
    """What one layer saved in one forward pass, by number: on the host, and on the device again from its backward pass
    on.

    The hooks of saved tensors hold the load and nothing in it holds them, so it is freed with the graph, without the
    collector.
    """

    def __init__(self, road: _Road, staying: Iterable[Any]) -> None:
        self.road = road
        self.staying = {x.untyped_storage()._cdata for x in staying if isinstance(x, Tensor)}
        self.before = road.last  # the layer whose backward pass is next
        road.last = weakref.ref(self)
        self.numbers: dict[tuple, int] = {}  # of a tensor that is saved twice, once
        self.leaving: list[Tensor] = []  # held, so that no other tensor takes their memory, and their name
        self.host: list[Tensor] = []
        self.device: list[Tensor | None] = []
        self.uses: list[int] = []
        self.arrival: Any = None

    def pack(self, x: Tensor) -> Tensor | int:
        if x.untyped_storage()._cdata in self.staying or x.nbytes < SMALL or x.device != self.road.device:
            return x
        if any(
            step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)
        ):  # expanded: it is smaller than it looks
            return x
        name = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        if name not in self.numbers:
            self.numbers[name] = len(self.host)
            self.leaving.append(x.detach())
            self.host.append(
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=self.road.stream is not None)
            )
            self.device.append(None)
            self.uses.append(0)
            self.road.copy(self.host[-1], x.detach())
        number = self.numbers[name]
        self.uses[number] += 1
        return number

    def sent(self) -> None:
        """After the layer's forward pass. The memory of the layer before is free once it is copied, which has had this
        layer's time.
        """
        road = self.road
        road.leaving.append((road.mark(), self.leaving))
        self.leaving, self.numbers = [], {}
        while len(road.leaving) > 1:
            road.wait(road.leaving.pop(0)[0])

    def unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.uses[packed] == 0:  # a graph that was kept for a second backward pass
            return self.host[packed].to(self.road.device)
        if self.device[packed] is None:
            self.fetch()
        self.road.wait(self.arrival)
        self.road.leaving.clear()  # what comes back was sent later than whatever is still leaving
        if self.before is not None and (before := self.before()) is not None:
            before.fetch()
        self.before = None
        self.uses[packed] -= 1
        x = self.device[packed]
        if self.uses[packed] == 0:
            self.device[packed] = None
        return x

    def fetch(self) -> None:
        """Begins to bring back what is not here."""
        for i, host in enumerate(self.host):
            if self.device[i] is None and self.uses[i]:
                self.device[i] = torch.empty_strided(
                    host.shape, host.stride(), dtype=host.dtype, device=self.road.device
                )
                self.road.copy(self.device[i], host)
        self.arrival = self.road.mark()

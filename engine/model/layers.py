"""What a decoder layer keeps for the backward pass, where that waits, and how the layer runs.

    --gradient_checkpointing   of a layer is kept                          and is run again in the backward pass
      none                     all that autograd saves                     nothing
      selective                its input, the results of matrix products   norms, rotary embeddings, activations,
                               and of attention                            dequantisation
      full                     its input                                   the layer
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engine.flags import MemoryFlags
from engine.model.offload import CopyStream, offload_layers
from engine.model.policy import Root
from engine.model.shards import local
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
    "triptych::planned_attention",
}


def recompute_layers(root: Root, mode: str = "full") -> None:
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


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compile_layers(root: Root) -> None:
    """torch.compile on every decoder layer: equal layers share a graph, and the stream comes rounded up, so that none
    is compiled twice.
    """
    # its advice, on selective recomputation in place, is heeded
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = (
        64  # of one code object: kinds of layers x models x adapters x with or without gradients
    )
    for layer in root.lm.base_model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)
    root.rounds_up = True


def why_not_compile(device: torch.device) -> str:
    """What --compile lacks on this machine, or ''."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h, of the package python3-dev) are not installed"
    if device.type == "cuda":
        return "" if compiler("$CC", "gcc", "clang") else "there is no C compiler (gcc, clang or $CC)"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        found: str | None = get_cpp_compiler()
    except RuntimeError:  # torch._inductor.exc.InvalidCxxCompiler
        found = None
    return "" if found else "there is no C++ compiler (g++ or $CXX)"


def transform_layers(root: Root, memory: MemoryFlags, stream: CopyStream | None = None) -> None:
    """--gradient_checkpointing, --compile, --activation_offload, from within: what is compiled includes the
    recomputation.

    `stream` carries what is offloaded; None: one of the root's device.
    """
    if memory.gradient_checkpointing != "none":
        recompute_layers(root, memory.gradient_checkpointing)
    if memory.compile:
        compile_layers(root)
    if memory.activation_offload:
        offload_layers(root, stream or CopyStream(local(next(root.parameters())).device))

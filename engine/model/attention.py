"""Packed causal attention: one flat stream of tokens, and no token sees another sequence.

    out_t = sum_{s in window(t)} softmax_s( cap(scale q_t . k_s) ) v_s
    window(t) = { s <= t, s > t - W, same sequence as t }

Registered with transformers' AttentionInterface under the name NAME, so every decoder of the library that mixes tokens
only through attention runs on it unmodified; no mask is ever built. The stream's boundaries arrive as keyword arguments
that the decoder passes through: `packing`, whatever has `cu_seqlens` (int32, S + 1, on the device), `bounds` (the same
on the host), `max_seqlen` and `lengths` (Python ints): a MicroBatch, or `Packing` where there is none. Nothing here
waits for the device.

Backends: flash-attention 4, 3 or 2 where installed, torch's own varlen kernel on CUDA, scaled_dot_product_attention
per sequence (any device), and `eager`, the formula written out, which the others equal.

T tokens of the stream · N query heads · K key/value heads · G = N / K · H head size · L tokens of one sequence · W
window.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from engine.errors import UserError
from engine.model.attention_backends import BROKEN, Attend, flash, flash4_lacks, varlen
from engine.model.attention_operator import as_operator, operator_while_compiling

NAME = "triptych"
BACKENDS = ("flash4", "flash3", "flash2", "varlen", "sdpa", "eager")
BY_LENGTHS = ("sdpa", "eager")  # loops over sequences, which torch.compile would trace anew for all lengths
ADDED: dict[str, Callable[[], Attend]] = {}


def choose_backend(requested: str, device: torch.device, config: Any, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, why) for `--attention`. Raises UserError for one that is not there or cannot run this model."""
    needs_eager = [name for name in ("attn_logit_softcapping",) if getattr(config, name, None)]
    if getattr(config, "model_type", "") == "gpt_oss":
        needs_eager.append("attention sinks")
    if requested != "auto":
        if why_not := unavailable(requested, device, dtype):
            raise UserError(f"--attention {requested}: {why_not}; --attention auto picks one that runs here")
        return requested, "as asked"
    if needs_eager:
        softcap_flash = needs_eager == ["attn_logit_softcapping"] and not unavailable("flash2", device, dtype)
        return ("flash2" if softcap_flash else "eager"), f"the model has {' and '.join(needs_eager)}"
    broken: list[str] = []
    for backend in BACKENDS:
        why_not = unavailable(backend, device, dtype)
        if not why_not:
            return backend, "; ".join(["first that runs here, in the order " + " > ".join(BACKENDS), *broken])
        if BROKEN in why_not:  # installed by somebody who wants it used
            broken.append(f"{backend}: {why_not}")
    raise AssertionError("eager runs everywhere")


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run here, or ''."""
    if backend in ("sdpa", "eager"):
        return ""
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs --dtype bfloat16"
    module = {
        "flash4": "flash_attn.cute",
        "flash3": "flash_attn_interface",
        "flash2": "flash_attn.flash_attn_interface",
    }.get(backend)
    if backend == "varlen":
        return _cannot_import("torch.nn.attention.varlen")
    if backend in ("flash3", "flash4") and torch.cuda.get_device_capability(device)[0] < 9:
        return "needs a Hopper GPU or newer"
    return _cannot_import(module) or (flash4_lacks() if backend == "flash4" else "")


@lru_cache
def _cannot_import(module: str) -> str:
    """Why a module cannot be used, or ''. It is imported to see: half an installation is found and not usable."""
    try:
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
    except ModuleNotFoundError:
        return f"the package {module} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:
        # a library that is missing, of another torch or CUDA: whatever it raises, another backend serves
        return f"the package {module} {BROKEN} ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    return ""


def register(backend: str) -> str:
    """Registers packed attention on `backend` and returns the name for a model's `attn_implementation`.

    Nothing is registered with AttentionMaskInterface: for a name unknown there the library builds no mask. For a known
    one it would first look at the position ids for packed sequences, and with that wait for the device in every forward
    pass.
    """
    AttentionInterface.register(NAME, packed(backend))
    return NAME


def packed(backend: str) -> Callable:
    """Packed attention on `backend` as a function of AttentionInterface's signature, for who registers it within
    another.
    """
    if backend in ADDED:
        return _packed(ADDED[backend]())
    if backend == "flash4":
        return _packed(as_operator(backend))
    if backend in BY_LENGTHS:
        return _packed(operator_while_compiling(backend))
    return _packed(varlen if backend == "varlen" else flash(backend))


def add_backend(name: str, attend: Callable[[], Attend]) -> None:
    """Another backend for `packed` and `register`, which `choose_backend` does not choose: the planner's."""
    ADDED[name] = attend


def _packed(attend: Callable) -> Callable:
    def attention(
        module,
        query_1NTH,
        key_1KTH,
        value_1KTH,
        attention_mask,
        scaling=None,
        dropout=0.0,
        sliding_window=None,
        softcap=None,
        s_aux=None,
        packing=None,
        **others,
    ) -> tuple[Tensor, None]:
        if packing is None or attention_mask is not None or dropout:
            raise ValueError("packed attention takes a packing, no mask and no dropout")
        q_TNH, k_TKH, v_TKH = (x[0].transpose(0, 1) for x in (query_1NTH, key_1KTH, value_1KTH))
        scale = scaling if scaling is not None else q_TNH.shape[-1] ** -0.5
        out_TNH = attend(
            q_TNH, k_TKH, v_TKH, packing, scale=scale, window=sliding_window, softcap=softcap, sinks_N=s_aux
        )
        return out_TNH[None], None

    return attention

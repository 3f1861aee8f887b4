"""Low-rank adapters on frozen linear layers, dense or in NF4.

    y = x W^T + b + s (x A^T) B^T,      s = alpha / r, or alpha / sqrt(r) (rsLoRA),      A (r, I),  B (O, r)

W and b are frozen, in the compute dtype or in 4 bits (nf4.py); A and B are trained, in the master dtype, and cast to
the compute dtype where they are used. A starts uniform in +- 1 / sqrt(I), drawn from (seed, name) on every world size
alike, B at 0: so the adapted model starts as the frozen one, to the bit. Dropout is left out on purpose: training has
no randomness with a state.

An adapted layer is one module whose tensors are all Parameters, so FSDP cuts each of them by rows: a rank's rows of B
belong to its rows of W, and W + s B A is merged shard by shard. Sources: Hu et al. 2021 (arXiv 2106.09685);
Kalajdzievski 2023 (2312.03732).

O output features · I input features · r rank · T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from engine.model.adapters import nf4
from engine.model.adapters.saved import INITIAL, OFF, ORIGINAL, TRAINED, SavedModule, checkpoint_name, saved
from engine.model.shards import local, local_rows, sharded_like, whole

__all__ = ["INITIAL", "OFF", "TRAINED", "AdaptedLinear", "Adapters"]  # of which the first three are saved.py's
# names that no checkpoint has
OWN = tuple(f".{name}" for name in ("codes", "scales", "groups", "lora_A", "lora_B", "initial_A", "initial_B"))
OWN += (".saved_weight", ".initial_weight")


@dataclass(frozen=True)
class Adapters:
    """What is adapted, and how: r, s, the layers' names, and the form of the frozen weights."""

    rank: int
    alpha: float
    rslora: bool
    modules: tuple[str, ...]  # full names in the causal language model
    seed: int
    four_bit: bool = False
    double_quant: bool = False
    everything: bool = False  # every linear layer was asked for, whatever their names
    keep_initial: bool = False  # a frozen copy of the adapter that training starts from, as the reference
    saved: tuple[str, ...] = ()  # full names of embedding and head, if they are trained whole

    @property
    def form(self) -> str:
        """Of the frozen weights: '', nf4 or nf4-double."""
        return "" if not self.four_bit else "nf4-double" if self.double_quant else "nf4"

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter, dense or in NF4; of rank 0, a frozen layer in NF4 alone."""

    weight: Any  # dense, else None; Any: which of these are there depends on the form
    bias: Any
    codes: Any
    scales: Any
    groups: Any
    lora_A: Any
    lora_B: Any
    initial_A: Any
    initial_B: Any

    def __init__(self, source: nn.Linear, adapters: Adapters, rank: int, master: torch.dtype) -> None:
        """Raises ValueError where the rows are not whole NF4 blocks."""
        super().__init__()
        self.out_features, self.in_features = source.out_features, source.in_features
        self.rank, self.scaling, self.use = rank, adapters.scaling, TRAINED
        self.four_bit = adapters.four_bit
        self.weight = None if self.four_bit else source.weight
        self.bias = source.bias
        shapes = nf4.shapes(self.out_features, self.in_features, adapters.double_quant) if self.four_bit else {}
        for name in ("codes", "scales", "groups"):
            empty = torch.empty(shapes[name], dtype=nf4.HELD, device="meta") if name in shapes else None
            self.register_parameter(name, empty if empty is None else nn.Parameter(empty, requires_grad=False))
        for name in ["lora", *(["initial"] if adapters.keep_initial else [])] if rank else []:
            for leaf, shape in (("A", (rank, self.in_features)), ("B", (self.out_features, rank))):
                empty = torch.empty(shape, dtype=master, device="meta")
                self.register_parameter(f"{name}_{leaf}", nn.Parameter(empty, requires_grad=name == "lora"))

    def forward(self, x: Tensor) -> Tensor:
        if self.four_bit:
            y = nf4.Linear.apply(x, self.codes, self.scales, self.groups)
            y = y if self.bias is None else y + self.bias
        else:
            y = linear(x, self.weight, self.bias)
        if not self.rank or self.use == OFF:
            return y
        a, b = (self.lora_A, self.lora_B) if self.use == TRAINED else (self.initial_A, self.initial_B)
        h_Tr = linear(x.reshape(-1, self.in_features), a.to(x.dtype))
        return torch.addmm(y.reshape(-1, self.out_features), h_Tr, b.to(x.dtype).T, alpha=self.scaling).view(y.shape)

    # --- shard by shard, outside forward ------------------------------------------------------------------------------

    @property
    def matrix(self) -> Tensor:
        """The tensor that is cut as W is."""
        return self.codes if self.four_bit else self.weight

    @torch.no_grad()
    def fill(self, rows_OI: Tensor) -> None:
        """Quantises this rank's rows of W. Collective under double quantisation, which needs the scales of all rows."""
        codes, scales = nf4.quantise(rows_OI.to(self.codes.device))
        held = {"codes": codes}
        if self.groups is None:
            held["scales"] = scales
        else:
            codes, groups = nf4.quantise_scales(whole(sharded_like(scales, self.codes)))
            held |= {"scales": codes[local_rows(self.scales)], "groups": groups[local_rows(self.groups)]}
        for name, rows in held.items():
            local(getattr(self, name)).copy_(rows.view(nf4.HELD))

    @property
    def needed_whole(self) -> list[Tensor]:
        """The tensors of which `merged` asks for all rows, in its order."""
        return [p for p in (self.groups, self.lora_A if self.rank else None) if p is not None]

    @torch.no_grad()
    def merged(self, whole: Callable[[Any], Tensor] = whole) -> Tensor:
        """W + s B A in fp32, cut as W is: this rank's rows, computed from its rows of W and B. Collective by `whole`,
        which gives all rows of a tensor.
        """
        if self.four_bit:
            groups = None if self.groups is None else whole(self.groups)
            rows = nf4.dequantise(
                local(self.codes), local(self.scales), groups, torch.float32, local_rows(self.codes).start
            )
        else:
            rows = local(self.weight).float()
        if self.rank:
            rows = torch.addmm(rows, local(self.lora_B).float(), whole(self.lora_A).float(), alpha=self.scaling)
        return sharded_like(rows, self.matrix)


def linears(lm: Any) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's blocks by full name; the head is not one of them."""
    body = {id(module) for module in lm.base_model.layers.modules()}
    return {name: module for name, module in lm.named_modules() if id(module) in body and isinstance(module, nn.Linear)}


def adapt(lm: Any, adapters: Adapters, *, frozen: torch.dtype, master: torch.dtype) -> list[str]:
    """Freezes a model on the meta device, in the compute dtype, and puts adapters on the named layers.

    Under 4 bits every linear layer of the blocks is quantised, adapted or not; returns the names of the matrices that
    are left dense: those whose rows are not whole blocks, and stacked ones (a mixture's experts). A scalar head stays
    trained.
    """
    lm.requires_grad_(False)
    for p in lm.parameters():
        p.data = p.data.to(frozen)
    left = []
    for name, source in linears(lm).items():
        rank = adapters.rank if name in adapters.modules else 0
        dense = adapters.four_bit and source.in_features % nf4.BLOCK
        if dense:
            left.append(name)
        if not rank and (dense or not adapters.four_bit):
            continue
        path, _, leaf = name.rpartition(".")
        how = adapters if not dense else replace(adapters, four_bit=False)
        setattr(lm.get_submodule(path), leaf, AdaptedLinear(source, how, rank, master))
    left += [name for name, p in lm.base_model.layers.named_parameters() if p.dim() > 2] if adapters.four_bit else []
    there = dict(lm.named_modules())  # a value model has no head for tokens
    for name in (name for name in adapters.saved if name in there):
        path, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(path), leaf, SavedModule(there[name], adapters.keep_initial, master))
    if (score := getattr(lm, "score", None)) is not None:
        score.weight.data = score.weight.data.to(master)
        score.requires_grad_(True)
    return left


def adapted(lm: Any) -> dict[str, AdaptedLinear]:
    return {name: module for name, module in lm.named_modules() if isinstance(module, AdaptedLinear)}


@torch.no_grad()
def initialise(lm: Any, seed: int, start: Callable[[str, slice], Tensor] | None = None) -> None:
    """Fills the adapters, and their initial copies, from `start` (of 'NAME.lora_A' some rows), or at random (A) and
    with 0 (B). What is trained whole is filled from `start` (of NAME), or stays as the checkpoint filled it.
    """
    for name, module in adapted(lm).items():
        for leaf in ("A", "B") if module.rank else ():
            p = getattr(module, f"lora_{leaf}")
            rows = local_rows(p)
            if start:
                values = start(f"{name}.lora_{leaf}", rows)
            else:
                values = (_uniform(seed, name, p.shape) if leaf == "A" else torch.zeros(p.shape))[rows]
            local(p).copy_(values)
            if (kept := getattr(module, f"initial_{leaf}", None)) is not None:
                local(kept).copy_(local(p))
    for name, whole_module in saved(lm).items():
        p, kept = whole_module.saved_weight, getattr(whole_module, "initial_weight", None)
        if start:
            local(p).copy_(start(name, local_rows(p)))
        if kept is not None:
            local(kept).copy_(local(p))


def _uniform(seed: int, name: str, shape: torch.Size) -> Tensor:
    """(r, I) uniform in +- 1 / sqrt(I), from the raw stream of Philox, which numpy guarantees."""
    key = int.from_bytes(hashlib.blake2b(json.dumps([seed, "lora", name]).encode(), digest_size=16).digest(), "little")
    unit = (np.random.Philox(key=key).random_raw(shape.numel()) >> np.uint64(40)).astype(np.float32) * 2.0**-23 - 1
    return torch.from_numpy(unit / np.float32(math.sqrt(shape[1]))).view(shape)


@contextlib.contextmanager
def using(root: nn.Module, which: str) -> Iterator[None]:
    """Forward passes in the body use this adapter: TRAINED, INITIAL or OFF."""
    modules = [module for module in root.modules() if isinstance(module, AdaptedLinear | SavedModule)]
    for module in modules:
        module.use = which
    try:
        yield
    finally:
        for module in modules:
            module.use = TRAINED


def dense(lm: Any) -> dict[str, tuple[torch.Size, Any]]:
    """The model as a checkpoint has it, without adapters: tensor name → (shape, a function that gives it, cut as it is
    held).

    Adapted and 4-bit layers come merged, in fp32, one at a time when they are asked for (collective); of what is
    trained whole its trained weight; others, and the buffers that a checkpoint holds, as they are.
    """
    layers, whole_modules = adapted(lm), saved(lm)
    found: dict[str, tuple[torch.Size, Any]] = {}
    for name, p in lm.named_parameters():
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf != "bias":
            shape = torch.Size([layers[path].out_features, layers[path].in_features])
            found[f"{path}.weight"] = (shape, layers[path].merged)
        elif path in whole_modules:
            found[f"{path}.weight"] = (p.shape, lambda p=whole_modules[path].saved_weight: p)
        elif ORIGINAL not in name:
            found[name] = (p.shape, lambda p=p: p)
    persistent = lm.state_dict(keep_vars=True)
    buffers = {name: b for name, b in lm.named_buffers() if name in persistent}
    return found | {checkpoint_name(name): (b.shape, lambda b=b: b) for name, b in buffers.items()}


def count(lm: Any) -> tuple[int, int]:
    """(trained numbers, numbers of the model without adapters), over all ranks."""
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    return trained, sum(shape.numel() for shape, _ in dense(lm).values())

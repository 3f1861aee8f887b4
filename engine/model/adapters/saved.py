"""Embedding and head trained whole beside the adapters, as PEFT's `modules_to_save`.

A saved module holds the frozen module as it was, in the compute dtype, and a copy of its weight in the master dtype,
which is trained and cast where it is used. So pi_ref is still there under trained embeddings: switched off, the module
is the frozen one. With keep_initial a second copy stays frozen at what training starts from.

Where embedding and head are one tensor (tied), one that is saved is trained apart from the other, as PEFT does: the
model is then untied, and its config says so (`open.untie`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

TRAINED, INITIAL, OFF = "trained", "initial", "off"  # which adapter a forward pass uses
ORIGINAL = ".original_module."  # in the names of the frozen module's tensors


class SavedModule(nn.Module):
    """A module of one weight, frozen, with a trained copy of the weight."""

    saved_weight: Any
    initial_weight: Any

    def __init__(self, source: nn.Module, keep_initial: bool, master: torch.dtype) -> None:
        super().__init__()
        self.original_module, self.use = source, TRAINED
        weight: Any = source.weight
        for name in ("saved", *(["initial"] if keep_initial else [])):
            empty = torch.empty(weight.shape, dtype=master, device="meta")
            self.register_parameter(f"{name}_weight", nn.Parameter(empty, requires_grad=name == "saved"))

    @property
    def weight(self) -> Tensor:
        """The one in use, in the compute dtype."""
        frozen: Any = self.original_module.weight
        if self.use == OFF:
            return frozen
        return (self.saved_weight if self.use == TRAINED else self.initial_weight).to(frozen.dtype)

    def forward(self, *args: Any, **options: Any) -> Any:
        return functional_call(self.original_module, {"weight": self.weight}, args, options)


def vocabulary_modules(lm: Any) -> dict[str, nn.Module]:
    """The embedding and, if there is one, the head by full name: what has a row for every token."""
    wanted = [m for m in (lm.get_input_embeddings(), lm.get_output_embeddings()) if m is not None]
    names = {id(module): name for name, module in lm.named_modules()}
    return {names[id(module)]: module for module in wanted}


def saved(lm: Any) -> dict[str, SavedModule]:
    return {name: module for name, module in lm.named_modules() if isinstance(module, SavedModule)}


def checkpoint_name(name: str) -> str:
    """What a checkpoint calls a tensor of the frozen module."""
    return name.replace(ORIGINAL, ".")

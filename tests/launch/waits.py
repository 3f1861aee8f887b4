"""Where a step would wait for a GPU, seen on a CPU: calls that read a tensor's numbers, or copy between host and device
unpinned.

    Tensor.item .tolist .cpu .numpy .nonzero, truth and conversions, boolean masks as indices, repeat_interleave without
    output_size torch.tensor(..., device=), torch.as_tensor(..., device=), Tensor.to(device): copies from pageable
    memory

A copy through `engine.world.on_device` is pinned and does not wait. Which tensors would lie on the device a CPU cannot
say, so calls on host tensors are seen as well, and named as such by who allows them.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "losses", "rollout", "launch")
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.nonzero,
    torch.nonzero,
    torch.masked_select,
    Tensor.masked_select,
    torch.equal,
    Tensor.equal,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    torch.unique,
    Tensor.unique,
}
REPEATS = {torch.repeat_interleave, Tensor.repeat_interleave}
INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
MADE = {torch.tensor, torch.as_tensor}


def waits(function: Any, args: tuple, kwargs: dict) -> bool:
    if function in READS:
        return True
    if function in REPEATS:
        return kwargs.get("output_size") is None and isinstance(args[1], Tensor)
    if function in INDEXED:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)
    if function in MADE:
        return kwargs.get("device") is not None
    if function is Tensor.to:
        return any(isinstance(x, torch.device | str) for x in (*args[1:], *kwargs.values()))
    return False


class Waits(TorchFunctionMode):
    """Counts them by 'file:function' of ours, the innermost on the stack; others' (torch's own, the library's) count as
    theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(function, args, kwargs):
            place = self._place()
            # the library moves what may have moved already; we know where ours lies
            if function is not Tensor.to or "(" not in place:
                self.found[place] += 1
        return function(*args, **kwargs)

    def _place(self) -> str:
        frame, others = sys._getframe(2), ""
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS:
                return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}" + (f" ({others})" if others else "")
            others = others or f"{path.name}:{frame.f_code.co_name}"
            frame = frame.f_back
        return others

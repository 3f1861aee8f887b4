"""Numbers that are none (NaN, infinity): whose they were first, of the ranks and of the examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.model.shards import local


def not_finite(tensors: Mapping[str, Any]) -> str:
    """The name of the first tensor of which this rank's share holds a number that is none, or ''. Waits for the
    device.
    """
    floating = {name: local(t).detach() for name, t in tensors.items() if t.is_floating_point()}
    floating = {name: t for name, t in floating.items() if t.numel()}
    if not floating:
        return ""
    largest = torch.stack([x.float() for x in torch._foreach_norm(list(floating.values()), math.inf)])
    fine = torch.isfinite(largest).tolist()
    return next((name for name, ok in zip(floating, fine, strict=True) if not ok), "")


class Trail:
    """The sums of a step after each of this rank's micro-batches: a few numbers that stay where they are, and are read
    only if the step went wrong.
    """

    def __init__(self) -> None:
        self._of: object = None
        self._after: list[tuple[Sequence[int], dict[str, Any]]] = []

    def note(self, of: object, examples: Sequence[int], sums: Mapping[str, Any]) -> None:
        """`of` is what `sums` belong to; those of another step are forgotten."""
        if self._of is not of:
            self._of, self._after = of, []
        self._after.append((examples, dict(sums)))

    def first(self) -> list[int]:
        """The examples of the first micro-batch after which a sum was no number, or none."""
        for examples, sums in self._after:
            if not all(math.isfinite(float(value)) for value in sums.values()):
                return list(examples)
        return []


def whose(ranks: Iterable[tuple[str, list[int]]], unit: str, examples: Sequence[int]) -> str:
    """In words; of every rank the name of a tensor of its own that holds none, and its `Trail.first`."""
    found = list(ranks)
    if broken := [f"{name} on rank {rank}" for rank, (name, _) in enumerate(found) if name]:
        return f"in the weights: {', '.join(broken[:3])}"
    met = [f"rank {rank}, {unit} {shown(mine)}" for rank, (_, mine) in enumerate(found) if mine]
    return f"on {'; '.join(met[:4])}" if met else f"in a gradient, of the {unit} {shown(examples)}"


def shown(numbers: Sequence[int]) -> str:
    return f"{[int(n) for n in numbers[:16]]}{' ...' if len(numbers) > 16 else ''}"


def all_finite(x_R: Tensor) -> bool:
    return bool(torch.isfinite(x_R).all())

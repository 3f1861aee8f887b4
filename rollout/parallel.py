"""One sampler on several ranks: a team of neighbours, each with its part of every layer, by the library's own plan.

    colwise                  y_r = x W_r^T + b_r          rows of W: a rank's own heads, its part of the MLP
    rowwise                  y = sum_r x_r W_r^T + b      columns of W, x_r what a colwise layer gave; an all-reduce
    colwise_gather_output    y = [y_0 ... y_n], on every rank
    rowwise_split_input      as rowwise, of an x that is whole

The plan is `model.tp_plan` of transformers. What it does not name, norms above all, is whole on every rank, and so is
the embedding where it says embedding_rowwise: its lookups would cost a sum over the ranks. The head's rows are split
and its logits gathered, so that each logit is computed once, by one rank: the ranks of a team see the same bits and
choose the same tokens without a word. A head that is the embedding is computed in slices of the whole.

Sizes need not divide: the last ranks have less, or nothing. Heads must. Left out on purpose: experts and latent
attention in parallel, which their plans name and which are refused by name.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM

from engine.errors import UserError
from engine.world import World
from rollout import handover
from rollout.handover import Place

FLAG = "--rollout_tensor_parallel"
ROWS = ("colwise", "colwise_gather_output")
COLUMNS = ("rowwise", "rowwise_split_input")
WHOLE = ("replicated_with_grad_allreduce", "embedding_rowwise")


@dataclass(frozen=True)
class Team:
    """The ranks that share one sampler: `rank` of `size`, team `number` of `count` in the world."""

    rank: int
    size: int
    number: int
    count: int
    group: Any = None  # the process group of more than one

    @classmethod
    def of(cls, world: World, size: int) -> Team:
        """This rank's team of `size` neighbours. Collective. Raises UserError where teams do not divide the world."""
        if size < 1 or world.size % size:
            raise UserError(f"{FLAG} {size} does not divide the {world.size} ranks of this run")
        number, rank = divmod(world.rank, size)
        teams = [range(first, first + size) for first in range(0, world.size, size)]
        groups = [dist.new_group(list(ranks)) for ranks in teams] if size > 1 else [None] * len(teams)
        return cls(rank, size, number, len(teams), groups[number])

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its team."""
        return self.rank == 0

    def part(self, width: int) -> tuple[int, int]:
        """(first, size) of this rank's part of so many rows or columns."""
        most = -(-width // self.size)
        first = min(self.rank * most, width)
        return first, min(most, width - first)

    def sum(self, x: Tensor) -> Tensor:
        """Over the team, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def least(self, number: int) -> int:
        """Of the team's numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.group)
        return int(numbers)

    def join(self, part: Tensor, width: int) -> Tensor:
        """Every rank's columns beside each other, (..., width), the same bits on every rank."""
        if self.size == 1:
            return part
        padded = pad(part, (0, -(-width // self.size) - part.shape[-1])).contiguous()
        everyones = padded.new_empty(self.size, *padded.shape)
        handover.all_gather(everyones.view(-1), padded.view(-1), group=self.group)
        return everyones.movedim(0, -2).flatten(-2)[..., :width]

    def head(self, lm: Any) -> Tensor:
        """The rows of the head whose logits this rank computes."""
        weight = lm.get_output_embeddings().weight
        if self.size > 1 and weight is lm.get_input_embeddings().weight:
            return weight.narrow(0, *self.part(len(weight)))
        return weight


def check(config: Any, size: int, world: World) -> None:
    """Raises UserError where this model cannot be sampled by teams of `size` ranks, before anything is read."""
    if world.size % size:
        raise UserError(f"{FLAG} {size} does not divide the {world.size} ranks of this run")
    if size > 1:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        _styles(lm, size)


def build(
    config: Any, attention_name: str, dtype: torch.dtype, device: torch.device, team: Team, shared: Any = None
) -> Any:
    """The sampler's modules, with room for this rank's part; what needs no copy of the model `shared` is its own.
    Raises UserError.
    """
    cut = None if team.size == 1 else lambda lm: _cut(lm, team)
    return handover.skeleton(config, attention_name, dtype, device, shared, cut)


# --- the cut ----------------------------------------------------------------------------------------------------------


def _styles(lm: Any, size: int) -> dict[str, str]:
    """How each module of this model is split: module name → style. Raises UserError for a plan that is not known."""
    plan, family = lm.tp_plan or {}, type(lm).__name__
    named = dict(lm.named_modules())
    found: dict[str, str] = {}
    for name in (*named, *(name for name, _ in lm.named_parameters())):
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if style is None or style in WHOLE:
            continue
        if style not in ROWS + COLUMNS or not isinstance(named.get(name), nn.Linear):
            raise UserError(f"{FLAG}: {family} splits {name} by {style!r}, which only {_known()} of linear layers are")
        found[name] = style
    if not any(style in COLUMNS for style in found.values()):
        raise UserError(f"{FLAG}: transformers has no plan to split the layers of {family}")
    _check_heads(lm.config, found, size)
    return found


def _known() -> str:
    return ", ".join((*ROWS, *COLUMNS))


def _check_heads(config: Any, styles: dict[str, str], size: int) -> None:
    """Attention that is split at all is split by whole heads."""
    if not any(style == "colwise" and re.search("attn|attention", name) for name, style in styles.items()):
        return
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = config.to_dict().get(what)
        if heads and heads % size:
            raise UserError(f"{FLAG} {size} does not divide {what}, {heads}")


def _cut(lm: Any, team: Team) -> dict[str, Place]:
    """Leaves this rank's part of every module on the meta device: tensor name → its place in the whole."""
    places: dict[str, Place] = {}
    head, is_tied = lm.get_output_embeddings(), lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    for name, style in _styles(lm, team.size).items():
        path, _, leaf = name.rpartition(".")
        source = lm.get_submodule(name)
        if source is head and is_tied:
            continue  # the embedding, whole
        module = Part(source, style, team)
        setattr(lm.get_submodule(path), leaf, module)
        dimension = 1 if style in COLUMNS else 0
        first, size = team.part(source.weight.shape[dimension])
        places[f"{name}.weight"] = Place(dimension, first, size)
        if source.bias is not None and dimension == 0:
            places[f"{name}.bias"] = Place(0, first, size)
    return places


class Part(nn.Module):
    """A rank's rows or columns of a linear layer, and what the team does around them."""

    bias: Any

    def __init__(self, source: nn.Linear, style: str, team: Team) -> None:
        super().__init__()
        self.style, self.team, self.out_features = style, team, source.out_features
        dimension = 1 if style in COLUMNS else 0
        self.first, self.size = team.part(source.weight.shape[dimension])
        self.weight = _empty(source.weight.narrow(dimension, self.first, self.size))
        bias: Any = source.bias
        if bias is not None and dimension == 0:
            bias = bias.narrow(0, self.first, self.size)
        self.register_parameter("bias", bias if bias is None else _empty(bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.style in ROWS:
            y = linear(x, self.weight, self.bias)
            return self.team.join(y, self.out_features) if self.style == "colwise_gather_output" else y
        if self.style == "rowwise_split_input":
            x = x.narrow(-1, self.first, self.size)
        y = self.team.sum(linear(x, self.weight))
        return y if self.bias is None else y + self.bias  # once, after the sum


def _empty(x: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(x.shape, dtype=x.dtype, device="meta"), requires_grad=False)

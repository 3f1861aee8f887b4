"""Weights from the sharded policy to the sampler: one whole copy in the compute dtype, at addresses that stay.

    W_sampler  <-  all_gather( cast(shard of W + s B A) )          a bucket at a time, in the model's order

The cast comes before the gather, so bf16 travels at half the bytes of the fp32 masters, and what is gathered is bit for
bit what FSDP gathers for training; under adapters it is their sum, rounded once. A bucket is one flat buffer of
BUCKET bytes that many parameters share, or a part of a large one; two are in flight, so that the next is on its way
while one is copied to its parameters' places. Beside them lie, under adapters, one merged shard of a matrix and at most
a bucket of what merging needs whole.

Addresses never change while a copy is kept (CUDA graphs and views survive an update); one that does not fit beside
training is given back after every rollout, and gathered for the next. What has not moved does not travel: frozen
weights go over once, and on one rank a tensor that the policy holds in the compute dtype is the sampler's too, never
copied.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from engine.model.adapters import lora
from engine.model.adapters.lora import AdaptedLinear
from engine.model.adapters.saved import checkpoint_name
from engine.model.shards import local, whole
from engine.world import World

BUCKET = 32 * 2**20  # bytes of all ranks together that one collective moves


# --- the sampler's modules --------------------------------------------------------------------------------------------


def skeleton(
    config: Any,
    attention_name: str,
    dtype: torch.dtype,
    device: torch.device,
    source: Any = None,
    cut: Callable[[nn.Module], dict[str, Place]] | None = None,
) -> nn.Module:
    """The family's own modules with uninitialised weights, in eval mode, without gradients.

    What `source`, a model on this rank alone, holds in this dtype on this device is shared with it. `cut` leaves
    parts of the modules before there is memory for them, and says what place each has in the whole.
    """
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention_name)
    places = cut(lm) if cut else {}
    shared = {} if source is None else _shareable(source, dtype, device)
    made: dict[int, nn.Parameter] = {}  # by the empty one's identity: tied weights stay one tensor
    for path, module in lm.named_modules():  # Module.to_empty would exchange data of parameters, which fakes refuse
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in made:
                own = shared.get(f"{path}.{name}".removeprefix("."))
                own = torch.empty(p.shape, dtype=p.dtype, device=device) if own is None else own
                made[id(p)] = nn.Parameter(own, requires_grad=False)
            setattr(module, name, made[id(p)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    target: Any = lm.eval()
    by_fsdp = source is not None and _is_sharded(source)
    target.origin = Origin(None if source is None else weakref.ref(source), dict.fromkeys(shared, by_fsdp), places)
    return target


@dataclass
class Origin:
    """Where a sampler's weights come from."""

    shares_with: weakref.ref | None  # the model that holds what is shared
    shared: dict[str, bool]  # names of the tensors that are that model's own, and whether FSDP holds them
    places: dict[str, Place]  # of tensors that are parts of the model's, by name
    loaded: weakref.ref | None = None  # the model of the last hand-over


def _shareable(source: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a whole model that a sampler may compute with where they lie."""
    layers, found = lora.adapted(source), {}
    sharded = _is_sharded(source)
    for name, (_, read) in lora.dense(source).items():
        if _layer_of(name, layers) is not None:
            continue
        p = read()
        lasts = isinstance(p, DTensor) == sharded  # what FSDP has gathered goes again
        if lasts and p.dtype == dtype and p.device == device and local(p).is_contiguous():
            found[name] = local(p).detach()
    return found


def _is_sharded(source: Any) -> bool:
    return any(isinstance(p, DTensor) for p in source.parameters())


def _layer_of(name: str, layers: dict[str, AdaptedLinear]) -> AdaptedLinear | None:
    """The adapted or quantised layer whose matrix this is."""
    path, _, leaf = name.rpartition(".")
    return layers.get(path) if leaf == "weight" else None


# --- hand-over --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A part of a tensor: `size` rows (dimension 0) or columns (1) from `first` on."""

    dimension: int
    first: int
    size: int


@dataclass(frozen=True)
class Moving:
    """A tensor on its way: the sampler's, how this rank's part of the policy's is read, and the whole's shape."""

    target: Tensor
    read: Callable[[], Any]
    shape: torch.Size
    is_sharded: bool  # over the ranks
    place: Place | None = None  # of the target in the whole; None: it is the whole


@torch.no_grad()
def load(target: Any, source: Any, world: World, rehearsed: int | None = None) -> float:
    """Copies every parameter and buffer of `source` (shards or whole) into `target`'s. Collective.

    Frozen weights are copied the first time. Raises ValueError where the two are not the same model, or where the
    target shares its weights with another.

    A planner has but some buckets moved, `rehearsed` at most, evenly spread. Returns how many there are for each that
    was.
    """
    origin: Origin = target.origin
    if origin.shared and origin.shares_with is not None and origin.shares_with() is not source:
        raise ValueError("these weights are another policy's own: every policy takes a sampler of its own")
    buffers = {checkpoint_name(name): buffer for name, buffer in source.named_buffers()}
    own = dict(target.named_parameters())
    theirs = {name: found for name, found in lora.dense(source).items() if name not in buffers}
    if own.keys() != theirs.keys():
        raise ValueError(f"not the same model: {sorted(own.keys() ^ theirs.keys())[:4]}")
    _find_room(own)
    layers = lora.adapted(source)
    again = origin.loaded is not None and origin.loaded() is source
    names = [name for name in own if not again or _is_trained(name, theirs[name][1], layers)]
    needed = [t for name in names if (layer := _layer_of(name, layers)) for t in layer.needed_whole]
    whole_of = whole if world.size == 1 else Ahead(needed, world)
    moving = []
    for name in names:
        shape, read = theirs[name]
        if (layer := _layer_of(name, layers)) is not None:
            cut, read = layer.matrix, partial(layer.merged, whole_of)
        else:
            cut = read()
            if name in origin.shared and not _has_moved(own[name], cut, origin.shared[name]):
                continue
        is_sharded = world.size > 1 and isinstance(cut, DTensor)
        moving.append(Moving(own[name], read, shape, is_sharded, origin.places.get(name)))
    share = _hand_over(moving, world, rehearsed)
    _copy_buffers(target, buffers)
    origin.loaded = weakref.ref(source)
    return share


def give_back(target: Any) -> None:
    """Frees what is a copy; the next `load` finds room for it again, at other addresses, and copies all of it."""
    for name, p in target.named_parameters():
        if name not in target.origin.shared:
            p.untyped_storage().resize_(0)
    target.origin.loaded = None


def _find_room(own: dict[str, nn.Parameter]) -> None:
    """For what was given back."""
    for p in own.values():
        if p.untyped_storage().nbytes() == 0:
            p.untyped_storage().resize_(p.numel() * p.element_size())


def _is_trained(name: str, read: Callable[[], Tensor], layers: dict[str, AdaptedLinear]) -> bool:
    layer = _layer_of(name, layers)
    return bool(layer.rank) if layer is not None else read().requires_grad


def _has_moved(own: Tensor, p: Any, is_sharded: bool) -> bool:
    """Whether what was shared lies elsewhere by now. What FSDP has gathered for the moment has not moved."""
    where = [(t.untyped_storage()._cdata, t.storage_offset()) for t in (own, local(p))]
    return isinstance(p, DTensor) == is_sharded and where[0] != where[1]


def _copy_buffers(target: Any, buffers: dict[str, Tensor]) -> None:
    """Rotary frequencies, embedding scales: whole on every rank, in a dtype of their own."""
    modules = dict(target.named_modules())
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        held = modules[path]._buffers
        if held[leaf].dtype != buffer.dtype or held[leaf].shape != buffer.shape:
            held[leaf] = buffer.detach().clone()
        held[leaf].copy_(buffer)


# --- buckets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Numbers [start, stop) of every rank's shard of a tensor, the shard read row by row."""

    moving: Moving
    start: int
    stop: int


def buckets(moving: Sequence[Moving], ranks: int) -> list[list[Piece]]:
    """Tensors in their order, packed into buckets of at most BUCKET bytes of one dtype; a large one is split.

    The same on every rank: a tensor of R rows is cut in chunks of ceil(R / ranks) rows, padded where the last ranks
    have less, or nothing. A row of a tensor that goes over by columns stays in one piece.
    """
    found: list[list[Piece]] = []
    room, dtype = 0, None
    for one in moving:
        size, numbers = one.target.element_size(), _per_rank(one.shape, ranks)
        by_columns = one.place is not None and one.place.dimension == 1
        grain = one.shape[1:].numel() if by_columns else 1
        start = 0
        while start < numbers:
            if not found or one.target.dtype != dtype or room < grain:
                found.append([])
                room, dtype = max(grain, BUCKET // size // ranks), one.target.dtype
            stop = min(numbers, start + room // grain * grain)
            found[-1].append(Piece(one, start, stop))
            room, start = room - (stop - start), stop
    return found


def _per_rank(shape: torch.Size, ranks: int) -> int:
    """Numbers of a rank's shard, padded."""
    return -(-shape[0] // ranks) * shape[1:].numel() if shape else 1


def _hand_over(moving: list[Moving], world: World, rehearsed: int | None) -> float:
    """What every rank holds whole is copied; shards are gathered, a bucket on its way while another is copied out."""
    for one in moving:
        if not one.is_sharded:
            rows, place = local(one.read()), one.place
            one.target.copy_(rows if place is None else rows.narrow(place.dimension, place.first, place.size))
    everything = buckets([one for one in moving if one.is_sharded], world.size)
    plan = everything[:: -(-len(everything) // rehearsed) if rehearsed and everything else 1]
    sizes = [_numbers(bucket) * bucket[0].moving.target.element_size() for bucket in plan]
    buffers = [torch.empty((world.size + 1) * max(sizes), dtype=torch.uint8, device=world.device) for _ in sizes[:2]]
    flying: tuple[Any, list[Piece], Tensor] | None = None
    reader = _Reader()
    for number, (bucket, size) in enumerate(zip(plan, sizes, strict=True)):
        everyones, mine = buffers[number % 2][: (world.size + 1) * size].split([world.size * size, size])
        dtype, at = bucket[0].moving.target.dtype, 0
        for piece in bucket:
            part = reader(piece)
            mine.view(dtype)[at : at + len(part)].copy_(part)  # the cast
            at += piece.stop - piece.start
        work = all_gather(everyones, mine, group=world.mesh.get_group(), async_op=True)
        if flying is not None:
            _land(*flying)
        flying = work, bucket, everyones.view(dtype).view(world.size, -1)
    if flying is not None:
        _land(*flying)
    return len(everything) / max(1, len(plan))


all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13's name, and before


def _numbers(bucket: list[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in bucket)


class _Reader:
    """This rank's part of a piece; a shard is read, and merged if it must be, once for all of its pieces."""

    def __init__(self) -> None:
        self.moving: Moving | None = None

    def __call__(self, piece: Piece) -> Tensor:
        if self.moving is not piece.moving:
            self.moving, self.shard = piece.moving, local(piece.moving.read()).reshape(-1)
        return self.shard[piece.start : piece.stop]


def _land(work: Any, bucket: list[Piece], everyones_SN: Tensor) -> None:
    """Waits for a bucket and copies its pieces to their places."""
    work.wait()
    at = 0
    for piece in bucket:
        _put(piece, everyones_SN[:, at : at + piece.stop - piece.start])
        at += piece.stop - piece.start


def _put(piece: Piece, part_SN: Tensor) -> None:
    """Every rank's numbers of a piece into the sampler's tensor, or those of its part."""
    target, shape, place = piece.moving.target, piece.moving.shape, piece.moving.place
    per_rank, row, total = _per_rank(shape, len(part_SN)), shape[1:].numel(), shape.numel()
    if place is not None and place.dimension == 0:
        _put_rows(piece, part_SN, place, row, per_rank, total)
        return
    grain, columns = (1, slice(None)) if place is None else (row, slice(place.first, place.first + place.size))
    # from here on in rows of `grain` numbers, of which `columns` are taken
    per_rank, total, start, stop = per_rank // grain, total // grain, piece.start // grain, piece.stop // grain
    part_SRC = part_SN.unflatten(1, (-1, grain))[..., columns]
    own_RC = target.view(total, -1)
    full, rest = divmod(total, per_rank)  # ranks that hold a whole chunk, and the rows of the one after them
    own_RC[: full * per_rank].unflatten(0, (full, per_rank))[:, start:stop].copy_(part_SRC[:full])
    if start < rest:
        own_RC[full * per_rank + start : full * per_rank + min(stop, rest)].copy_(part_SRC[full, : rest - start])


def _put_rows(piece: Piece, part_SN: Tensor, place: Place, row: int, per_rank: int, total: int) -> None:
    """Of a part by rows: at once what comes from ranks whose whole chunk is in it, then from those at its ends."""
    own, first, last = piece.moving.target.view(-1), place.first * row, (place.first + place.size) * row
    inner = range(-(-first // per_rank), last // per_rank)
    if inner:
        at = inner.start * per_rank - first
        own_SN = own[at : at + len(inner) * per_rank].view(len(inner), per_rank)
        own_SN[:, piece.start : piece.stop].copy_(part_SN[inner.start : inner.stop])
    for rank in {first // per_rank, last // per_rank} - set(inner):
        start = rank * per_rank + piece.start
        a, b = max(first, start), min(last, rank * per_rank + piece.stop, total)
        if a < b:
            own[a - first : b - first].copy_(part_SN[rank, a - start : b - start])


class Ahead:
    """What merging needs whole (an adapter's A, the scales of scales), gathered many tensors at a time in the order in
    which they are asked for.
    """

    def __init__(self, tensors: Sequence[Any], world: World) -> None:
        self.waiting, self.world = deque(t for t in tensors if isinstance(t, DTensor)), world
        self.there: deque[tuple[int, Tensor]] = deque()

    def __call__(self, p: Any) -> Tensor:
        """All rows of p, on every rank. Collective."""
        if not isinstance(p, DTensor):
            return p
        while True:
            if not self.there:
                self._fetch()
            name, found = self.there.popleft()  # what is not asked for (in a rehearsal) is dropped
            if name == id(p):
                return found

    def _fetch(self) -> None:
        some: list[Any] = []
        sizes: list[int] = []
        while self.waiting:
            p = self.waiting[0]
            size = _per_rank(p.shape, self.world.size) * p.element_size()
            if some and (sum(sizes) + size) * self.world.size > BUCKET:
                break
            some.append(self.waiting.popleft())
            sizes.append(size)
        mine = torch.zeros(sum(sizes), dtype=torch.uint8, device=self.world.device)
        for p, part in zip(some, mine.split(sizes), strict=True):
            shard = local(p).contiguous().view(torch.uint8).reshape(-1)
            part[: len(shard)].copy_(shard)
        everyones = mine.new_empty(self.world.size * len(mine))
        all_gather(everyones, mine, group=self.world.mesh.get_group())
        for p, part in zip(some, everyones.view(self.world.size, -1).split(sizes, dim=1), strict=True):
            numbers = part.reshape(-1)[: p.shape.numel() * p.element_size()]
            self.there.append((id(p), numbers.clone().view(p.dtype).view(p.shape)))

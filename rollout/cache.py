"""The KV cache in pages, and the attention function that owns it: transformers' own decoders run on it, none is written
twice.

    prefill    the new prompts as one packed stream: attention within the stream, keys and values written to their pages
    decode     one token a response:  out_a = sum_{s in window(p_a)} softmax_s( cap(scale q_a . k_as) ) v_as,  p_a its
               place, over the pages that hold its positions (pages.py)

Registered with transformers' AttentionInterface under the name NAME; the pass that says where each token of the stream
belongs arrives as a keyword argument that decoders pass through. Nothing is registered with AttentionMaskInterface: for
a name unknown there, the library builds no mask at all. Layers with the same window are of one kind, and have their
pages in common: each layer has a pool of its own, and a page is at the same place in all of them.

T tokens of the stream · A active responses · P pages of a pool · B positions of a page · J pages that a response may
have · N query heads · K key/value heads · H head size.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from engine.data.packing import Packing
from engine.world import on_device
from rollout.dense import Dense
from rollout.kernels import paged_attention
from rollout.pages import Layout, Pages, PagesInStrips, SharedPages
from rollout.rows import Rows, rows_of
from rollout.strips import Strips

NAME = "triptych_rollout"
Window = int | None


@dataclass(frozen=True)
class Layer:
    """What a layer keeps of a token."""

    window: Window
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    def bytes_of(self, block: int) -> int:
        """Of a page."""
        return block * self.kv_heads * (self.key_size + self.value_size) * self.dtype.itemsize


class PagedCache:
    """Keys and values of every layer, in pages."""

    def __init__(
        self,
        layers: dict[int, Layer],
        counts: dict[Window, int],
        slots: int,
        max_length: int,
        block: int,
        layout: Layout | None = None,
    ) -> None:
        """Pools of `counts` pages, by window, those of layers without one in the strips of a `layout`, if there is one;
        none is allocated before `allocate`.
        """
        self.layers, self.counts = layers, counts
        self.max_length, self.block = max_length, block
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._memory: list[HeadsApart] = []  # of the pools in strips
        self.kinds: dict[Window, Pages] = {}
        self._page = {  # bytes of one in all layers
            window: sum(layer.bytes_of(block) for layer in layers.values() if layer.window == window)
            for window in counts
        }
        self.reset(slots, layout)

    def holds(self, wanted: dict[Window, tuple[int, int]], layout: Layout | None) -> bool:
        """Whether it has the pages that are `wanted` (room.py), and lies in strips where these do."""
        enough = all(self.counts[window] >= most for window, (_, most) in wanted.items())
        return enough and (self.layout is None) == (layout is None)

    def reset(self, slots: int, layout: Layout | None) -> None:
        """No page has an owner."""
        self.slots, self.layout = slots, layout
        self.strips: Strips | None = None  # that were read last
        sizes = slots, self.max_length, self.block
        self.kinds = {
            window: PagesInStrips(count, *sizes, layout) if layout and window is None else Pages(count, *sizes, window)
            for window, count in self.counts.items()
        }

    def allocate(self, device: torch.device) -> None:
        for index, layer in self.layers.items():
            count, in_strips = self.counts[layer.window], self.kinds[layer.window].layout is not None
            for pools, size in ((self.keys, layer.key_size), (self.values, layer.value_size)):
                if in_strips:
                    self._memory.append(HeadsApart(count, layer.kv_heads, self.block, size, layer.dtype))
                    pools[index] = self._memory[-1].pool
                else:
                    pools[index] = zeros((count, layer.kv_heads, self.block, size), layer.dtype, device)

    def leave(self, slot: int) -> None:
        """A slot gives back its pages, and the memory of its strip."""
        for kind in self.kinds.values():
            kind.finish(slot)
        if self.layout is not None:
            begin = self.layout.own.first_page + slot * self.layout.own.pages
            for memory in self._memory:
                memory.give_back(begin, begin + self.layout.own.pages)

    def copy(self, window: Window, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Pages onto others, in all layers of a kind."""
        if not sources:
            return
        device = next(iter(self.keys.values())).device
        pairs = on_device(torch.tensor([sources, targets]), device)
        for index, layer in self.layers.items():
            if layer.window == window:
                for pool in (self.keys[index], self.values[index]):
                    pool[pairs[1]] = pool[pairs[0]]

    @property
    def held_bytes(self) -> int:
        """Of the pages that somebody uses."""
        return sum((len(kind.users) - 1 - kind.free) * self._page[window] for window, kind in self.kinds.items())


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: what is masked is still multiplied by 0, and 0 times garbage may be NaN. On a CPU memory that the system
    gives when it is first written to, so that a pool takes what it holds.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


class HeadsApart:
    """A pool (pages, K, B, H) of zeros on a CPU, in which the positions of a head lie side by side over all pages, so
    that those of a strip are one piece; it takes the memory that is written to, in the system's smallest pages.
    """

    def __init__(self, pages: int, kv_heads: int, block: int, size: int, dtype: torch.dtype) -> None:
        self.page = block * size * dtype.itemsize  # bytes of a page of one head
        self.head = pages * self.page
        self.memory = mmap.mmap(-1, max(1, kv_heads * self.head))
        shape = kv_heads, pages, block, size
        flat = torch.frombuffer(self.memory, dtype=dtype, count=int(np.prod(shape)))
        self.pool = flat.view(shape).transpose(0, 1)

    def give_back(self, begin: int, end: int) -> None:
        """What pages `begin` to `end` - 1 take. Elsewhere than on Linux they may keep what they hold."""
        if sys.platform != "linux":
            return
        for head in range(0, self.head * self.pool.shape[1], self.head):
            first = -(-(head + begin * self.page) // mmap.PAGESIZE) * mmap.PAGESIZE
            size = head + end * self.page - first
            if size >= mmap.PAGESIZE:  # rounded down, to what holds nothing of a neighbour
                self.memory.madvise(mmap.MADV_DONTNEED, first, size // mmap.PAGESIZE * mmap.PAGESIZE)


# --- passes -----------------------------------------------------------------------------------------------------------


@dataclass
class Prefill:
    """Prompts, as one packed stream: the page and position of every token, by kind."""

    cache: PagedCache
    positions_T: Tensor  # int64
    pages_T: dict[Window, Tensor]  # int64; 0 for what no later token sees
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, cache: PagedCache, columns: Sequence[dict[Window, np.ndarray]], lengths: Sequence[int]) -> Prefill:
        """`columns` are the pages of each prompt, in the order of its positions."""
        device = next(iter(cache.keys.values())).device
        places = [np.arange(n) for n in lengths]
        pages = {
            window: np.concatenate([of[window][at // cache.block] for of, at in zip(columns, places, strict=True)])
            for window in cache.kinds
        }
        put = lambda x: on_device(torch.from_numpy(x.astype(np.int64)), device)
        return cls(cache, put(np.concatenate(places)), {w: put(x) for w, x in pages.items()}, tuple(lengths))

    @cached_property
    def packing(self) -> Packing | None:
        """The boundaries of the packed prompts, the same for all layers."""
        return Packing.of(self.lengths, self.positions_T.device)

    def write(self, layer: int, k_TKH: Tensor, v_TKH: Tensor, window: Window) -> None:
        _write(self.cache, layer, k_TKH, v_TKH, self.pages_T[window], self.positions_T)

    def read(self, layer: int, q_TNH: Tensor, **how) -> Tensor:
        raise AssertionError("prompts attend within their stream")


@dataclass
class Decode:
    """One token for every active response: where it goes, and what it reads, by kind."""

    cache: PagedCache
    positions_T: Tensor  # int64
    pages_A: dict[Window, Tensor]  # int64
    plans: dict[Window, Strips | Dense | Rows] | None = None  # or else:
    tables_AJ: dict[Window, Tensor] = field(default_factory=dict)  # int32

    packing = None

    @classmethod
    def by_rows(cls, cache: PagedCache, slots_A: np.ndarray, positions_A: np.ndarray, device: torch.device) -> Decode:
        """Of responses whose positions the host knows, page by page."""
        put = lambda x: on_device(torch.from_numpy(x.astype(np.int64)), device)
        pages = {w: put(kind.tables[slots_A, positions_A // cache.block]) for w, kind in cache.kinds.items()}
        where = slots_A, positions_A, device
        plans: dict[Window, Strips | Dense | Rows] = {
            w: Dense.of(kind, *where) or rows_of(kind, *where) for w, kind in cache.kinds.items() if not kind.layout
        }
        if isinstance(kind := cache.kinds.get(None), PagesInStrips):
            keys = max((of.kv_heads, of.key_size) for of in cache.layers.values() if of.window is None)
            plans[None] = cache.strips = Strips.of(kind, slots_A, positions_A, keys, cache.strips)
        return cls(cache, put(positions_A), pages, plans)

    @classmethod
    def by_tables(cls, cache: PagedCache, positions_A: Tensor, tables_AJ: dict[Window, Tensor]) -> Decode:
        """Of responses whose positions the device knows: nothing here depends on them."""
        columns_A1 = (positions_A // cache.block)[:, None]
        pages = {w: table.gather(1, columns_A1).squeeze(1).long() for w, table in tables_AJ.items()}
        return cls(cache, positions_A, pages, None, tables_AJ)

    def write(self, layer: int, k_AKH: Tensor, v_AKH: Tensor, window: Window) -> None:
        _write(self.cache, layer, k_AKH, v_AKH, self.pages_A[window], self.positions_T)

    def read(
        self, layer: int, q_ANH: Tensor, *, scale: float, window: Window, softcap: float | None, sinks_N: Tensor | None
    ) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.plans is not None:
            return self.plans[window].attend(q_ANH, keys, values, scale=scale, softcap=softcap, sinks_N=sinks_N)
        return paged_attention(
            q_ANH,
            keys,
            values,
            self.tables_AJ[window],
            self.positions_T,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks_N=sinks_N,
        )


def _write(cache: PagedCache, layer: int, k_TKH: Tensor, v_TKH: Tensor, pages_T: Tensor, positions_T: Tensor) -> None:
    places_T = positions_T % cache.block
    cache.keys[layer][pages_T, :, places_T] = k_TKH
    cache.values[layer][pages_T, :, places_T] = v_TKH


@dataclass
class Probe:
    """One token, to see what every layer hands over."""

    positions_T: Tensor
    layers: dict[int, Layer] = field(default_factory=dict)
    packing = None

    def write(self, layer: int, k_TKH: Tensor, v_TKH: Tensor, window: Window) -> None:
        sizes = k_TKH.shape[1], k_TKH.shape[2], v_TKH.shape[2]
        self.layers[layer] = Layer(window, *sizes, dtype=k_TKH.dtype)

    def read(self, layer: int, q_TNH: Tensor, **how) -> Tensor:
        return q_TNH.new_zeros(*q_TNH.shape[:2], self.layers[layer].value_size)


# --- the attention function -------------------------------------------------------------------------------------------


def register(packed: Callable) -> str:
    """Registers cached attention and returns its name; `packed` is the engine's packed attention, for prefill."""

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
        rollout=None,
        **others,
    ) -> tuple[Tensor, None]:
        if rollout is None or attention_mask is not None or dropout:
            raise ValueError("cached attention takes a pass, no mask and no dropout")
        k_TKH, v_TKH = (x[0].transpose(0, 1) for x in (key_1KTH, value_1KTH))
        rollout.write(module.layer_idx, k_TKH, v_TKH, sliding_window)
        if rollout.packing is not None:
            options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
            return packed(module, query_1NTH, key_1KTH, value_1KTH, None, **options, packing=rollout.packing)
        q_ANH = query_1NTH[0].transpose(0, 1)
        scale = scaling if scaling is not None else q_ANH.shape[-1] ** -0.5
        how = {"scale": scale, "window": sliding_window, "softcap": softcap, "sinks_N": s_aux}
        return rollout.read(module.layer_idx, q_ANH, **how)[None], None

    AttentionInterface.register(NAME, attention)
    return NAME


def columns_of(shared: SharedPages, pages: Pages) -> np.ndarray:
    """The pages of a shared prompt in the order of its positions, as a slot's table has them."""
    columns = np.zeros(pages.tables.shape[1] + 1, np.int64)
    end = shared.first + len(shared.whole)
    columns[shared.first : end] = shared.whole
    columns[end] = shared.tail
    return columns

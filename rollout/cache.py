"""The KV cache, and the attention function that owns it: transformers' own decoders run on it, none is written twice.

    prefill    the new prompts as one packed stream: attention within the stream, keys and values written to their slots
    decode     one token a slot:  out_a = sum_{s in window(p_a)} softmax_s( cap(scale q_a . k_as) ) v_as,  p_a its place

Registered with transformers' AttentionInterface under the name NAME; the `Pass` that says which slot each token of the
stream belongs to arrives as a keyword argument that decoders pass through. Nothing is registered with
AttentionMaskInterface: for a name unknown there, the library builds no mask at all.

The cache is dense, (slots, K, max_length, H) per layer, so its memory is slots x max_length, whatever comes. Slots in
use are always the first A, so that decoding reads a slice. The query heads that share a key/value head are folded into
rows of one query: grouped-query attention then reads every key once.

T tokens of the stream · A active slots · L cached positions · N query heads · K key/value heads · G = N / K · H head
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine.data.packing import Packing

NAME = "triptych_rollout"


class SlotCache:
    """Keys and values of every layer, in slots. A layer's tensors are made at its first use, in the shapes that it
    hands over.
    """

    def __init__(self, slots: int, max_length: int) -> None:
        self.slots, self.max_length = slots, max_length
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def write(self, layer: int, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor, positions_T: Tensor) -> None:
        for cache, x_TKH in ((self.keys, k_TKH), (self.values, v_TKH)):
            if layer not in cache:  # zeros: what is masked is still multiplied by 0, and 0 times garbage may be NaN
                cache[layer] = x_TKH.new_zeros(self.slots, x_TKH.shape[1], self.max_length, x_TKH.shape[2])
            cache[layer][slots_T, :, positions_T] = x_TKH

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot into another."""
        for cache in (self.keys, self.values):
            for x_SKLH in cache.values():
                x_SKLH[target, :, :length] = x_SKLH[source, :, :length]


@dataclass
class Pass:
    """One forward: the slot and position of every token of the stream, and how it attends."""

    cache: SlotCache
    slots_T: Tensor  # int64; decoding: 0 .. A - 1
    positions_T: Tensor  # int64
    longest: int  # cached positions that decoding looks at
    lengths: tuple[int, ...] | None = None  # of the packed prompts; None: decoding
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window, the same for all layers

    @cached_property
    def packing(self) -> Packing:
        """The boundaries of the packed prompts, the same for all layers."""
        return Packing.of(self.lengths or (), self.positions_T.device)

    def visible(self, window: int | None) -> Tensor:
        """True where the token of slot a may see cached position s, (A, L) bool."""
        if window not in self.masks:
            columns_L = torch.arange(self.longest, device=self.positions_T.device)
            mask_AL = columns_L <= self.positions_T[:, None]
            self.masks[window] = (
                mask_AL if window is None else mask_AL & (columns_L > self.positions_T[:, None] - window)
            )
        return self.masks[window]


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
        rollout.cache.write(module.layer_idx, k_TKH, v_TKH, rollout.slots_T, rollout.positions_T)
        if rollout.lengths is not None:
            options = {
                "scaling": scaling,
                "sliding_window": sliding_window,
                "softcap": softcap,
                "s_aux": s_aux,
                "packing": rollout.packing,
            }
            return packed(module, query_1NTH, key_1KTH, value_1KTH, None, **options)
        q_ANH = query_1NTH[0].transpose(0, 1)
        scale = scaling if scaling is not None else q_ANH.shape[-1] ** -0.5
        how = {"scale": scale, "window": sliding_window, "softcap": softcap, "sinks_N": s_aux}
        out_ANH = _decode(q_ANH, rollout, module.layer_idx, **how)
        return out_ANH[None], None

    AttentionInterface.register(NAME, attention)
    return NAME


def _decode(
    q_ANH: Tensor,
    rollout: Pass,
    layer: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """One token of each active slot against what the slot holds."""
    active, longest = len(q_ANH), rollout.longest
    k_AKLH, v_AKLH = (cache[layer][:active, :, :longest] for cache in (rollout.cache.keys, rollout.cache.values))
    visible_A11L = rollout.visible(window)[:, None, None]
    q_AKGH = q_ANH.unflatten(1, (k_AKLH.shape[1], -1))
    if softcap is None and sinks_N is None:
        out_AKGH = scaled_dot_product_attention(q_AKGH, k_AKLH, v_AKLH, attn_mask=visible_A11L, scale=scale)
        return out_AKGH.flatten(1, 2)
    scores_AKGL = (q_AKGH @ k_AKLH.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores_AKGL = softcap * torch.tanh(scores_AKGL / softcap)
    scores_AKGL = scores_AKGL.masked_fill(~visible_A11L, float("-inf"))
    if sinks_N is not None:  # a sink is one more score per head, whose value is zero
        sinks_AKG1 = sinks_N.float().view(1, q_AKGH.shape[1], -1, 1).expand(active, -1, -1, 1)
        weights_AKGL = torch.cat([scores_AKGL, sinks_AKG1], -1).softmax(-1)[..., :-1]
    else:
        weights_AKGL = scores_AKGL.softmax(-1)
    return (weights_AKGL.to(v_AKLH.dtype) @ v_AKLH).flatten(1, 2)

"""The choice of a token from logits: temperature, top-k, top-p, and Gumbel-max on two levels.

    x_v    = z_v / temperature, or -inf where top-k or top-p leave v out
    block  = argmax_b ( log sum_{v in b} exp x_v + G_tb )              blocks of about sqrt(V) consecutive tokens
    token  = argmax_{v in block} ( x_v + G'_tv )

which is exact, since P(block) P(token | block) = softmax(x); and which, like Gumbel-max on all of V, changes its mind
only where two candidates are within rounding of each other (an inverse CDF adds up rounding over V). It needs 2 sqrt(V)
noises instead of V: drawing V of them costs more than the model does on a CPU. The sums over blocks are the ones that
the log-probability of the token needs anyway.

A tokens sampled at once · V vocabulary · B blocks · I tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.flags import DecodingFlags
from rollout.noise import gumbel

NUCLEUS = 256  # likeliest tokens that top-p looks at first


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole.

    A response ends with one of `stop_ids`, or with the token that completes one of `stop_strings` (finish_reason
    'stop'), or at `max_new_tokens` ('length'). The order of filters is the library's: temperature, top-k, top-p. Raises
    ValueError for values that mean nothing. Left out: min-p, typical sampling, penalties (no recipe here uses them).
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, flags: DecodingFlags, *stop_ids: int) -> SamplingParams:
        """As the command line says; responses end with one of `stop_ids`."""
        return cls(flags.response_length, flags.temperature, flags.top_k, flags.top_p, stop_ids)

    def __post_init__(self) -> None:
        if (
            self.max_new_tokens < 1
            or not 0 <= self.temperature < float("inf")
            or self.top_k < 0
            or not 0 < self.top_p <= 1
        ):
            raise ValueError(f"max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not {self}")
        if isinstance(self.stop_strings, str) or "" in self.stop_strings:
            raise ValueError(f"stop_strings must be a tuple of strings that are not empty, not {self.stop_strings!r}")


def choose(
    logits_AV: Tensor, params: SamplingParams, keys_A: Tensor, positions_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, logprobs, logprobs_t1): a token per row, its log-probability under the distribution it was drawn from,
    and at temperature 1.

    Args: logits (A, V) fp32, left as they are; keys (A) int64 from `response_key`; positions (A) int64, tokens already
    in the response. Returns: (A) int64, (A) fp32, (A) fp32. Greedy draws from a point mass: its logprobs are 0, its
    logprobs_t1 the model's.
    """
    if params.temperature == 0:
        tokens_A = logits_AV.argmax(-1)
        logprobs_t1_A = _at(logits_AV, tokens_A) - _block_sums(logits_AV).logsumexp(-1)
        return tokens_A, torch.zeros_like(logprobs_t1_A), logprobs_t1_A
    plain = params.temperature == 1 and params.top_k == 0 and params.top_p == 1
    if plain:
        sums_AB = _block_sums(logits_AV)
        tokens_A = _gumbel_max(logits_AV, sums_AB, keys_A, positions_A)
        logprobs_A = _at(logits_AV, tokens_A) - sums_AB.logsumexp(-1)
        return tokens_A, logprobs_A, logprobs_A
    normaliser_t1_A = _block_sums(logits_AV).logsumexp(-1)
    x_AV = _filtered(logits_AV / params.temperature, params.top_k, params.top_p)
    sums_AB = _block_sums(x_AV)
    tokens_A = _gumbel_max(x_AV, sums_AB, keys_A, positions_A)
    return tokens_A, _at(x_AV, tokens_A) - sums_AB.logsumexp(-1), _at(logits_AV, tokens_A) - normaliser_t1_A


def _at(x_AV: Tensor, tokens_A: Tensor) -> Tensor:
    return x_AV.gather(1, tokens_A[:, None]).squeeze(1)


def block_size(vocab: int) -> int:
    """The power of two nearest above sqrt(V)."""
    return 1 << max(0, (vocab - 1).bit_length() + 1) // 2


def _block_sums(x_AV: Tensor) -> Tensor:
    """log sum exp of every block, (A, B); the last block may be short."""
    vocab = x_AV.shape[1]
    size = block_size(vocab)
    whole = vocab // size * size
    sums_AB = x_AV[:, :whole].unflatten(1, (-1, size)).logsumexp(-1)
    return sums_AB if whole == vocab else torch.cat([sums_AB, x_AV[:, whole:].logsumexp(-1, keepdim=True)], 1)


def _gumbel_max(x_AV: Tensor, sums_AB: Tensor, keys_A: Tensor, positions_A: Tensor) -> Tensor:
    """Noise of token v has the index v, noise of block b the index -1 - b."""
    vocab, size = x_AV.shape[1], block_size(x_AV.shape[1])
    blocks_B = -1 - torch.arange(sums_AB.shape[1], device=x_AV.device)
    chosen_A1 = (sums_AB + gumbel(keys_A, positions_A, blocks_B)).argmax(-1, keepdim=True)
    tokens_AI = chosen_A1 * size + torch.arange(size, device=x_AV.device)
    inside_AI = x_AV.gather(1, tokens_AI.clamp(max=vocab - 1)).masked_fill(tokens_AI >= vocab, float("-inf"))
    best_A1 = (inside_AI + gumbel(keys_A, positions_A, tokens_AI)).argmax(-1, keepdim=True)
    return tokens_AI.gather(1, best_A1).squeeze(1)


def _filtered(x_AV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the k likeliest tokens, then outside the fewest likeliest that hold probability p; ties with the
    last one stay.
    """
    if 0 < top_k < x_AV.shape[1]:
        x_AV = x_AV.masked_fill(x_AV < x_AV.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
    if top_p < 1:
        x_AV = x_AV.masked_fill(x_AV < _nucleus_edges(x_AV, top_p), float("-inf"))
    return x_AV


def _nucleus_edges(x_AV: Tensor, top_p: float) -> Tensor:
    """The logit of the last token that is needed for probability p, (A, 1). Sorting all of V is rarely needed, and
    slow; on CUDA, where to look whether it is needed would be to wait, the edge is found by halving.
    """
    normaliser_A1 = _block_sums(x_AV).logsumexp(-1, keepdim=True)
    if x_AV.is_cuda:
        return _edges_by_halving(x_AV, normaliser_A1, top_p)
    count = min(NUCLEUS, x_AV.shape[1])
    while True:
        sorted_AC = x_AV.topk(count, dim=-1).values
        mass_AC = (sorted_AC - normaliser_A1).exp().cumsum(-1)
        if count == x_AV.shape[1] or (mass_AC[:, -1] >= top_p).all():
            break
        count = min(8 * count, x_AV.shape[1])
    last_A1 = (mass_AC < top_p).sum(-1, keepdim=True).clamp(max=count - 1)
    return sorted_AC.gather(1, last_A1)


def _edges_by_halving(x_AV: Tensor, normaliser_A1: Tensor, top_p: float) -> Tensor:
    """The same without a wait: the largest probability so that tokens of at least that much hold p, bit by bit (the
    bits of a float that is not negative are ordered as its values are).
    """
    shares_AV = (x_AV - normaliser_A1).exp()
    bits_AV = shares_AV.view(torch.int32)
    low_A1 = torch.zeros_like(bits_AV[:, :1])  # all of V holds p
    high_A1 = torch.full_like(low_A1, 0x3F800001)  # above 1
    for _ in range(30):  # 2^30 > 0x3F800001
        middle_A1 = (low_A1 + high_A1) // 2
        enough_A1 = shares_AV.masked_fill(bits_AV < middle_A1, 0).sum(-1, keepdim=True) >= top_p
        low_A1, high_A1 = torch.where(enough_A1, middle_A1, low_A1), torch.where(enough_A1, high_A1, middle_A1)
    return x_AV.masked_fill(bits_AV < low_A1, float("inf")).amin(-1, keepdim=True)

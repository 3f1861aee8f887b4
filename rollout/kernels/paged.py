"""Attention over pages as two Triton kernels: partial results of pieces of a response, then their sum.

A response's visible positions are cut into at most PIECES pieces, of the smallest of 256, 512, 1024, ... positions
with which that suffices. A program computes pieces i, i + S, i + 2S, ... of one response and one key/value head, for
all its query heads at once, so that a key is read once; a second kernel adds a response's pieces with their weights.
Where pieces begin depends on the response's own position and window alone, and the pieces are added in one order. So
a response's result is the same to the bit whatever is computed beside it, however many programs S share its pieces,
however wide the table is and whichever pages it names.

Bytes moved: keys and values that are visible, once, and 8 Hv bytes a piece and query head for the partial results (at
pieces of 256, 128 wide heads in groups of 4: 3 %). Left out on purpose: the sum in the same launch by the last program
to come (its order of arrival would need an atomic counter that someone must reset).

They also run under TRITON_INTERPRET=1 on a CPU, which is how the CPU suite tests them.

A responses · N query heads · K key/value heads · G = N / K · P pages · B tokens of a page · J pages of a table's row ·
S programs that share the pieces of a response · H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # no triton (a CPU machine): the eager path serves
    AVAILABLE = False

PIECES = 32  # at most, of a response
PIECE = 256  # positions of the shortest piece
ROWS = 16  # query heads of a program: what a tensor core takes at least
TILE_BYTES = 2**14  # of keys, and of values, that a program reads at once
PROGRAMS = 16  # a multiprocessor, that S aims at: many short ones even out what lengths differ in
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E = math.log2(math.e)


def takes(q_ANH: Tensor, keys_PKBH: Tensor, values_PKBH: Tensor) -> bool:
    """Whether the kernels are for these shapes and dtypes; for others the eager path serves."""
    B, H = keys_PKBH.shape[2:]
    alike = keys_PKBH.shape == values_PKBH.shape and q_ANH.dtype == keys_PKBH.dtype == values_PKBH.dtype
    contiguous = keys_PKBH.is_contiguous() and values_PKBH.is_contiguous()
    sizes = H % 16 == 0 and H <= 256 and B >= 16 and B & (B - 1) == 0
    return AVAILABLE and alike and contiguous and sizes and q_ANH.dtype in DTYPES


def tile(head_size: int, dtype: torch.dtype) -> int:
    """Positions that a program reads at once; of the head size and dtype alone, so that page sizes give equal bits."""
    return max(16, min(128, TILE_BYTES // (triton.next_power_of_2(head_size) * dtype.itemsize)))


def launch(head_size: int, dtype: torch.dtype) -> dict[str, int | None]:
    """Threads and stages of the first kernel, of which three programs then fit a multiprocessor of sm_90 and sm_100.

    A tile waits for the number of its page: five stages are two tiles on their way. Without tensor cores, in float32,
    arithmetic takes the time: more threads, which hide one another's waits. Of the widest heads the compiler would
    rather spill than use more than 128 registers, were it not told how many there are.
    """
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 2}
    return {"num_warps": 4, "num_stages": 5, "maxnreg": 160 if head_size > 128 else None}


def constants(head_size: int, dtype: torch.dtype, windowed: bool) -> dict[str, int | bool]:
    """What both kernels are compiled for: their pieces must be the same."""
    sizes = {"H": head_size, "WIDTH": triton.next_power_of_2(head_size), "TILE": tile(head_size, dtype)}
    return sizes | {"PIECE": PIECE, "PIECES": PIECES, "WINDOWED": windowed}


def longest_of(room: int, window: int | None, tile: int) -> int:
    """Positions that a response's pieces may cover: the first one begins at the start of a tile."""
    return room if window is None else min(room, window + tile - 1)


def shares(A: int, heads: int, longest: int, multiprocessors: int) -> tuple[int, int]:
    """(pieces that a response of `longest` positions may have, programs that share them)."""
    pieces = min(PIECES, -(-longest // PIECE))
    return pieces, max(1, min(pieces, -(-PROGRAMS * multiprocessors // (A * heads))))


if AVAILABLE:

    @triton.jit
    def _pieces_of(
        position, room, window, WINDOWED: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr
    ):
        """(first visible position, end, start of the first piece, positions of a piece)."""
        end = tl.minimum(position + 1, room).to(tl.int32)
        first = 0
        if WINDOWED:
            first = tl.maximum(position + 1 - window, 0).to(tl.int32)
        start = first // TILE * TILE
        piece = PIECE
        while piece * PIECES < end - start:
            piece *= 2
        return first, end, start, piece

    @triton.jit
    def _piece(
        query,
        keys,
        values,
        table,
        k,
        begin,
        end,
        first,
        scale,
        softcap,
        K: tl.constexpr,
        B: tl.constexpr,
        H: tl.constexpr,
        TILE: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
    ):
        """Of the positions begin .. end - 1, from the start of a tile: the softmax's average of the values, and log2 of
        the sum of the exponentials. Scores are in powers of two.
        """
        column = tl.arange(0, query.shape[1])
        running_max = tl.full([query.shape[0]], float("-inf"), tl.float32)
        running_sum = tl.zeros([query.shape[0]], tl.float32)
        average = tl.zeros(query.shape, tl.float32)
        for at in range(begin, end, TILE):
            s = at + tl.arange(0, TILE)
            visible = s < end
            if WINDOWED:
                visible = visible & (s >= first)
            if B >= TILE:  # a tile lies within one page
                page = tl.load(table + at // B).to(tl.int64)
            else:
                page = tl.load(table + s // B, mask=visible, other=0).to(tl.int64)
            row = (page * K + k) * B + s % B
            offset = row[:, None] * H + column[None, :]
            read = visible[:, None] & (column < H)[None, :]
            key = tl.load(keys + offset, mask=read, other=0.0).to(query.dtype)
            value = tl.load(values + offset, mask=read, other=0.0).to(query.dtype)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            if CAPPED:  # softcap tanh(...), the tanh from one exponential
                score = softcap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
            score = tl.where(visible[None, :], score, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(score, 1))
            rescale = tl.exp2(running_max - new_max)
            weight = tl.exp2(score - new_max[:, None])
            running_sum = running_sum * rescale + tl.sum(weight, 1)
            average = tl.dot(weight.to(query.dtype), value, average * rescale[:, None], input_precision="ieee")
            running_max = new_max
        return average / running_sum[:, None], running_max + tl.log2(running_sum)

    @triton.jit(do_not_specialize=["room", "table_stride", "pieces", "window"])
    def _partial_kernel(
        q,
        keys,
        values,
        tables,
        positions,
        partial,
        lse,
        q_stride_a,
        q_stride_n,
        room,
        table_stride,
        pieces,
        window,
        scale,
        softcap,
        K: tl.constexpr,
        G: tl.constexpr,
        B: tl.constexpr,
        H: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
        PIECE: tl.constexpr,
        PIECES: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        """Pieces i, i + S, ... of one response, for ROWS query heads of one key/value head."""
        a = tl.program_id(0).to(tl.int64)
        shared_by: tl.constexpr = (G + ROWS - 1) // ROWS  # programs, of more query heads than one takes
        k = tl.program_id(1) // shared_by
        row, column = tl.program_id(1) % shared_by * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
        inside = (row < G)[:, None] & (column < H)[None, :]
        head = k * G + row
        query = tl.load(q + a * q_stride_a + head[:, None] * q_stride_n + column[None, :], mask=inside, other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
        table = tables + a * table_stride
        first, end, start, piece = _pieces_of(tl.load(positions + a), room, window, WINDOWED, TILE, PIECE, PIECES)
        for i in range(tl.program_id(2), (end - start + piece - 1) // piece, tl.num_programs(2)):
            begin = start + i * piece
            until = tl.minimum(begin + piece, end)
            average, piece_lse = _piece(
                query, keys, values, table, k, begin, until, first, scale, softcap, K, B, H, TILE, WINDOWED, CAPPED
            )
            place = (a * (K * G) + head) * pieces + i
            tl.store(lse + place, piece_lse, mask=row < G)
            tl.store(partial + place[:, None] * H + column[None, :], average, mask=inside)

    @triton.jit(do_not_specialize=["room", "pieces", "window"])
    def _sum_kernel(
        partial,
        lse,
        sinks,
        positions,
        out,
        room,
        pieces,
        window,
        N: tl.constexpr,
        H: tl.constexpr,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
        PIECE: tl.constexpr,
        PIECES: tl.constexpr,
        WINDOWED: tl.constexpr,
        WITH_SINKS: tl.constexpr,
    ):
        """The pieces of one response and query head, by their weights; always as many as there may be, so that they are
        added in one order.
        """
        a, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
        _, end, start, piece = _pieces_of(tl.load(positions + a), room, window, WINDOWED, TILE, PIECE, PIECES)
        i, column = tl.arange(0, PIECES), tl.arange(0, WIDTH)
        there = i < (end - start + piece - 1) // piece
        place = (a * N + n) * pieces + i
        piece_lse = tl.load(lse + place, mask=there, other=float("-inf"))
        largest = tl.max(piece_lse, 0)
        if WITH_SINKS:
            sink = tl.load(sinks + n).to(tl.float32) * 1.4426950408889634  # log2 e
            largest = tl.maximum(largest, sink)
        weight = tl.exp2(piece_lse - largest)
        total = tl.sum(weight, 0)
        if WITH_SINKS:
            total += tl.exp2(sink - largest)
        read = there[:, None] & (column < H)[None, :]
        average = tl.load(partial + place[:, None] * H + column[None, :], mask=read, other=0.0)
        result = tl.sum(average * weight[:, None], 0) / total
        tl.store(out + (a * N + n) * H + column, result.to(out.dtype.element_ty), mask=column < H)


def paged_attention(
    q_ANH: Tensor,
    keys_PKBH: Tensor,
    values_PKBH: Tensor,
    tables_AJ: Tensor,
    positions_A: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
    multiprocessors: int,
) -> Tensor:
    """As `eager.paged_attention`, for what `takes` takes. The grid depends on shapes alone; nothing waits for the
    device. `multiprocessors` changes the number of programs and no bit of the result.
    """
    (A, N, H), (_, K, B, _), room = q_ANH.shape, keys_PKBH.shape, tables_AJ.shape[1] * keys_PKBH.shape[2]
    out_ANH = q_ANH.new_empty(A, N, H)
    if not A:
        return out_ANH
    heads = K * -(-N // K // ROWS)
    pieces, programs = shares(A, heads, longest_of(room, window, tile(H, q_ANH.dtype)), multiprocessors)
    partial = q_ANH.new_empty(A, N, pieces, H, dtype=torch.float32)
    lse = q_ANH.new_empty(A, N, pieces, dtype=torch.float32)
    q_ANH = q_ANH if q_ANH.stride(2) == 1 else q_ANH.contiguous()
    tables_AJ = tables_AJ if tables_AJ.stride(1) == 1 else tables_AJ.contiguous()
    positions_A = positions_A.contiguous()
    # e^(2 scale q.k / softcap) makes the soft-cap's tanh, e^(scale q.k) the softmax: powers of two are faster
    in_powers_of_two = (scale if softcap is None else 2 * scale / softcap) * LOG2E
    tensors = (q_ANH, keys_PKBH, values_PKBH, tables_AJ, positions_A, partial, lse)
    strides = (q_ANH.stride(0), q_ANH.stride(1), room, tables_AJ.stride(0), pieces, window or 0)
    common = constants(H, q_ANH.dtype, window is not None)
    compiled_for: dict[str, int | None] = {"K": K, "G": N // K, "B": B, "ROWS": ROWS, "CAPPED": softcap is not None}
    # a CPU has the interpreter alone, whose products know no bfloat16
    compiled_for |= {"WIDEN": not q_ANH.is_cuda, **launch(H, q_ANH.dtype)}
    _partial_kernel[(A, heads, programs)](
        *tensors, *strides, in_powers_of_two, (softcap or 0.0) * LOG2E, **common, **compiled_for
    )
    sinks = {"N": N, "WITH_SINKS": sinks_N is not None}
    of_sum = (partial, lse, lse if sinks_N is None else sinks_N, positions_A, out_ANH)
    _sum_kernel[(A, N)](*of_sum, room, pieces, window or 0, **common, **sinks)
    return out_ANH

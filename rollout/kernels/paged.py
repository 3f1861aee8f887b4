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
STAGES = 5  # a tile waits for its page's number: five stages are two tiles on their way
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

    @triton.jit(do_not_specialize=["room", "pages", "pieces", "window"])
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
        pages,
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
        """Piece by piece: the softmax's average of the values, and log2 of the sum of the exponentials. Scores are in
        powers of two.
        """
        a = tl.program_id(0).to(tl.int64)
        tiles: tl.constexpr = (G + ROWS - 1) // ROWS
        k = tl.program_id(1) // tiles
        first, end, start, piece = _pieces_of(tl.load(positions + a), room, window, WINDOWED, TILE, PIECE, PIECES)
        row = tl.program_id(1) % tiles * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = (row < G)[:, None] & (column < H)[None, :]
        head = k * G + row
        query = tl.load(q + a * q_stride_a + head[:, None] * q_stride_n + column[None, :], mask=inside, other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
        table = tables + a * pages
        for i in range(tl.program_id(2), (end - start + piece - 1) // piece, tl.num_programs(2)):
            running_max = tl.full([ROWS], float("-inf"), tl.float32)
            running_sum = tl.zeros([ROWS], tl.float32)
            average = tl.zeros([ROWS, WIDTH], tl.float32)
            begin = start + i * piece
            for at in range(begin, tl.minimum(begin + piece, end), TILE):
                s = at + tl.arange(0, TILE)
                visible = s < end
                if WINDOWED:
                    visible = visible & (s >= first)
                if B >= TILE:  # a tile lies within one page
                    page = tl.load(table + at // B).to(tl.int64)
                    base = (page * K + k) * (B * H) + (s % B) * H
                else:
                    page = tl.load(table + s // B, mask=visible, other=0).to(tl.int64)
                    base = (page * K + k) * (B * H) + (s % B) * H
                offset = base[:, None] + column[None, :]
                read = visible[:, None] & (column < H)[None, :]
                key = tl.load(keys + offset, mask=read, other=0.0)
                value = tl.load(values + offset, mask=read, other=0.0)
                if WIDEN:
                    key, value = key.to(tl.float32), value.to(tl.float32)
                score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
                if CAPPED:  # softcap tanh(score / softcap), the tanh from one exponential
                    score = softcap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
                score = tl.where(visible[None, :], score, float("-inf"))
                new_max = tl.maximum(running_max, tl.max(score, 1))
                rescale = tl.exp2(running_max - new_max)
                weight = tl.exp2(score - new_max[:, None])
                running_sum = running_sum * rescale + tl.sum(weight, 1)
                average = average * rescale[:, None]
                average = tl.dot(weight.to(value.dtype), value, average, input_precision="ieee")
                running_max = new_max
            place = (a * (K * G) + head) * pieces + i
            tl.store(lse + place, running_max + tl.log2(running_sum), mask=row < G)
            average = average / running_sum[:, None]
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
        first, end, start, piece = _pieces_of(tl.load(positions + a), room, window, WINDOWED, TILE, PIECE, PIECES)
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
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
    multiprocessors: int,
) -> Tensor:
    """As `eager.paged_attention`, for what `takes` takes. The grid depends on shapes alone; nothing waits for the
    device. `multiprocessors` changes the number of programs and no bit of the result.
    """
    (A, N, H), (_, K, B, _), J = q_ANH.shape, keys_PKBH.shape, tables_AJ.shape[1]
    out_ANH = q_ANH.new_empty(A, N, H)
    if not A:
        return out_ANH
    G, room, TILE = N // K, J * B, tile(H, keys_PKBH.dtype)
    heads = K * -(-G // ROWS)
    pieces, programs = shares(A, heads, longest_of(room, window, TILE), multiprocessors)
    partial = torch.empty(A, N, pieces, H, dtype=torch.float32, device=q_ANH.device)
    lse = torch.empty(A, N, pieces, dtype=torch.float32, device=q_ANH.device)
    q_ANH = q_ANH if q_ANH.stride(2) == 1 else q_ANH.contiguous()
    tables_AJ, positions_A = tables_AJ.contiguous(), positions_A.contiguous()
    # exp2 of a score before a soft-cap is e^(2 scale q.k / softcap), of one after it e^score
    in_powers_of_two = (scale if softcap is None else 2 * scale / softcap) * LOG2E
    common = {
        "H": H,
        "WIDTH": max(16, triton.next_power_of_2(H)),
        "TILE": TILE,
        "PIECE": PIECE,
        "PIECES": PIECES,
        "WINDOWED": window is not None,
    }
    _partial_kernel[(A, heads, programs)](
        q_ANH,
        keys_PKBH,
        values_PKBH,
        tables_AJ,
        positions_A,
        partial,
        lse,
        q_ANH.stride(0),
        q_ANH.stride(1),
        room,
        J,
        pieces,
        window or 0,
        in_powers_of_two,
        (softcap or 0.0) * LOG2E,
        K=K,
        G=G,
        B=B,
        ROWS=ROWS,
        CAPPED=softcap is not None,
        WIDEN=not q_ANH.is_cuda,  # a CPU has the interpreter alone, whose products know no bfloat16
        **common,
        num_warps=8 if q_ANH.dtype == torch.float32 else 4,
        num_stages=STAGES,
    )
    _sum_kernel[(A, N)](
        partial,
        lse,
        lse if sinks_N is None else sinks_N,
        positions_A,
        out_ANH,
        room,
        pieces,
        window or 0,
        N=N,
        WITH_SINKS=sinks_N is not None,
        **common,
    )
    return out_ANH

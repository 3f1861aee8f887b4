"""Packed attention: every backend of engine/model/attention.py that is here, beside what is done without packing.
                                                                                          python -m benchmarks.attention
                                                                                          --help

    sdpa padded         scaled_dot_product_attention on the sequences padded to the longest (inputs beforehand, untimed)
    sdpa block mask     one call over the whole stream with a (T, T) mask, as `transformers` packs without such a kernel
    flex                torch's flex_attention, compiled, with a block mask of the same (CUDA only: no CPU backward)

Rates count what the model needs: pairs = sum over sequences of sum_t min(t, W) visible (query, key) pairs, t = 1 .. L,

    FLOPs forward = 4 N H pairs   (two products)   backward = 10 N H pairs   (five: one of them recomputes the scores)
    bytes forward = q + k + v + out                         backward = twice that + out

whatever the backend computes; and stand beside a matrix product and a copy measured in the same run. The stream is in
the layout that a decoder hands over, and backends are called as the decoder calls them.

To add a candidate: one line in CANDIDATES.

T tokens of the stream · S sequences · L tokens of one · N query heads · K key/value heads · H head size · W window.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from benchmarks import measure
from benchmarks.measure import Case, Times, Unavailable
from engine.errors import UserError
from engine.model import attention

SIGMA = 0.9  # of log length: chat data's spread


@dataclass(frozen=True)
class Stream:
    """The boundaries of a packed stream, and the window."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    window: int | None

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that attend."""
        full = lambda length: length * (length + 1) // 2
        beyond = lambda length: full(max(0, length - self.window)) if self.window else 0
        return sum(full(length) - beyond(length) for length in self.lengths)


Attend = Callable[[Tensor, Tensor, Tensor, Stream], Tensor]  # (T, N, H), (T, K, H), (T, K, H) -> (T, N, H)


def make_stream(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Stream:
    return Stream(lengths, torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device), window)


def make_inputs(
    stream: Stream, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device, seed: int = 0
) -> list[Tensor]:
    """q, k, v and the gradient of the output, random."""
    generator = torch.Generator(device).manual_seed(seed)
    T = sum(stream.lengths)
    shapes = [(T, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [
        torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_(i < 3)
        for i, shape in enumerate(shapes)
    ]


def parse_lengths(text: str, tokens: int) -> tuple[int, ...]:
    """'lognormal:MEAN', 'fixed:L' or 'L,L,L': sequence lengths that fill `tokens`, the last one cut to fit. Raises
    ValueError.
    """
    kind, _, value = text.partition(":")
    if kind == "lognormal":
        draws = np.random.Generator(np.random.Philox(key=0)).lognormal(
            np.log(float(value)) - SIGMA**2 / 2, SIGMA, tokens
        )
        wanted = [max(1, round(draw)) for draw in draws]
    elif kind == "fixed":
        wanted = [int(value)] * tokens
    else:
        wanted = [int(word) for word in text.split(",")]
        tokens = min(tokens, sum(wanted))
    if min(wanted) < 1:
        raise ValueError(f"{text}: a length is at least 1")
    ends = np.minimum(np.cumsum(wanted), tokens)
    return tuple(int(length) for length in np.diff(ends, prepend=0) if length)


def reference(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, stream: Stream) -> Tensor:
    """The formula, sequence by sequence, in the inputs' dtype (float64 here)."""
    groups, outs = q_TNH.shape[1] // k_TKH.shape[1], []
    for q_LNH, k_LKH, v_LKH in zip(*(x.split(stream.lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        k_LNH, v_LNH = (x.repeat_interleave(groups, dim=1) for x in (k_LKH, v_LKH))
        scores_NLL = torch.einsum("qnh,knh->nqk", q_LNH, k_LNH) * q_LNH.shape[-1] ** -0.5
        scores_NLL = scores_NLL.masked_fill(~visible(len(q_LNH), stream.window, q_LNH.device), float("-inf"))
        outs.append(torch.einsum("nqk,knh->qnh", scores_NLL.softmax(-1), v_LNH))
    return torch.cat(outs)


def visible(length: int, window: int | None, device) -> Tensor:
    """(L, L), True where query t (row) may see key s."""
    back_LL = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back_LL >= 0) & (back_LL < (window or length))


def backend(name: str) -> Attend:
    """A backend of engine/model/attention.py through the function that it registers for decoders."""

    def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, stream: Stream) -> Tensor:
        function = _registered(name, q_TNH.device, q_TNH.dtype)
        as_decoders_do = (x.transpose(0, 1)[None] for x in (q_TNH, k_TKH, v_TKH))
        return function(None, *as_decoders_do, None, sliding_window=stream.window, packing=stream)[0][0]

    return attend


@lru_cache
def _registered(name: str, device: torch.device, dtype: torch.dtype) -> Callable:
    try:
        attention.choose_backend(name, device, SimpleNamespace(), dtype)
    except UserError as error:
        raise Unavailable(str(error).removeprefix(f"--attention {name}: ").split(";")[0]) from None
    return AttentionInterface()[attention.register(name)]


def padded(q_SNLH: Tensor, k_SKLH: Tensor, v_SKLH: Tensor, stream: Stream) -> Tensor:
    """Right padding needs no mask under causality: a real token never looks ahead."""
    banded = stream.window is not None and stream.window < stream.max_seqlen
    mask_LL = visible(stream.max_seqlen, stream.window, q_SNLH.device) if banded else None
    gqa = q_SNLH.shape[1] != k_SKLH.shape[1]
    return scaled_dot_product_attention(q_SNLH, k_SKLH, v_SKLH, attn_mask=mask_LL, is_causal=not banded, enable_gqa=gqa)


def block_mask(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, stream: Stream) -> Tensor:
    """Heads are repeated, as `transformers` does where there is a mask: kernels with both a mask and grouped heads are
    rare.
    """
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    q_1NTH, k_1NTH, v_1NTH = (
        x.transpose(0, 1)[None] for x in (q_TNH, k_TKH.repeat_interleave(groups, 1), v_TKH.repeat_interleave(groups, 1))
    )
    return scaled_dot_product_attention(q_1NTH, k_1NTH, v_1NTH, attn_mask=_mask_TT(stream))[0].transpose(0, 1)


def flex(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, stream: Stream) -> Tensor:
    if not q_TNH.is_cuda:
        raise Unavailable("flex_attention has no backward on a CPU")
    compiled, mask = _flex(stream)
    q_1NTH, k_1KTH, v_1KTH = (x.transpose(0, 1)[None] for x in (q_TNH, k_TKH, v_TKH))
    return compiled(q_1NTH, k_1KTH, v_1KTH, block_mask=mask, enable_gqa=q_TNH.shape[1] != k_TKH.shape[1])[0].transpose(
        0, 1
    )


def _sequence_T(stream: Stream) -> Tensor:
    lengths_S = torch.tensor(stream.lengths, device=stream.cu_seqlens.device)
    return torch.repeat_interleave(torch.arange(len(stream.lengths), device=lengths_S.device), lengths_S)


@lru_cache(maxsize=1)  # made once a stream, as a trainer makes it once a micro-batch: not part of the time
def _mask_TT(stream: Stream) -> Tensor:
    sequence_T = _sequence_T(stream)
    return visible(len(sequence_T), stream.window, sequence_T.device) & (sequence_T[:, None] == sequence_T)


@lru_cache(maxsize=1)
def _flex(stream: Stream) -> tuple[Callable, object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sequence_T, window = _sequence_T(stream), stream.window or len(_sequence_T(stream))

    def may_see(b, h, query, key):
        return (key <= query) & (query - key < window) & (sequence_T[query] == sequence_T[key])

    T = len(sequence_T)
    return torch.compile(flex_attention, dynamic=False), create_block_mask(
        may_see, None, None, T, T, device=sequence_T.device
    )


@dataclass(frozen=True)
class Candidate:
    attend: Attend
    compiles: bool = False
    padded: bool = False  # takes and returns (S, N, L, H), padded to the longest, instead of the stream


CANDIDATES = {
    **{name: Candidate(backend(name)) for name in attention.BACKENDS},
    "sdpa padded": Candidate(padded, padded=True),
    "sdpa block mask": Candidate(block_mask),
    "flex": Candidate(flex, compiles=True),
}


def pad(x_TNH: Tensor, stream: Stream) -> Tensor:
    """(S, N, Lmax, H), zeros after each sequence."""
    sequences = [x.transpose(0, 1) for x in x_TNH.detach().split(stream.lengths)]
    out_SNLH = x_TNH.new_zeros(len(sequences), x_TNH.shape[1], stream.max_seqlen, x_TNH.shape[2])
    for row, x_NLH in zip(out_SNLH, sequences, strict=True):
        row[:, : x_NLH.shape[1]] = x_NLH
    return out_SNLH


def unpad(x_SNLH: Tensor, stream: Stream) -> Tensor:
    return torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(x_SNLH, stream.lengths, strict=True)])


def case_of(candidate: Candidate, inputs: list[Tensor], stream: Stream) -> Case:
    *qkv, out_grad = inputs
    if candidate.padded:
        qkv, out_grad = [pad(x, stream).requires_grad_() for x in qkv], pad(out_grad, stream)
    return Case(
        lambda: candidate.attend(*qkv, stream),
        lambda out: torch.autograd.grad(out, qkv, out_grad),
        compiles=candidate.compiles,
    )


def errors(candidate: Candidate, inputs: list[Tensor], stream: Stream) -> dict[str, float]:
    """Relative errors of output and gradients against the formula in float64 on the same (rounded) inputs."""
    case = case_of(candidate, inputs, stream)
    out = case.forward()
    got = (out, *case.backward(out))
    if candidate.padded:
        got = [unpad(x, stream) for x in got]
    *qkv, out_grad = inputs
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference(*wide, stream)
    wanted = (expected, *torch.autograd.grad(expected, wide, out_grad.double()))
    return dict(zip(("out", "q_grad", "k_grad", "v_grad"), map(measure.relative_error, got, wanted), strict=True))


def memory_of(
    name: str, lengths: tuple[int, ...], window: int | None, shape: tuple, device: torch.device, threads: int
) -> int:
    """Peak extra bytes of one forward and backward, gradients included. On a CPU to be called in a fresh process."""
    torch.set_num_threads(threads)
    stream = make_stream(lengths, window, device)
    small = make_stream((16,), window, device)

    def run(inputs: list[Tensor], stream: Stream):
        case = case_of(CANDIDATES[name], inputs, stream)
        return lambda: (out := case.forward(), case.backward(out))

    run(make_inputs(small, *shape, device), small)()
    inputs = make_inputs(stream, *shape, device)
    measured = run(inputs, stream)
    if device.type == "cuda":
        measured()  # compiles
    _mask_TT.cache_clear()  # the mask is part of what masking costs
    return measure.extra_memory(measured, device)


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = measure.device_of(None).type == "cuda"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 2048)
    parser.add_argument("--heads", type=int, default=32 if cuda else 8)
    parser.add_argument("--kv_heads", type=int, default=8 if cuda else 2)
    parser.add_argument("--head_dim", type=int, default=128 if cuda else 64)
    parser.add_argument(
        "--lengths",
        default="lognormal:790" if cuda else "lognormal:400",
        help="lognormal:MEAN, fixed:LENGTH or a list 512,100,3000 (which sets --tokens)",
    )
    parser.add_argument("--window", type=int, help="sliding window: a token sees itself and W - 1 before it")
    parser.add_argument("--dtype", choices=measure.DTYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--backends", nargs="+", metavar="NAME", default=list(CANDIDATES), help=f"of: {', '.join(CANDIDATES)}"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="timed runs of each backend take about this long (at least one to three runs)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", metavar="PATH", help="write every figure there")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.backends if name not in CANDIDATES]:
        parser.error(f"unknown backend {unknown[0]}; there are {', '.join(CANDIDATES)}")
    if min(args.tokens, args.heads, args.kv_heads, args.head_dim, args.threads) < 1 or args.heads % args.kv_heads:
        parser.error("sizes are at least 1, and --heads is a multiple of --kv_heads")
    try:
        args.lengths = parse_lengths(args.lengths, 2**62 if args.lengths[0].isdigit() else args.tokens)
    except (ValueError, OverflowError) as error:
        parser.error(f"--lengths: {error}")
    args.tokens = sum(args.lengths)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device, dtype = measure.device_of(args.device), measure.DTYPES[args.dtype]
    torch.set_num_threads(args.threads)
    here = measure.machine(device)
    shape = (args.heads, args.kv_heads, args.head_dim, dtype)
    fresh = measure.FreshProcesses("torch", "engine.model.attention")
    sample = make_stream(
        tuple(min(length, n) for length, n in zip(args.lengths, (130, 1, 257, 96), strict=False)), args.window, device
    )
    sample_inputs = make_inputs(sample, *shape, device, seed=1)
    rows = {name: {"memory": None, "errors": None, "skipped": None} for name in args.backends}
    for name, row in rows.items():
        try:
            row["errors"] = errors(CANDIDATES[name], sample_inputs, sample)
            measured = (name, args.lengths, args.window, shape, device, args.threads)
            row["memory"] = memory_of(*measured) if device.type == "cuda" else fresh(memory_of, *measured)
        except Exception as error:  # whatever a candidate raises is shown in its row
            row["skipped"] = measure.reason(error)

    stream = make_stream(args.lengths, args.window, device)
    inputs = make_inputs(stream, *shape, device)
    cases = {name: case_of(CANDIDATES[name], inputs, stream) for name, row in rows.items() if row["skipped"] is None}
    times = measure.take_turns(cases, device, args.seconds)
    for name in cases:
        rows[name]["times" if isinstance(times[name], Times) else "skipped"] = times[name]
    rates = {"product": measure.matmul_rate(device, dtype), "copy": measure.copy_rate(device)}
    show(args, here, device, stream, rows, rates)
    measure.write_json(
        args.json,
        benchmark="attention",
        machine=here,
        arguments=vars(args),
        visible_pairs=stream.pairs,
        product_flops_per_second=rates["product"],
        copy_bytes_per_second=rates["copy"],
        backends=rows,
    )


def show(
    args: argparse.Namespace, here: dict, device: torch.device, stream: Stream, rows: dict, rates: dict[str, float]
) -> None:
    unit, scale = ("TFLOP/s", 1e12) if device.type == "cuda" else ("GFLOP/s", 1e9)
    flops = 4 * args.heads * args.head_dim * stream.pairs
    size = torch.finfo(measure.DTYPES[args.dtype]).bits // 8
    out_bytes = args.tokens * args.heads * args.head_dim * size
    least_bytes = 2 * out_bytes * (1 + args.kv_heads / args.heads)
    print(
        f"\n{here['device']}, torch {here['torch']}, {args.dtype}"
        + (f", {args.threads} threads" if device.type == "cpu" else "")
    )
    fill = args.tokens / (len(args.lengths) * stream.max_seqlen)
    print(
        f"T = {args.tokens:,} tokens in {len(args.lengths)} sequences of up to {stream.max_seqlen:,} (padded, they"
        f" would fill {fill:.0%}), mean context {stream.pairs / args.tokens:,.0f}"
    )
    print(
        f"N = {args.heads} heads, K = {args.kv_heads}, H = {args.head_dim}"
        + (f", W = {args.window}" if args.window else "")
    )
    print(f"a matrix product reaches {rates['product'] / scale:,.0f} {unit}, a copy {rates['copy'] / 1e9:,.0f} GB/s\n")

    def rate(times: list[float], products: float) -> list[str]:
        achieved = products * flops / measure.median(times)
        return [
            measure.seconds_text(measure.median(times)),
            f"{achieved / scale:,.0f}",
            f"{achieved / rates['product']:.0%}",
        ]

    header = (
        "backend",
        "forward",
        unit,
        "of product",
        "backward",
        unit,
        "of product",
        "total",
        "spread",
        "GB/s",
        "extra memory",
        "err out",
        "err dq dk dv",
    )
    lines = []
    for name, row in rows.items():
        if row["skipped"] is not None:
            lines.append([name, "-", row["skipped"]])
            continue
        times, error = row["times"], row["errors"]
        total = measure.median(times.total)
        lines.append(
            [
                name,
                *rate(times.forward, 1),
                *rate(times.backward, 2.5),
                measure.seconds_text(total),
                f"±{measure.spread(times.total):.0%}",
                f"{(3 * least_bytes + out_bytes) / total / 1e9:,.1f}",
                measure.mib_text(row["memory"]),
                f"{error['out']:.0e}",
                f"{max(error[key] for key in ('q_grad', 'k_grad', 'v_grad')):.0e}",
            ]
        )
    print(measure.table(header, lines))
    print(
        "\nFLOPs: 4 N H x visible pairs forward, 2.5 times that backward; GB/s: least bytes over both; errors against"
        " float64, on a smaller sample"
    )


if __name__ == "__main__":
    sys.exit(main())

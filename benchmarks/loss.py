"""Loss heads side by side: hidden states and output weights in, a loss and its gradients out. python -m benchmarks.loss

Every variant computes a loss of log p(target) of the R rows that count of T tokens, and its gradients for hidden and
weight:

    token sum   - (1/R) sum log p                          SFT's
    entropy     - (1/R) sum (log p + 0.01 H)               a policy gradient's
    pairs       - (1/P) sum log sigma(5 [mean log p(w) - mean log p(l)])   length-normalised DPO's, without reference

A rate counts what the loss needs, 2 R D V forward and 4 R D V backward, whatever the variant computes (a recomputing
backward does 6); 'of products' is the time of those bare matrix products, measured in the same run, over the variant's.
The second table is the passes between the products, in bytes a second beside a copy.

To add a candidate: one line in VARIANTS.

T tokens · R rows that count · C rows of a chunk · D hidden · V vocabulary · P pairs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from benchmarks import measure
from benchmarks.measure import Case, Times, Unavailable
from losses.kernels import eager
from losses.logprobs import default_chunk_rows, linear_logprobs, linear_loss

IGNORED = -100  # what the other libraries call a row that does not count
ENTROPY_COEF = 0.01
BETA = 5.0


@dataclass(frozen=True)
class Problem:
    """Inputs in both dialects: labels with -100 for the libraries, the rows that count for ours (the packer ships
    those).
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    labels_T: Tensor
    rows_R: Tensor
    targets_R: Tensor
    counts: list[int]  # rows of each answer: chosen, rejected, chosen, ...
    chunk_rows: int | None

    @property
    def cuts(self) -> list[int]:
        """P + 1 row numbers between pairs."""
        ends = torch.tensor([0, *self.counts]).cumsum(0).tolist()
        return ends[::2]

    @property
    def hidden_RD(self) -> Tensor:
        return self.hidden_TD.index_select(0, self.rows_R)


def make_problem(
    tokens: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    masked: float,
    chunk_rows: int | None,
    device,
    seed: int = 0,
) -> Problem:
    """Logits of unit scale about a target that stands out of them as a trained model's does, mildly."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden_TD = torch.randn(tokens, hidden, device=device, generator=generator).to(dtype)
    weight_VD = torch.randn(vocab, hidden, device=device, generator=generator).mul_(hidden**-0.5).to(dtype)
    targets_T = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
    order_T = torch.randperm(tokens, device=device, generator=generator)
    rows_R = order_T[: max(2, tokens - round(masked * tokens))].sort().values
    labels_T = torch.full_like(targets_T, IGNORED).index_copy_(0, rows_R, targets_T[rows_R])
    hidden_TD.add_(weight_VD[targets_T] * 4)
    answers = 2 * max(1, len(rows_R) // 400)  # answers of some 200 rows
    counts = [len(rows_R) // answers] * (answers - 1)
    counts.append(len(rows_R) - sum(counts))
    return Problem(
        hidden_TD.requires_grad_(),
        weight_VD.requires_grad_(),
        labels_T,
        rows_R,
        targets_T[rows_R].contiguous(),
        counts,
        chunk_rows,
    )


def token_sum(logprobs_R: Tensor, p: Problem) -> Tensor:
    return -logprobs_R.sum() / len(p.rows_R)


def with_entropy(logprobs_R: Tensor, entropy_R: Tensor, p: Problem) -> Tensor:
    return -(logprobs_R + ENTROPY_COEF * entropy_R).sum() / len(p.rows_R)


def pairs(logprobs_C: Tensor, p: Problem, groups: slice) -> Tensor:
    """The loss of the pairs in `groups`, whose rows `logprobs_C` are."""
    counts = p.counts[2 * groups.start : 2 * groups.stop]
    means = torch.stack([answer.mean() for answer in logprobs_C.split(counts)])
    return -logsigmoid(BETA * (means[::2] - means[1::2])).sum() / (len(p.counts) // 2)


def oracle(kind: str, hidden_TD: Tensor, weight_VD: Tensor, p: Problem) -> Tensor:
    """The loss with all logits in memory, in the inputs' dtype."""
    logp_RV = (hidden_TD[p.rows_R] @ weight_VD.T).log_softmax(-1)
    logprobs_R = logp_RV.gather(1, p.targets_R[:, None]).squeeze(1)
    if kind == "pairs":
        return pairs(logprobs_R, p, slice(0, len(p.counts) // 2))
    if kind == "entropy":
        return with_entropy(logprobs_R, -(logp_RV.exp() * logp_RV).sum(-1), p)
    return token_sum(logprobs_R, p)


def naive(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """What `transformers` does: all logits, upcast, every row whether it counts or not."""
    return cross_entropy((hidden_TD @ weight_VD.T).float(), labels_T, ignore_index=IGNORED, reduction="sum")


def compiled(p: Problem) -> Tensor:
    return torch.compile(naive, dynamic=False)(p.hidden_TD, p.weight_VD, p.labels_T) / len(p.rows_R)


def ours_loss(p: Problem) -> Tensor:
    return linear_loss(
        p.hidden_RD, p.weight_VD, p.targets_R, lambda logprobs_C, _: token_sum(logprobs_C, p), chunk_rows=p.chunk_rows
    )


def ours_pairs(p: Problem) -> Tensor:
    loss = lambda logprobs_C, groups: pairs(logprobs_C, p, groups)
    return linear_loss(p.hidden_RD, p.weight_VD, p.targets_R, loss, p.cuts, chunk_rows=p.chunk_rows)


def ours_logprobs(p: Problem) -> Tensor:
    return token_sum(linear_logprobs(p.hidden_RD, p.weight_VD, p.targets_R, chunk_rows=p.chunk_rows), p)


def ours_entropy(p: Problem) -> Tensor:
    return with_entropy(
        *linear_logprobs(p.hidden_RD, p.weight_VD, p.targets_R, entropy=True, chunk_rows=p.chunk_rows), p
    )


def torch_native(p: Problem) -> Tensor:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    if p.hidden_TD.dtype == torch.bfloat16 and not p.hidden_TD.is_cuda:
        raise Unavailable("takes minutes in bfloat16 on a CPU")
    total = torch.nn.functional.linear_cross_entropy(
        p.hidden_TD, p.weight_VD, p.labels_T, ignore_index=IGNORED, reduction="sum"
    )
    return total / len(p.rows_R)


def trl(p: Problem) -> Tensor:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which trl imports, and which remarks on its own kernels
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:
        raise Unavailable("trl >= 1.16 is not installed") from None
    logprobs_R, *_ = ChunkedLogProbFunction.apply(
        p.hidden_RD, p.weight_VD, None, p.targets_R, 1.0, 32768, None, 1.0, ()
    )
    return token_sum(logprobs_R, p)


def liger(p: Problem) -> Tensor:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    if not p.hidden_TD.is_cuda:
        raise Unavailable("its kernels need a GPU")
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(p.weight_VD, p.hidden_TD, p.labels_T) / len(p.rows_R)


@dataclass(frozen=True)
class Variant:
    loss: Callable[[Problem], Tensor]
    kind: str = "token sum"
    backward: bool = True  # False: forward only, without gradients
    gradients_in_forward: bool = False
    compiles: bool = False


VARIANTS = {
    "naive": Variant(lambda p: naive(p.hidden_TD, p.weight_VD, p.labels_T) / len(p.rows_R)),
    "compile": Variant(compiled, compiles=True),
    "linear_loss": Variant(ours_loss, gradients_in_forward=True),
    "linear_loss pairs": Variant(ours_pairs, "pairs", gradients_in_forward=True),
    "linear_logprobs forward": Variant(ours_logprobs, backward=False),
    "linear_logprobs": Variant(ours_logprobs),
    "linear_logprobs entropy": Variant(ours_entropy, "entropy"),
    "torch native": Variant(torch_native, gradients_in_forward=True),
    "trl": Variant(trl),
    "liger": Variant(liger, gradients_in_forward=True),
}


def case_of(variant: Variant, p: Problem) -> Case:
    leaves = (p.hidden_TD, p.weight_VD)
    if not variant.backward:
        return Case(torch.no_grad()(lambda: variant.loss(p)))
    return Case(lambda: variant.loss(p), lambda loss: torch.autograd.grad(loss, leaves), compiles=variant.compiles)


def products(p: Problem) -> tuple[Case, float]:
    """The three products of some of the R rows, and how many times that R is: the logits of all might not fit."""
    p = Problem(p.hidden_TD.detach(), p.weight_VD.detach(), p.labels_T, p.rows_R, p.targets_R, p.counts, None)
    V, size = p.weight_VD.shape[0], p.hidden_TD.element_size()
    rows = min(len(p.rows_R), max(256, 2**30 // (V * size)))
    hidden_CD = p.hidden_RD[:rows].contiguous()
    logits_CV = hidden_CD.new_empty(rows, V)
    hidden_grad_CD, weight_grad_VD = torch.empty_like(hidden_CD), torch.empty_like(p.weight_VD)

    def forward() -> Tensor:
        return torch.mm(hidden_CD, p.weight_VD.T, out=logits_CV)

    def backward(logits_CV: Tensor) -> None:
        torch.mm(logits_CV, p.weight_VD, out=hidden_grad_CD)
        torch.mm(logits_CV.T, hidden_CD, out=weight_grad_VD)

    return Case(forward, backward), len(p.rows_R) / rows


def passes(vocab: int, device: torch.device) -> tuple[dict[str, Case], int]:
    """The two passes over a chunk of fp32 logits in every implementation present, and the chunk's bytes. They move it
    once, and twice.
    """
    modules = {"eager": eager}
    if device.type == "cuda":
        from losses.kernels import fused

        modules |= {"fused": fused} if fused.AVAILABLE else {}
    rows = max(1, (2**30 if device.type == "cuda" else 2**26) // (4 * vocab))
    logits_CV = torch.randn(rows, vocab, device=device)
    work_CV, targets_C = torch.empty_like(logits_CV), torch.randint(0, vocab, (rows,), device=device)
    coef_C = torch.full((rows,), -1.0, device=device)
    lse_C, _, entropy_C = eager.logits_statistics(logits_CV, targets_C, True)
    restore = lambda: work_CV.copy_(logits_CV)
    cases = {}
    for name, module in modules.items():
        cases |= {
            f"statistics, {name}": Case(lambda m=module: m.logits_statistics(logits_CV, targets_C, False)),
            f"statistics with entropy, {name}": Case(lambda m=module: m.logits_statistics(logits_CV, targets_C, True)),
            f"gradient, {name}": Case(
                lambda m=module: m.logits_gradient_(work_CV, lse_C, targets_C, coef_C, None, None, None), before=restore
            ),
            f"gradient with entropy, {name}": Case(
                lambda m=module: m.logits_gradient_(work_CV, lse_C, targets_C, coef_C, entropy_C, coef_C, None),
                before=restore,
            ),
        }
    return cases, logits_CV.nbytes


def errors(variant: Variant, p: Problem) -> dict[str, float]:
    """Relative errors of loss and gradients against float64 on the same (rounded) inputs."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden_TD, p.weight_VD))
    expected = oracle(variant.kind, hidden, weight, p)
    if not variant.backward:
        with torch.no_grad():
            return {"loss": measure.relative_error(variant.loss(p), expected)}
    loss = variant.loss(p)
    got = (loss, *torch.autograd.grad(loss, (p.hidden_TD, p.weight_VD)))
    wanted = (expected, *torch.autograd.grad(expected, (hidden, weight)))
    return dict(zip(("loss", "hidden_grad", "weight_grad"), map(measure.relative_error, got, wanted), strict=True))


def memory_of(name: str, shape: tuple, device: torch.device, threads: int) -> int:
    """Peak extra bytes of one forward and backward, gradients included. On a CPU to be called in a fresh process."""
    torch.set_num_threads(threads)
    variant = VARIANTS[name]

    def run(p: Problem):
        case = case_of(variant, p)
        loss = case.forward()
        return case.backward(loss) if case.backward else loss

    p = make_problem(*shape, device)
    # libraries and thread pools first, which are not the loss's memory; compiled code needs the very shape
    run(p if variant.compiles or device.type == "cuda" else make_problem(16, *shape[1:5], None, device))
    return measure.extra_memory(lambda: run(p), device)


def sample_of(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Problem:
    """Small enough for float64 logits, several chunks, the last of them short."""
    return make_problem(
        min(args.tokens, 203), args.hidden, min(args.vocab, 8191), dtype, args.masked_fraction, 64, device, seed=1
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = measure.device_of(None).type == "cuda"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 1024)
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 256)
    parser.add_argument("--vocab", type=int, default=128256 if cuda else 32000)
    parser.add_argument("--dtype", choices=measure.DTYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", default=list(VARIANTS), help=f"of: {', '.join(VARIANTS)}"
    )
    parser.add_argument(
        "--chunk_rows", type=int, help="rows of logits that exist at a time in ours (default: by the device)"
    )
    parser.add_argument("--masked_fraction", type=float, default=0.0, help="share of the tokens that do not count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0 if cuda else 1.0,
        help="timed runs of each variant take about this long (at least one to three runs)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", metavar="PATH", help="write every figure there")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        parser.error(f"unknown variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    if (
        min(args.tokens, args.hidden, args.vocab, args.threads) < 2 - (args.threads == 1)
        or not 0 <= args.masked_fraction < 1
    ):
        parser.error("--tokens, --hidden and --vocab are at least 2, --masked_fraction is in [0, 1)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device, dtype = measure.device_of(args.device), measure.DTYPES[args.dtype]
    torch.set_num_threads(args.threads)
    here = measure.machine(device)
    shape = (args.tokens, args.hidden, args.vocab, dtype, args.masked_fraction, args.chunk_rows)
    fresh = measure.FreshProcesses("torch", "losses")
    rows = {name: {"memory": None, "errors": None, "skipped": None} for name in args.variants}

    # memory first: nothing of this process's is in a fresh one's way, and what cannot run is found out cheaply
    for name, row in rows.items():
        try:
            row["errors"] = errors(VARIANTS[name], sample_of(args, dtype, device))
            measured = (name, shape, device, args.threads)
            row["memory"] = memory_of(*measured) if device.type == "cuda" else fresh(memory_of, *measured)
        except Exception as error:  # whatever a candidate raises is shown in its row
            row["skipped"] = measure.reason(error)

    p = make_problem(*shape, device)
    bare, scale = products(p)
    runnable = {name: case_of(VARIANTS[name], p) for name, row in rows.items() if row["skipped"] is None}
    times = measure.take_turns({"products": bare, **runnable}, device, args.seconds)
    del bare
    product_times = Times(
        [t * scale for t in times["products"].forward], [t * scale for t in times["products"].backward]
    )
    for name in runnable:
        rows[name]["times" if isinstance(times[name], Times) else "skipped"] = times[name]
    del p, runnable
    pass_cases, chunk_bytes = passes(args.vocab, device)
    pass_times = measure.take_turns(pass_cases, device, args.seconds / 4)
    copied = measure.copy_rate(device)
    show(args, here, device, rows, product_times, pass_times, chunk_bytes, copied)
    measure.write_json(
        args.json,
        benchmark="loss",
        machine=here,
        arguments=vars(args),
        products=product_times,
        copy_bytes_per_second=copied,
        variants=rows,
        passes=pass_times,
        pass_chunk_bytes=chunk_bytes,
    )


def show(
    args, here: dict, device, rows: dict, products: Times, pass_times: dict, chunk_bytes: int, copied: float
) -> None:
    """The two tables, and what the memory column is to be compared with."""
    unit, scale = ("TFLOP/s", 1e12) if device.type == "cuda" else ("GFLOP/s", 1e9)
    R = max(2, args.tokens - round(args.masked_fraction * args.tokens))
    flops = 2 * R * args.hidden * args.vocab
    naive_times = rows.get("naive", {}).get("times")
    print(
        f"\n{here['device']}, torch {here['torch']}, {args.dtype}"
        + (f", {args.threads} threads" if device.type == "cpu" else "")
    )
    print(
        f"T = {args.tokens:,} tokens of which {R:,} count, D = {args.hidden:,}, V = {args.vocab:,}; chunks of ", end=""
    )
    print(f"{args.chunk_rows or default_chunk_rows(torch.empty(args.vocab, 0, device=device)):,} rows\n")

    def line(name: str, times: Times, backward: bool, in_forward: bool, memory: int | None, error: dict) -> list[str]:
        total, bare = measure.median(times.total), measure.median(products.total if backward else products.forward)
        beside = (naive_times.total if backward else naive_times.forward) if naive_times else None
        forward, back = (measure.seconds_text(measure.median(t)) for t in (times.forward, times.backward))
        return [
            name,
            "in one" if in_forward else forward,
            "in one" if in_forward else back if backward else "",
            measure.seconds_text(total),
            f"±{measure.spread(times.total):.0%}",
            f"{flops * (3 if backward else 1) / total / scale:,.0f}",
            f"{bare / total:.0%}",
            f"{measure.median(beside) / total:.2f}x" if beside else "",
            "" if memory is None else measure.mib_text(memory),
            *(f"{error[key]:.0e}" if key in error else "" for key in ("loss", "hidden_grad", "weight_grad")),
        ]

    header = (
        "variant",
        "forward",
        "backward",
        "total",
        "spread",
        unit,
        "of products",
        "naive/this",
        "extra memory",
        "err loss",
        "err dh",
        "err dW",
    )
    lines = [line("bare products", products, True, False, None, {})]
    for name, row in rows.items():
        variant = VARIANTS[name]
        if row["skipped"] is not None:
            lines.append([name, "-", row["skipped"]])
        else:
            lines.append(
                line(name, row["times"], variant.backward, variant.gradients_in_forward, row["memory"], row["errors"])
            )
    print(measure.table(header, lines))
    size = torch.finfo(measure.DTYPES[args.dtype]).bits // 8
    hidden, weight = (n * args.hidden * size for n in (args.tokens, args.vocab))
    print(
        f"\nhidden + weight + its gradient: {measure.mib_text(hidden + 2 * weight)}; one T x V matrix in fp32:"
        f" {measure.mib_text(4 * args.tokens * args.vocab)}"
    )
    print(
        "extra memory is the peak over the inputs, both gradients included; errors are against float64, on a smaller"
        " sample\n"
    )

    def pass_line(name: str, times: Times | str) -> list[str]:
        if isinstance(times, str):
            return [name, "-", times]
        moved, seconds = chunk_bytes * (2 if name.startswith("gradient") else 1), measure.median(times.forward)
        rate = moved / seconds
        return [
            name,
            measure.seconds_text(seconds),
            f"±{measure.spread(times.forward):.0%}",
            f"{rate / 1e9:,.1f}",
            f"{rate / copied:.0%}",
        ]

    copy_line = ["copy", measure.seconds_text(2 * chunk_bytes / copied), "", f"{copied / 1e9:,.1f}", "100%"]
    print(
        measure.table(
            ("pass over logits", "time", "spread", "GB/s", "of a copy"),
            [copy_line, *(pass_line(*item) for item in pass_times.items())],
        )
    )


if __name__ == "__main__":
    sys.exit(main())

"""Attention over pages for one decoded token: the Triton kernels beside the definition and flash-attention's calls.

                                                                             python -m benchmarks.decode [--rehearse]
    kernel    rollout/kernels/paged.py
    eager     rollout/kernels/eager.py: every table gathered to its full width
    flash2/3  flash_attn_with_kvcache where it is installed (version 2: pages of multiples of 256)

Every response has `context` tokens (or, with --mixed, between 1 and that). On CUDA a case is one graph of as many calls
as make 256 MiB of keys and values, each on a pool of its own as a model's layers are, so that neither Python nor what
the cache holds shows; the time is that of one call.

    bytes = keys and values that the queries see, once

beside the data sheet's bandwidth (engine/hardware.py) and a copy measured in the same run. Errors are relative to
float64, on smaller inputs. `--rehearse` runs everything tiny, on a CPU too (where there is no kernel to time).

A responses · N query heads · K key/value heads · P pages · B tokens of a page · J pages of a table's row · H head size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Case, Times, Unavailable
from engine import hardware
from engine.errors import UserError
from rollout.kernels import MULTIPROCESSORS, eager, flash_paged, paged

SHAPES = {"0.6b": (16, 8, 128), "1b": (32, 8, 64), "8b": (32, 8, 128), "tiny": (4, 2, 16)}  # N, K, H
COLD = 2**28  # bytes of keys and values in one graph: more than any GPU's last-level cache
MOST_CALLS = 64


@dataclass(frozen=True)
class Problem:
    """One call's shape; its bytes are those of the keys and values that are seen."""

    shape: str
    responses: int
    context: int
    page: int
    mixed: bool
    dtype: torch.dtype

    def lengths(self) -> list[int]:
        A = self.responses
        return [1 + (self.context - 1) * (a + 1) // A for a in range(A)] if self.mixed else [self.context] * A

    @property
    def bytes(self) -> int:
        _, K, H = SHAPES[self.shape]
        return 2 * sum(self.lengths()) * K * H * self.dtype.itemsize

    def calls(self, device: torch.device) -> int:
        return max(1, min(MOST_CALLS, COLD // self.bytes)) if device.type == "cuda" else 1


def make(problem: Problem, device: torch.device) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """(query, pools of keys and values for every call, tables, positions), random; pages are scattered."""
    N, K, H = SHAPES[problem.shape]
    A, J = problem.responses, -(-problem.context // problem.page)
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=problem.dtype)
    pool = lambda: draw(A * J + 1, K, problem.page, H)
    tables_AJ = torch.randperm(A * J, generator=generator, device=device).view(A, J).int() + 1
    positions_A = torch.tensor(problem.lengths(), device=device) - 1
    return draw(A, N, H), [(pool(), pool()) for _ in range(problem.calls(device))], tables_AJ, positions_A


def _kernel(q_ANH: Tensor, keys_PKBH: Tensor, values_PKBH: Tensor, *others: Tensor, scale: float) -> Tensor:
    if not q_ANH.is_cuda:
        raise Unavailable("needs a CUDA device")
    if not paged.takes(q_ANH, keys_PKBH, values_PKBH):
        raise Unavailable("not for these shapes")
    how = {"scale": scale, "window": None, "softcap": None, "sinks_N": None}
    return paged.paged_attention(q_ANH, keys_PKBH, values_PKBH, *others, **how, multiprocessors=MULTIPROCESSORS)


def _eager(*tensors: Tensor, scale: float) -> Tensor:
    return eager.paged_attention(*tensors, scale=scale, window=None, softcap=None, sinks_N=None)


def _flash(backend: str) -> Callable[..., Tensor]:
    def attend(*tensors: Tensor, scale: float) -> Tensor:
        try:
            return flash_paged(backend)(*tensors, scale=scale)
        except UserError as error:
            raise Unavailable(str(error).removeprefix(f"attention over pages by {backend} ")) from None

    return attend


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "kernel": _kernel,
    "eager": _eager,
    "flash2": _flash("flash2"),
    "flash3": _flash("flash3"),
}


def error(name: str, problem: Problem, device: torch.device) -> float:
    """Relative error against the definition in float64, on the same (rounded) inputs."""
    q_ANH, [(keys_PKBH, values_PKBH), *_], *places = make(problem, device)
    scale = q_ANH.shape[2] ** -0.5
    wide = (x.double() for x in (q_ANH, keys_PKBH, values_PKBH))
    got = CANDIDATES[name](q_ANH, keys_PKBH, values_PKBH, *places, scale=scale)
    return measure.relative_error(got, _eager(*wide, *places, scale=scale))


def case_of(name: str, inputs: tuple, device: torch.device) -> Case:
    """All calls of a problem; on CUDA as a graph that is captured at the first run."""
    q_ANH, pools, *places = inputs
    scale = q_ANH.shape[2] ** -0.5

    def calls(some: list) -> list[Tensor]:
        return [CANDIDATES[name](q_ANH, *pool, *places, scale=scale) for pool in some]

    if device.type != "cuda":
        return Case(lambda: calls(pools))
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            calls(pools[:1])  # compiles
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls(pools)
            graphs.append(graph)
        graphs[0].replay()

    return Case(replay, compiles=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "1b", "8b"])
    parser.add_argument("--responses", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--pages", nargs="+", type=int, default=[256], help="tokens of a page")
    parser.add_argument("--mixed", action="store_true", help="lengths from 1 to the context, instead of all that long")
    parser.add_argument("--dtype", choices=measure.DTYPES, default="bfloat16")
    parser.add_argument("--backends", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=0.2, help="timed runs of each take about this long")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on any machine: that the program runs")
    parser.add_argument("--json", metavar="PATH", help="write every figure there")
    args = parser.parse_args(argv)
    if min(*args.responses, *args.contexts, *args.pages) < 1:
        parser.error("sizes are at least 1")
    if args.rehearse:
        args.shapes, args.responses, args.contexts, args.pages = ["tiny"], [1, 3], [33], [16]
        args.dtype, args.seconds = "float32", 0.01
    elif measure.device_of(args.device).type == "cpu":
        parser.error("the kernel needs a CUDA device, and --rehearse does not")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device, dtype = measure.device_of(args.device), measure.DTYPES[args.dtype]
    here = measure.machine(device)
    problems = [
        Problem(shape, responses, context, page, args.mixed, dtype)
        for shape in args.shapes
        for page in args.pages
        for context in args.contexts
        for responses in args.responses
    ]
    rows = []
    for problem in problems:
        inputs = make(problem, device)
        cases = {name: case_of(name, inputs, device) for name in args.backends}
        times = measure.take_turns(cases, device, args.seconds)
        seconds = {
            name: measure.median(t.forward) / len(inputs[1]) if isinstance(t, Times) else t for name, t in times.items()
        }
        rows.append({"problem": problem, "bytes": problem.bytes, "seconds": seconds})
        del inputs, cases
    errors: dict[str, float | str] = {}
    for name in args.backends:
        try:
            errors[name] = error(name, Problem(args.shapes[0], 3, 700, args.pages[0], True, dtype), device)
        except Exception as why:  # whatever a candidate raises is shown
            errors[name] = measure.reason(why)
    sheet = hardware.of_gpu(device) if device.type == "cuda" else None
    bandwidth = {"copy": measure.copy_rate(device), "data sheet": sheet.bandwidth if sheet else None}
    show(args, here, rows, errors, bandwidth)
    measure.write_json(
        args.json,
        benchmark="decode",
        machine=here,
        arguments=vars(args),
        bandwidth=bandwidth,
        errors=errors,
        rows=[row | {"problem": vars(row["problem"])} for row in rows],
    )


def show(args: argparse.Namespace, here: dict, rows: list[dict], errors: dict, bandwidth: dict) -> None:
    sheet = bandwidth["data sheet"]
    print(f"\n{here['device']}, torch {here['torch']}, {args.dtype}, lengths {'mixed' if args.mixed else 'equal'}")
    known = f", the data sheet says {sheet / 1e9:,.0f}" if sheet else ""
    print(f"a copy reaches {bandwidth['copy'] / 1e9:,.0f} GB/s{known}\n")
    shown = [name for name in args.backends if any(isinstance(row["seconds"][name], float) for row in rows)]
    header = [
        "shape, responses x context, page",
        "MiB",
        *(f"{name} {unit}" for name in shown for unit in ("us", "GB/s")),
    ]
    lines = []
    for row in rows:
        problem = row["problem"]
        line = [
            f"{problem.shape}, {problem.responses} x {problem.context}, {problem.page}",
            f"{row['bytes'] / 2**20:,.1f}",
        ]
        for name in shown:
            seconds = row["seconds"][name]
            known = isinstance(seconds, float)
            line += [f"{seconds * 1e6:,.1f}", f"{row['bytes'] / seconds / 1e9:,.0f}"] if known else ["-", "-"]
        lines.append(line)
    print(measure.table(header, lines))
    print()
    for name in args.backends:
        failed = {seconds for row in rows if isinstance(seconds := row["seconds"][name], str)}
        said = errors[name] if isinstance(errors[name], str) else f"relative error {errors[name]:.0e}"
        print(f"{name}: {'; '.join(sorted({said, *failed}))}")


if __name__ == "__main__":
    sys.exit(main())

"""Time, memory and error, measured the same way by every benchmark, and the table and JSON that show them.

time     every case is warmed up, then cases take turns (A B C A B C ...), so that a busy moment of the machine hits all
         of them; median and spread, spread = half of the interquartile range over the median. CUDA: events on the
         stream, caches flushed between runs; CPU: wall clock.
memory   peak during one forward and backward, over what was there before, gradients included. CUDA: the allocator's;
         CPU: the resident set's high-water mark in a fresh process, so that no case sees another's peak.
error    ||x - reference|| / ||reference|| against float64.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MAX_RUNS = 100
FLUSH_BYTES = 2**28  # more than any GPU's last-level cache


class Unavailable(Exception):
    """This case cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """`forward()` gives an output, `backward(output)` its gradients (None: there is none); `before()` runs untimed
    before each.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    before: Callable[[], None] | None = None
    compiles: bool = False  # its first run may be slow for that alone


@dataclass(frozen=True)
class Times:
    """Seconds of every timed run."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def total(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Half of the interquartile range (of fewer than four values: of the range) over the median."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) >= 4 else (min(values), 0, max(values))
    return (high - low) / 2 / median(values)


def take_turns(cases: dict[str, Case], device: torch.device, seconds: float) -> dict[str, Times | str]:
    """Times of every case, `seconds` of runs each (at least three; one where that takes twice as long), or one line
    saying why not.
    """
    results: dict[str, Times | str] = {}
    runs: dict[str, int] = {}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for name, case in cases.items():
        try:
            first = _once(case, device, flush)  # also pays for page faults, thread pools and compilation
            slow = sum(first) > 2 * seconds
            fast = (
                sum(first)
                if slow
                else min(sum(_once(case, device, flush)) for _ in range(3 if device.type == "cuda" else 1))
            )
            runs[name] = 1 if slow else max(3, min(MAX_RUNS, round(seconds / fast)))
            results[name] = Times()
            # nothing that a warm-up saves shows in a run this long: it is the measurement
            if sum(first) > 10 * seconds and not case.compiles:
                runs[name], results[name] = 0, Times([first[0]], [first[1]])
        except Exception as error:  # a candidate may fail in any way, and the others must still be measured
            results[name] = reason(error)
            _free(device)
    for i in range(max(runs.values(), default=0)):
        for name, times in results.items():
            if isinstance(times, Times) and i < runs[name]:
                forward, backward = _once(cases[name], device, flush)
                times.forward.append(forward)
                times.backward.append(backward)
    return results


def _once(case: Case, device: torch.device, flush: Tensor | None) -> tuple[float, float]:
    """(forward, backward) seconds of one run."""
    if case.before:
        case.before()
    if device.type == "cuda":
        flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        output = case.forward()
        events[1].record()
        if case.backward:
            case.backward(output)
        events[2].record()
        torch.cuda.synchronize(device)
        return events[0].elapsed_time(events[1]) / 1e3, events[1].elapsed_time(events[2]) / 1e3
    start = time.perf_counter()
    output = case.forward()
    middle = time.perf_counter()
    if case.backward:
        case.backward(output)
        return middle - start, time.perf_counter() - middle
    return middle - start, 0.0


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read plus written, of a large copy."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = take_turns({"copy": Case(lambda: target.copy_(source))}, device, 0.5)["copy"]
    return 2 * size / median(times.forward)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product of random numbers (zeros run faster)."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = take_turns({"product": Case(lambda: torch.mm(a, b, out=out))}, device, 0.5)["product"]
    return 2 * n**3 / median(times.forward)


def extra_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes during `run()` over what was there before it; what it returns is still alive when the peak is read."""
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    _reset_peak()
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return peak - before


def allocator_peak(run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator held at once of what `run()` allocated: every allocation and release on a
    CPU, CUDA's own count.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes the present resident set
    except OSError as error:
        raise Unavailable(f"no peak memory here ({error})") from None


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def save_random_llama(directory: Path, tokenizer_from: Path, hidden: int, layers: int, vocab: int) -> None:
    """A Llama of this shape with weights drawn from seed 0, in Hugging Face's format."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=vocab,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(directory)


class FreshProcesses:
    """Runs functions each in a process of its own, forked from a server that has imported `modules` and computed
    nothing.
    """

    def __init__(self, *modules: str) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(modules))

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        """The function's result; it and its arguments must be picklable. Raises what it raises, or Unavailable if the
        process died.
        """
        with ProcessPoolExecutor(1, mp_context=self.context) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool:
                raise Unavailable("its process died, likely for want of memory") from None


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| in float64."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def reason(error: BaseException) -> str:
    """One short line for why a case did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 100 else text[:97] + "..."


def device_of(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the arguments; to be read before the run, during which HEAD may move."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        processor = next(
            (line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")),
            platform.machine(),
        )
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=7"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
        commit = git.stdout.strip() or "unknown"  # a copy without its history
    except OSError:  # no git
        commit = "unknown"
    return {
        "device": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is text, the others numbers. A row shorter than the header ends in
    free text.
    """
    whole = [row for row in rows if len(row) == len(header)]
    widths = [max(len(row[i]) for row in (header, *whole)) for i in range(len(header))]
    widths[0] = max(len(row[0]) for row in (header, *rows))

    def line(row: Sequence[str]) -> str:
        if len(row) < len(header):
            return f"{row[0]:<{widths[0]}}  {' '.join(row[1:])}"
        return "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )

    rule = "-" * len(line(header))
    return "\n".join([line(header).rstrip(), rule, *(line(row).rstrip() for row in rows)])


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{2 if seconds < 0.01 else 1}f} ms"


def mib_text(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def write_json(path: str | None, **content: Any) -> None:
    """Writes the content, times as lists; nothing without a path."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        default = lambda x: asdict(x) if isinstance(x, Times) else str(x)
        Path(path).write_text(json.dumps(content, indent=1, default=default) + "\n", encoding="utf-8")
        print(f"written: {path}")

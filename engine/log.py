"""What a run says of itself: metrics.jsonl, the progress bar, throughput and memory.

A metric of a step is a sum over the step's examples divided by a count, both over all ranks: one all-reduce a step.

    perf/tokens_per_second_per_gpu   tokens fed to the model / seconds / ranks
    perf/mfu                         model FLOPs / seconds / peak FLOP/s; 6 per matmul weight and token, 4 where it is frozen under
                                     adapters (the head: per counted token), 6 x layers x heads x head size x sum of
                                     squared lengths for causal attention
    perf/peak_memory_gib             allocator's peak on CUDA, resident set's peak on a CPU; rank 0's
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.batch import MicroBatch
from engine.world import World

# dense bf16 FLOP/s of data sheets; a device that is not listed is measured by a matrix product
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


class Totals:
    """Named sums of one step: of tensors on the device until `reduce`, of Python's numbers on the host."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sums: dict[str, Tensor | float] = {}

    def add(self, **values: Tensor | float) -> None:
        """Adds each tensor's sum (detached, in fp64) to its name; a '/' in a metric's name is written '__'."""
        for key, value in values.items():
            name = key.replace("__", "/")
            amount = value.detach().double().sum() if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + amount

    def reduce(self, names: tuple[str, ...]) -> dict[str, float]:
        """The sums over all ranks, by name; waits for the device. Every rank must pass the same names: one without
        examples has no sums of its own.
        """
        held = [self.sums.get(name, 0.0) for name in names]
        on_device = [
            x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=self.world.device)
            for x in held
        ]
        return dict(zip(names, self.world.sum(torch.stack(on_device)).tolist(), strict=True))


class JsonLines:
    """A file of one JSON object a line, each with its `step`; opened at step `start`, the lines of later steps are cut
    off.
    """

    def __init__(self, path: Path, start: int) -> None:
        partial = path.with_suffix(".partial")
        kept = _rows_before(path, start) if start else []
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.rename(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in `close`

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Metrics:
    """metrics.jsonl and the progress bar, on rank 0; on resume the file is cut back to the resumed step."""

    def __init__(self, output_dir: Path, world: World, *, start: int, total: int, report_to: str = "none") -> None:
        self.world = world
        self._file = self._bar = self._elsewhere = None
        if world.is_main:
            self._file = JsonLines(output_dir / "metrics.jsonl", start)
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=0.5)
            self._elsewhere = _reporter(report_to, output_dir)

    def write(self, step: int, row: dict[str, Any], postfix: str = "") -> None:
        """One row for step `step` (1-based: after that many optimizer steps). A postfix is shown on the bar, which then
        moves.
        """
        if self.world.is_main:
            self._file.write({"step": step, **row})
            if postfix:
                self._bar.set_postfix_str(postfix, refresh=False)
                self._bar.update(1)
            if self._elsewhere:
                self._elsewhere(step, row)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.world.is_main:
            self._bar.write(line)

    def close(self) -> None:
        if self.world.is_main:
            self._file.close()
            self._bar.close()


def _rows_before(path: Path, start: int) -> list[str]:
    """The lines of steps up to `start`; a torn last line is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (ValueError, KeyError):
            break
    return kept


def _reporter(report_to: str, output_dir: Path) -> Any:
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(output_dir / "tensorboard"))
        return lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items() if isinstance(v, int | float)]
    if report_to == "wandb":
        import wandb

        run = wandb.init(project="triptych", name=output_dir.name, dir=str(output_dir))
        return lambda step, row: run.log(row, step=step)
    return None


class Throughput:
    """Tokens and FLOPs of a step, counted into its `Totals` under the names COUNTED."""

    COUNTED = ("perf/tokens", "perf/flops")

    def __init__(self, world: World, policy: Any, dtype: torch.dtype, num_tokens: int = 0) -> None:
        config = policy.lm.config
        embedding, head = (
            m.weight.numel() for m in (policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings())
        )
        tied = config.tie_word_embeddings
        body = policy.num_parameters - embedding - (0 if tied else head)
        frozen = policy.adapters is not None
        self.per_token = 4 * body + 6 * policy.num_trained if frozen else 6 * body
        self.per_row = (4 if frozen else 6) * head
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = config.num_hidden_layers * config.num_attention_heads * head_size
        self.world, self.peak = world, peak_flops(world.device, dtype)
        self.num_tokens = num_tokens
        self._since = time.perf_counter()

    def flops(self, batch: MicroBatch) -> float:
        """Model FLOPs of the batch, forward and backward."""
        if not batch.examples:
            return 0.0
        squares = sum(length * length for length in batch.lengths)
        return self.per_token * batch.num_tokens + self.per_row * len(batch.targets_R) + 6.0 * self.attention * squares

    def count(self, batch: MicroBatch, totals: Totals) -> None:
        totals.add(perf__tokens=batch.num_tokens, perf__flops=self.flops(batch))

    def row(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of a step from its reduced totals. Time goes from one `row` to the next: each comes after a wait
        for the device.
        """
        if self.world.device.type == "cuda":
            peak_memory = torch.cuda.max_memory_allocated(self.world.device)
        else:
            peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        now = time.perf_counter()
        tokens, flops = (sums[name] for name in self.COUNTED)
        seconds, self._since = now - self._since, now
        self.num_tokens += int(tokens)
        return {
            "num_tokens": self.num_tokens,
            "perf/tokens_per_second_per_gpu": tokens / seconds / self.world.size,
            "perf/mfu": flops / seconds / self.world.size / self.peak,
            "perf/peak_memory_gib": peak_memory / 2**30,
        }


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The data sheet's figure of a known GPU in bf16, else what a matrix product reaches now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := next((flops for model, flops in PEAK_FLOPS.items() if model in name), None):
            return known
    n = 4096 if device.type == "cuda" else 512
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


class Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.since = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds

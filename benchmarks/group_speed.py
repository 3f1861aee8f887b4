"""Whole steps of launch.grpo and of TRL's GRPOTrainer, each with its own sampling: seconds and peak memory.

`python -m benchmarks.against_trl grpo` runs it. Both sides take the same prompts in the same order, sample as many
tokens at temperature 1 and reward what a random model gets right half of the time (an even number of characters);
sides take turns, each turn a process of its own, and of each step the best turn counts (these machines are shared).
TRL runs as it is best here: no gradient checkpointing, its fused head, no old log-probs (it takes one update per step
and leaves them out), and the whole batch in one micro-batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

LEARNING_RATE, SEED = 1e-5, 1
ROWS = 256  # of the data, since reading it is no part of a step
EVEN = """def verify(response: str, ground_truth: str) -> bool:
    return len(response) % 2 == 0
"""


class Stopwatch:
    """CPU and wall seconds between marks, and the peak resident set over what was there at the start."""

    def __init__(self) -> None:
        self.base, self.cpu, self.wall = self.resident(), [], []
        self.mark()

    @staticmethod
    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def mark(self) -> None:
        self.since = time.process_time(), time.perf_counter()

    def lap(self) -> None:
        self.cpu.append(time.process_time() - self.since[0])
        self.wall.append(time.perf_counter() - self.since[1])
        self.mark()

    def result(self, sampling: list[float], tokens: list[float]) -> dict[str, Any]:
        """`sampling`: wall seconds of every step's; `tokens`: of its responses, on average."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "cpu": self.cpu,
            "wall": self.wall,
            "sampling": sampling,
            "tokens": tokens,
            "peak_bytes": self.resident() - self.base,
            "children_cpu": children.ru_utime + children.ru_stime,
        }


def make_rows(root: Path, data: Path) -> Path:
    """The judge, as a verifier of the user's own, and the first rows of the data for it."""
    (root / "even.py").write_text(EVEN, encoding="utf-8")
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:ROWS]]
    lines = [json.dumps({"messages": r["messages"], "ground_truth": "", "dataset": "even"}) for r in rows]
    (root / "even.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / "even.jsonl"


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """launch.grpo's `train`; a step goes from one row of its metrics to the next."""
    from engine.config import parse
    from engine.train import throughput
    from launch import grpo

    shutil.rmtree(args.root / "ours", ignore_errors=True)  # an earlier turn's
    watch, row = Stopwatch(), throughput.Throughput.row

    def timed_row(self, sums):
        watch.lap()
        result = row(self, sums)
        watch.mark()
        return result

    throughput.Throughput.row = timed_row
    flags = {
        "model_name_or_path": args.root / "model",
        "dataset_name": args.root / "rows.jsonl",
        "output_dir": args.root / "ours",
        "cache_dir": args.root / "cache",
        "seed": SEED,
        "batch_size": args.batch_size,
        "num_samples_per_prompt": args.samples,
        "response_length": args.response_length,
        "max_steps": args.steps,
        "learning_rate": LEARNING_RATE,
        "verifier_module": args.root / "even.py",
    }
    grpo.train(parse(grpo.Config, [word for name, value in flags.items() for word in (f"--{name}", str(value))]))
    lines = map(json.loads, (args.root / "ours" / "metrics.jsonl").read_text().splitlines())
    rows = [line for line in lines if "loss" in line]
    return watch.result([r["time/rollout"] for r in rows], [r["rollout/length"] for r in rows])


def trl(args: argparse.Namespace) -> dict[str, Any]:
    """GRPOTrainer's `train`."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    watch, sampling, tokens = Stopwatch(), [], []

    class Timed(TrainerCallback):
        def on_step_begin(self, *_, **__):
            watch.mark()

        def on_step_end(self, *_, **__):
            watch.lap()

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *arguments, **named):
            since = time.perf_counter()
            ids, logprobs = super()._generate_single_turn(*arguments, **named)
            sampling.append(time.perf_counter() - since)
            tokens.append(sum(map(len, ids)) / len(ids))
            return ids, logprobs

    def right(completions, **_):
        return [float(len(turns[0]["content"]) % 2 == 0) for turns in completions]

    config = GRPOConfig(
        output_dir=str(args.root / "trl"),
        per_device_train_batch_size=args.batch_size * args.samples,
        num_generations=args.samples,
        max_completion_length=args.response_length,
        max_steps=args.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=SEED,
    )
    data = load_dataset("json", data_files=str(args.root / "ordered.jsonl"), split="train")
    model = AutoModelForCausalLM.from_pretrained(args.root / "model", dtype=torch.float32)
    Trainer(
        model=model,
        args=config,
        train_dataset=data.rename_column("messages", "prompt").select_columns(["prompt"]),
        processing_class=AutoTokenizer.from_pretrained(args.root / "model"),
        reward_funcs=right,
        callbacks=[Timed()],
    ).train()
    return watch.result(sampling, tokens)


def best(turns: list[dict[str, Any]], what: str) -> float:
    """Of every step but the first, in which a run begins, the best turn's; their mean, since steps differ by their
    prompts.
    """
    steps = zip(*(turn[what] for turn in turns), strict=True)
    fastest = [min(of_step) for of_step in steps]
    return sum(fastest[1:] or fastest) / len(fastest[1:] or fastest)


def show(turns: dict[str, list[dict[str, Any]]]) -> tuple[str, dict[str, float]]:
    """(the lines, the ratios): TRL's seconds of a step over ours, of CPU and of the clock, and memory."""
    lines, found = [], {}
    for side, of_side in turns.items():
        found[side] = {what: best(of_side, what) for what in ("cpu", "wall", "sampling")}
        found[side]["peak_bytes"] = max(turn["peak_bytes"] for turn in of_side)
        f, tokens = found[side], of_side[0]["tokens"][-1]
        lines.append(
            f"{side:>5}: {f['cpu']:.2f} CPU s a step, {f['wall']:.2f} s by the clock, of which sampling"
            f" {f['sampling']:.2f}; {tokens:.1f} tokens a response, peak memory {f['peak_bytes'] / 2**20:,.0f} MiB over"
            f" the imports; helper processes {of_side[0]['children_cpu']:.1f} CPU s in a whole run"
        )
    ratios = {what: found["trl"][what] / found["ours"][what] for what in found["ours"]}
    lines.append(
        f"TRL takes {ratios['cpu']:.1f} times our CPU seconds, {ratios['wall']:.1f} times the clock's, and"
        f" {ratios['peak_bytes']:.1f} times the memory"
    )
    return "\n".join(lines), ratios

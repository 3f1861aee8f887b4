"""How much each algorithm of RLVR learns from what it samples: held-out accuracy against tokens, on the embedded task.

    python -m benchmarks.rlvr [--seeds 1 2 3] [--iterations 30] [--only grpo rloo]

Every run is the embedded default of its command through the real `train`, from the same fine-tuned tiny model, with 16
prompts of 8 responses an iteration. Printed per algorithm: accuracy before, after a third, two thirds and all of the
iterations as the mean of the seeds (lowest to highest), tokens sampled by then, the seconds of a run on the clock, and
its CPU seconds, those of the verifiers' processes left out. `_ahead` are runs with --rollout_ahead 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from engine import terminal
from launch import grpo, ppo
from launch.seeds import each_seed

ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (ppo, {}),
    "ppo_ahead": (ppo, {"rollout_ahead": 1}),
    "grpo": (grpo, {}),
    "grpo_ahead": (grpo, {"rollout_ahead": 1}),
    "rloo": (grpo, {"advantage": "rloo"}),
    "dr_grpo": (grpo, {"advantage": "dr_grpo", "aggregate": "dr_grpo"}),
    "reinforce_pp": (grpo, {"advantage": "reinforce_pp"}),
}
SAMPLED = {"batch_size": 16, "num_samples_per_prompt": 8}


def run(name: str, seed: int, iterations: int, root: Path) -> tuple[list[dict[str, Any]], float, float]:
    """(rows of metrics.jsonl, seconds, CPU seconds)."""
    stage, flags = ALGORITHMS[name]
    out, began, before = root / f"{name}-{seed}", time.perf_counter(), time.process_time()
    config = stage.Config(
        **SAMPLED, **flags, output_dir=str(out), seed=seed, max_steps=iterations, eval_steps=max(1, iterations // 3)
    )
    with terminal.subdued():
        each_seed(stage.train, config)
    with (out / "metrics.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows, time.perf_counter() - began, time.process_time() - before


def points(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(tokens sampled so far in thousands, held-out accuracy), at every evaluation."""
    responses = SAMPLED["batch_size"] * SAMPLED["num_samples_per_prompt"]
    tokens, found = 0.0, []
    for row in rows:
        tokens += responses * row.get("rollout/length", 0.0) / 1000
        if "eval/accuracy" in row:
            found.append((tokens, row["eval/accuracy"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.only:
            runs = [run(name, seed, arguments.iterations, Path(root)) for seed in arguments.seeds]
            columns = list(zip(*[points(rows) for rows, _, _ in runs], strict=True))
            shown = []
            for column in columns:
                accuracies = [accuracy for _, accuracy in column]
                tokens = sum(k for k, _ in column) / len(column)
                mean = sum(accuracies) / len(accuracies)
                shown.append(f"{mean:.1%} ({min(accuracies):.1%} to {max(accuracies):.1%}) at {tokens:.0f}k")
            seconds, busy = (sum(run[i] for run in runs) / len(runs) for i in (1, 2))
            print(f"{name:13} " + " | ".join(shown) + f" | {seconds:.0f} s, {busy:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()

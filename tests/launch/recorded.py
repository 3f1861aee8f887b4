"""Runs to report on, made of numbers: healthy ones of each stage, and their directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launch.reports.runs import RLVR, Recorded, series_of

CONFIGS: dict[str, dict[str, Any]] = {
    "sft": {"reduce_loss": "token", "batch_size": 16, "learning_rate": 3e-3, "optimizer": "adamw", "seed": 1},
    "dpo": {"loss_type": "dpo_norm", "beta": 5.0, "batch_size": 16, "learning_rate": 1e-3, "optimizer": "adamw"},
    "ppo": {
        **{"kl_coef": 0.05, "vf_coef": 0.1, "batch_size": 32, "num_samples_per_prompt": 4, "learning_rate": 1e-3},
        "seed": 1,
    },
    "grpo": {
        **{"advantage": "grpo", "surrogate": "clip", "clip_low": 0.2, "clip_high": 0.28, "aggregate": "token"},
        **{"kl_coef": 0.01, "kl_in": "loss", "kl_estimator": "k3", "dual_clip": None, "mask_truncated": False},
        **{"batch_size": 32, "num_samples_per_prompt": 8, "learning_rate": 1e-3, "seed": 1},
    },
}
STEPS = 60


def curve(first: float, last: float, noise: float = 0.02, n: int = STEPS) -> np.ndarray:
    """From first to last, fast and then slowly, with some noise: the same at every call."""
    shape = np.exp(-np.arange(n) / (n / 5))
    wobble = noise * (first - last) * np.sin(np.arange(n) * 1.7)
    wobble[0] = 0
    return last + (first - last) * shape + wobble


def healthy(stage: str) -> dict[str, dict[int, float]]:
    """Metric → step → value."""
    found: dict[str, np.ndarray] = {
        "learning_rate": np.linspace(1e-3, 1e-5, STEPS),
        "grad_norm": curve(3.0, 0.5),
        "num_tokens": np.arange(1, STEPS + 1) * 1000.0,
        "perf/tokens_per_second_per_gpu": curve(900, 1000),
        "perf/mfu": curve(0.30, 0.33),
        "perf/peak_memory_gib": np.full(STEPS, 0.5),
    }
    held_out: dict[str, tuple[float, ...]] = {}
    if stage == "sft":
        found |= {"loss": curve(6.0, 0.5), "trained_tokens": np.full(STEPS, 500.0)}
        held_out = {"loss": (6.1, 0.6, 0.55), "token_accuracy": (0.0, 0.7, 0.8)}
    if stage == "dpo":
        margins = curve(0.0, 4.0)
        found |= {"loss": np.log1p(np.exp(-margins)), "rewards/margins": margins, "nll": curve(2.0, 1.9)}
        found |= {"rewards/chosen": margins / 2, "rewards/rejected": -margins / 2}
        found |= {"rewards/accuracies": curve(0.0, 0.9), "logps/accuracies": curve(0.5, 0.9)}
        found |= {"logps/chosen": curve(-100, -95), "logps/rejected": curve(-100, -130)}
        held_out = {
            "loss": (0.693, 0.3, 0.2),
            "logps/accuracies": (0.5, 0.8, 0.85),
            "rewards/accuracies": (0, 0.8, 0.9),
        }
    if stage in RLVR:
        scores = curve(0.3, 0.8)
        found |= {"objective/scores": scores, "verified/gsm8k": scores, "objective/kl": curve(0.0, 1.2)}
        found |= {"loss": curve(-0.01, -0.005), "loss/policy": curve(-0.01, -0.005)}
        found |= {
            "objective/entropy": curve(0.3, 0.15),
            "val/ratio": curve(1.01, 1.0),
            "policy/clipfrac": curve(0.1, 0.05),
        }
        found |= {"policy/approxkl": curve(0.02, 0.01)}
        found |= {
            "rollout/length": curve(16.0, 16.4),
            "rollout/stop_rate": curve(0.97, 1.0),
            "rollout/errors": np.zeros(STEPS),
        }
        found |= {
            "time/rollout": np.full(STEPS, 2.0),
            "time/evaluate": np.full(STEPS, 0.5),
            "time/update": np.full(STEPS, 1.0),
        }
        held_out = {
            "accuracy": (0.34, 0.6, 0.77),
            "low": (0.28, 0.54, 0.71),
            "high": (0.4, 0.66, 0.83),
            "length": (16, 16.2, 16.3),
        }
    if stage == "ppo":
        found |= {"loss/value": curve(0.1, 0.03), "val/explained_variance": curve(-0.5, 0.6)}
        found |= {"grad_norm/value": curve(2.0, 0.4)}
    if stage == "grpo":
        found |= {"loss/kl": curve(0.0, 0.08), "rollout/masked": curve(8.0, 0.0), "groups/drawn": np.full(STEPS, 32.0)}
        found |= {"groups/signal": curve(0.9, 0.6), "groups/all_right": curve(0.0, 0.3)}
        found |= {"groups/pass_at_8": curve(0.9, 0.97), "sampler/truncated": np.zeros(STEPS)}
        found |= {"sampler/ratio": curve(1.001, 1.0), "sampler/ratio_max": curve(1.3, 1.2)}
    rows = {name: {step: float(v) for step, v in enumerate(values, 1)} for name, values in found.items()}
    steps = (0, STEPS // 2, STEPS)
    return rows | {f"eval/{name}": dict(zip(steps, map(float, v), strict=True)) for name, v in held_out.items()}


def samples(n: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "step": 5 * (i // 4),
            "prompt": f"What is {i % 4} + 5?",
            "response": f"It is {i}.",
            "score": i % 2,
            "reason": "said so",
        }
        for i in range(n)
    ]


def recorded(stage: str, **changes: Any) -> Recorded:
    """A healthy run of the stage. Changes: metrics by name (/ as __) as arrays of a row a step, or as {step: value};
    `config` and `samples` in place of its own.
    """
    config = CONFIGS[stage] | changes.pop("config", {})
    kept = changes.pop("samples", samples() if stage in RLVR else [])
    metrics = healthy(stage)
    for name, values in changes.items():
        rows = values if isinstance(values, dict) else dict(enumerate(np.asarray(values, float).tolist(), 1))
        metrics[name.replace("__", "/")] = rows
    series = {name: series_of(values) for name, values in metrics.items()}
    return Recorded(Path(f"output/{stage}"), stage, stage, "finished", config, {}, series, kept, [])


def write(
    directory: Path, stage: str, *, rows: list[Any] | None = None, kept: list[Any] | None = None, **config: Any
) -> Path:
    """A directory as a finished healthy run of the stage leaves it; `rows` and `kept` (samples) in place of its own."""
    (directory / "final").mkdir(parents=True)
    (directory / "final" / "config.json").write_text("{}")
    head = "# total_steps: 60\n# machine: 2 x NVIDIA H100 80GB HBM3\n# version: triptych 9.9\n# commit: abc123\n"
    (directory / "config.yaml").write_text(head + yaml.safe_dump(CONFIGS[stage] | config))
    if rows is None:
        metrics = healthy(stage)
        steps = sorted({step for values in metrics.values() for step in values})
        rows = [{"step": s, **{name: values[s] for name, values in metrics.items() if s in values}} for s in steps]
    lines(directory / "metrics.jsonl", rows)
    kept = samples() if kept is None and stage in RLVR else kept
    if kept:
        lines(directory / "samples.jsonl", kept)
    return directory


def lines(path: Path, rows: list[Any]) -> None:
    """Objects as JSON lines; texts as they are."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )

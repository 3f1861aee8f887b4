"""What a reference policy costs: the base or adapter under the trained one, cached numbers, or a second frozen model.

    python -m benchmarks.references [--steps 6 --hidden 256 --layers 6 --vocab 16384]

launch.dpo and launch.ppo on one small random model, with adapters under every --reference, and with all weights trained
('two full models': the trained one and a frozen copy). Peak memory is the allocator's over the whole run; seconds are
CPU seconds of one thread (these machines are shared) per step, and of everything before the first step, where the cache
is filled. Losses must agree where the reference is the same policy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LORA = {"use_lora": "true", "learning_rate": 1e-3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo, two full models": ("dpo", {"reference": "copy", "learning_rate": 1e-4}),
    "dpo, full, cached": ("dpo", {"reference": "cache", "learning_rate": 1e-4}),
    "dpo, LoRA, second frozen model": ("dpo", LORA | {"reference": "copy"}),
    "dpo, LoRA, cached": ("dpo", LORA | {"reference": "cache"}),
    "dpo, LoRA, base": ("dpo", LORA | {"reference": "base"}),
    "dpo, from an adapter, second frozen model": (
        "dpo",
        LORA | {"reference": "copy", "adapter_name_or_path": "ADAPTER"},
    ),
    "dpo, from an adapter, adapter": ("dpo", LORA | {"reference": "adapter", "adapter_name_or_path": "ADAPTER"}),
    "ppo, two full models": ("ppo", {"reference": "copy", "learning_rate": 1e-4}),
    "ppo, LoRA, second frozen model": ("ppo", LORA | {"reference": "copy"}),
    "ppo, LoRA, base": ("ppo", LORA | {"reference": "base"}),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.references",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in {"steps": 6, "hidden": 256, "layers": 6, "vocab": 16384}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_case(stage: str, flags: dict[str, Any], steps: int, root: Path) -> dict[str, Any]:
    """In this process: once under the profiler for memory, once for time."""
    import importlib
    import time

    import torch

    from benchmarks.measure import allocator_peak
    from engine import log
    from engine.config import parse

    torch.set_num_threads(1)
    module = importlib.import_module(f"launch.{stage}")
    flags = {name: str(root / "adapter" / "final") if value == "ADAPTER" else value for name, value in flags.items()}
    common: dict[str, Any] = {"model_name_or_path": root / "model", "max_steps": steps, "warmup_ratio": 0.0}
    if stage == "dpo":
        common |= {"dataset_name": root / "pairs.jsonl", "batch_size": 16, "micro_batch_tokens": 2048}
    else:
        common |= {
            "dataset_name": root / "problems.jsonl",
            "batch_size": 8,
            "num_samples_per_prompt": 2,
            "response_length": 16,
            "micro_batch_tokens": 2048,
            "num_ppo_epochs": 1,
        }

    def train(name: str) -> Path:
        words = common | flags | {"output_dir": root / "runs" / name, "cache_dir": root / "caches" / name}
        module.train(parse(module.Config, [word for key, value in words.items() for word in (f"--{key}", str(value))]))
        return root / "runs" / name

    name = f"{stage}-{abs(hash(json.dumps(flags, sort_keys=True)))}"
    peak = allocator_peak(lambda: train(f"{name}-memory"))
    marks, write = [], log.Metrics.write
    log.Metrics.write = lambda self, step, row, *rest: (
        write(self, step, row, *rest),
        "loss" in row and marks.append(time.process_time()),
    )[0]
    began = time.process_time()
    rows = [json.loads(line) for line in (train(name) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "peak": peak,
        "step": (marks[-1] - marks[0]) / (len(marks) - 1),
        "before": marks[0] - began,
        "losses": losses,
    }


def make_inputs(args: argparse.Namespace, root: Path) -> None:
    from benchmarks.measure import save_random_llama
    from engine.config import parse
    from engine.data.embedded import embedded
    from launch import sft

    made = embedded(root)
    save_random_llama(root / "model", made.model, args.hidden, args.layers, args.vocab)
    for name, path in (("pairs", made.train_pairs), ("problems", made.train_problems)):
        (root / f"{name}.jsonl").write_text(path.read_text())
    flags = {
        "model_name_or_path": root / "model",
        "dataset_name": made.train_conversations,
        "output_dir": root / "adapter",
        "cache_dir": root / "cache",
        "use_lora": "true",
        "export_adapter": "true",
        "max_steps": 3,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "sample_tokens": 0,
    }
    sft.train(parse(sft.Config, [word for key, value in flags.items() for word in (f"--{key}", str(value))]))


def main() -> None:
    args = options()
    if args.child:
        case, root = json.loads(args.child)
        stage, flags = CASES[case]
        print("\n" + json.dumps(run_case(stage, flags, args.steps, Path(root))), flush=True)
        return
    import torch

    from benchmarks.measure import machine, mib_text, table, write_json

    here = machine(torch.device("cpu"))
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="triptych-references-") as temporary:
        make_inputs(args, Path(temporary))
        for case in CASES:
            words = [
                word
                for name in ("steps", "hidden", "layers", "vocab")
                for word in (f"--{name}", str(getattr(args, name)))
            ]
            command = [sys.executable, "-m", "benchmarks.references", *words, "--child", json.dumps([case, temporary])]
            out = subprocess.run(command, capture_output=True, text=True, check=False)
            if out.returncode:
                raise SystemExit(f"{case}: {out.stderr[-2000:]}")
            figures[case] = json.loads(out.stdout.strip().splitlines()[-1])
            print(f"{case}: done", flush=True)
    rows, first = [], {}
    for case, figure in figures.items():
        beside = first.setdefault(case.split(",")[0], figure)
        kind = case.rpartition(",")[0]
        same = next(f for c, f in figures.items() if c.rpartition(",")[0] == kind) if "full" not in case else beside
        apart = max(abs(a - b) for a, b in zip(figure["losses"], same["losses"], strict=True))
        rows.append(
            [
                case,
                mib_text(figure["peak"]),
                f"{figure['peak'] / beside['peak']:.2f}",
                f"{figure['step']:.2f} s",
                f"{figure['step'] / beside['step']:.2f}",
                f"{figure['before']:.1f} s",
                f"{apart:.0e}",
            ]
        )
    print(f"\n{here['device']}, torch {here['torch']}, commit {here['commit']}")
    print(table(["reference", "peak", "of two full", "a step", "of two full", "before", "losses apart"], rows))
    write_json(args.json, machine=here, arguments=vars(args), cases=figures)


if __name__ == "__main__":
    main()

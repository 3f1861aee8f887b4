"""Triptych beside TRL on the same model, rows, order and schedule: losses step by step, seconds a step, peak memory.

    python -m benchmarks.against_trl dpo [--steps 8 --batch_size 8 --hidden 256 --layers 6 --vocab 32000 --data FILE]
    python -m benchmarks.against_trl sft ...
    python -m benchmarks.against_trl grpo [--part agreement|speed --steps 4 --samples 4 --response_length 64 --turns 2]

Each side runs in a process of its own, in float32 on one thread. Seconds are the process's CPU seconds (these machines
are shared) of steps after the first two; memory is the peak resident set over what the imports took. TRL runs as it is
best for this machine: reference log-probs precomputed, no gradient checkpointing. Of GRPO, losses and gradients are
compared on recorded responses (group_agreement.py), seconds and memory on each side's own (group_speed.py). Needs the
extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import group_agreement, group_speed

DATA = {
    "dpo": Path("../shared/data/preferences/gsm8k_model_solutions.jsonl"),
    "sft": Path("../shared/data/sft/gsm8k_train.jsonl"),
    "grpo": Path("../shared/data/rlvr/gsm8k_train.jsonl"),
}
DEFAULTS = {"steps": 8, "batch_size": 8, "hidden": 256, "layers": 6, "vocab": 32000, "max_length": 1024}
OF_GRPO = {"steps": 4, "layers": 4, "vocab": 16000}  # 11 M parameters
# Tülu's template with the marks from which TRL takes its assistant mask
MARKED = "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
LEARNING_RATE, WARMUP_RATIO, SEED = 1e-4, 0.25, 1


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("stage", choices=sorted(DATA))
    parser.add_argument(
        "--side", choices=("ours", "trl", "both"), help="run one side in this process (used internally)"
    )
    parser.add_argument("--root", type=Path, help="directory that both sides share (used internally)")
    for name, default in DEFAULTS.items():
        of_grpo = f", of grpo {OF_GRPO[name]}" if name in OF_GRPO else ""
        parser.add_argument(f"--{name}", type=int, help=f"(default: {default}{of_grpo})")
    for name, default in {"samples": 4, "response_length": 64, "turns": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of grpo (default: {default})")
    parser.add_argument("--part", choices=("agreement", "speed"), help="of grpo (default: both)")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    for name, default in (DEFAULTS | (OF_GRPO if args.stage == "grpo" else {})).items():
        if vars(args)[name] is None:
            setattr(args, name, default)
    return args


def make_inputs(args: argparse.Namespace) -> None:
    """A random Llama with the embedded tokenizer and Tülu's template; the rows in the order in which our step plan
    draws them.
    """
    import shutil

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from engine.data.chat import TULU_TEMPLATE
    from engine.data.embedded import embedded
    from engine.data.mixture import Steps

    made = embedded(args.root)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=args.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(args.root / "model")
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    tokenizer.chat_template = TULU_TEMPLATE
    tokenizer.save_pretrained(args.root / "model")
    embedded_data = {"dpo": made.train_pairs, "sft": made.train_conversations, "grpo": made.train_problems}[args.stage]
    data = args.data or (DATA[args.stage] if DATA[args.stage].is_file() else embedded_data)
    if args.stage == "grpo":
        data = group_speed.make_rows(args.root, data)
    shutil.copy(data, args.root / "rows.jsonl")
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    steps = Steps(len(lines), args.batch_size, 1, args.steps, SEED)
    (args.root / "ordered.jsonl").write_text(
        "".join(lines[i] for step in range(args.steps) for i in steps.examples(step)), encoding="utf-8"
    )


class Meter:
    """CPU seconds per step and the peak of memory over what was there at the start."""

    def __init__(self) -> None:
        self.base, self.seconds, self.since = self.resident(), [], time.process_time()

    @staticmethod
    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def start(self) -> None:
        self.since = time.process_time()

    def stop(self) -> None:
        self.seconds.append(time.process_time() - self.since)

    def result(self, rows: list[dict]) -> dict:
        timed = sorted(self.seconds[2:]) or self.seconds
        return {"seconds": timed[len(timed) // 2], "peak_bytes": self.resident() - self.base, "rows": rows}


def ours(args: argparse.Namespace) -> dict:
    import importlib

    from engine import config
    from engine.train import throughput

    stage = importlib.import_module(f"launch.{args.stage}")
    meter, row = Meter(), throughput.Throughput.row

    def timed_row(self, sums):
        meter.stop()
        result = row(self, sums)
        meter.start()
        return result

    throughput.Throughput.row = timed_row
    meter.start()
    flags = {
        "model_name_or_path": args.root / "model",
        "dataset_name": args.root / "rows.jsonl",
        "output_dir": args.root / "ours",
        "seed": SEED,
        "cache_dir": args.root / "cache",
        "batch_size": args.batch_size,
        "max_steps": args.steps,
        "learning_rate": LEARNING_RATE,
        "warmup_ratio": WARMUP_RATIO,
        "max_seq_length": args.max_length,
        "micro_batch_tokens": 8192,
        "num_train_epochs": 1,
    } | ({"sample_tokens": 0} if args.stage == "sft" else {})
    stage.train(config.parse(stage.Config, [w for k, v in flags.items() for w in (f"--{k}", str(v))]))
    lines = (args.root / "ours" / "metrics.jsonl").read_text().splitlines()
    return meter.result([r for r in map(json.loads, lines) if "loss" in r])


def trl(args: argparse.Namespace) -> dict:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from engine.data.chat import TULU_TEMPLATE

    meter, rows = Meter(), []

    class Record(TrainerCallback):
        def on_step_begin(self, *_, **__):
            meter.start()

        def on_step_end(self, *_, **__):
            meter.stop()

        def on_log(self, arguments, state, control, logs=None, **_):
            if logs and "loss" in logs:
                rows.append(logs)

    model = AutoModelForCausalLM.from_pretrained(args.root / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.root / "model")
    common = {
        "output_dir": str(args.root / "trl"),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "max_length": args.max_length,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": math.ceil(args.steps * WARMUP_RATIO),
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "seed": SEED,
    }
    if args.stage == "dpo":
        trainer_class, columns = DPOTrainer, ["chosen", "rejected"]
        size = args.batch_size
        config = DPOConfig(
            **common,
            loss_type=["sigmoid_norm"],
            beta=5.0,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=size,
        )
    else:
        trainer_class, columns = SFTTrainer, ["messages"]
        tokenizer.chat_template = TULU_TEMPLATE.replace(
            "{{ '<|assistant|>\n' + message['content'] + eos_token }}", MARKED
        )
        assert "generation" in tokenizer.chat_template
        config = SFTConfig(**common, assistant_only_loss=True)

    class InOrder(trainer_class):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)

    data = load_dataset("json", data_files=str(args.root / "ordered.jsonl"), split="train").select_columns(columns)
    trainer = InOrder(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Record()])
    trainer.train()
    trainer.model.save_pretrained(args.root / "trl")
    return meter.result(rows)


def distance_of_weights(root: Path) -> float:
    """|w_ours - w_trl| / |w_trl - w_start|"""
    from safetensors.torch import load_file

    start, a, b = (
        load_file(path / "model.safetensors") for path in (root / "model", root / "ours" / "final", root / "trl")
    )
    apart = sum((a[k].double() - b[k].double()).square().sum() for k in start)
    moved = sum((b[k].double() - start[k].double()).square().sum() for k in start)
    return float((apart / moved).sqrt())


def run_side(side: str, args: argparse.Namespace) -> dict:
    """What one side measures, in a process of its own."""
    words = [
        word
        for name, value in vars(args).items()
        if name not in ("stage", "side", "json", "part") and value is not None
        for word in (f"--{name}", str(value))
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.against_trl", args.stage, "--side", side, *words]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{side} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")
    return json.loads((args.root / f"{side}.json").read_text())


def main() -> None:
    args = options()
    if args.side:
        sides = {"ours": ours, "trl": trl, "both": groups}
        if args.stage == "grpo":
            sides |= {"ours": group_speed.ours, "trl": group_speed.trl}
        result = sides[args.side](args)
        (args.root / f"{args.side}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as directory:
        args.root = Path(directory)
        if args.stage == "grpo":
            main_grpo(args)
            return
        make_inputs(args)
        results = {side: run_side(side, args) for side in ("ours", "trl")}
        apart = distance_of_weights(args.root)
    show(args, results, apart)


def groups(args: argparse.Namespace) -> list[dict]:
    """Both sides in one process, on recorded responses."""
    return group_agreement.compare(args.root)


def main_grpo(args: argparse.Namespace) -> None:
    """Losses and gradients on recorded responses, then steps that take turns."""
    found = {}
    if args.part != "speed":
        rows = run_side("both", args)
        found["agreement"] = rows
        print(group_agreement.show(rows), flush=True)
    if args.part != "agreement":
        make_inputs(args)
        turns: dict[str, list[dict]] = {"ours": [], "trl": []}
        for _ in range(args.turns):
            for side, of_side in turns.items():
                of_side.append(run_side(side, args))
                print(f"{side}: {', '.join(f'{x:.2f}' for x in of_side[-1]['cpu'])} CPU s a step", flush=True)
        shown, ratios = group_speed.show(turns)
        found |= {"turns": turns, "ratios": ratios}
        print(shown)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if not all(row["within"] for row in found.get("agreement", ()) if row["agrees"]):
        sys.exit("losses or gradients that must agree do not")


def show(args: argparse.Namespace, results: dict[str, dict], apart: float) -> None:
    """Losses step by step, then seconds and memory."""
    worst = 0.0
    print(
        f"{'step':>4} {'loss ours':>12} {'loss TRL':>12} {'norm ours':>10} {'norm TRL':>10}"
        + "  accuracy ours, TRL" * (args.stage == "dpo")
    )
    for a, b in zip(results["ours"]["rows"], results["trl"]["rows"], strict=True):
        worst = max(worst, abs(a["loss"] - float(b["loss"])) / abs(float(b["loss"])))
        # TRL logs margins of sums where ours are of the means that the loss sees: only their sign is comparable
        accuracy = (
            f"  {a['rewards/accuracies']:.3f} {float(b['rewards/accuracies']):.3f}" if args.stage == "dpo" else ""
        )
        print(
            f"{a['step']:>4} {a['loss']:12.7f} {float(b['loss']):12.7f} {a['grad_norm']:10.5f}"
            f" {float(b['grad_norm']):10.5f}{accuracy}"
        )
    speed = results["trl"]["seconds"] / results["ours"]["seconds"]
    memory = results["ours"]["peak_bytes"] / results["trl"]["peak_bytes"]
    print(f"\nlargest relative difference of losses {worst:.1e}; weights apart by {apart:.1e} of the way travelled")
    for side in ("ours", "trl"):
        print(
            f"{side:>5}: {results[side]['seconds']:.2f} CPU s a step, peak memory"
            f" {results[side]['peak_bytes'] / 2**20:.0f} MiB over the imports"
        )
    print(f"speed {speed:.2f} x TRL's, memory {memory:.2f} of TRL's")
    if args.json:
        args.json.write_text(
            json.dumps(
                {"loss_difference": worst, "weights_apart": apart, "speed": speed, "memory": memory, **results},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()

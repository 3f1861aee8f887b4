"""Is the plan true: the memory that `launch.plan` says against what the run takes.            python -m benchmarks.plan

A model of some 40 M random weights and made-up data whose sequences all have --max_seq_length tokens; every case is
planned, then run for two steps as `python -m launch.STAGE` would (2 ranks: one process each), and measured from before
the loading of weights to after the export: on CUDA torch.cuda.max_memory_allocated, on a CPU the largest sum of the
allocator's live bytes, from the events of torch.profiler(profile_memory=True). Speed is not compared: times of a plan
are floors of a data sheet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

COMMON = {"max_steps": 2, "batch_size": 8, "micro_batch_tokens": 1024, "max_seq_length": 256}
SAMPLED = {"response_length": 128, "rollout_slots": 16, "num_samples_per_prompt": 2, "num_ppo_epochs": 1}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "sft": ("sft", 1, {}),
    "sft, bfloat16": ("sft", 1, {"dtype": "bfloat16"}),
    "sft, full recomputation": ("sft", 1, {"gradient_checkpointing": "full", "micro_batch_tokens": 2048}),
    "sft, selective recomputation": ("sft", 1, {"gradient_checkpointing": "selective"}),
    "sft, 8-bit moments": ("sft", 1, {"optimizer": "adamw_8bit"}),
    "sft, bfloat16 masters": ("sft", 1, {"dtype": "bfloat16", "master_dtype": "bfloat16"}),
    "sft, naive head": ("sft", 1, {"head": "naive"}),
    "sft, 2 ranks": ("sft", 2, {}),
    "sft, 2 ranks, reduced once": ("sft", 2, {"gradient_sync": "last"}),
    "dpo": ("dpo", 1, {}),
    "dpo, 2 ranks": ("dpo", 2, {"gradient_sync": "every"}),
    "dpo, LoRA": ("dpo", 1, {"use_lora": True, "dtype": "bfloat16"}),
    "dpo, LoRA on 4 bits": (
        "dpo",
        1,
        {"use_lora": True, "load_in_4bit": True, "double_quant": True, "dtype": "bfloat16"},
    ),
    "ppo": ("ppo", 1, SAMPLED),
    "grpo": ("grpo", 1, SAMPLED),
    "grpo, against a reference": ("grpo", 1, SAMPLED | {"kl_coef": 0.01, "num_mini_batches": 2}),
}
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
}


def made(root: Path, sizes: dict[str, int] = SIZES) -> tuple[Path, dict[str, Path]]:
    """(model, stage → data) under `root`: every row is cut at the longest sequence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.data.embedded import embedded

    source = embedded(root / "cache").model
    tokenizer = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer["eos_token_id"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "model")
    for file in source.glob("*tokenizer*"):
        shutil.copy(file, root / "model")
    user = lambda i: {"role": "user", "content": f"{i}"}
    answer = lambda i, word: {"role": "assistant", "content": f"{word} {i} " * 600}
    rows = {
        "sft": [{"messages": [user(i), answer(i, "one")]} for i in range(64)],
        "dpo": [{"chosen": [user(i), answer(i, "one")], "rejected": [user(i), answer(i, "two")]} for i in range(64)],
        "ppo": [
            {"messages": [{"role": "user", "content": f"{i:03d}" * 30}], "ground_truth": "1", "dataset": "gsm8k"}
            for i in range(64)
        ],
    }
    for stage, lines in rows.items():
        (root / f"{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    files = {stage: root / f"{stage}.jsonl" for stage in rows}
    return root / "model", files | {"grpo": files["ppo"]}


def words(flags: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in flags.items()
        for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def planned(stage: str, ranks: int, flags: dict[str, Any], root: Path) -> dict[str, Any]:
    """What `launch.plan` writes as JSON."""
    path = root / "plan.json"
    gpu = (
        "cpu"
        if not torch.cuda.is_available()
        else next(n for n in ("h200-141gb", "h100-80gb", "a100-80gb") if n[:4] in torch.cuda.get_device_name().lower())
    )
    command = [
        sys.executable,
        "-m",
        "launch.plan",
        stage,
        *words(flags),
        "--gpu",
        gpu,
        "--gpus",
        str(ranks),
        "--suggest",
        "false",
        "--json",
        str(path),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text(encoding="utf-8"))


def measured(stage: str, ranks: int, flags: dict[str, Any], root: Path) -> int:
    """Bytes of rank 0 at the peak of the real run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    out = root / "peak"
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, "-m", "benchmarks.plan", "--measure", stage, str(out), *words(flags)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
        )
    _, errors = processes[0].communicate()
    if any(process.wait() for process in processes):
        raise RuntimeError(f"the run failed:\n{errors[-2000:]}")
    return int(out.read_text(encoding="utf-8"))


def measure(stage: str, out: Path, argv: list[str]) -> None:
    """In a process of its own: the run, and its peak into the file `out`."""
    import importlib

    from engine import config

    module = importlib.import_module(f"launch.{stage}")
    torch.set_num_threads(1)
    parsed = config.parse(module.Config, argv)
    if torch.cuda.is_available():
        module.train(parsed)
        peak = torch.cuda.max_memory_allocated()
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            module.train(parsed)
        trace = out.with_suffix(f".{os.getpid()}")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        trace.unlink()
        peak = max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")
    if os.environ["RANK"] == "0":
        out.write_text(str(peak), encoding="utf-8")


def compare(name: str, root: Path, model: Path, data: dict[str, Path]) -> tuple[dict[str, Any], int]:
    stage, ranks, changes = CASES[name]
    flags = (
        COMMON
        | {
            "model_name_or_path": model,
            "dataset_name": data[stage],
            "cache_dir": root / "cache",
            "output_dir": root / f"run-{len(list(root.iterdir()))}",
        }
        | changes
    )
    if stage == "sft":
        flags["sample_tokens"] = 0
    return planned(stage, ranks, flags, root), measured(stage, ranks, flags, root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose names contain this")
    arguments = parser.parse_args()
    print(f"{'':<30}{'planned':>10}{'measured':>10}  MiB{'':>6}planned / measured   the peak is in")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model, data = made(root)
        for name in CASES:
            if arguments.only and arguments.only != name and (arguments.only in CASES or arguments.only not in name):
                continue
            plan, peak = compare(name, root, model, data)
            total = plan["peak"]["total"]
            print(
                f"{name:<30}{total / 2**20:>10.0f}{peak / 2**20:>10.0f}{total / peak:>23.3f}         "
                f" {plan['peak']['phase']}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    else:
        main()

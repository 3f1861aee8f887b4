"""What `make gpu` runs on a CUDA machine: tests, every stage in bf16 on a 1B-shaped random model, quick benchmarks, one table.

Under eight minutes on one H200, with torch, transformers, triton and pytest; nothing is installed or fetched. Each part is a process
of its own with a time limit, and one that fails does not stop the next. Logs and JSON go to $OUT, or to benchmarks/out. Without CUDA
it says so and exits 0. `--rehearse` runs the same plan in minutes on a CPU, tiny: a test of this file, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 8 * 60  # seconds for everything; a part gets no more than what is left

LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 4096, "tie_word_embeddings": True, "rope_theta": 5e5,
}  # fmt: skip
TINY = LLAMA_1B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640}

# one line a run: module, file of `make_model`, compiled or not
STAGES = (
    ("launch.dpo", "pairs.jsonl", False),
    ("launch.dpo", "pairs.jsonl", True),
    ("launch.sft", "conversations.jsonl", True),
)


@dataclass
class Part:
    """One row of the summary."""

    name: str
    ok: bool
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class Runner:
    """Runs commands one after another within the time that is left, each with its output in a log of its own."""

    def __init__(self, out: Path) -> None:
        self.out, self.start = out, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, command: list[str], limit: float, tail: int) -> Part:
        """Prints the last `tail` lines of what the command says."""
        began = time.monotonic()
        limit = min(limit, TIME_LIMIT - (began - self.start))
        log = self.out / f"{name.replace(' ', '_')}.log"
        print(f"\n=== {name} (at most {max(limit, 0):.0f} s): {' '.join(command)}", flush=True)
        if limit < 10:
            return Part(name, False, 0.0, note="no time left")
        # a session of its own, so that a part over its limit ends with its children (compilers, workers)
        with open(log, "wb") as f:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            try:
                status, note = process.wait(limit), ""
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                status, note = process.wait(), f"stopped after {limit:.0f} s"
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
        text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        print("\n".join([line for line in text.splitlines() if line.strip()][-tail:]), flush=True)
        note = note or ("" if status == 0 else f"exit status {status}, see {log.name}")
        return Part(name, status == 0, time.monotonic() - began, note=note)


def make_model(directory: Path, shape: dict[str, Any], device: str) -> None:
    """A random Llama of this shape in bf16 with the embedded tokenizer, and data of chat-like lengths beside it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from engine.embedded import embedded

    made = embedded(directory / "embedded")
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")

    generator = np.random.Generator(np.random.Philox(key=1))
    sentences = [json.loads(line)["chosen"][1]["content"] for line in made.train_pairs.read_text(encoding="utf-8").splitlines()]

    def text(mean_sentences: float) -> str:  # a sentence is some 20 tokens
        count = max(1, min(40, round(generator.lognormal(np.log(mean_sentences), 0.8))))
        return " ".join(sentences[i] for i in generator.integers(len(sentences), size=count))

    with open(directory / "pairs.jsonl", "w", encoding="utf-8") as pairs, open(directory / "conversations.jsonl", "w", encoding="utf-8") as conversations:
        for _ in range(512):
            user = {"role": "user", "content": text(10)}
            chosen, rejected = ([user, {"role": "assistant", "content": text(15)}] for _ in range(2))
            pairs.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
            conversations.write(json.dumps({"messages": chosen}) + "\n")


def run_stage(runner: Runner, module: str, data: str, compiled: bool, directory: Path, rehearse: bool) -> Part:
    """A few steps; figures are medians of the second half of them, past compilation and the allocator's growth."""
    name = f"{module.split('.')[1]} {'compiled' if compiled else 'eager'}"
    output = directory / name.replace(" ", "_")
    steps, length, tokens, batch = (2, 256, 1024, 4) if rehearse else (8, 2048, 16384, 32)
    common = {
        "model_name_or_path": directory / "model", "dataset_name": directory / data, "output_dir": output, "cache_dir": directory / "cache",
        "max_steps": steps, "max_seq_length": length, "micro_batch_tokens": tokens, "batch_size": batch, "learning_rate": 1e-6,
        "dtype": "bfloat16", "resume": "never",
    }  # fmt: skip
    words = [word for key, value in common.items() for word in (f"--{key}", str(value))]
    part = runner(name, ["-m", module, *words, *(["--compile"] if compiled else [])], 150, tail=8)
    rows = _metrics(output / "metrics.jsonl")
    if rows:
        late = rows[len(rows) // 2 :]
        middle = lambda key: statistics.median(row[key] for row in late)
        part.figures = {
            "tokens/s": f"{middle('perf/tokens_per_second_per_gpu'):,.0f}", "MFU": f"{middle('perf/mfu'):.1%}",
            "peak GiB": f"{max(row['perf/peak_memory_gib'] for row in rows):.1f}", "first loss": f"{rows[0]['loss']:.4f}",
            "steps": len(rows),
        }  # fmt: skip
    if part.ok and len(rows) != steps:
        part.ok, part.note = False, f"{len(rows)} of {steps} steps in metrics.jsonl"
    return part


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of optimizer steps (not those of evaluations, nor the torn line of a run that was stopped)."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [row for row in rows if "perf/mfu" in row]


def run_tests(runner: Runner) -> Part:
    """Only the files that mark something `gpu`: collecting the others would import packages that need not be here."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8"))
    part = runner("tests", ["-m", "pytest", "-m", "gpu", "-rs", *files], 180, tail=30)
    log = (runner.out / "tests.log").read_text(encoding="utf-8") if part.seconds else ""
    counted = [line.strip("= ") for line in log.splitlines() if " passed" in line or " failed" in line or " skipped" in line]
    part.figures = {"result": counted[-1] if counted else "none"}
    return part


def run_benchmark(runner: Runner, name: str, flags: list[str], summary: Any) -> Part:
    """A benchmark on its defaults; `summary` takes the figures of one row of its JSON."""
    path = runner.out / f"{name.split('.')[1]}.json"
    path.unlink(missing_ok=True)
    part = runner(name.split(".")[1], ["-m", name, "--json", str(path), *flags], 150, tail=60)
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content.get("variants") or content.get("backends")
        part.figures = {key: summary(row, content) for key, row in rows.items() if row["skipped"] is None}
    return part


def loss_summary(row: dict[str, Any], content: dict[str, Any]) -> str:
    seconds = _total(row["times"])
    bare = content["products"]["forward"] if not any(row["times"]["backward"]) else [sum(pair) for pair in zip(*content["products"].values(), strict=True)]
    return f"{seconds * 1e3:.1f} ms, {statistics.median(bare) / seconds:.0%} of products, {row['memory'] / 2**30:.2f} GiB"


def attention_summary(row: dict[str, Any], content: dict[str, Any]) -> str:
    shape = content["arguments"]
    flops = 3.5 * 4 * shape["heads"] * shape["head_dim"] * content["visible_pairs"]
    seconds = _total(row["times"])
    return f"{seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.3g} TFLOP/s, {row['memory'] / 2**30:.2f} GiB"


def _total(times: dict[str, list[float]]) -> float:
    return statistics.median(f + b for f, b in zip(times["forward"], times["backward"], strict=True))


def print_summary(parts: list[Part], title: str, seconds: float) -> None:
    print(f"\n{'=' * 100}\n{title}, {seconds:.0f} s in all\n{'=' * 100}")
    for part in parts:
        print(f"{'ok  ' if part.ok else 'FAIL'}  {part.name:<16} {part.seconds:5.0f} s  {part.note}".rstrip())
        if part.name in ("loss", "attention"):
            for key, value in part.figures.items():
                print(f"        {key:<24} {value}")
        elif part.figures:
            print("        " + ", ".join(f"{key} {value}" for key, value in part.figures.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="the same plan, tiny, on whatever device there is")
    args = parser.parse_args(argv)
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not args.rehearse:
        print("no CUDA device on this machine: nothing to do (the CPU suite is `make test`)")
        return 0
    from benchmarks.measure import machine, reason

    device = torch.device("cuda" if cuda else "cpu")
    runner = Runner(Path(os.environ.get("OUT") or ROOT / "benchmarks" / "out"))
    here = machine(device)
    title = f"{here['device']}, torch {here['torch']}, commit {here['commit']}{', a rehearsal' if args.rehearse else ''}"
    print(title, flush=True)
    parts = [run_tests(runner)]
    with tempfile.TemporaryDirectory(prefix="triptych-gpu-") as temporary:
        began, directory = time.monotonic(), Path(temporary)
        try:
            make_model(directory, TINY if args.rehearse else LLAMA_1B, device.type)
            parts.append(Part("make model", True, time.monotonic() - began))
        except Exception as error:  # the stages will then fail by themselves, and the benchmarks still run
            parts.append(Part("make model", False, time.monotonic() - began, note=reason(error)))
        torch.cuda.empty_cache()
        for module, data, compiled in STAGES:
            parts.append(run_stage(runner, module, data, compiled, directory, args.rehearse))
    small = ["--tokens", "256", "--seconds", "0.2"] if args.rehearse else []
    parts.append(run_benchmark(runner, "benchmarks.loss", [*small, *(["--hidden", "64", "--vocab", "4000"] if small else [])], loss_summary))
    parts.append(run_benchmark(runner, "benchmarks.attention", small, attention_summary))

    seconds = time.monotonic() - runner.start
    content = {"machine": here, "rehearsal": args.rehearse, "seconds": seconds, "parts": [vars(part) for part in parts]}
    (runner.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print_summary(parts, title, seconds)
    print(f"\nlogs and JSON: {runner.out}")
    return 0 if all(part.ok for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())

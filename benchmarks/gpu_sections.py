"""The sections of `make gpu`: each a function of a `Lab` that returns its figures, run by benchmarks/gpu.py in a process of its own.

Shapes: a random Llama of 1B (16 layers, D 2048, V 128,256) for the stages, the sampler and the profile; 8B for adapters. A section that
cannot run on this machine raises `Skipped`, and one that fails raises whatever it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import attention, loss, measure, memory, rollout
from engine import hardware, world
from engine.config import parse
from engine.embedded import embedded
from launch import dpo, plan, ppo, sft

ROOT = Path(__file__).resolve().parent.parent
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 4096, "tie_word_embeddings": True, "rope_theta": 5e5,
}  # fmt: skip
TINY = LLAMA_1B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640}
COSTLIEST = 20  # kernels of a profile
Figures = dict[str, Any]


class Skipped(Exception):
    """The section cannot run here; the message says why."""


@dataclass(frozen=True)
class Lab:
    """What the sections of one run share: a directory, and whether this is a rehearsal (tiny, on whatever device there is)."""

    directory: Path
    rehearse: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def model(self) -> Path:
        """The random model in bf16 with the embedded tokenizer, and chat-like data beside it; made by the section that is first to ask."""
        if not (self.directory / "ready").exists():
            _make_model(self.directory, TINY if self.rehearse else LLAMA_1B, self.device)
            (self.directory / "ready").touch()
        return self.directory / "model"


def _make_model(directory: Path, shape: dict[str, Any], device: torch.device) -> None:
    made = embedded(directory / "embedded")
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    generator = np.random.Generator(np.random.Philox(key=1))
    sentences = [json.loads(line)["chosen"][1]["content"] for line in made.train_pairs.read_text(encoding="utf-8").splitlines()]

    def text(mean_sentences: float) -> str:  # a sentence is some 20 tokens
        count = max(1, min(40, round(generator.lognormal(np.log(mean_sentences), 0.8))))
        return " ".join(sentences[i] for i in generator.integers(len(sentences), size=count))

    with open(directory / "dpo.jsonl", "w", encoding="utf-8") as pairs, open(directory / "sft.jsonl", "w", encoding="utf-8") as conversations:
        for _ in range(512):
            user = {"role": "user", "content": text(10)}
            chosen, rejected = ([user, {"role": "assistant", "content": text(15)}] for _ in range(2))
            pairs.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
            conversations.write(json.dumps({"messages": chosen}) + "\n")
    (directory / "ppo.jsonl").write_text(made.train_problems.read_text(encoding="utf-8"), encoding="utf-8")


# --- facts ----------------------------------------------------------------------------------------------------------------------


def facts(lab: Lab) -> Figures:
    """Ceilings of the device; every backend and head against float64 at small shapes; two steps of every stage on the embedded model."""
    device, dtype = lab.device, torch.bfloat16
    found: Figures = {}
    if device.type == "cuda":
        found |= {"copy GB/s": round(measure.copy_rate(device) / 1e9), "product TFLOP/s": round(measure.matmul_rate(device, dtype) / 1e12)}
    bad = []
    stream = attention.make_stream((5, 1, 130, 64, 257), 100, device)
    inputs = attention.make_inputs(stream, 8, 2, 64, dtype, device)
    allowed = max(attention.errors(attention.CANDIDATES["eager"], inputs, stream).values())
    for name in attention.attention.BACKENDS:
        error = _error(lambda name=name: max(attention.errors(attention.CANDIDATES[name], inputs, stream).values()))
        found[f"attention {name}"] = error
        bad += [name] if isinstance(error, float) and not error <= 2 * allowed + 1e-3 else []
    problem = loss.make_problem(303, 128, 5003, dtype, 0.3, 100, device)
    for name, variant in loss.VARIANTS.items():
        if lab.rehearse and name == "compile":  # a minute of a CPU
            continue
        error = _error(lambda variant=variant: max(loss.errors(variant, problem).values()))
        found[f"head {name}"] = error
        bad += [name] if isinstance(error, float) and not error <= 2e-2 else []
    for stage in (sft, dpo, ppo):
        name = stage.__name__.removeprefix("launch.")
        extra = {"sample_tokens": 0} if stage is sft else {"batch_size": 4, "response_length": 8} if stage is ppo else {}
        rows = _train(stage, lab.directory / f"facts-{name}", {"max_steps": 2, "cache_dir": lab.directory / "cache", "dtype": "bfloat16", **extra})
        found[f"{name} first loss"] = round(rows[0]["loss"], 4)
    if bad:
        raise AssertionError(f"not equal to float64: {', '.join(bad)}; {found}")
    return found


def _error(compute: Callable[[], float]) -> float | str:
    try:
        return float(f"{compute():.1e}")
    except Exception as error:  # a backend that is not there, or a library that fails: the others must still be seen
        return measure.reason(error)


# --- kernels ----------------------------------------------------------------------------------------------------------------------


def heads(lab: Lab) -> Figures:
    """Loss heads at 8,192 tokens of a Llama 8B's last layer, beside the bare products."""
    content = _benchmark(loss.main, lab, "loss", ["--hidden", "64", "--vocab", "4000", "--variants", "naive", "linear_loss", "linear_logprobs"])
    found = {"bare products": f"{sum(statistics.median(times) for times in content['products'].values()) * 1e3:.1f} ms"}
    for name, row in content["variants"].items():
        if row["skipped"] is None:
            seconds = _total(row["times"])
            forward_only = not any(row["times"]["backward"])
            bare = content["products"]["forward"] if forward_only and "forward" in name else [sum(x) for x in zip(*content["products"].values(), strict=True)]
            found[name] = f"{seconds * 1e3:.1f} ms, {statistics.median(bare) / seconds:.0%} of products, {row['memory'] / 2**30:.2f} GiB"
    return found


def packed_attention(lab: Lab) -> Figures:
    """Packed attention at 16,384 tokens, 32 / 8 heads of 128, beside padded and masked."""
    content = _benchmark(attention.main, lab, "attention", ["--heads", "4", "--kv_heads", "2", "--head_dim", "16"])
    shape, found = content["arguments"], {}
    for name, row in content["backends"].items():
        if row["skipped"] is None:
            seconds = _total(row["times"])
            rate = 3.5 * 4 * shape["heads"] * shape["head_dim"] * content["visible_pairs"] / seconds / 1e12
            found[name] = f"{seconds * 1e3:.2f} ms, {rate:.3g} TFLOP/s, {row['memory'] / 2**30:.2f} GiB"
        elif not row["skipped"].startswith(("the package", "needs")):
            found[name] = row["skipped"]
    return found


def _benchmark(main: Callable, lab: Lab, name: str, tiny: list[str]) -> dict[str, Any]:
    path = lab.directory / f"{name}.json"
    main(["--json", str(path), *(["--tokens", "256", "--seconds", "0.05", *tiny] if lab.rehearse else ["--seconds", "0.5"])])
    return json.loads(path.read_text(encoding="utf-8"))


def _total(times: dict[str, list[float]]) -> float:
    return statistics.median(f + b for f, b in zip(times["forward"], times["backward"], strict=True))


# --- stages -----------------------------------------------------------------------------------------------------------------------


def _train(stage: Any, output_dir: Path, flags: dict[str, Any]) -> list[dict[str, Any]]:
    """The stage's own `train`, and its rows of steps."""
    words = [word for key, value in {"output_dir": output_dir, **flags}.items() for word in (f"--{key}", str(value))]
    stage.train(parse(stage.Config, words))
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "perf/mfu" in row]


def _flags(lab: Lab, stage: Any) -> dict[str, Any]:
    name = stage.__name__.removeprefix("launch.")
    steps, length, tokens, batch = (2, 256, 1024, 4) if lab.rehearse else (8, 2048, 16384, 32)
    return {
        "model_name_or_path": lab.model, "dataset_name": lab.directory / f"{name}.jsonl", "cache_dir": lab.directory / "cache", "max_steps": steps,
        "max_seq_length": length, "micro_batch_tokens": tokens, "batch_size": batch, "learning_rate": 1e-6, "dtype": "bfloat16", "resume": "never",
    }  # fmt: skip


def _supervised(stage: Any, compiled: bool) -> Callable[[Lab], Figures]:
    def section(lab: Lab) -> Figures:
        flags = _flags(lab, stage) | ({"compile": "true"} if compiled and not lab.rehearse else {}) | ({"sample_tokens": 0} if stage is sft else {})
        with _planned(lab, stage.__name__.removeprefix("launch."), flags) as planned:
            rows = _train(stage, lab.directory / "run", flags)
        late = rows[len(rows) // 2 :]  # past compilation and the allocator's growth
        middle = lambda key: statistics.median(row[key] for row in late)
        peak = max(row["perf/peak_memory_gib"] for row in rows)
        return {
            "tokens/s": f"{middle('perf/tokens_per_second_per_gpu'):,.0f}", "MFU": f"{middle('perf/mfu'):.1%}", "peak GiB": f"{peak:.1f}",
            "first loss": f"{rows[0]['loss']:.4f}", "steps": len(rows), **planned, **({"not compiled": "a rehearsal"} if compiled and lab.rehearse else {}),
        }  # fmt: skip

    section.__doc__ = f"{stage.__name__} on the 1B shape, {'compiled' if compiled else 'eager'}: tokens/s, MFU, peak memory beside the plan's."
    return section


@contextlib.contextmanager
def _planned(lab: Lab, stage: str, flags: dict[str, Any]) -> Iterator[Figures]:
    """What launch.plan says of the same flags on this device, computed on the host meanwhile; filled in at the end."""
    found: Figures = {}
    longest = {} if lab.rehearse else {"longest_tokens": 1600, "mean_tokens": 720}
    words = [word for key, value in (flags | longest).items() if key not in ("resume", "cache_dir", "dataset_name") for word in (f"--{key}", str(value))]
    path = lab.directory / "plan.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "launch.plan", stage, "--gpu", device_name(lab.device), "--gpus", "1", "--suggest", "false", "--json", str(path), *words]
    process = None if lab.rehearse else subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=_without_gpu())
    if process is None:
        plan.main(command[3:])
    yield found
    if process is None or process.wait() == 0:
        content = json.loads(path.read_text(encoding="utf-8"))
        found["planned peak GiB"] = f"{content['peak']['total'] / 2**30:.1f}"
        found["planned tokens/s at best"] = f"{content['tokens_per_second_per_gpu']:,.0f}"


def _without_gpu() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def device_name(device: torch.device) -> str:
    """The planner's name of this GPU, or 'cpu'."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    return next((key for key in hardware.DEVICES if key.partition("-")[0].upper() in name.upper()), "h100-80gb")


def reinforce(lab: Lab) -> Figures:
    """launch.ppo on the 1B shape: three iterations of 64 prompts x 4 responses of 128 tokens."""
    small = {"batch_size": 4, "num_samples_per_prompt": 2, "response_length": 8} if lab.rehearse else {"batch_size": 64, "num_samples_per_prompt": 4, "response_length": 128, "max_steps": 3}
    rows = _train(ppo, lab.directory / "run", _flags(lab, ppo) | {"rollout_slots": 256} | small)
    return {key: round(rows[-1][key], 3) for key in rows[-1] if key.startswith("time/") or key in ("perf/mfu", "perf/peak_memory_gib", "rollout/length")}


def adapters(rung: str) -> Callable[[Lab], Figures]:
    def section(lab: Lab) -> Figures:
        if rung == "QLoRA" and importlib.util.find_spec("bitsandbytes") is None:
            raise Skipped("bitsandbytes was not brought along")
        found = memory.rung_of_shape(rung, Namespace(shape="tiny" if lab.rehearse else "8b", tokens=256 if lab.rehearse else 8192))
        falls = {key: f"{found[key]:.3f}" for key in ("first loss", "loss")}
        return {"tokens/s": f"{found['speed']:,.0f}", "peak GiB": f"{found['peak'] / 2**30:.1f}", "parameters": found["parameters"], **falls}

    section.__doc__ = f"{rung} of the 8B shape, four SFT steps of 8,192 tokens, layers recomputed: tokens/s and peak memory."
    return section


def random_model(lab: Lab, device: torch.device) -> torch.nn.Module:
    """Of the stages' shape, drawn on the device: on a host it takes a minute."""
    config = AutoConfig.from_pretrained(lab.model)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


# --- sampling -----------------------------------------------------------------------------------------------------------------------


def rollouts(lab: Lab) -> Figures:
    """The sampler on the 1B shape at 64 and 256 responses of 128 tokens: tokens/s, a token's time, and the share of it that reading must take."""
    found: Figures = {}
    here = world.start()
    lm = random_model(lab, here.device)
    config, prompt, long, short = lm.config, 20 if lab.rehearse else 200, 12 if lab.rehearse else 128, 4 if lab.rehearse else 32
    weights = sum(p.nbytes for p in lm.parameters())
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2  # bytes of a token
    rate = measure.copy_rate(here.device) if here.device.type == "cuda" else 1e10
    for slots in (4, 8) if lab.rehearse else (64, 256):
        seconds = {}
        for length in (short, long):
            args = Namespace(slots=slots, requests=slots, samples=8, prompt=prompt, response=length, vocab=config.vocab_size, sorted=False, sigma=1.0)
            requests, run = rollout.make_requests(args, False), rollout.ours(lm, args, here)
            run([rollout.Request(r.prompt_ids, r.example, r.sample, 2) for r in requests])
            start = rollout._seconds(here)
            made = run(requests)
            seconds[length] = rollout._seconds(here) - start
        token = (seconds[long] - seconds[short]) / (long - short)
        floor = (weights + slots * cached * (prompt + (long + short) / 2)) / rate
        found[f"{slots} responses"] = f"{made / seconds[long]:,.0f} tokens/s, {token * 1e3:.2f} ms a token, {floor / token:.0%} of it reading weights and cache"
    return found


# --- profiles ---------------------------------------------------------------------------------------------------------------------


def profile(lab: Lab) -> Figures:
    """The costliest kernels of an eager SFT step and of a decoded token, and how long the device stood still between kernels."""
    _train(sft, lab.directory / "run", _flags(lab, sft) | {"sample_tokens": 0, "profile": "true", "max_steps": 5})
    found = {"an SFT step": kernels(lab.directory / "run" / "trace.json", 3)}
    here = world.start()
    lm = random_model(lab, here.device)
    tokens = 4 if lab.rehearse else 16
    args = Namespace(slots=64, requests=64, samples=8, prompt=20 if lab.rehearse else 200, response=tokens, vocab=lm.config.vocab_size, sorted=False, sigma=1.0)
    run, requests = rollout.ours(lm, args, here), rollout.make_requests(args, False)
    run(requests)
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if here.device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as trace:
        run(requests)
        rollout._seconds(here)
    trace.export_chrome_trace(str(lab.directory / "decode.json"))
    return found | {"a decoded token of 64 (hand-over and prefill shared out)": kernels(lab.directory / "decode.json", tokens)}


def kernels(trace: Path, repeats: int) -> str:
    """A table of the kernels of a trace: milliseconds and calls of each, a repeat, and the device's idle share from first to last."""
    events = [e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e]
    if not events:
        return "no kernels: not a CUDA device"
    total: dict[str, list[float]] = {}
    for event in events:
        total.setdefault(event["name"], []).append(event["dur"])
    events.sort(key=lambda e: e["ts"])
    busy, end = 0.0, events[0]["ts"]
    for event in events:
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))
        end = max(end, event["ts"] + event["dur"])
    wall = end - events[0]["ts"]
    lines = [f"{wall / repeats / 1e3:.2f} ms, {len(events) / repeats:,.0f} kernels, the device idle {1 - busy / wall:.0%} of the time"]
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1]))[:COSTLIEST]:
        lines.append(f"{sum(times) / repeats / 1e3:9.3f} ms {sum(times) / busy:5.1%} {len(times) / repeats:7.1f} x  {name[:90]}")
    return "\n".join(lines)


# --- tests ----------------------------------------------------------------------------------------------------------------------------


def tests(lab: Lab) -> Figures:
    """`pytest -m gpu` of the files that mark something so: collecting the others could import packages that need not be here."""
    if lab.device.type != "cuda":
        raise Skipped("needs a CUDA device")
    marked = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-rs", *marked], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    counted = [line.strip("= ") for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode:
        raise AssertionError(f"{counted[-1] if counted else 'no test ran'}: {'; '.join(failed)[:600]}")
    return {"result": counted[-1]}


@dataclass(frozen=True)
class Section:
    run: Callable[[Lab], Figures]
    box: int  # seconds


SECTIONS = {
    "facts": Section(facts, 75),
    "loss": Section(heads, 60),
    "attention": Section(packed_attention, 60),
    "sft eager": Section(_supervised(sft, False), 50),
    "sft compiled": Section(_supervised(sft, True), 70),
    "rollout": Section(rollouts, 60),
    "profile": Section(profile, 60),
    "dpo compiled": Section(_supervised(dpo, True), 70),
    "ppo": Section(reinforce, 75),
    "lora 8b": Section(adapters("LoRA"), 75),
    "qlora 8b": Section(adapters("QLoRA"), 75),
    "dpo eager": Section(_supervised(dpo, False), 50),
    "tests": Section(tests, 150),
}  # in order of value


def clean(directory: Path) -> None:
    """What a section left that the next does not need: runs and their weights."""
    for path in (directory / "run", *directory.glob("facts-*"), *directory.glob("*.json")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

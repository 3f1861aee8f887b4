"""The sections of `make gpu`: each a generator of (name, figure), run by benchmarks/gpu.py in a process of its own.

Shapes: a random Llama of 1B (16 layers, D 2048, V 128,256) for the stages, the sampler and the profile; of 8B for
adapters. Stages run by their own entry point, as `python -m launch.X` runs them, in the section's process. A section
that cannot run on this machine raises `Skipped`, and one that fails raises whatever it is; figures that it has yielded
before are kept.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import attention, decode, loss, measure
from benchmarks.gpu_lab import ROOT, Figures, Lab, Planned, Skipped, forget, launch, random_llama
from engine import world
from engine.model.attention import BACKENDS
from engine.model.policy import Policy
from rollout import Request, Sampler, SamplingParams

COSTLIEST = 20  # kernels of a profile
LITTLE_MEMORY = 100 * 2**30  # bytes of a device, below which the layers of 8B are recomputed


# --- facts ------------------------------------------------------------------------------------------------------------


def facts(lab: Lab) -> Figures:
    """Ceilings of the device; every backend and head against float64 at small shapes; two steps of every stage on the
    embedded model.
    """
    device, dtype = lab.device, torch.bfloat16
    if device.type == "cuda":
        yield "copy GB/s", round(measure.copy_rate(device) / 1e9)
        yield "product TFLOP/s", round(measure.matmul_rate(device, dtype) / 1e12)
    bad, absent = [], []

    def compared(what: str, compute: Callable[[], float], allowed: float) -> Figures:
        try:
            error = compute()
        except Exception as why:  # a backend that is not there, or a library that fails: the others must still be seen
            (absent if isinstance(why, measure.Unavailable) else bad).append(f"{what}: {measure.reason(why)}")
            return
        yield what, f"{error:.1e} of {allowed:.1e} allowed"
        if not error <= allowed:
            bad.append(what)

    stream = attention.make_stream((5, 1, 130, 64, 257), 100, device)
    inputs = attention.make_inputs(stream, 8, 2, 64, dtype, device)
    # as in tests/test_gpu.py
    allowed = 2 * max(attention.errors(attention.CANDIDATES["eager"], inputs, stream).values()) + 1e-3
    for name in BACKENDS:
        candidate = attention.CANDIDATES[name]
        yield from compared(
            f"attention {name}", lambda c=candidate: max(attention.errors(c, inputs, stream).values()), allowed
        )
    problem = loss.make_problem(303, 128, 5003, dtype, 0.3, 100, device)
    for name, variant in loss.VARIANTS.items():
        if device.type == "cuda" or name != "compile":  # a minute of a CPU
            yield from compared(
                f"head {name}", lambda variant=variant: max(loss.errors(variant, problem).values()), 2e-2
            )
    yield "not here", "; ".join(absent)
    common = {
        "model_name_or_path": lab.made.model,
        "cache_dir": lab.directory / "cache",
        "max_steps": 2,
        "batch_size": 4,
        "max_seq_length": 256,
        "dtype": "bfloat16",
    }
    for stage, extra in (
        ("sft", {"dataset_name": lab.made.train_conversations, "sample_tokens": 0}),
        ("dpo", {"dataset_name": lab.made.train_pairs}),
        ("ppo", {"dataset_name": lab.made.train_problems, "response_length": 8}),
    ):
        rows = launch(stage, lab.directory / f"run-{stage}", common | extra)
        yield f"launch.{stage}", f"first loss {rows[0]['loss']:.4f}, {len(rows)} steps"
    if bad:
        raise AssertionError(f"not equal to float64: {', '.join(bad)}")


# --- kernels ----------------------------------------------------------------------------------------------------------


def heads(lab: Lab) -> Figures:
    """Loss heads at 8,192 tokens of a Llama 8B's last layer, beside the bare products."""
    tiny = ["--hidden", "64", "--vocab", "4000", "--variants", "naive", "linear_loss", "linear_logprobs forward"]
    content = _benchmark(loss.main, lab, "loss", tiny)
    products = content["products"]
    both = statistics.median(f + b for f, b in zip(products["forward"], products["backward"], strict=True))
    yield "bare products", f"{both * 1e3:.2f} ms, of which forward {statistics.median(products['forward']) * 1e3:.2f}"
    for name, row in content["variants"].items():
        if row["skipped"] is None:
            seconds = _total(row["times"])
            bare = statistics.median(products["forward"]) if name.endswith("forward") else both
            yield name, f"{seconds * 1e3:.2f} ms, {bare / seconds:.0%} of products, {row['memory'] / 2**30:.2f} GiB"
    for name, times in content["passes"].items():
        moved = content["pass_chunk_bytes"] * (2 if name.startswith("gradient") else 1)
        if isinstance(times, dict):
            yield (
                name,
                (
                    f"{moved / statistics.median(times['forward']) / content['copy_bytes_per_second']:.0%} of a copy's"
                    " rate"
                ),
            )
    yield (
        "not here",
        "; ".join(
            f"{name}: {row['skipped']}" for name, row in content["variants"].items() if row["skipped"] is not None
        ),
    )


def packed_attention(lab: Lab) -> Figures:
    """Packed attention at 16,384 tokens, 32 / 8 heads of 128, beside padded and masked."""
    content = _benchmark(attention.main, lab, "attention", ["--heads", "4", "--kv_heads", "2", "--head_dim", "16"])
    shape = content["arguments"]
    for name, row in content["backends"].items():
        if row["skipped"] is None:
            seconds = _total(row["times"])
            rate = 3.5 * 4 * shape["heads"] * shape["head_dim"] * content["visible_pairs"] / seconds / 1e12
            yield name, f"{seconds * 1e3:.2f} ms, {rate:.3g} TFLOP/s, {row['memory'] / 2**30:.2f} GiB"
    yield (
        "not here",
        "; ".join(
            f"{name}: {row['skipped']}" for name, row in content["backends"].items() if row["skipped"] is not None
        ),
    )


def decoding(lab: Lab) -> Figures:
    """Attention over pages of one decoded token, at shapes of 0.6B, 1B and 8B, beside the memory's bandwidth."""
    path = lab.directory / "decode.json"
    decode.main(["--json", str(path), *(["--rehearse"] if lab.rehearse else ["--seconds", "0.05"])])
    content = json.loads(path.read_text(encoding="utf-8"))
    best = content["bandwidth"]["data sheet"] or content["bandwidth"]["copy"]
    for row in content["rows"]:
        name = "{shape}, {responses} x {context}".format(**row["problem"])
        known = {backend: s for backend, s in row["seconds"].items() if not isinstance(s, str)}
        yield (
            name,
            "; ".join(f"{backend} {s * 1e6:.1f} us, {row['bytes'] / s / best:.0%}" for backend, s in known.items()),
        )
    said = lambda error: error if isinstance(error, str) else f"{error:.0e}"
    yield "errors", "; ".join(f"{backend}: {said(error)}" for backend, error in content["errors"].items())


def _benchmark(main: Callable, lab: Lab, name: str, tiny: list[str]) -> dict[str, Any]:
    path = lab.directory / f"{name}.json"
    main(
        [
            "--json",
            str(path),
            *(["--tokens", "256", "--seconds", "0.05", *tiny] if lab.rehearse else ["--seconds", "0.5"]),
        ]
    )
    return json.loads(path.read_text(encoding="utf-8"))


def _total(times: dict[str, list[float]]) -> float:
    return statistics.median(f + b for f, b in zip(times["forward"], times["backward"], strict=True))


# --- stages -----------------------------------------------------------------------------------------------------------


def _flags(lab: Lab, stage: str) -> dict[str, Any]:
    steps, length, tokens, batch = (2, 256, 1024, 4) if lab.rehearse else (8, 2048, 16384, 32)
    return {
        "model_name_or_path": lab.model,
        "dataset_name": lab.data(stage),
        "cache_dir": lab.directory / "cache",
        "max_steps": steps,
        "max_seq_length": length,
        "micro_batch_tokens": tokens,
        "batch_size": batch,
        "learning_rate": 1e-6,
        "dtype": "bfloat16",
        "resume": "never",
    } | ({"sample_tokens": 0} if stage == "sft" else {})


def _trained(rows: list[dict[str, Any]]) -> Figures:
    late = rows[len(rows) // 2 :]  # past compilation and the allocator's growth
    middle = lambda key: statistics.median(row[key] for row in late)
    yield "tokens/s, MFU", f"{middle('perf/tokens_per_second_per_gpu'):,.0f}, {middle('perf/mfu'):.1%}"
    yield "peak GiB", f"{max(row['perf/peak_memory_gib'] for row in rows):.2f}"
    yield "loss", f"{rows[0]['loss']:.4f} to {rows[-1]['loss']:.4f} in {len(rows)} steps"


def supervised(stage: str, compiled: bool) -> Callable[[Lab], Figures]:
    """launch.sft or launch.dpo on the 1B shape: tokens/s, MFU, and peak memory beside the plan's."""

    def section(lab: Lab) -> Figures:
        flags = _flags(lab, stage)
        if compiled and lab.device.type == "cuda":
            flags["compile"] = "true"
        elif compiled:
            yield "compiled", "no: it takes minutes of a CPU"
        planned = Planned(lab, stage, flags)
        yield from _trained(launch(stage, lab.directory / "run", flags))
        yield from planned.figures()

    return section


def reinforce(lab: Lab) -> Figures:
    """launch.ppo on the 1B shape: three iterations of 64 prompts x 4 responses of 128 tokens."""
    small = {"batch_size": 4, "num_samples_per_prompt": 2, "response_length": 8, "max_steps": 2}
    large = {"batch_size": 64, "num_samples_per_prompt": 4, "response_length": 128, "max_steps": 3}
    rows = launch(
        "ppo", lab.directory / "run", _flags(lab, "ppo") | {"rollout_slots": 256} | (small if lab.rehearse else large)
    )
    for key in ("time/rollout", "time/evaluate", "time/update"):
        yield f"{key[5:]} s", ", ".join(f"{row[key]:.3f}" for row in rows)
    yield "response tokens", f"{rows[-1]['rollout/length']:.0f} on average"
    yield "MFU of updates and all", f"{rows[-1]['perf/mfu']:.1%}"
    yield "peak GiB", f"{max(row['perf/peak_memory_gib'] for row in rows):.2f}"


def adapters(four_bit: bool) -> Callable[[Lab], Figures]:
    """launch.sft with adapters on the 8B shape, frozen in bf16 or in 4 bits: tokens/s, MFU, and peak memory beside the
    plan's.
    """

    def section(lab: Lab) -> Figures:
        if four_bit and importlib.util.find_spec("bitsandbytes") is None:
            raise Skipped("bitsandbytes was not brought along")
        began = time.perf_counter()
        directory = lab.model_8b
        yield "weights made or found", f"in {time.perf_counter() - began:.0f} s"
        flags = _flags(lab, "sft") | {
            "model_name_or_path": directory,
            "use_lora": "true",
            "export_adapter": "true",
            "learning_rate": 1e-4,
        }
        flags |= (
            {"micro_batch_tokens": 1024, "max_steps": 2}
            if lab.rehearse
            else {"micro_batch_tokens": 8192, "max_steps": 6}
        )
        if four_bit:
            flags |= {"load_in_4bit": "true", "double_quant": "true"}
        if lab.device.type == "cuda" and torch.cuda.get_device_properties(lab.device).total_memory < LITTLE_MEMORY:
            flags["gradient_checkpointing"] = "full"
        yield "gradient_checkpointing", flags.get("gradient_checkpointing", "none")
        planned = Planned(lab, "sft", flags)
        yield from _trained(launch("sft", lab.directory / "run", flags))
        yield from planned.figures()

    return section


# --- sampling ---------------------------------------------------------------------------------------------------------


class Decoding:
    """The sampler on random weights of the 1B shape: prompts of 200 tokens, 8 responses to each, `tokens` long.

    The last response ends after `warm` tokens: from there to the end every pass decodes one token of all the others,
    and nothing else.
    """

    def __init__(self, lab: Lab, slots: int, tokens: int, warm: int) -> None:
        self.here, self.slots, self.tokens, self.warm = world.start(), slots, tokens, warm
        self.config = AutoConfig.from_pretrained(lab.model)
        self.prompt = 20 if lab.rehearse else 200
        self.policy = Policy(random_llama(self.config, self.here.device), "fused")
        self.sampler = Sampler(
            self.config, self.policy, self.here, dtype=torch.bfloat16, max_length=self.prompt + tokens, slots=slots
        )
        generator = np.random.Generator(np.random.Philox(key=0))
        prompts = [generator.integers(1, self.config.vocab_size, self.prompt) for _ in range(-(-slots // 8))]
        self.requests = [
            Request(prompts[i // 8], i // 8, i % 8, warm if i == slots - 1 else tokens) for i in range(slots)
        ]
        self.made = slots * tokens - (tokens - warm)

    def run(self, before_decoding: Callable[[], Any] = lambda: None) -> tuple[float, float]:
        """(seconds of all: hand-over, prefill, decoding; seconds of a token that is only decoded)."""
        start = self._now()
        self.sampler.load(self.policy)
        responses = self.sampler.stream(self.requests, SamplingParams(), seed=0, step=0)
        next(responses)
        warm = self._now()
        before_decoding()
        middle = self._now()
        for _ in responses:
            pass
        end = self._now()
        return end - start - (middle - warm), (end - middle) / (self.tokens - self.warm)

    def _now(self) -> float:
        if self.here.device.type == "cuda":
            torch.cuda.synchronize(self.here.device)
        return time.perf_counter()

    def least_bytes(self) -> float:
        """That decoding one token of every response must read: all weights once, and the keys and values of what came
        before.
        """
        c = self.config
        weights = sum(p.nbytes for p in self.policy.lm.parameters())
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
        return weights + (self.slots - 1) * token * (self.prompt + (self.warm + self.tokens) / 2)


def rollouts(lab: Lab) -> Figures:
    """The sampler at 64 and 256 responses of 128 tokens: tokens/s, a token's time, and what reading at a copy's rate
    takes of it.
    """
    rate = measure.copy_rate(lab.device)
    for slots in (8, 16) if lab.rehearse else (64, 256):
        decoding = Decoding(lab, slots, *((12, 4) if lab.rehearse else (128, 16)))
        decoding.run()  # once for the libraries and the cache
        seconds, token = decoding.run()
        floor = decoding.least_bytes() / rate
        reading = f"{floor * 1e3:.2f} ({floor / token:.0%}) for reading at {rate / 1e9:,.0f} GB/s"
        yield (
            f"{slots} responses",
            f"{decoding.made / seconds:,.0f} tokens/s in all; {token * 1e3:.2f} ms a token decoded, {reading}",
        )
        del decoding
        forget()


# --- profiles ---------------------------------------------------------------------------------------------------------


def profile(lab: Lab) -> Figures:
    """The costliest kernels of an eager SFT step and of a decoded token of 64 responses, and how long the device stood
    still in between.
    """
    launch("sft", lab.directory / "run", _flags(lab, "sft") | {"profile": "true", "max_steps": 5})
    yield "an SFT step", _kernels(lab.directory / "run" / "trace.json", 3)
    forget()
    decoding = Decoding(lab, *((8, 6, 4) if lab.rehearse else (64, 32, 16)))
    decoding.run()
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if lab.device.type == "cuda" else []),
    ]
    trace = torch.profiler.profile(activities=activities)
    decoding.run(trace.start)
    trace.stop()
    trace.export_chrome_trace(str(lab.directory / "decode.json"))
    yield "a decoded token", _kernels(lab.directory / "decode.json", decoding.tokens - decoding.warm)


def _kernels(path: Path, repeats: int) -> str:
    """A trace's table. Of one of its `repeats`: the wall time from the first kernel to the last, the kernels' sum, the
    device's idle share; then milliseconds, share of the sum and calls of the costliest. Without a CUDA device, of
    operators on the host, which nest.
    """
    events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if "dur" in e]
    found, unit = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")], "kernels"
    if not found:
        found, unit = [e for e in events if e.get("cat") == "cpu_op"], "operators of the host (no CUDA device)"
    found.sort(key=lambda e: e["ts"])
    by_name: dict[str, list[float]] = {}
    busy, end = 0.0, found[0]["ts"]
    for event in found:
        by_name.setdefault(_short(event["name"]), []).append(event["dur"])
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))  # two kernels at once count once
        end = max(end, event["ts"] + event["dur"])
    wall, total = end - found[0]["ts"], sum(e["dur"] for e in found)
    sums = f"{len(found) / repeats:,.0f} {unit}, sum {total / repeats / 1e3:.2f} ms"
    lines = [f"{wall / repeats / 1e3:.2f} ms; {sums}; idle {1 - busy / wall:.0%}"]
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:COSTLIEST]:
        lines.append(
            f"{sum(times) / repeats / 1e3:9.3f} ms {sum(times) / total:5.1%} {len(times) / repeats:7.1f} x  {name}"
        )
    return "\n".join(lines)


def _short(name: str) -> str:
    """Without return type, namespaces and arguments: what tells kernels apart, in a line of a terminal."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name if len(name) <= 72 else f"{name[:44]}...{name[-25:]}"


# --- tests ------------------------------------------------------------------------------------------------------------


def tests(lab: Lab) -> Figures:
    """`pytest -m gpu` of the files that mark something so: collecting the others could import packages that need not be
    here.
    """
    if lab.device.type != "cuda":
        raise Skipped("needs a CUDA device")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", *marked]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("FAILED"):
            yield line.split(" - ")[0].removeprefix("FAILED tests/").strip(), line.partition(" - ")[2].strip()[:160]
        elif " passed" in line or " failed" in line:
            yield "result", line.strip("= \n")
    if status := process.wait():
        raise AssertionError(f"pytest ended with status {status}")


SECTIONS: dict[str, Callable[[Lab], Figures]] = {
    "facts": facts,
    "loss": heads,
    "attention": packed_attention,
    "decode": decoding,
    "sft eager": supervised("sft", False),
    "sft compiled": supervised("sft", True),
    "rollout": rollouts,
    "profile": profile,
    "dpo compiled": supervised("dpo", True),
    "ppo": reinforce,
    "lora 8b": adapters(False),
    "qlora 8b": adapters(True),
    "dpo eager": supervised("dpo", False),
    "tests": tests,
}

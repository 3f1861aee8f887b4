"""What the sections of `make gpu` share: random models, chat-like data, a stage run by its entry point, the plan of the
same flags.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engine.data.chat import load_tokenizer
from engine.data.conversations import ConversationEncoder
from engine.data.embedded import Embedded, embedded
from engine.hardware import of_gpu
from launch.plan import plan

ROOT = Path(__file__).resolve().parent.parent
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
TINY = LLAMA_1B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
ENOUGH_DISK = 24 * 2**30  # bytes free, to save the 8B weights
Figures = Iterator[tuple[str, Any]]


class Skipped(Exception):
    """The section cannot run here; the message says why."""


@dataclass(frozen=True)
class Lab:
    """What the sections of one run share: a directory, and whether this is a rehearsal (tiny, on whatever device there
    is).
    """

    directory: Path
    rehearse: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def model(self) -> Path:
        """The 1B model; made, with the data, by the section that is first to ask."""
        return self._made("model", TINY if self.rehearse else LLAMA_1B)

    @property
    def model_8b(self) -> Path:
        """Raises Skipped where the disk has no room for it."""
        if (
            not self.rehearse
            and not (self.directory / "8b").is_dir()
            and (free := shutil.disk_usage(self.directory).free) < ENOUGH_DISK
        ):
            raise Skipped(
                f"{free / 2**30:.0f} GiB of disk are free, the weights and some room are {ENOUGH_DISK / 2**30:.0f}"
            )
        return self._made("8b", TINY if self.rehearse else LLAMA_8B)

    @property
    def made(self) -> Embedded:
        """The embedded model and data."""
        return embedded(self.directory / "embedded")

    def data(self, stage: str) -> Path:
        """512 rows of chat-like lengths, for a stage; of ppo, the embedded problems."""
        if not (self.directory / "data").is_dir():
            partial = self.directory / ".data"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _make_data(self.made, partial)
            partial.rename(self.directory / "data")
        return self.directory / "data" / f"{stage}.jsonl"

    def _made(self, name: str, shape: dict[str, Any]) -> Path:
        """A random Llama of this shape in bf16 with the embedded tokenizer."""
        if not (self.directory / name).is_dir():
            partial = self.directory / f".{name}"  # what a killed section left half-written goes
            shutil.rmtree(partial, ignore_errors=True)
            tokenizer = AutoTokenizer.from_pretrained(self.made.model)
            ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            random_llama(LlamaConfig(**shape, **ids, dtype=torch.bfloat16), self.device).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(self.directory / name)
            forget()
        return self.directory / name


def random_llama(config: Any, device: torch.device) -> LlamaForCausalLM:
    """In bf16 from the start: of 8B there need not be room for fp32 beside what else is on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _make_data(made: Embedded, directory: Path) -> None:
    generator = np.random.Generator(np.random.Philox(key=1))
    sentences = [
        json.loads(line)["chosen"][1]["content"] for line in made.train_pairs.read_text(encoding="utf-8").splitlines()
    ]

    def text(mean_sentences: float) -> str:  # a sentence is some 20 tokens
        count = max(1, min(40, round(generator.lognormal(np.log(mean_sentences), 0.8))))
        return " ".join(sentences[i] for i in generator.integers(len(sentences), size=count))

    pairs = []
    for _ in range(512):
        user = {"role": "user", "content": text(10)}
        chosen, rejected = ([user, {"role": "assistant", "content": text(15)}] for _ in range(2))
        pairs.append({"chosen": chosen, "rejected": rejected})
    for stage, rows in (("dpo", pairs), ("sft", [{"messages": pair["chosen"]} for pair in pairs])):
        (directory / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copy(made.train_problems, directory / "ppo.jsonl")


def forget() -> None:
    """The next peak of memory is of what comes next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def launch(stage: str, output_dir: Path, flags: dict[str, Any]) -> list[dict[str, Any]]:
    """`python -m launch.STAGE` with these flags, without the seconds that its imports take; its rows of steps."""
    forget()
    sys.argv = [f"launch.{stage}", *words({"output_dir": output_dir, **flags})]
    print(" ".join(sys.argv), flush=True)
    try:
        runpy.run_module(f"launch.{stage}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"launch.{stage} ended with status {end.code}") from None
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "perf/mfu" in row]


def words(flags: dict[str, Any]) -> list[str]:
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


class Planned:
    """What launch.plan says of the same flags on this device, computed on the host while the stage runs."""

    def __init__(self, lab: Lab, stage: str, flags: dict[str, Any]) -> None:
        self.path, self.process = lab.directory / "plan.json", None
        gpu = of_gpu(lab.device) if lab.device.type == "cuda" else None
        if gpu is None and lab.device.type == "cuda":
            return
        where = {"gpu": gpu.name if gpu else "cpu", "gpus": 1, "suggest": "false", "json": self.path}
        shape = {key: value for key, value in flags.items() if key not in ("resume", "cache_dir", "dataset_name")}
        command = [stage, *words(where | shape | _lengths(lab, flags["max_seq_length"]))]
        if lab.device.type == "cuda":
            command, env = [sys.executable, "-m", "launch.plan", *command], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            self.process = subprocess.Popen(command, cwd=ROOT, env=env)
        else:  # its imports are paid for here
            plan(command)

    def figures(self) -> Figures:
        if self.process is not None and self.process.wait():
            yield "planned", "launch.plan failed, see gpu.log"
        elif self.path.is_file():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            yield "planned peak GiB", f"{content['peak']['total'] / 2**30:.2f}"
            yield "planned tokens/s at best", f"{content['tokens_per_second_per_gpu']:,.0f}, MFU {content['mfu']:.1%}"


def _lengths(lab: Lab, max_seq_length: int) -> dict[str, Any]:
    """Of the data's conversations, for the planner; pairs are of the same lengths."""
    encode = ConversationEncoder(
        load_tokenizer(lab.model, AutoConfig.from_pretrained(lab.model).vocab_size), max_seq_length, "messages"
    )
    rows = [encode(json.loads(line)) for line in lab.data("sft").read_text(encoding="utf-8").splitlines()]
    ids, masks = zip(*(row[0] for row in rows if not isinstance(row, str)), strict=True)
    lengths = [len(x) for x in ids]
    share = sum(int(mask.sum()) for mask in masks) / sum(lengths)
    return {"longest_tokens": max(lengths), "mean_tokens": f"{np.mean(lengths):.1f}", "trained_share": f"{share:.3f}"}

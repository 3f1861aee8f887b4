"""What it costs to check the headers of safetensors files (engine/headers.py) before they are used.

    python -m benchmarks.headers [--tensors 30000] [--shards 8] [--runs 15] [--json FILE]

Two inputs: one file of so many small tensors, and a model in so many shards with an index, of the names of 32 layers.
Cases take turns, in CPU seconds of this process, the files in the page cache:

open      the library alone: every file opened and the names of its tensors asked for
check     our check alone, of a file that was not looked at before
both      what the engine does before it reads: check, then open
again     the same where a file was looked at before, as every later call of a run finds it
read      every file opened by the library and every tensor read, the least that any loader does

The ratio is 'both' over 'open'; beside it, what the check adds to 'read'.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.measure import machine, median, spread, table, write_json
from engine import headers
from engine.model import weights

LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)


def one_file(directory: Path, tensors: int) -> list[Path]:
    """A file of so many tensors of 8 numbers, as a mixture of experts or adapters may have them."""
    path = directory / "model.safetensors"
    save_file({f"model.layers.{i // 300}.mlp.experts.{i % 300}.weight": torch.zeros(8) for i in range(tensors)}, path)
    return [path]


def sharded(directory: Path, shards: int, hidden: int = 256) -> list[Path]:
    """A model of 32 layers in so many files, and its index."""
    names = ["model.embed_tokens", *(f"model.layers.{i}.{name}" for i in range(32) for name in LAYER), "lm_head"]
    named = {f"{name}.weight": torch.zeros(hidden, hidden, dtype=torch.bfloat16) for name in names}
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i * shards // len(named)] for i, name in enumerate(named)}
    for file in files:
        save_file({name: named[name] for name, of in weight_map.items() if of == file}, directory / file)
    (directory / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return [directory / file for file in files]


def library(directory: Path, files: list[Path], *, reads: bool = False) -> int:
    """Opens every file, and the index where there is one, as a loader without checks does."""
    index = directory / weights.INDEX
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    found = len(weight_map)
    for path in files:
        with safe_open(path, framework="pt") as f:
            names = f.keys()
            found += sum(f.get_tensor(name).numel() for name in names) if reads else len(names)
    return found


def fresh(check: Callable[[], object]) -> Callable[[], object]:
    """The check as of files that were not looked at before."""

    def run() -> object:
        headers.forget()
        return check()

    return run


def measured(directory: Path, files: list[Path], runs: int) -> dict[str, list[float]]:
    """CPU seconds of every run of every case."""
    check = lambda: weights.files_by_name(directory)
    both = lambda: (check(), library(directory, files))
    cases: dict[str, Callable[[], object]] = {
        "open": lambda: library(directory, files),
        "check": fresh(check),
        "both": fresh(both),
        "again": both,
        "read": lambda: library(directory, files, reads=True),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs + 2):
        for name, case in cases.items():
            start = time.process_time()
            case()
            if run >= 2:  # the first two warm up
                times[name].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tensors", type=int, default=30_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = machine(torch.device("cpu"))
    found, rows = {}, []
    with tempfile.TemporaryDirectory(prefix="triptych-headers-") as root:
        for name, make, number in (("one file", one_file, args.tensors), ("shards", sharded, args.shards)):
            directory = Path(root) / name
            directory.mkdir()
            files = make(directory, number)
            times = measured(directory, files, args.runs)
            found[name] = times
            in_ms = {case: 1e3 * median(seconds) for case, seconds in times.items()}
            rows.append(
                [
                    f"{name}: {number:,}",
                    *(f"{ms:.1f} ms" for ms in in_ms.values()),
                    f"{in_ms['both'] / in_ms['open']:.2f}",
                    f"{in_ms['again'] / in_ms['open']:.2f}",
                    f"{in_ms['check'] / in_ms['read']:.1%}",
                    f"{100 * max(map(spread, times.values())):.0f} %",
                ]
            )
    print(f"{here['device']}, torch {here['torch']}, commit {here['commit']}; CPU time")
    ratios = ["both / open", "again / open", "check / read", "spread"]
    print(table(["input", *next(iter(found.values())), *ratios], rows))
    write_json(args.json, machine=here, arguments=vars(args), cases=found)


if __name__ == "__main__":
    main()

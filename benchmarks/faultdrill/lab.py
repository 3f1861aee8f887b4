"""Runs of every stage on a tiny model, uninterrupted and with a fault in them, and how their ends are compared.

Ranks are forked from one warm process (tests/ranks.py): a run takes one to four seconds. A configuration's
uninterrupted run is made once, and its moments (steps, reports, changes to the file system) counted, from which faults
are drawn.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.faultdrill.planted import counts_of, plan_of
from tests import ranks as forked

HOOK = "benchmarks.faultdrill.planted:arm"
PATIENCE = 90.0  # seconds for a run of these sizes, on a busy machine
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_lora": "true", "lora_rank": 4},
    "nf4": {"use_lora": "true", "lora_rank": 4, "load_in_4bit": "true"},
    "8bit": {"optimizer": "adamw_8bit"},
}
ADAM = {"learning_rate": 2e-3, "micro_batch_tokens": 500, "save_steps": 2}
SAMPLED = {
    "batch_size": 6,
    "num_samples_per_prompt": 2,
    "response_length": 12,
    "max_seq_length": 256,
    "eval_samples": 1,
    "max_steps": 6,
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": ADAM | {"batch_size": 12, "max_steps": 10, "sample_tokens": 0},
    "dpo": ADAM | {"batch_size": 8, "max_steps": 10},
    "ppo": ADAM | SAMPLED | {"num_ppo_epochs": 2},
    "grpo": ADAM | SAMPLED | {"kl_coef": 0.05, "num_samples_per_prompt": 3},
}
DATA = {"sft": "train_conversations", "dpo": "train_pairs", "ppo": "train_problems", "grpo": "train_problems"}
NEEDS = {"nf4": "bitsandbytes", "8bit": "bitsandbytes"}


@dataclass(frozen=True)
class Setup:
    """A configuration."""

    stage: str
    method: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.method}-{self.ranks}"

    @property
    def is_possible(self) -> bool:
        return self.method not in NEEDS or importlib.util.find_spec(NEEDS[self.method]) is not None


def setups(seed: int) -> list[Setup]:
    """All of them, in an order that is the seed's, in which any few that follow each other differ in all."""
    every = [Setup(*of) for of in _spread(random.Random(f"setups {seed}"))]
    return [setup for setup in every if setup.is_possible]


def _spread(chance: random.Random) -> list[tuple[str, str, int]]:
    """Diagonals of stage, method and ranks."""
    stages, methods = list(STAGES), list(METHODS)
    chance.shuffle(stages)
    chance.shuffle(methods)
    order = []
    for offset in range(len(methods)):
        for flip in (0, 1):
            for i, stage in enumerate(stages):
                order.append((stage, methods[(i + offset) % len(methods)], 1 + (i + offset + flip) % 2))
    half = [o for j, o in enumerate(order) if (j // len(stages)) % 2 == 0]
    return half + [o for o in order if o not in half]


@functools.cache
def root() -> Path:
    """The model, data and caches that runs share; gone when the drill ends."""
    from engine.data.embedded import embedded
    from tests.families import save_family

    path = Path(tempfile.mkdtemp(prefix="faultdrill-lab-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    if importlib.util.find_spec("bitsandbytes"):  # seconds for every run that wants it
        forked.context.set_forkserver_preload([*_preloaded(), "bitsandbytes"])
    made = embedded(path)
    save_family("llama", path / "model", made.model, initializer_range=0.05)
    return path


def _preloaded() -> list[str]:
    return ["transformers.models.llama.modeling_llama", *forked.STAGES]


def data(name: str) -> Path:
    return next(root().glob(f"embedded-v*/{name}.jsonl"))


def flags(setup: Setup, output_dir: Path, cache: Path | None = None, **changes: Any) -> dict[str, Any]:
    own = {
        "model_name_or_path": root() / "model",
        "cache_dir": cache or root() / "cache",
        "dataset_name": data(DATA[setup.stage]),
        "output_dir": output_dir,
    }
    if setup.stage in ("ppo", "grpo"):
        own["eval_dataset_name"] = data("held_out_problems")
    return own | STAGES[setup.stage] | METHODS[setup.method] | changes


@dataclass
class Ended:
    """How a run's processes ended."""

    codes: list[int | None]
    output: str
    seconds: float

    @property
    def ok(self) -> bool:
        return set(self.codes) == {0}

    def tail(self, of: int = 300) -> str:
        return f"statuses {self.codes}: ...{self.output[-of:]}"


def launch(
    setup: Setup,
    output_dir: Path,
    plan: dict[str, Any] | None = None,
    *,
    together: bool = False,
    patience: float = PATIENCE,
    cache: Path | None = None,
    more: dict[str, Any] | None = None,
) -> Ended:
    """The run's command, with a plan planted in its ranks. `together`: when one dies, all are killed at once."""
    began, log = time.monotonic(), output_dir.with_name(f"{output_dir.name}.{time.monotonic_ns()}.log")
    if plan is not None:
        plan_of(output_dir).write_text(json.dumps(plan))
    words = flags(setup, output_dir, cache, **(more or {}))
    argv = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    processes = forked.start(f"launch.{setup.stage}", argv, setup.ranks, log, HOOK if plan is not None else "")
    try:
        wait_for(processes, together, patience)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
                process.join()
    output = log.read_text(errors="replace") if log.exists() else ""
    return Ended([process.exitcode for process in processes], output, time.monotonic() - began)


def wait_for(processes: Sequence[Any], together: bool, seconds: float) -> None:
    """Until all have ended, or for so long. `together`: when one does not end well, the others are killed."""
    left, end = list(processes), time.monotonic() + seconds
    while left and time.monotonic() < end:
        wait([process.sentinel for process in left], timeout=max(0.0, end - time.monotonic()))
        for process in list(left):
            process.join(0)
            if process.exitcode is not None:
                left.remove(process)
                if together and process.exitcode != 0:
                    for other in left:
                        other.kill()


# --- what a run leaves ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remains:
    """All of a finished run that has to be the same to the bit, hashed."""

    final: dict[str, str]
    checkpoints: dict[str, dict[str, str]]  # by step: file → hash
    rows: list[str]
    samples: list[str]


def remains(run: Path) -> Remains:
    final = {str(p.relative_to(run)): _hash(p) for p in sorted((run / "final").rglob("*")) if p.is_file()}
    saved = {}
    for path in sorted((run / "checkpoints").glob("step-*")):
        saved[path.name] = {p.name: _hash_tensors(p) for p in sorted(path.glob("*.safetensors"))}
    return Remains(final, saved, _timeless(run / "metrics.jsonl"), _timeless(run / "samples.jsonl"))


def _hash(path: Path) -> str:
    """Of a card without the commit, which somebody may make meanwhile."""
    lines = path.read_bytes().splitlines(keepends=True)
    return hashlib.sha256(b"".join(line for line in lines if not line.startswith(b"- commit:"))).hexdigest()


def _hash_tensors(path: Path) -> str:
    """Of a safetensors file, whose header may list the same things in another order."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True)
    return hashlib.sha256(header.encode() + content[8 + size :]).hexdigest()


def _timeless(path: Path) -> list[str]:
    if not path.is_file():
        return []
    rows = map(json.loads, path.read_text().splitlines())
    return [json.dumps({k: v for k, v in row.items() if not k.startswith(("perf/", "time/"))}) for row in rows]


def difference(found: Remains, expected: Remains) -> str:
    """The first thing that is not the same, or ''."""
    if not found.final:
        return "there is no final/"
    for name in sorted(found.final.keys() | expected.final.keys()):
        if found.final.get(name) != expected.final.get(name):
            return f"{name} is not that of the uninterrupted run"
    # one more may be there of a step at which the run was told to end, and one less of those before it
    if (last := max(expected.checkpoints)) not in found.checkpoints:
        return f"there is no {last}"
    for step, files in found.checkpoints.items():
        if files != expected.checkpoints.get(step, files):
            return f"{step}: masters or moments are not those of the uninterrupted run"
    for kind in ("rows", "samples"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        if ours != theirs:
            where = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            return f"{kind} of the trajectory differ from number {where + 1} on ({len(ours)} of {len(theirs)})"
    return ""


def leftovers(run: Path) -> str:
    """Temporary files that a finished run has not removed, or ''."""
    found = [p.name for p in (*run.glob(".*"), *run.glob("checkpoints/*")) if _is_leftover(p.name)]
    return f"left behind: {', '.join(sorted(found))}" if found else ""


def _is_leftover(name: str) -> bool:
    return name.startswith("tmp-") or name.endswith(".partial") or name in (".value", ".adapter")


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it left, and how many moments of each kind every rank had."""

    remains: Remains
    counts: list[dict[str, Any]]


@functools.cache
def uninterrupted(setup: Setup) -> Whole:
    """Made once. Raises RuntimeError where it does not end well."""
    run = root() / "whole" / setup.name
    run.parent.mkdir(exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)  # of an attempt that took too long
    ended = launch(setup, run, {})
    if not ended.ok:
        raise RuntimeError(f"{setup.name} does not run at all: {ended.tail()}")
    counts = [json.loads(counts_of(run, rank).read_text()) for rank in range(setup.ranks)]
    return Whole(remains(run), counts)


def newest(run: Path) -> int | None:
    """The step of the newest checkpoint that has its name (0: none); None of a run that is finished."""
    if any((run / "final" / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    return max((int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")), default=0)


def went_on(setup: Setup, run: Path, ended: Ended, after: int | None) -> str:
    """'' where the finished run is the uninterrupted one's equal in everything, and went on `after` that step."""
    begins = "is finished, final/ is written" if after is None else f"resuming after step {after}\n"
    if (begins if after != 0 else "starting at step 0") not in ended.output:
        return f"it does not go on after step {after}, of which there is a checkpoint: {ended.tail()}"
    if not ended.ok:
        return f"the same command does not go on: {ended.tail()}"
    if "warning: checkpoint" in ended.output:
        return f"a checkpoint was passed over: {ended.output[ended.output.index('warning: checkpoint') :][:200]}"
    return difference(remains(run), uninterrupted(setup).remains) or leftovers(run)

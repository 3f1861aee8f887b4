"""Runs that faults are planted in: tiny, made once for a process, copied for every case."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.data.embedded import embedded
from tests.families import save_family
from tests.launch.test_equivalence import Runs
from tests.ranks import Result

DATA = {
    "sft": "train_conversations.jsonl",
    "dpo": "train_pairs.jsonl",
    "ppo": "problems.jsonl",
    "grpo": "problems.jsonl",
}
OF_ALL = {"batch_size": 4, "max_steps": 4, "learning_rate": 2e-3, "micro_batch_tokens": 200, "quiet": "true"}
ROLLOUTS = {
    "num_samples_per_prompt": 2,
    "num_mini_batches": 1,
    "response_length": 8,
    "num_ppo_epochs": 1,
    "eval_samples": 1,
}
OF_STAGE = {
    "sft": {"sample_tokens": 0},
    "dpo": {},
    "ppo": ROLLOUTS | {"kl_coef": 0.05},
    "grpo": ROLLOUTS | {"kl_coef": 0.01},
}
JUDGE = """
def verify(response, ground_truth):
    return (1 / (1 + len(response)), f"{len(response)} characters")
"""  # a random model earns something from it, and not always the same
ROWS = 96


class Scene:
    """A directory with a model, data, a cache and runs of one stage, at paths that stay the same."""

    def __init__(self, stage: str, form: str = "whole", **flags: object) -> None:
        """`form`: whole, or lora, whose adapters start from those in adapter/."""
        self.stage, self.form, self.root = stage, form, Path(tempfile.mkdtemp(prefix=f"triptych-drill-{stage}-"))
        self._gone = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        self.now, self._kept = self.root / "now", self.root / "kept"
        self.now.mkdir()
        made = embedded(_embedded())
        save_family("llama", self.now / "model", made.model, initializer_range=0.05)
        for name in ("train_conversations", "train_pairs", "train_problems"):
            rows = (made.model.parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]
            (self.now / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        rows = (self.now / "train_problems.jsonl").read_text(encoding="utf-8").splitlines()
        problems = [json.dumps(json.loads(row) | {"dataset": "judge"}) + "\n" for row in rows]
        (self.now / "problems.jsonl").write_text("".join(problems), encoding="utf-8")
        (self.now / "judge.py").write_text(JUDGE, encoding="utf-8")
        self.flags = OF_ALL | OF_STAGE[stage] | self._of_files() | flags
        self.reference: Path | None = None

    def _of_files(self) -> dict[str, object]:
        flags: dict[str, object] = {
            "model_name_or_path": self.now / "model",
            "cache_dir": self.now / "cache",
            "dataset_name": self.now / DATA[self.stage],
        }
        if self.stage in ("ppo", "grpo"):
            flags["verifier_module"] = self.now / "judge.py"
        return flags | ({"use_lora": "true", "lora_r": 4} if self.form == "lora" else {})

    @property
    def runs(self) -> Runs:
        """Of tests/launch/test_equivalence.py: how a run is started."""
        return Runs(self.stage, self.now, self.flags)

    def launch(self, name: str, ranks: int = 1, hook: str = "", log: str = "", **changes: object) -> Result:
        """A run of that name, with a hook of tests/plants.py, which takes words of its own from its command."""
        from tests.ranks import launch

        command = self.runs.command(name, **changes)
        hook = f"tests.plants:{hook}" if hook and ":" not in hook else hook
        return launch(command, ranks, f"launch.{self.stage}", self.now / f"{log or name}.log", hook, timeout=120)

    def whole(self, name: str, ranks: int = 1, **changes: object) -> Path:
        """A run that comes to its end. Raises RuntimeError if it does not, which is a fault of the drill."""
        result = self.launch(name, ranks, **changes)
        if not result.ok:
            raise RuntimeError(f"{self.stage}, {self.form}, {name} ended with {result.codes}: {result.output[-2000:]}")
        return self.now / name

    def keep(self) -> None:
        """What is there now is what every case begins with."""
        shutil.rmtree(self._kept, ignore_errors=True)
        shutil.copytree(self.now, self._kept, symlinks=True)

    def again(self) -> Path:
        """As it was kept."""
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(self._kept, self.now, symlinks=True)
        return self.now


@functools.cache
def _embedded() -> Path:
    root = Path(tempfile.mkdtemp(prefix="triptych-drill-"))
    weakref.finalize(_embedded, shutil.rmtree, root, ignore_errors=True)
    return root


@dataclass(frozen=True)
class End:
    """What a run comes to: its weights, of which a bit counts, and its rows without times."""

    weights: str
    rows: str

    @staticmethod
    def of(output_dir: Path) -> End:
        digest = hashlib.sha256()
        for path in sorted((output_dir / "final").rglob("*model.safetensors")):
            if path.name.startswith("copy"):
                continue
            digest.update(str(path.relative_to(output_dir)).encode() + path.read_bytes())
        timed = ("perf/", "time/")
        lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]
        return End(digest.hexdigest(), json.dumps(rows))


def said(output: str) -> list[str]:
    """The lines of a run's output that are for its user's attention."""
    return [line for line in output.splitlines() if line.startswith(("error: ", "warning: ", "stopped: "))]


def refused(result: Result) -> str:
    """'' where every rank ended with a status of its own and one line says why; else what is wrong."""
    errors = [line for line in said(result.output) if line.startswith("error: ")]
    if "Traceback" in result.output:
        last = result.output.rstrip().splitlines()[-1]
        return f"a traceback, which ends in {last[:200]}"
    if any(code not in (1, 2) for code in result.codes) or 2 not in result.codes:
        return f"exit statuses {result.codes}: {result.output[-200:]}"
    return "" if len(errors) == 1 else f"{len(errors)} lines that begin with 'error: ': {errors}"


def not_finite(directory: Path) -> list[str]:
    """The safetensors files below it that hold a number that is none."""
    from safetensors.torch import load_file

    found = []
    for path in sorted(directory.rglob("*.safetensors")):
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in load_file(path).values()):
            found.append(str(path.relative_to(directory)))
    return found


def numbers(checkpoint: Path) -> dict[str, bytes]:
    """Of a checkpoint's shards, tensor by tensor; their headers are written in any order."""
    from safetensors.numpy import load_file

    files = sorted(checkpoint.glob("shard-*"))
    return {f"{path.name}/{name}": x.tobytes() for path in files for name, x in load_file(path).items()}

"""The same damage against a plain `transformers` Trainer, and against stock torch.distributed.checkpoint.

Both train or hold a random model of a few thousand numbers on one process. Trainer: eight steps with a checkpoint
after the third and the sixth, of which the newest is damaged; then resume_from_checkpoint=True, as its documentation
has it. DCP: what step 2 saved is damaged, and loaded. They are asked for what the engine is asked for: the same bits,
or one line that names the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import shutil
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.faultdrill.suite import Case
from tests.ranks import context

if TYPE_CHECKING:
    from transformers import Trainer

NEWEST = "checkpoint-6"
TRAINER = {  # what is damaged -> (files, how)
    "model-flipped": ("model.safetensors", "flip"),
    "model-truncated": ("model.safetensors", "truncate"),
    "optimizer-truncated": ("optimizer.pt", "truncate"),
    "optimizer-deleted": ("optimizer.pt", "delete"),
    "scheduler-deleted": ("scheduler.pt", "delete"),
    "random-state-deleted": ("rng_state.pth", "delete"),
    "trainer-state-deleted": ("trainer_state.json", "delete"),
    "all-deleted": ("*", "delete"),
}
DCP = {
    "flipped": ("__0_0.distcp", "flip"),
    "zeros": ("__0_0.distcp", "zeros"),
    "truncated": ("__0_0.distcp", "truncate"),
    "emptied": ("__0_0.distcp", "empty"),
    "deleted": ("__0_0.distcp", "delete"),
    "of-another-step": ("__0_0.distcp", "swap"),
    "metadata-truncated": (".metadata", "truncate"),
    "metadata-deleted": (".metadata", "delete"),
}


def _damage(files: list[Path], kind: str, draw: random.Random, other: Path) -> None:
    for path in files:
        content = path.read_bytes()
        at = draw.randrange(len(content) // 2, len(content) - 8)  # among the numbers, not in a header
        changed = {
            "flip": content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :],
            "truncate": content[: len(content) // 2],
            "zeros": content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
            "empty": b"",
            "swap": (other / path.name).read_bytes() if kind == "swap" else b"",
        }
        if kind == "delete":
            path.unlink()
        else:
            path.write_bytes(changed[kind])


def _in_a_process(work: Callable[..., None], *arguments: str, log: Path) -> int:
    """Its exit status; what it says is in `log`."""
    process = context.Process(target=_logged, args=(work, arguments, str(log)))
    process.start()
    process.join(120)
    return -9 if process.exitcode is None else process.exitcode


def _logged(work: Callable[..., None], arguments: tuple[str, ...], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    work(*arguments)


def trainer(directory: str, **changes: object) -> Trainer:
    """A Trainer of a random Llama of a few thousand numbers, with dropout, for eight steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    torch.set_num_threads(1)
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="eager"))
    ids = torch.randint(0, 64, (64, 12), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    steps = {"max_steps": 8, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 100}
    arguments = TrainingArguments(output_dir=directory, **(steps | quiet | changes))
    return Trainer(model=model, args=arguments, train_dataset=rows)


def train(directory: str, resume: str) -> None:
    """Eight steps of a Trainer; the weights go to final/."""
    made = trainer(directory)
    made.train(resume_from_checkpoint=True if resume else None)
    made.model.save_pretrained(f"{directory}/final")


def save(directory: str) -> None:
    """What two steps leave, by dcp.save: each in a directory of its own."""
    import torch
    import torch.distributed.checkpoint as dcp

    for step in (1, 2):
        dcp.save(_tensors(torch, step), checkpoint_id=f"{directory}/step-{step}", no_dist=True)


def load(directory: str) -> None:
    """The newest one; what is read goes to a digest beside it."""
    import torch
    import torch.distributed.checkpoint as dcp

    tensors = _tensors(torch, 0)
    dcp.load(tensors, checkpoint_id=f"{directory}/step-2", no_dist=True)
    same = all(torch.equal(tensors[name], x) for name, x in _tensors(torch, 2).items())
    Path(directory, "read").write_text("the same" if same else "others")


def _tensors(torch, step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(64, 32, generator=generator) for name in ("master", "exp_avg", "exp_avg_sq")}


@functools.cache
def _prepared(of: str) -> tuple[Path, str]:
    """A directory with what is damaged, and the digest of the end that is right."""
    root = Path(tempfile.mkdtemp(prefix=f"triptych-drill-{of}-"))
    weakref.finalize(_prepared, shutil.rmtree, root, ignore_errors=True)
    code = _in_a_process(
        train if of == "trainer" else save, str(root / "run"), *[""] * (of == "trainer"), log=root / "log"
    )
    if code:
        raise RuntimeError(f"the baseline {of} does not run: {(root / 'log').read_text()[-500:]}")
    return root / "run", digest(root / "run" / "final") if of == "trainer" else "the same"


def digest(final: Path) -> str:
    return hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest()


def train_all(directory: str, *names: str) -> None:
    """Takes up each of these, one after the other: a Trainer takes seconds to import. `code` and `log` tell of each."""
    for name in names:
        place = Path(directory, name)
        with open(place / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = 0
            try:
                train(str(place / "run"), "resume")
            except Exception:
                code = 1
                traceback.print_exc()
        (place / "code").write_text(str(code))


@functools.cache
def _trained(seed: str) -> Path:
    """The Trainer's cases of a seed: each with its damage, and how it ended."""
    kept, _ = _prepared("trainer")
    root = kept.parent / seed
    for what, (pattern, kind) in TRAINER.items():
        place = root / what / "run"
        shutil.copytree(kept, place)
        files = sorted((place / NEWEST).glob(pattern))
        _damage(files, kind, random.Random(f"{what}/{seed}"), place / "checkpoint-3")
        shutil.rmtree(place / "final")
        shutil.rmtree(place / "checkpoint-8", ignore_errors=True)
    _in_a_process(train_all, str(root), *TRAINER, log=root / "log")
    return root


def _run(name: str, directory: Path) -> str:
    of, what, seed = name.split("/")
    kept, wanted = _prepared(of)
    if of == "trainer":
        place = _trained(seed) / what
        code, output = int((place / "code").read_text()), (place / "log").read_text(errors="replace")
        found = digest(place / "run" / "final") if code == 0 else ""
    else:
        place = directory / "run"
        shutil.copytree(kept, place)
        pattern, kind = DCP[what]
        _damage(sorted((place / "step-2").glob(pattern)), kind, random.Random(f"{what}/{seed}"), place / "step-1")
        code = _in_a_process(load, str(place), log=directory / "log")
        found = (place / "read").read_text() if code == 0 else ""
        output = (directory / "log").read_text(errors="replace")
    if code == 0:
        return "" if found == wanted else "other bits, and it ended as if they were right"
    if "Traceback" in output:
        return f"a traceback: {' '.join(output.rstrip().splitlines()[-1].split())[:120]}"
    return "" if len(output.splitlines()) == 1 else f"exit status {code}"


def _cases(of: str, kinds: dict[str, tuple[str, str]]) -> Callable[[int, int], Iterator[Case]]:
    def cases(count: int, seed: int) -> Iterator[Case]:
        for number in range(min(count, len(kinds))):
            name = f"{of}/{list(kinds)[number]}/{seed}"
            yield Case(name, partial(_run, name))

    return cases


DAMAGE = {
    "transformers' Trainer, resume_from_checkpoint=True": _cases("trainer", TRAINER),
    "torch.distributed.checkpoint, load": _cases("dcp", DCP),
}

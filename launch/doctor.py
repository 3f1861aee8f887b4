"""What this machine can do, and what to do about the rest.                               python -m launch.doctor

One line for each thing that training here depends on: versions, GPUs, bf16, attention, collectives, memory, disk,
optional packages. What is missing says which flag or command wants it and what to type. Nothing is trained, loaded or
sent anywhere. It ends with status 2 where a stage could not start at all.

    python -m launch.doctor --output_dir /data/runs          also how much room is there
"""

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from engine.config import parse
from engine.errors import UserError
from engine.flags import flag
from engine.hardware import of_gpu
from engine.model import attention, layers
from engine.terminal import Heading, Row, say
from engine.world import available_cores, host_memory, main
from launch import commands

GIB = 2**30
NEEDED = {  # package → (the oldest version, the first that is too new); as in pyproject.toml
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", ""),
    "jinja2": ("3.1.6", ""),
    "safetensors": ("", ""),
    "numpy": ("", ""),
    "tqdm": ("", ""),
}
OPTIONAL = {  # package → what wants it
    "datasets": "datasets of the hub, or saved to disk",
    "bitsandbytes": "--load_in_4bit, --optimizer adamw_8bit",
    "flash-attn": "--attention flash2, faster than torch's varlen on some GPUs",
    "matplotlib": "launch.report's pictures",
    "langdetect": "the verifier ifeval",
    "nltk": "the verifier ifeval",
    "tensorboard": "--report_to tensorboard",
    "wandb": "--report_to wandb",
}
LITTLE = 20  # GiB of free disk below which a checkpoint of a model of 1B weights may not fit


@dataclass(frozen=True, kw_only=True)
class Config:
    __doc__ = __doc__
    output_dir: str = flag("output", "where runs will be written")
    cache_dir: str = flag("~/.cache/triptych", "where tokenised data and reference log-probs will be kept")


def examine(config: Config) -> None:
    """Prints what is here. Raises UserError where no stage could start."""
    lacking: list[str] = []
    say(Heading("software"), *software(lacking))
    say(Heading("devices"), *devices())
    say(Heading("attention"), *backends())
    say(Heading("room"), *room(config))
    say(Heading("optional"), *optional(), "")
    if lacking:
        raise UserError(f"training cannot start here: {'; '.join(lacking)}")
    say("done: training can start here; try python -m launch.dpo, which needs no argument", last=True)


def software(lacking: list[str]) -> Iterator[Row]:
    """Python and the packages that every stage imports; what is wrong with them goes into `lacking` too."""
    yield Row("python", platform.python_version())
    for package, (oldest, too_new) in NEEDED.items():
        version = version_of(package)
        wanted = f"'{package}{f'>={oldest}' if oldest else ''}{f',<{too_new}' if too_new else ''}'"
        wrong = "not installed" if version is None else ""
        if version and oldest and numbers(version) < numbers(oldest):
            wrong = f"{version} is older than {oldest}"
        if version and too_new and numbers(version) >= numbers(too_new):
            wrong = f"{version} is newer than what is tested, below {too_new}"
        if wrong:
            lacking.append(f"{package}: {wrong} (pip install {wanted})")
        yield Row(package, f"{wrong}: pip install {wanted}" if wrong else str(version))
    yield Row("--compile", layers.why_not_compile(device()) or "can be used")


def devices() -> Iterator[Row]:
    """Where training runs, in which numbers, and how ranks talk."""
    count = torch.cuda.device_count()
    for i in range(count):
        card = torch.cuda.get_device_properties(i)
        known = of_gpu(torch.device("cuda", i))
        plan = f"launch.plan knows it as {known.name}" if known else "launch.plan does not know it"
        yield Row(
            f"GPU {i}", f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute {card.major}.{card.minor}; {plan}"
        )
    if not count:
        built = torch.version.cuda or torch.version.hip
        why = f"this torch is built for {built}: is the driver there?" if built else "this torch is built for the CPU"
        yield Row("GPU", f"none ({why}); small models train on the CPU")
    yield Row("CPU", f"{available_cores()} cores of {platform.machine()}")
    yield Row("bf16", bf16())
    gloo, nccl = (
        available() for available in (torch.distributed.is_gloo_available, torch.distributed.is_nccl_available)
    )
    backends = ", ".join(name for name, there in (("gloo", gloo), ("nccl", nccl)) if there) or "none"
    missing = "" if gloo and (nccl or not count) else "; several ranks need gloo, on GPUs also nccl: another torch"
    yield Row("collectives", backends + missing)
    ranks = count if count > 1 else 2
    yield Row("several ranks", f"torchrun --nproc_per_node {ranks} -m launch.dpo")


def bf16() -> str:
    """Whether bfloat16 is arithmetic here, or emulated."""
    if device().type == "cuda":
        if torch.cuda.get_device_capability()[0] >= 8:
            return "in hardware; --dtype auto takes it"
        return "emulated by this GPU, and slow: --dtype float32"
    info = Path("/proc/cpuinfo")
    words = info.read_text(encoding="utf-8", errors="replace").split() if info.is_file() else []
    found = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in words]
    if found:
        return f"in hardware ({', '.join(found)}); --dtype auto is float32 on a CPU, --dtype bfloat16 can be tried"
    return "no instructions for it: --dtype bfloat16 would be slow, auto takes float32"


def backends() -> Iterator[Row]:
    """Every attention backend, in the order in which auto tries them."""
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    chosen = ""
    for name in attention.BACKENDS:
        why_not = attention.unavailable(name, device(), dtype)
        first = not why_not and not chosen
        chosen = chosen or ("" if why_not else name)
        yield Row(name, why_not or ("can be used" + ("; --attention auto takes it" if first else "")))


def room(config: Config) -> Iterator[Row]:
    """Memory of the host, and what is free on disk."""
    yield Row("memory", f"{host_memory() / GIB:.0f} GiB")
    for name in ("output_dir", "cache_dir"):
        path = Path(vars(config)[name]).expanduser().absolute()
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free / GIB
        little = f"; little for checkpoints: --{name} elsewhere, or --save_total_limit 1" if free < LITTLE else ""
        yield Row(f"--{name}", f"{path}, {free:,.0f} GiB free{little}")


def optional() -> Iterator[Row]:
    """Packages that one flag or command wants."""
    for package, what in OPTIONAL.items():
        version = version_of(package)
        yield Row(package, f"{version or f'not installed (pip install {package})'}; for {what}")


def device() -> torch.device:
    """Where rank 0 would run."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """(2, 11) of '2.11.0+cpu': what a bound is compared by."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


if __name__ == "__main__":
    main(lambda: examine(parse(Config, elsewhere=commands)))

"""Where a run comes from, for the head of its config.yaml: machine, version and commit. None of it is read by a run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import torch

from engine.world import World, available_cores

ROOT = Path(__file__).parents[1]


def facts(world: World, total_steps: int) -> dict[str, str]:
    """Name → words; what cannot be found out is left out."""
    on_cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_cuda else f"cpu ({available_cores()} cores)"
    version, commit = _version(), _commit()
    return {
        "total_steps": str(total_steps),
        "machine": f"{world.size} x {device}",
        "version": ", ".join(filter(None, (version and f"triptych {version}", f"torch {torch.__version__}"))),
        **({"commit": commit} if commit else {}),
    }


def _version() -> str:
    try:
        return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, ValueError, KeyError):  # installed without its root
        return ""


def _commit() -> str:
    """What a clone's HEAD points at, read without git; '' where there is none. Changes that are not committed are not
    seen.
    """
    try:
        head = (ROOT / ".git" / "HEAD").read_text(encoding="ascii").strip()
        if not head.startswith("ref: "):
            return head[:12]
        ref = head.removeprefix("ref: ")
        loose = ROOT / ".git" / ref
        if loose.is_file():
            return loose.read_text(encoding="ascii").strip()[:12]
        packed = (ROOT / ".git" / "packed-refs").read_text(encoding="ascii").splitlines()
        return next((line.split()[0][:12] for line in packed if line.endswith(f" {ref}")), "")
    except (OSError, ValueError):
        return ""

"""The plan of the very run that --dry_run is about: its flags, its world, its data's lengths."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from engine import config as configuration
from engine.hardware import of_gpu
from engine.world import World

PATIENCE = 600  # seconds


def show_plan(stage: str, config: object, world: World, tokens: np.ndarray, trained_share: float = 1.0) -> None:
    """Prints what `python -m launch.plan` says of this configuration on this world; one line where it has nothing to
    say.

    `tokens` are those of a sequence of every example (of a pair: of its mean one). The planner makes a process group of
    its own, so rank 0 starts it as a process; the other ranks wait.
    """
    values = configuration.as_dict(config)
    world.on_main("plan", lambda: world.say("", *_plan(stage, values, world, tokens, trained_share)))


def suggested(stage: str, config: object, world: World, seconds: float) -> str:
    """What `python -m launch.plan` would change of a configuration that did not fit, in one line, or ''."""
    lines = _plan(stage, configuration.as_dict(config), world, None, 1.0, seconds)
    return next((line for line in lines if line.startswith("it fits with ")), "")


def _plan(
    stage: str, values: dict, world: World, tokens: np.ndarray | None, trained_share: float, seconds: float = PATIENCE
) -> list[str]:
    device, nodes = "cpu", 1
    if world.device.type == "cuda":
        nodes = max(1, world.size // torch.cuda.device_count())
        found = of_gpu(world.device)
        if found is None:
            return [
                f"no plan: {torch.cuda.get_device_name(world.device)} is not one of the devices that launch.plan knows"
            ]
        device = found.name
    if values.get("loss_type") == "simpo":  # it reads no reference, and a saved None is not given
        values = values | {"reference": None}
    facts: dict[str, object] = {"gpu": device, "gpus": world.size // nodes, "nodes": nodes}
    facts |= (
        {}
        if tokens is None
        else {
            "longest_tokens": math.ceil(tokens.max()),
            "mean_tokens": f"{tokens.mean():.2f}",
            "num_examples": len(tokens),
            "trained_share": f"{trained_share:.4f}",
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        configuration.save(values, path, {})
        words = [str(word) for name, value in facts.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "launch.plan", stage, "--config", str(path), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [f"no plan: {error}"]
    if done.returncode:
        return [f"no plan: {(done.stderr.strip().splitlines() or ['the planner failed'])[-1]}"]
    return done.stdout.rstrip().splitlines()

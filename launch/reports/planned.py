"""launch.plan's figures beside the measured ones: of a plan.json in the run's directory, or rehearsed now."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import UserError
from launch.reports.runs import RLVR, Recorded, as_number

GIB = 2**30


@dataclass(frozen=True)
class Comparison:
    """Rows of (what, planned, measured, what it says), or why there are none."""

    rows: list[tuple[str, str, str, str]]
    note: str


def compare(run: Recorded, *, rehearse: bool = False) -> Comparison | None:
    """None: there is no plan and none was asked for."""
    plan, note = run.plan, "plan.json of the directory."
    if plan is None and rehearse:
        try:
            plan, note = rehearsed(run)
        except UserError as problem:
            return Comparison([], f"No plan: {problem}")
    if plan is None:
        return None
    needed, seconds = as_number(plan.get("needed")), as_number(plan.get("seconds"))
    ranks = as_number(plan.get("ranks")) or 1
    if needed is None or seconds is None:
        return Comparison([], "plan.json is not launch.plan's (--json): it says neither `needed` nor `seconds`.")
    rows = []
    memory, step = run.series.get("perf/peak_memory_gib"), step_seconds(run, ranks)
    if memory is not None and len(memory):
        peak = float(memory.values.max())
        rows.append(("peak memory of a rank", f"{needed / GIB:.3g} GiB", f"{peak:.3g} GiB", said(peak * GIB / needed)))
    if step is not None:
        floor = f"{seconds:.3g} s (at best)"
        rows.append(
            (
                f"time of {'an iteration' if run.stage in RLVR else 'a step'}",
                floor,
                f"{step:.3g} s",
                said(step / seconds),
            )
        )
    return Comparison(rows, note)


def said(ratio: float) -> str:
    return f"{ratio:.2g} × the plan" if np.isfinite(ratio) else ""


def step_seconds(run: Recorded, ranks: float) -> float | None:
    """Median: of the phases where they were written, else tokens of a step by their speed."""
    phases = [s for name, s in run.series.items() if name.startswith("time/") and len(s)]
    if phases:
        return float(sum(np.median(s.values) for s in phases))
    tokens, speed = run.series.get("num_tokens"), run.series.get("perf/tokens_per_second_per_gpu")
    if tokens is None or speed is None or len(tokens) < 3 or len(tokens) != len(speed):
        return None
    taken = np.diff(tokens.values) / np.maximum(speed.values[1:], 1e-9) / ranks / np.diff(tokens.steps)
    return float(np.median(taken))


def rehearsed(run: Recorded) -> tuple[dict[str, Any], str]:
    """The plan of the run's own configuration on the machine that it names; of this one where it names none. Raises
    UserError.
    """
    import torch

    from engine import hardware
    from engine.config import parse
    from launch.planner.plans import STAGES, make, resolve
    from launch.planner.report import as_json

    if run.stage not in STAGES:
        raise UserError("the stage is not known")
    torch.set_num_threads(1)
    ranks, gpu = machine_of(run)
    words = ["--config", str(run.directory / "config.yaml"), "--gpu", gpu, "--gpus", str(ranks), "--suggest", "false"]
    config, lm_config, value_config = resolve(run.stage, parse(STAGES[run.stage][1], words))
    device = hardware.device(config.gpu, config.gpus)
    made = as_json(make(run.stage, config, lm_config, value_config, device), None, None)
    whole = " Measured is the whole process, Python and its libraries too." if gpu == "cpu" else ""
    return made, f"Planned now for {ranks} × {gpu}, with sequences of --max_seq_length: real ones are shorter.{whole}"


def machine_of(run: Recorded) -> tuple[int, str]:
    """(ranks, the planner's name of a device) of a config.yaml's `# machine: 8 x NVIDIA H100 80GB HBM3`."""
    from engine import hardware

    found = re.match(r"(\d{1,5}) x (.*)", run.facts.get("machine", ""))
    if found is None:
        return 1, "cpu"
    name = found[2].lower().replace(" ", "").replace("geforce", "")
    known = [device for device in hardware.DEVICES if device.partition("-")[0] in name]
    if not known and "cpu" not in name:
        raise UserError(f"the planner does not know {found[2]}")
    return int(found[1]), min(
        known, default="cpu", key=lambda device: device.partition("-")[2].partition("gb")[0] not in name
    )

"""Will it fit, and how fast can it be: before GPUs are booked.    python -m launch.plan dpo --gpus 8 --gpu h100-80gb

The stage's own step runs here on tensors that have shapes and no numbers, as rank 0 of the planned number of ranks: its
model, cut by FSDP; its loss, backward pass and optimizer; for ppo and grpo its sampler and the cache. A ledger keeps
what is live and what every operation costs. No GPU, no weights, no data and no hub are needed, and every flag of the
stage may be given as it will be for the run.

Assumed: full micro-batches of sequences of --max_seq_length (--longest_tokens, if the data is known to be shorter) of
which every token counts (--trained_share); flash-attention as torch ships it. Times are floors: matrix products at 80 %
of the data sheet, memory at 90 %, links at 75 %, 5 microseconds for an operation, collectives behind computation within
a micro-batch. Under --compile memory is that of the layers as they are, which is more than compiled ones take.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from engine import hardware
from engine.config import parse
from engine.errors import UserError, nearest
from engine.redact import redacted
from engine.world import main
from launch import commands
from launch.planner.plans import STAGES, make, resolve
from launch.planner.report import as_json, suggestion, table
from launch.planner.search import suggest


def plan(argv: list[str]) -> None:
    """The command: prints the plan of a stage's flags, and a change that makes it fit where it does not."""
    if not argv or argv[0] in ("-h", "--help"):
        stages = ",".join(STAGES)
        print(
            f"{__doc__}\nusage: python -m launch.plan {{{stages}}} [--gpu NAME] [--gpus N] [--nodes N] [the stage's"
            " flags]"
        )
        return
    stage = argv[0]
    if stage not in STAGES:
        raise UserError(f"{stage!r} is not a stage to plan: {', '.join(STAGES)}{nearest(stage, STAGES)}")
    torch.set_num_threads(1)  # it computes nothing
    started = time.perf_counter()
    config, lm_config, value_config = resolve(stage, parse(STAGES[stage][1], argv[1:], elsewhere=commands))
    device = hardware.device(config.gpu, config.gpus)
    made = make(stage, config, lm_config, value_config, device)
    print("\n".join(table(made, lm_config)))
    change, other = None, None
    if not made.fits and config.suggest:
        change, other = suggest(made, lm_config, value_config)
        print("\n".join(suggestion(made, change, other)))
    print(f"planned in {time.perf_counter() - started:.0f} s")
    if config.json:
        Path(config.json).write_text(json.dumps(redacted(as_json(made, change, other)), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(lambda: plan(sys.argv[1:]))

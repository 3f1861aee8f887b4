"""python -m tests.gpu_waits STAGE DIRECTORY: where step 3 of the embedded model's stage waits for the device, as CUDA's
sync debug mode sees it.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
import warnings
from pathlib import Path

import torch

from engine import log
from engine.config import parse

ROOT = Path(__file__).parents[1]
ROOMS = ("engine", "losses", "rollout", "launch")


def main(stage: str, directory: str) -> None:
    module, places, write = importlib.import_module(f"launch.{stage}"), [], log.Metrics.write

    def place(*_: object, **__: object) -> None:
        ours = [
            f
            for f in traceback.extract_stack()
            if Path(f.filename).is_relative_to(ROOT) and Path(f.filename).relative_to(ROOT).parts[0] in ROOMS
        ]
        places.append(f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno} {ours[-1].line}")

    def marked(self: log.Metrics, step: int, row: dict, postfix: str = "") -> None:
        if postfix and step == 3:
            torch.cuda.set_sync_debug_mode(0)
        write(self, step, row, postfix)
        if postfix and step == 2:
            torch.cuda.set_sync_debug_mode(1)

    log.Metrics.write = marked
    warnings.showwarning = place
    warnings.simplefilter("always")
    words = {
        "output_dir": f"{directory}/out",
        "cache_dir": f"{directory}/cache",
        "max_steps": 4,
        "micro_batch_tokens": 1000,
    }
    module.train(parse(module.Config, [word for key, value in words.items() for word in (f"--{key}", str(value))]))
    print("\n" + json.dumps([p for p in places if p]))


if __name__ == "__main__":
    main(*sys.argv[1:])

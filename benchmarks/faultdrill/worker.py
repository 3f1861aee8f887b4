"""A rank of launch.sft under torchrun, with a plan planted in its first attempt: see planted.py."""

from __future__ import annotations

import sys

import torch

from benchmarks.faultdrill import planted
from engine.config import parse
from engine.world import main
from launch import sft
from launch.resolve import commands, each_seed

if __name__ == "__main__":
    torch.set_num_threads(1)
    planted.arm(sys.argv[1:])
    main(lambda: each_seed(sft.train, parse(sft.Config, elsewhere=commands)))

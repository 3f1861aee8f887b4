"""What was trained, out of a checkpoint, for who does not go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from engine.errors import UserError


def load_masters(path: Path, parts: Mapping[str, nn.Module]) -> None:
    """What was trained of these parts (policy, value), from a sound checkpoint that any number of ranks wrote; what
    their optimizers know is left there. Collective. Raises UserError.
    """
    trained = {
        f"{part}.master.{name}": p.detach()
        for part, module in parts.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    reader = HuggingFaceStorageReader(str(path))
    stored: Any = reader.read_metadata().state_dict_metadata
    there = {name for name in stored if name.split(".")[0] in parts and name.split(".")[1] == "master"}
    wrong = [n for n in there ^ trained.keys()] or [n for n, t in trained.items() if stored[n].size != t.shape]
    if wrong:
        raise UserError(f"{path}: tensors do not fit the model, the first is {sorted(wrong)[0]}")
    dcp.load(trained, storage_reader=reader)

"""Which layers of which model are adapted: by --use_lora and its flags, or as an adapter's files say."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from engine.errors import UserError, nearest
from engine.flags import AdapterFlags
from engine.model.adapters import files, lora
from engine.model.adapters.lora import Adapters


def choose(flags: AdapterFlags, lm_config: Any, directory: Path | None, keep_initial: bool) -> Adapters | None:
    """What --use_lora and its flags say of this model; `directory` is the adapter's that training starts from. Raises
    UserError.
    """
    if not flags.use_lora:
        return None
    how: dict[str, Any] = {
        "seed": flags.seed,
        "four_bit": flags.load_in_4bit,
        "double_quant": flags.double_quant,
        "keep_initial": keep_initial,
    }
    if directory is not None:
        return replace(of_directory(directory, lm_config), **how)
    layers, name = _layers_of(lm_config)
    wanted = flags.lora_target_modules or ("all-linear",)
    known = sorted({n.rpartition(".")[2] for n in layers})
    for target in wanted:
        if target != "all-linear" and target not in known and target not in layers:
            raise UserError(
                f"--lora_target_modules {target}: no linear layer of {name} is called that{nearest(target, known)};"
                f" there are {', '.join(known)}"
            )
    chosen = tuple(n for n in layers if "all-linear" in wanted or n in wanted or n.rpartition(".")[2] in wanted)
    rank, alpha = flags.lora_rank or 16, flags.lora_alpha or 32.0
    return Adapters(rank, alpha, flags.use_rslora, chosen, everything="all-linear" in wanted, **how)


def of_directory(directory: Path, lm_config: Any) -> Adapters:
    """The adapters that an adapter's files describe, for this model. Raises UserError."""
    described = files.read_config(directory)
    rank, rslora = described["r"], described.get("use_rslora", False)
    return Adapters(
        rank, float(described["lora_alpha"]), rslora, files.modules_of(directory, rank, *_layers_of(lm_config)), seed=0
    )


def for_value_model(adapters: Adapters, lm_config: Any) -> Adapters:
    """The same adapters on another model: on all its linear layers, or on those of the same last names. Raises
    UserError.
    """
    layers, name = _layers_of(lm_config)
    wanted = {n.rpartition(".")[2] for n in adapters.modules}
    modules = tuple(n for n in layers if adapters.everything or n.rpartition(".")[2] in wanted)
    if not modules:
        raise UserError(
            f"--value_model_name_or_path: {name} has none of the layers {', '.join(sorted(wanted))}, which are adapted"
        )
    return replace(adapters, modules=modules, keep_initial=False)


def _layers_of(lm_config: Any) -> tuple[dict[str, nn.Linear], str]:
    """(the linear layers that can be adapted, the model's class)."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(lm_config))
    return lora.linears(lm), type(lm).__name__

"""Which layers of which model are adapted: by --use_lora and its flags, or as an adapter's files say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
from engine.model.adapters.saved import vocabulary_modules


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
    layers, vocabulary, name = _layers_of(lm_config)
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
    saved = _saved(flags.lora_modules_to_save or (), vocabulary, name, "--lora_modules_to_save ")
    return Adapters(rank, alpha, flags.use_rslora, chosen, everything="all-linear" in wanted, saved=saved, **how)


def of_directory(directory: Path, lm_config: Any) -> Adapters:
    """The adapters that an adapter's files describe, for this model. Raises UserError."""
    described = files.read_config(directory)
    rank, rslora = described["r"], described.get("use_rslora", False)
    layers, vocabulary, name = _layers_of(lm_config)
    saved = _saved(described.get("modules_to_save") or (), vocabulary, name, f"{directory}: modules_to_save ")
    modules = files.modules_of(directory, rank, layers, {n: vocabulary[n] for n in saved}, name)
    return Adapters(rank, float(described["lora_alpha"]), rslora, modules, seed=0, saved=saved)


def for_value_model(adapters: Adapters, lm_config: Any) -> Adapters:
    """The same adapters on another model: on all its linear layers, or on those of the same last names; and its
    embedding whole, if one of this name is. Raises UserError.
    """
    layers, (embedding, *_), name = _layers_of(lm_config)
    wanted = {n.rpartition(".")[2] for n in adapters.modules}
    modules = tuple(n for n in layers if adapters.everything or n.rpartition(".")[2] in wanted)
    if not modules:
        raise UserError(
            f"--value_model_name_or_path: {name} has none of the layers {', '.join(sorted(wanted))}, which are adapted"
        )
    last = {n.rpartition(".")[2] for n in adapters.saved}
    saved = (embedding,) if embedding.rpartition(".")[2] in last else ()
    return replace(adapters, modules=modules, keep_initial=False, saved=saved)


def check_new_tokens(adapters: Adapters, lm_config: Any, added: dict[str, int]) -> None:
    """Raises UserError where tokens were added and nothing would train their rows of embedding and head."""
    if not added:
        return
    _, vocabulary, _ = _layers_of(lm_config)
    names = [name.rpartition(".")[2] for name in vocabulary]
    if left := [name.rpartition(".")[2] for name in vocabulary if name not in adapters.saved]:
        raise UserError(
            f"--add_special_tokens with --use_lora: nothing would train the new tokens' rows of {' and '.join(left)};"
            f" give --lora_modules_to_save {' '.join(names)}"
        )


def _saved(wanted: Sequence[str], vocabulary: dict[str, nn.Module], model: str, where: str) -> tuple[str, ...]:
    """The modules that are to be trained whole, by full name. Raises UserError."""
    short = {name: name.rpartition(".")[2] for name in vocabulary}
    for name in wanted:
        if name not in short and name not in short.values():
            raise UserError(
                f"{where}{str(name)[:80]}: only embedding and head of {model} can be trained whole,"
                f" {' and '.join(short.values())}{nearest(str(name), list(short.values()))}"
            )
    chosen = tuple(name for name in vocabulary if name in wanted or short[name] in wanted)
    for name in chosen:
        if any(leaf != "weight" for leaf, _ in vocabulary[name].named_parameters()):
            raise UserError(f"{where}{short[name]}: that of {model} has more than a weight, which is not supported")
    return chosen


def _layers_of(lm_config: Any) -> tuple[dict[str, nn.Linear], dict[str, nn.Module], str]:
    """(the linear layers that can be adapted, embedding and head, the model's class)."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(lm_config))
    return lora.linears(lm), vocabulary_modules(lm), type(lm).__name__

"""Adapters as flags and as files: which layers of which model, PEFT's format in and out.

An adapter's directory has adapter_config.json and adapter_model.safetensors with `base_model.model.NAME.lora_A.weight` (r, I) and
`...lora_B.weight` (O, r); ours also has base.json, the fingerprint of the weights it was trained on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from engine import lora, weights
from engine.config import RunConfig
from engine.errors import UserError, nearest
from engine.lora import Adapters
from engine.shards import whole
from engine.world import World

CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
ONLY_WITH_LORA = ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "adapter_name_or_path", "load_in_4bit", "double_quant", "export_adapter")
KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<leaf>[AB])\.weight")


def check_flags(config: RunConfig) -> None:
    """Raises UserError for adapter flags that contradict each other; nothing is opened."""
    if config.load_in_4bit and not config.use_lora:
        raise UserError("--load_in_4bit needs --use_lora: weights in 4 bits cannot be trained, only adapters on them")
    for name in ONLY_WITH_LORA:
        if getattr(config, name) and not config.use_lora:
            raise UserError(f"--{name} is not read without --use_lora")
    if config.double_quant and not config.load_in_4bit:
        raise UserError("--double_quant is not read without --load_in_4bit")
    for name in ("lora_rank", "lora_alpha"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise UserError(f"--{name} must be greater than 0, got {getattr(config, name)}")
    if config.adapter_name_or_path is not None:
        for name in ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora"):
            if name in config.given:
                raise UserError(f"--{name} is that of --adapter_name_or_path: give one of them")


def choose(config: RunConfig, lm_config: Any, directory: Path | None, keep_initial: bool) -> Adapters | None:
    """What --use_lora and its flags say of this model; `directory` is the adapter's that training starts from. Raises UserError."""
    if not config.use_lora:
        return None
    how = {"seed": config.seed, "four_bit": config.load_in_4bit, "double_quant": config.double_quant, "keep_initial": keep_initial}
    if directory is not None:
        return replace(of_directory(directory, lm_config), **how)
    layers, name = _layers_of(lm_config)
    wanted = config.lora_target_modules or ("all-linear",)
    known = sorted({n.rpartition(".")[2] for n in layers})
    for target in wanted:
        if target != "all-linear" and target not in known and target not in layers:
            raise UserError(f"--lora_target_modules {target}: no linear layer of {name} is called that{nearest(target, known)}; there are {', '.join(known)}")
    chosen = tuple(n for n in layers if "all-linear" in wanted or n in wanted or n.rpartition(".")[2] in wanted)
    return Adapters(config.lora_rank or 16, config.lora_alpha or 32.0, config.use_rslora, chosen, **how)


def of_directory(directory: Path, lm_config: Any) -> Adapters:
    """The adapters that an adapter's files describe, for this model. Raises UserError."""
    described = _read_config(directory)
    rank, alpha, rslora = int(described["r"]), float(described["lora_alpha"]), bool(described.get("use_rslora"))
    return Adapters(rank, alpha, rslora, _modules_of(directory, rank, *_layers_of(lm_config)), seed=0)


def _layers_of(lm_config: Any) -> tuple[dict[str, nn.Linear], str]:
    """(the linear layers that can be adapted, the model's class)."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(lm_config))
    return lora.linears(lm), type(lm).__name__


def _read_config(directory: Path) -> dict[str, Any]:
    """Raises UserError for anything but plain LoRA."""
    try:
        described = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind, rank, alpha = described["peft_type"], int(described["r"]), float(described["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise UserError(f"{directory}: no usable {CONFIG} of a LoRA adapter") from None
    if kind != "LORA" or rank < 1 or not math.isfinite(alpha):
        raise UserError(f"{directory}: an adapter of type {str(kind)[:20]!r}, rank {rank}, alpha {alpha}; only LoRA is read")
    for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out", "use_qalora", "target_parameters"):
        if described.get(name):
            raise UserError(f"{directory / CONFIG}: {name} is not supported, only plain LoRA of one rank")
    if described.get("bias", "none") != "none":
        raise UserError(f"{directory / CONFIG}: bias {described['bias']} is not supported, biases stay frozen")
    return described


def _open(directory: Path) -> Any:
    try:
        return safe_open(directory / TENSORS, framework="pt")
    except (SafetensorError, OSError):
        pickled = "; a pickle file would run code and is never read" if (directory / "adapter_model.bin").is_file() else ""
        raise UserError(f"{directory}: no readable {TENSORS}{pickled}") from None


def _modules_of(directory: Path, rank: int, layers: dict[str, nn.Linear], model: str) -> tuple[str, ...]:
    """The layers of an adapter's file, all of them layers of this model, with fitting shapes. Raises UserError."""
    found: dict[str, set[str]] = {}
    with _open(directory) as f:
        for key in f.keys():  # noqa: SIM118 - a file, not a dict
            match = KEY.fullmatch(key)
            if match is None or match["name"] not in layers:
                close = nearest(match["name"], list(layers)) if match else ""
                raise UserError(f"{directory}: the adapter is of another model: {key} fits no linear layer of {model}{close}")
            layer = layers[match["name"]]
            shape, expected = f.get_slice(key).get_shape(), {"A": [rank, layer.in_features], "B": [layer.out_features, rank]}[match["leaf"]]
            if list(shape) != expected:
                raise UserError(f"{directory}: the adapter is of another model: {key} is {list(shape)}, this model's layer takes {expected}")
            found.setdefault(match["name"], set()).add(match["leaf"])
    if not found or any(leaves != {"A", "B"} for leaves in found.values()):
        raise UserError(f"{directory / TENSORS}: no pairs of lora_A and lora_B")
    return tuple(name for name in layers if name in found)


def read(directory: Path, base_fingerprint: str | None) -> tuple[dict[str, Tensor], str]:
    """('NAME.lora_A' → fp32 tensor, the file's digest). Raises UserError if it says that it was trained on other weights."""
    described = directory / BASE
    if described.is_file():
        try:
            trained_on = str(json.loads(described.read_text(encoding="utf-8"))["weights"])
        except (ValueError, KeyError, TypeError, OSError):
            raise UserError(f"{described}: not readable, delete it to use the adapter on any base that fits") from None
        if base_fingerprint is not None and trained_on != base_fingerprint:
            raise UserError(f"{directory}: the adapter was trained on other weights ({trained_on}) than this model's ({base_fingerprint})")
    tensors = {}
    with _open(directory) as f:
        for key in f.keys():  # noqa: SIM118
            match = KEY.fullmatch(key)
            tensor = tensors[f"{match['name']}.lora_{match['leaf']}"] = f.get_tensor(key).float()
            if not tensor.isfinite().all():
                raise UserError(f"{directory / TENSORS}: {key} holds numbers that are not finite")
    with open(directory / TENSORS, "rb") as f:
        digest = hashlib.file_digest(f, "sha256")
    digest.update((directory / CONFIG).read_bytes())
    return tensors, digest.hexdigest()[:16]


@torch.no_grad()
def save(
    lm: nn.Module, adapters: Adapters, directory: Path, world: World, *, base_name: str, base_fingerprint: str, inside: dict[str, Path] | None = None
) -> None:
    """Writes the trained adapter in PEFT's format, as it is held; the directory appears whole or not at all. Collective.

    `inside` are finished directories to be moved into it, under new names.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    tensors = {}
    for name, module in lora.adapted(lm).items():
        for leaf in ("A", "B") if module.rank else ():
            tensor = whole(getattr(module, f"lora_{leaf}"))
            if world.is_main:
                tensors[f"base_model.model.{name}.lora_{leaf}.weight"] = tensor.cpu().contiguous().clone()
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        described = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": adapters.rank, "lora_alpha": adapters.alpha,
            "use_rslora": adapters.rslora, "target_modules": _targets(lm, adapters), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        }  # fmt: skip
        (partial / CONFIG).write_text(json.dumps(described, indent=2), encoding="utf-8")
        (partial / BASE).write_text(json.dumps({"weights": base_fingerprint}), encoding="utf-8")
        for name, finished in (inside or {}).items():
            finished.rename(partial / name)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    world.barrier()


def _targets(lm: nn.Module, adapters: Adapters) -> list[str]:
    """The adapted layers as PEFT matches them: by last name where that means these layers and no other, else by full name."""
    short = {name.rpartition(".")[2] for name in adapters.modules}
    layers = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear | lora.AdaptedLinear)]
    exact = {name for name in layers if name.rpartition(".")[2] in short} == set(adapters.modules)
    return sorted(short) if exact else list(adapters.modules)


def directory_of(name: str | None, world: World) -> Path | None:
    """Where --adapter_name_or_path lies, downloaded if it is a hub id. Raises UserError."""
    if name is None:
        return None
    return world.once("adapter", lambda: weights.resolve(name, None, "--adapter_name_or_path"))[0]

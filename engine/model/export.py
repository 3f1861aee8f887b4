"""Hugging Face's format on the way out: merged models and adapters, gathered tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from engine.disk import writing
from engine.model.adapters import files, lora
from engine.model.open import Base
from engine.model.policy import Policy, Root
from engine.model.shards import whole
from engine.model.weights import INDEX
from engine.run import publish
from engine.world import World

MAX_FILE_BYTES = 5 * 10**9


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def export(
    root: Root,
    base: Base,
    world: World,
    final: Path,
    *,
    dtype: str | None = None,
    adapter_only: bool = False,
    inside: dict[str, Path] | None = None,
) -> str:
    """Writes `final` in Hugging Face's format, in `dtype` or the input checkpoint's, adapters merged. Collective.

    A policy's adapter goes to final/adapter as well; where it is wanted alone, it is `final` itself. `inside` are
    finished directories to be moved into it, under new names. Returns what reads it.
    """
    if isinstance(root, Policy) and root.adapters is not None:
        facts: dict[str, Any] = {"base_name": base.name, "revision": base.revision, "base_weights": root.base_weights}
        facts["added"] = base.chat.added
        forms = {"": "", "nf4": " held in NF4", "nf4-double": " held in NF4 with double quantisation"}
        if adapter_only:
            tokenizer = base.chat.tokenizer if base.changes_tokenizer else None  # else it is the model's own
            files.save(root.lm, root.adapters, final, world, tokenizer=tokenizer, inside=inside, **facts)
            on = f"{base.name}{forms[root.adapters.form]}"
            return f"{final} is an adapter on {on}, for --adapter_name_or_path or PeftModel.from_pretrained"
        files.save(root.lm, root.adapters, final.with_name(".adapter"), world, **facts)
        inside = {"adapter": final.with_name(".adapter"), **(inside or {})}
    tensors = getattr(torch, dtype) if dtype else base.config.dtype or torch.float32
    save_model(
        root.lm,
        base.chat.tokenizer,
        base.directory,
        final,
        world,
        dtype=tensors,
        end_ids=base.chat.end_ids,
        inside=inside,
    )
    return f"{final} loads with AutoModelForCausalLM.from_pretrained"


@torch.no_grad()
def save_model(
    lm: Any,
    tokenizer: Any,
    source: Path,
    final: Path,
    world: World,
    *,
    dtype: torch.dtype,
    end_ids: tuple[int, ...],
    inside: dict[str, Path] | None = None,
) -> None:
    """Writes `final` in Hugging Face's format: sharded safetensors with index, config, generation config, tokenizer,
    template.

    `source` is the directory the model came from: its generation config is kept, with the ends of turns added.
    Adapters are merged. `inside` are finished directories to be moved into it, under new names. Tensors are gathered
    one by one; rank 0 holds one output file (5 GB) at a time. The directory appears whole or not at all.
    """
    partial = final.with_name(f".{final.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    own = lora.dense(lm)
    plan = _plan_files([(name, shape.numel() * dtype.itemsize) for name, (shape, _) in own.items()])
    weight_map, total = {}, 0
    for i, names in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{i:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for name in names:
            shard = own[name][1]()
            tensor = whole(shard.to(dtype) if shard.is_floating_point() else shard)
            if world.is_main:
                tensors[name] = tensor.cpu().contiguous().clone()
                total += tensors[name].nbytes
                weight_map[name] = file
        if world.is_main:
            with writing(partial / file):
                save_file(tensors, partial / file, metadata={"format": "pt"})
    if world.is_main:
        if len(plan) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        _save_configs(lm, tokenizer, source, partial, dtype, end_ids)
        publish(partial, final, inside)
    world.barrier()


def _plan_files(sizes: list[tuple[str, int]]) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if plan[-1] and filled + size > MAX_FILE_BYTES:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def _save_configs(
    lm: Any, tokenizer: Any, source: Path, directory: Path, dtype: torch.dtype, end_ids: tuple[int, ...]
) -> None:
    config = type(lm.config).from_dict(lm.config.to_dict())
    config.dtype = dtype
    config.architectures = [type(lm).__name__]
    config.save_pretrained(directory)
    own = (source / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(source) if own else GenerationConfig.from_model_config(config)
    if any(getattr(generation, field, None) is not None for field in SAMPLING):
        generation.do_sample = True  # hub configs often leave it out, and transformers then refuses to save them
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    generation.eos_token_id = list(dict.fromkeys((*end_ids, *ends)))
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

"""Hugging Face's format on the way out: merged models and adapters, gathered tensor by tensor."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.disk import fresh_directory, writing
from engine.errors import UserError, explained
from engine.model.adapters import files, lora
from engine.model.generation import generation_config
from engine.model.open import Base
from engine.model.policy import Policy, Root
from engine.model.shards import local, whole
from engine.model.weights import INDEX
from engine.run import publish
from engine.world import World

MAX_FILE_BYTES = 5 * 10**9
CARD = "README.md"


def export(
    root: Root,
    base: Base,
    world: World,
    final: Path,
    *,
    dtype: str | None = None,
    adapter_only: bool = False,
    keep_adapter: bool = True,
    inside: dict[str, Path] | None = None,
    card: str = "",
    file_bytes: int | None = None,
    notes: list[str] | None = None,
) -> str:
    """Writes `final` in Hugging Face's format, in `dtype` or the input checkpoint's, adapters merged. Collective.

    A policy's adapter goes to final/adapter as well (`keep_adapter`); where it is wanted alone, it is `final` itself.
    `inside` are finished directories to be moved into it, under new names; `card` is the text of its README.md; weights
    are in files of at most `file_bytes` (None: 5 GB); what the cast to `dtype` did is added to `notes`. Returns what
    reads it. Raises UserError for a disk that is full, and for numbers that `dtype` cannot hold.
    """
    if isinstance(root, Policy) and root.adapters is not None:
        facts: dict[str, Any] = {"base_name": base.name, "revision": base.revision, "base_weights": root.base_weights}
        facts["added"] = base.chat.added
        forms = {"": "", "nf4": " held in NF4", "nf4-double": " held in NF4 with double quantisation"}
        if adapter_only:
            tokenizer = base.chat.tokenizer if base.changes_tokenizer else None  # else it is the model's own
            files.save(root.lm, root.adapters, final, world, tokenizer=tokenizer, inside=inside, card=card, **facts)
            on = f"{base.name}{forms[root.adapters.form]}"
            return f"{final} is an adapter on {on}, for --adapter_name_or_path or PeftModel.from_pretrained"
        if keep_adapter:
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
        card=card,
        file_bytes=file_bytes,
        notes=notes,
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
    card: str = "",
    file_bytes: int | None = None,
    notes: list[str] | None = None,
) -> None:
    """Writes `final` in Hugging Face's format: sharded safetensors with index, config, generation config, tokenizer,
    template.

    `source` is the directory the model came from: its generation config is kept, with the ends of turns added.
    Adapters are merged. `inside` are finished directories to be moved into it, under new names. Tensors are gathered
    one by one; rank 0 holds one output file (5 GB) at a time. The directory appears whole or not at all.
    """
    partial = final.with_name(f".{final.name}.partial")
    own, cast, output = lora.dense(lm), _Cast(dtype), _Output(partial, world)
    plan = _plan_files([(name, shape.numel() * dtype.itemsize) for name, (shape, _) in own.items()], file_bytes)
    weight_map, total = {}, 0
    for i, names in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{i:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for name in names:
            shard = own[name][1]()
            tensor = whole(cast(name, shard) if shard.is_floating_point() else shard)
            if world.is_main:
                tensors[name] = tensor.cpu().contiguous().clone()
                total += tensors[name].nbytes
                weight_map[name] = file
        output.write(functools.partial(save_file, tensors, partial / file, metadata={"format": "pt"}))
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    if len(plan) > 1:
        output.write(lambda: (partial / INDEX).write_text(index, encoding="utf-8"))
    output.write(lambda: _save_configs(lm, tokenizer, source, partial, dtype, end_ids))
    if card:
        output.write(lambda: (partial / CARD).write_text(card, encoding="utf-8"))
    line = cast.check(world, len(own), output)
    output.write(lambda: publish(partial, final, inside))
    output.close(final)
    if notes is not None and line:
        notes.append(line)


class _Output:
    """What rank 0 writes into a directory that has no name yet; after a failure the others still take part in what is
    gathered, and all of them raise at the end.
    """

    def __init__(self, partial: Path, world: World) -> None:
        self.partial, self.world, self.problem = partial, world, ""
        self.write(lambda: fresh_directory(partial))

    def write(self, work: Callable[[], Any]) -> None:
        if not self.world.is_main or self.problem:
            return
        try:
            with writing(self.partial):
                work()
        except OSError as error:
            self.problem = explained(error)

    def close(self, final: Path) -> None:
        """Raises UserError on every rank for what went wrong on the first."""
        problem = self.world.gather(self.problem)[0]
        if problem:
            if self.world.is_main:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(f"{final} is not written: {problem}")


class _Cast:
    """Tensors in another dtype, and what became of their numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rounded: set[str] = set()
        self.beyond: set[str] = set()
        self.sources: set[str] = set()

    def __call__(self, name: str, shard: Any) -> Any:
        held, written = local(shard), shard.to(self.dtype)
        self.sources.add(str(held.dtype).removeprefix("torch."))
        if held.dtype != self.dtype and held.numel():
            if not torch.equal(local(written).to(held.dtype), held):
                self.rounded.add(name)
            if (local(written).isinf() & held.isfinite()).any():
                self.beyond.add(name)
        return written

    def check(self, world: World, count: int, output: _Output) -> str:
        """One line on what was rounded, or ''; numbers beyond the dtype's range are a problem of the output."""
        kinds = [(self.rounded, self.beyond)] if world.size == 1 else world.gather((self.rounded, self.beyond))
        rounded, beyond = (set().union(*of) for of in zip(*kinds, strict=True))
        name = str(self.dtype).removeprefix("torch.")
        if beyond:
            output.problem = output.problem or f"{min(beyond)} holds numbers beyond the range of {name}"
        return f"{name} rounds {len(rounded)} of {count} tensors of {' and '.join(sorted(self.sources))}" * bool(
            rounded
        )


def _plan_files(sizes: list[tuple[str, int]], most: int | None = None) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if plan[-1] and filled + size > (most or MAX_FILE_BYTES):
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
    generation, _ = generation_config(source, config, end_ids)
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

"""A plan: one configuration on one cluster, rehearsed, and what follows for memory, time and disk."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import hardware
from engine.data import embedded
from engine.errors import UserError, nearest
from engine.flags import fill, flag, require_positive
from engine.hardware import Device
from engine.model import build, open
from engine.train.reference import resolve_reference
from launch import dpo, grpo, ppo, sft
from launch.planner.fakes import rehearsal
from launch.planner.rlvr import Rlvr
from launch.planner.stages import RLVR, Case, Rehearsed, Supervised, Work

ARCHITECTURES = Path(__file__).parents[1] / "architectures"
FRAGMENTATION = 0.02  # of the allocator's peak, lost between blocks
THE_PLAN = "the plan"


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The cluster, and what is known of the data."""

    gpu: str = flag("h100-80gb", f"{', '.join(hardware.DEVICES)}, or cpu: this machine", THE_PLAN)
    gpus: int = flag(8, "GPUs of a node (torchrun --nproc_per_node)", THE_PLAN)
    nodes: int = flag(1, "nodes (torchrun --nnodes)", THE_PLAN)
    architecture: str | None = flag(None, "a config.json in place of the model's own", THE_PLAN)
    longest_tokens: int | None = flag(
        None, "tokens of the data's longest sequence; without it, --max_seq_length", THE_PLAN
    )
    mean_tokens: float | None = flag(
        None, "tokens of a mean sequence, for the speed; without it, the longest", THE_PLAN
    )
    trained_share: float = flag(1.0, "share of a sequence's tokens that count (sft, dpo)", THE_PLAN)
    num_examples: int | None = flag(None, "rows of the data, for steps, hours and disk", THE_PLAN)
    suggest: bool = flag(True, "if it does not fit, look for the cheapest change that makes it fit", THE_PLAN)
    json: str | None = flag(None, "also write the plan to this file", THE_PLAN)


@dataclass(frozen=True, kw_only=True)
class SftPlan(PlanFlags, sft.Config):
    __doc__ = sft.__doc__


@dataclass(frozen=True, kw_only=True)
class DpoPlan(PlanFlags, dpo.Config):
    __doc__ = dpo.__doc__


@dataclass(frozen=True, kw_only=True)
class PpoPlan(PlanFlags, ppo.Config):
    __doc__ = ppo.__doc__


@dataclass(frozen=True, kw_only=True)
class GrpoPlan(PlanFlags, grpo.Config):
    __doc__ = grpo.__doc__


STAGES = {"sft": (sft, SftPlan), "dpo": (dpo, DpoPlan), "ppo": (ppo, PpoPlan), "grpo": (grpo, GrpoPlan)}


@dataclass(frozen=True)
class Plan:
    """One configuration on one cluster, rehearsed."""

    stage: str
    config: Any
    device: Device
    ranks: int
    work: Work
    seen: Rehearsed

    @property
    def needed(self) -> int:
        """Bytes of a rank: the allocator's peak, what it loses between blocks, and what is outside it."""
        lost = 0 if self.device.name == "cpu" else FRAGMENTATION
        return round(self.seen.peak.total * (1 + lost)) + self.device.reserved

    @property
    def fits(self) -> bool:
        return self.needed <= self.device.memory

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step's (RLVR: an iteration's) parts."""
        seen, n = self.seen, self.work.micro_batches
        step = (n - 1) * seen.micro_batch.seconds + seen.last.seconds
        if self.stage not in RLVR:
            return {"forward and backward": step, "optimizer": seen.optimizer.seconds}
        config, waves = self.config, -(-self.work.units // max(1, seen.slots))
        return {
            "hand-over": seen.rollout["hand-over"].seconds,
            "prefill": self.work.units * seen.rollout["prefill"].seconds,
            "decode": waves * config.response_length * seen.rollout["decode"].seconds,
            "evaluate": n * seen.rollout["evaluate"].seconds,
            "update": config.num_ppo_epochs * step,
            "optimizer": config.num_ppo_epochs * config.num_mini_batches * seen.optimizer.seconds,
        }

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens(self) -> float:
        """Fed by a rank in a step's training micro-batches (RLVR: once through all responses)."""
        return self.seen.tokens * self.work.micro_batches

    @property
    def mfu(self) -> float:
        passes = self.config.num_ppo_epochs if self.stage in RLVR else 1
        return passes * self.seen.model_flops * self.work.micro_batches / self.seconds / self.device.flops

    @property
    def disk(self) -> dict[str, int]:
        """Bytes that the run leaves or needs, over all ranks."""
        config, seen = self.config, self.seen
        master = getattr(torch, config.master_dtype).itemsize
        moments = 2 * (1 + 4 / 256) if config.optimizer == "adamw_8bit" else 2 * master
        export = getattr(torch, config.export_dtype or str(seen.dtype).removeprefix("torch."), torch.float32).itemsize
        kept = config.save_total_limit + 1 if config.save_steps else 0
        final = (
            seen.trained * master
            if config.use_lora and config.export_adapter
            else seen.parameters * export * (2 if self.stage == "ppo" else 1)
        )
        found = {
            "a checkpoint": round(seen.trained * (master + moments)),
            "checkpoints, one being written": round(kept * seen.trained * (master + moments)),
            "final/": final,
        }
        if config.num_examples and self.stage not in RLVR:
            sequences = config.num_examples * (2 if self.stage == "dpo" else 1)
            found["tokenised data"] = round(sequences * (5 * (config.mean_tokens or config.max_seq_length) + 28))
            if self.stage == "dpo" and config.reference == "cache":
                found["reference cache"] = 24 * sequences
        return found


def resolve(stage: str, config: Any) -> tuple[Any, Any, Any]:
    """(configuration with the stage's defaults, the model's configuration, PPO's value model's). Raises UserError."""
    require_positive(config, "max_seq_length", "micro_batch_tokens", "batch_size", "gpus", "nodes")
    require_positive(config, "longest_tokens", "mean_tokens", "num_examples")
    if not 0 < config.trained_share <= 1:
        raise UserError(f"--trained_share is a share, greater than 0 and at most 1, got {config.trained_share}")
    config.check_adapters()
    config.check_optimizer()
    batch_size, _ = config.batch_size_on(config.gpus * config.nodes)
    none = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None}
    defaults = STAGES[stage][0].DEFAULTS | {"seed": 1}  # of --seeds one is planned
    if stage == "grpo":
        config.check_kl()
        config = config.with_loss()
    config = fill(dataclasses.replace(config, batch_size=batch_size, **none), **defaults)
    if stage == "dpo":
        config, _ = dpo.resolve_loss(config)
    if stage == "grpo":
        config.check_group()
    if stage in RLVR:
        require_positive(config, "num_samples_per_prompt", "response_length", "rollout_slots", "rollout_memory")
        require_positive(config, "rollout_tensor_parallel")
        require_positive(config, "num_ppo_epochs", "num_mini_batches")
    if stage == "ppo" or (stage == "grpo" and config.kl_coef):
        kind = resolve_reference(config.reference, config, without_lora="copy")
        config = dataclasses.replace(config, reference=kind)
    lm_config = grown(load_architecture(config.architecture, config.model_name_or_path, config.cache_dir), config)
    reach = getattr(lm_config, "max_position_embeddings", config.max_seq_length)
    most = min(config.max_seq_length, reach, config.longest_tokens or config.max_seq_length)
    batch_size = min(config.batch_size, config.num_examples or config.batch_size)
    config = dataclasses.replace(config, max_seq_length=most, batch_size=batch_size)
    if stage in RLVR and config.response_length >= most:
        raise UserError(f"--response_length {config.response_length} leaves no room for a prompt in {most} tokens")
    if stage != "ppo":  # it alone has a value model
        return config, lm_config, None
    name = config.value_model_name_or_path or config.model_name_or_path
    value_config = grown(load_architecture(config.architecture, name, config.cache_dir), config)
    value_config.num_labels = 1
    return config, lm_config, value_config


def grown(lm_config: Any, config: Any) -> Any:
    """With a row for each of --add_special_tokens, as if the tokenizer, which a plan does not read, had none of them
    and the model no row to spare.
    """
    return open.grow(lm_config, lm_config.vocab_size + len(config.add_special_tokens or ()))[0]


def load_architecture(file: str | None, name: str | None, cache_dir: str) -> Any:
    """The decoder's configuration, from a file, a local directory, or the table of known ones. Raises UserError."""
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"--architecture {file}: no such file")
        return build.load_config(Path(file))
    if name is None:
        return build.load_config(embedded(Path(cache_dir).expanduser()).model)
    if Path(name).expanduser().is_dir():
        return build.load_config(Path(name).expanduser())
    known = json.loads((ARCHITECTURES / "names.json").read_text(encoding="utf-8"))
    if name not in known:
        raise UserError(
            f"{name}: neither a directory nor a known architecture{nearest(name, known)}; give its config.json as"
            " --architecture FILE"
        )
    file, changes = known[name]
    config = build.load_config(ARCHITECTURES / f"{file}.json")
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def make(stage: str, config: Any, lm_config: Any, value_config: Any, device: Device) -> Plan:
    """The plan of a resolved configuration. Raises UserError for what the stage itself refuses."""
    ranks = config.gpus * config.nodes
    mean = None if config.mean_tokens is None else min(config.mean_tokens, config.max_seq_length)
    work = Work.of(stage, config, ranks, config.max_seq_length, mean)
    models = (lm_config, value_config)
    seen = rehearse(Case(stage, config, *models, device, ranks, config.gpus, work, config.trained_share))
    return Plan(stage, config, device, ranks, work, seen)


def rehearse(case: Case) -> Rehearsed:
    """A step of the stage on rank 0. Raises UserError for what the stage itself refuses."""
    config, device = case.config, case.device
    fused = 0.5 if config.compile else 1.0  # the traffic between matrix products that is left where layers are compiled
    config = dataclasses.replace(config, compile=False)
    with rehearsal(device, case.ranks, per_node=case.per_node, fused=fused) as (world, ledger, mode):
        stage = Rlvr if case.stage in RLVR else Supervised
        return stage(case, config, world, ledger, mode).rehearse()

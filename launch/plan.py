"""Will it fit, and how fast can it be: before GPUs are booked.     python -m launch.plan dpo --config RECIPE --gpus 8 --gpu h100-80gb

The stage's own step runs here on tensors that have shapes and no numbers, as rank 0 of the planned number of ranks: its
model, cut by FSDP; its loss, backward pass and optimizer; PPO's sampler and cache. A ledger keeps what is live and what
every operation costs. No GPU, no weights, no data and no hub are needed, and every flag of the stage may be given as it
will be for the run.

Assumed: full micro-batches of sequences of --max_seq_length (--longest_tokens, if the data is known to be shorter) of
which every token counts (--trained_share); flash-attention as torch ships it. Times are floors: matrix products at 80 %
of the data sheet, memory at 90 %, links at 75 %, 5 microseconds for an operation, collectives behind computation within
a micro-batch. Under --compile memory is that of the layers as they are, which is more than compiled ones take.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engine import adapters, hardware, model, world
from engine.config import RunConfig, flag, parse, require_positive, resolve_batch_size
from engine.embedded import embedded
from engine.errors import UserError, nearest
from engine.hardware import Device
from engine.ledger import HOST
from engine.reference import resolve as resolve_reference
from launch import dpo, ppo, sft
from launch.rehearse import Rehearsed, Work, rehearse

STAGES: dict[str, ModuleType] = {"sft": sft, "dpo": dpo, "ppo": ppo}
ARCHITECTURES = Path(__file__).parent / "architectures"
DEFAULTS = {
    "sft": {"batch_size": 128},
    "dpo": {},
    "ppo": {"batch_size": 224, "num_samples_per_prompt": 1, "response_length": 1024},
}
FRAGMENTATION = 0.02  # of the allocator's peak, lost between blocks
MOST_GPUS = 1024
GIB = 2**30

FLAGS = [
    ("gpu", str, flag("h100-80gb", f"{', '.join(hardware.DEVICES)}, or cpu: this machine", heading="the plan")),
    ("gpus", int, flag(8, "GPUs of a node (torchrun --nproc_per_node)")),
    ("nodes", int, flag(1, "nodes (torchrun --nnodes)")),
    ("architecture", str | None, flag(None, "a config.json in place of the model's own")),
    ("longest_tokens", int | None, flag(None, "tokens of the data's longest sequence; without it, --max_seq_length")),
    ("mean_tokens", float | None, flag(None, "tokens of a mean sequence, for the speed; without it, the longest")),
    ("trained_share", float, flag(1.0, "share of a sequence's tokens that count (sft, dpo)")),
    ("num_examples", int | None, flag(None, "rows of the data, for steps, hours and disk")),
    ("suggest", bool, flag(True, "if it does not fit, look for the cheapest change that makes it fit")),
    ("json", str | None, flag(None, "also write the plan to this file")),
]


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
        """Seconds of a step's (PPO: an iteration's) parts."""
        seen, n = self.seen, self.work.micro_batches
        step = (n - 1) * seen.micro_batch.seconds + seen.last.seconds
        if self.stage != "ppo":
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
        """Fed by a rank in a step's training micro-batches (PPO: once through all responses)."""
        return self.seen.tokens * self.work.micro_batches

    @property
    def mfu(self) -> float:
        passes = self.config.num_ppo_epochs if self.stage == "ppo" else 1
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
        if config.num_examples and self.stage != "ppo":
            sequences = config.num_examples * (2 if self.stage == "dpo" else 1)
            found["tokenised data"] = round(sequences * (5 * (config.mean_tokens or config.max_seq_length) + 28))
            if self.stage == "dpo" and config.reference == "cache":
                found["reference cache"] = 24 * sequences
        return found


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"{__doc__}\nusage: python -m launch.plan {{{','.join(STAGES)}}} [--gpu NAME] [--gpus N] [--nodes N] [the"
            " stage's flags]"
        )
        return
    stage = argv[0]
    if stage not in STAGES:
        raise UserError(f"{stage!r} is not a stage to plan: {', '.join(STAGES)}{nearest(stage, STAGES)}")
    torch.set_num_threads(1)  # it computes nothing
    started = time.perf_counter()
    config, lm_config, value_config = resolve(stage, parse(config_class(stage), argv[1:]))
    device = hardware.device(config.gpu, config.gpus)
    plan = make(stage, config, lm_config, value_config, device)
    print("\n".join(table(plan, lm_config)))
    change, other = None, None
    if not plan.fits and config.suggest:
        change, other = suggest(plan, lm_config, value_config)
        print("\n".join(suggestion(plan, change, other)))
    print(f"planned in {time.perf_counter() - started:.0f} s")
    if config.json:
        Path(config.json).write_text(json.dumps(as_json(plan, change, other), indent=1), encoding="utf-8")


def config_class(stage: str) -> type[RunConfig]:
    """The stage's flags and the plan's."""
    return dataclasses.make_dataclass(
        "Config",
        FLAGS,
        bases=(STAGES[stage].Config,),
        namespace={"__doc__": __doc__, "__module__": __name__},
        frozen=True,
        kw_only=True,
    )


def resolve(stage: str, config: Any) -> tuple[Any, Any, Any]:
    """(configuration with the stage's defaults, the model's configuration, PPO's value model's). Raises UserError."""
    require_positive(
        config,
        "max_seq_length",
        "micro_batch_tokens",
        "batch_size",
        "gpus",
        "nodes",
        "longest_tokens",
        "mean_tokens",
        "num_examples",
    )
    if not 0 < config.trained_share <= 1:
        raise UserError(f"--trained_share is a share, greater than 0 and at most 1, got {config.trained_share}")
    adapters.check_flags(config)
    config, _ = resolve_batch_size(config, config.gpus * config.nodes)
    config = dataclasses.replace(
        config, **{name: value for name, value in DEFAULTS[stage].items() if getattr(config, name) is None}
    )
    if stage == "dpo":
        config = dpo.resolve_loss(config)
    if stage == "ppo":
        require_positive(
            config, "num_samples_per_prompt", "response_length", "rollout_slots", "num_ppo_epochs", "num_mini_batches"
        )
        config = resolve_reference(config, without_lora="copy")
    lm_config = load_architecture(config.architecture, config.model_name_or_path, config.cache_dir)
    most = min(
        config.max_seq_length,
        getattr(lm_config, "max_position_embeddings", config.max_seq_length),
        config.longest_tokens or 2**62,
    )
    config = dataclasses.replace(
        config, max_seq_length=most, batch_size=min(config.batch_size, config.num_examples or config.batch_size)
    )
    if stage != "ppo":
        return config, lm_config, None
    if config.response_length >= most:
        raise UserError(f"--response_length {config.response_length} leaves no room for a prompt in {most} tokens")
    value_config = load_architecture(
        config.architecture, config.value_model_name_or_path or config.model_name_or_path, config.cache_dir
    )
    value_config.num_labels = 1
    return config, lm_config, value_config


def load_architecture(file: str | None, name: str | None, cache_dir: str) -> Any:
    """The decoder's configuration, from a file, a local directory, or the table of known ones. Raises UserError."""
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"--architecture {file}: no such file")
        return model.load_config(Path(file))
    if name is None:
        return model.load_config(embedded(Path(cache_dir).expanduser()).model)
    if Path(name).expanduser().is_dir():
        return model.load_config(Path(name).expanduser())
    known = json.loads((ARCHITECTURES / "names.json").read_text(encoding="utf-8"))
    if name not in known:
        raise UserError(
            f"{name}: neither a directory nor a known architecture{nearest(name, known)}; give its config.json as"
            " --architecture FILE"
        )
    file, changes = known[name]
    config = model.load_config(ARCHITECTURES / f"{file}.json")
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def make(stage: str, config: Any, lm_config: Any, value_config: Any, device: Device) -> Plan:
    ranks = config.gpus * config.nodes
    work = Work.of(
        stage,
        config,
        ranks,
        config.max_seq_length,
        None if config.mean_tokens is None else min(config.mean_tokens, config.max_seq_length),
    )
    seen = rehearse(
        stage,
        config,
        lm_config,
        device,
        ranks,
        config.gpus,
        work=work,
        trained_share=config.trained_share,
        value_config=value_config,
    )
    return Plan(stage, config, device, ranks, work, seen)


# --- what to change
# -----------------------------------------------------------------------------------------------------------------


def changes(plan: Plan) -> list[list[dict[str, Any]]]:
    """Flags that may make it fit, by what they cost: speed alone; the optimizer's precision; what is trained; more
    nodes.
    """
    config, budget = plan.config, plan.config.micro_batch_tokens
    speed, precision, trained, nodes = [], [], [], []
    if plan.ranks > 1:
        modes = ("last", "keep", "every")
        speed += [{"gradient_sync": mode} for mode in modes[modes.index(plan.seen.gradient_sync[0]) + 1 :]]
    while (budget := budget // 2) >= (2 if plan.stage == "dpo" else 1) * (config.max_seq_length - 1):
        speed.append({"micro_batch_tokens": budget})
    levels = ("none", "selective", "full")
    speed += [{"gradient_checkpointing": level} for level in levels[levels.index(config.gradient_checkpointing) + 1 :]]
    if not config.activation_offload and plan.device.name != "cpu":
        speed.append({"gradient_checkpointing": "full", "activation_offload": True})
    if config.optimizer == "adamw":
        precision.append({"optimizer": "adamw_8bit"})
    if config.master_dtype == "float32":
        precision.append({"master_dtype": "bfloat16"})
    if not config.use_lora:
        trained.append({"use_lora": True})
    if not config.load_in_4bit:
        trained.append({"use_lora": True, "load_in_4bit": True})
    while config.gpus * config.nodes * 2 ** (len(nodes) + 1) <= MOST_GPUS:
        nodes.append({"nodes": config.nodes * 2 ** (len(nodes) + 1)})
    return [speed, precision, trained, nodes]


def suggest(plan: Plan, lm_config: Any, value_config: Any) -> tuple[dict[str, Any] | None, Plan | None]:
    """(flags, plan) of what makes it fit: of the cheapest kind that does the fastest single change, else the fewest
    with those before.

    Candidates are estimated from rehearsals of a few layers, and planned whole where the estimate says that they may
    fit.
    """
    estimates: dict[str, tuple[float, float]] = {}

    def estimated(flags: dict[str, Any]) -> tuple[float, float]:
        if (key := json.dumps(flags, sort_keys=True)) not in estimates:
            estimates[key] = estimate(plan, adjusted(plan.config, flags), lm_config, value_config)
        return estimates[key]

    def attempt(flags: dict[str, Any]) -> Plan | None:
        if estimated(flags)[0] > 1.03 * plan.device.memory:
            return None
        other = make(plan.stage, adjusted(plan.config, flags), lm_config, value_config, plan.device)
        return other if other.fits else None

    *kinds, nodes = changes(plan)
    every, together = [flags for kind in kinds for flags in kind], {}
    for kind in kinds:
        for flags in sorted(kind, key=lambda flags: estimated(flags)[1]):
            if other := attempt(flags):
                return flags, other
        for flags in kind:
            together = together | flags
            if together != flags and (other := attempt(together)):
                return _relaxed(together, other, flags, every, attempt)
    if nodes and estimated(together | nodes[-1])[0] <= 1.03 * plan.device.memory:
        for flags in nodes:
            if other := attempt(flags):
                return flags, other
        for flags in nodes:
            if other := attempt(together | flags):
                return _relaxed(together | flags, other, flags, every, attempt)
    return None, None


def _relaxed(
    together: dict[str, Any], plan: Plan, last: dict[str, Any], tried: list[dict[str, Any]], attempt: Any
) -> tuple[dict[str, Any], Plan]:
    """Without what the last change made needless, or milder."""
    for name in [n for n in together if n not in last]:
        milder = [together | flags for flags in tried if flags.keys() == {name} and flags[name] != together[name]]
        for fewer in [{n: value for n, value in together.items() if n != name}, *milder]:
            if other := attempt(fewer):
                together, plan = fewer, other
                break
    return together, plan


def adjusted(config: Any, flags: dict[str, Any]) -> Any:
    """The configuration with these flags, and what they bring with them."""
    changed = dataclasses.replace(config, **flags)
    if changed.use_lora and not config.use_lora and getattr(config, "reference", None) == "copy":
        changed = dataclasses.replace(changed, reference="base")
    return changed


def estimate(plan: Plan, config: Any, lm_config: Any, value_config: Any) -> tuple[float, float]:
    """(bytes of a rank, seconds a token), extrapolated from 2 and 3 layers: with each further layer, every phase's peak
    and the time grow by the same amount. Infinite for a change that this model, or this torch, does not take.
    """
    layers = lm_config.num_hidden_layers
    alike = layers > 6 and len(set(getattr(lm_config, "layer_types", None) or [0])) == 1
    if config.gradient_sync == "auto":
        config = dataclasses.replace(config, gradient_sync=plan.seen.gradient_sync[0])
    depths = (2, 3) if alike else (layers,)
    try:
        made = [
            make(plan.stage, config, shallow(lm_config, n), value_config and shallow(value_config, n), plan.device)
            for n in depths
        ]
    except UserError:
        return math.inf, math.inf
    one, other = made[0], made[-1]
    grown = lambda a, b: a + (layers - depths[0]) * (b - a)
    peak = max(
        grown(one.seen.peaks[p].total, other.seen.peaks[p].total)
        for p in one.seen.peaks.keys() & other.seen.peaks.keys()
    )
    return peak + plan.device.reserved, grown(one.seconds / one.tokens, other.seconds / other.tokens)


def shallow(lm_config: Any, layers: int) -> Any:
    config = copy.deepcopy(lm_config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


# --- what is shown
# ------------------------------------------------------------------------------------------------------------------


def table(plan: Plan, lm_config: Any) -> list[str]:
    config, seen, device = plan.config, plan.seen, plan.device
    name = (lm_config.architectures or [lm_config.model_type])[0]
    unit = {"sft": "conversations", "dpo": "pairs", "ppo": "responses"}[plan.stage]
    where = f"{plan.ranks} x {device.name}" + (f" in {config.nodes} nodes" if config.nodes > 1 else "")
    scale, unit_of_memory = (GIB, "GiB") if plan.needed >= GIB else (2**20, "MiB")
    lines = [
        f"plan: {plan.stage} of {name}, {seen.parameters:,} parameters, {seen.trained:,} trained, on {where}",
        (
            f"work of a rank and step: {plan.work.units} {unit}, {plan.work.micro_batches} micro-batches, the fullest"
            f" of {sum(plan.work.full):,} tokens in sequences of at most {max(plan.work.full) + 1:,}"
        ),
        (
            f"compute {str(seen.compute).removeprefix('torch.')}, masters {config.master_dtype}, {config.optimizer},"
            f" checkpointing {config.gradient_checkpointing}, gradient sync {seen.gradient_sync[0]}"
        ),
        "",
        f"{'memory of a rank, ' + unit_of_memory:<44}{'at the peak':>12}{'between steps':>15}",
    ]
    for kind in sorted(seen.peak.kinds.keys() - {HOST}, key=lambda k: -seen.peak.kinds[k]):
        if max(seen.peak.kinds[kind], seen.steady.get(kind, 0)) >= scale / 200:
            lines.append(f"  {kind:<42}{seen.peak.kinds[kind] / scale:>12.2f}{seen.steady.get(kind, 0) / scale:>15.2f}")
    lines.append(
        f"  {'allocator, peak in: ' + seen.peak.phase:<42}{seen.peak.total / scale:>12.2f}{sum(size for kind, size in seen.steady.items() if kind != HOST) / scale:>15.2f}"
    )
    if outside := plan.needed - seen.peak.total:
        lines.append(f"  {'context, libraries, fragmentation':<42}{outside / scale:>12.2f}")
    left = device.memory - plan.needed
    verdict = f"it fits, {left / scale:.1f} left" if left >= 0 else f"it does not fit, {-left / scale:.1f} too much"
    lines += [f"  {'needed, of ' + f'{device.memory / scale:.1f}':<42}{plan.needed / scale:>12.2f}   {verdict}"]
    if waiting := seen.peak.kinds.get(HOST):
        lines.append(f"  {'in host memory':<42}{waiting / scale:>12.2f}")
    lines.append("")
    return lines + speed(plan) + disk(plan)


def speed(plan: Plan) -> list[str]:
    rate, unit = plan.tokens / plan.seconds, "an iteration" if plan.stage == "ppo" else "a step"
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in plan.parts.items())
    mean = (
        "" if plan.config.mean_tokens is None else f" with sequences of {plan.config.mean_tokens:.0f} tokens on average"
    )
    lines = [
        f"at best {plan.seconds:.3g} s {unit}{mean} ({parts}), {rate:,.0f} tokens/s a rank, {rate * plan.ranks:,.0f} in"
        f" all, MFU {plan.mfu:.0%}"
    ]
    exchanged, computed = plan.seen.micro_batch.communicating, plan.seen.micro_batch.computing
    if plan.ranks > 1:
        lines.append(
            f"a micro-batch computes for {computed:.3g} s and exchanges for {exchanged:.3g} s"
            + (": the links are the limit" if exchanged > computed else ", behind it")
        )
    if steps := total_steps(plan):
        lines.append(
            f"{steps:,} {'iterations' if plan.stage == 'ppo' else 'steps'}, {steps * plan.seconds / 3600:,.3g} hours at"
            " best"
        )
    return lines


def total_steps(plan: Plan) -> int | None:
    config = plan.config
    if config.num_examples is None:
        return config.max_steps if config.max_steps > 0 else None
    steps = -(-config.num_examples // min(config.batch_size, config.num_examples)) * config.num_train_epochs
    return min(steps, config.max_steps) if config.max_steps > 0 else steps


def disk(plan: Plan) -> list[str]:
    return ["disk: " + ", ".join(f"{name} {size / GIB:,.2g} GiB" for name, size in plan.disk.items() if size)]


def suggestion(plan: Plan, change: dict[str, Any] | None, other: Plan | None) -> list[str]:
    if other is None:
        return [
            "no change of these flags makes it fit: "
            + ", ".join(dict.fromkeys(name for kind in changes(plan) for flags in kind for name in flags))
        ]
    words = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items())
    rate, before = other.tokens / other.seconds, plan.tokens / plan.seconds
    return [
        f"it fits with {words}: {other.needed / GIB:.1f} of {other.device.memory / GIB:.1f} GiB, at best"
        f" {other.seconds:.3g} s a step, {rate:,.0f} tokens/s a rank ({rate / before - 1:+.0%})"
    ]


def as_json(plan: Plan, change: dict[str, Any] | None, other: Plan | None) -> dict[str, Any]:
    cost = lambda c: None if c is None else dataclasses.asdict(c) | {"seconds": c.seconds}
    seen, work = plan.seen, plan.work
    found = {
        "stage": plan.stage,
        "device": dataclasses.asdict(plan.device),
        "ranks": plan.ranks,
        "fits": plan.fits,
        "needed": plan.needed,
        "parameters": seen.parameters,
        "trained": seen.trained,
        "gradient_sync": seen.gradient_sync[0],
        "work": dataclasses.asdict(work),
        "peak": dataclasses.asdict(seen.peak),
        "peaks": {name: p.total for name, p in seen.peaks.items()},
        "between_steps": seen.steady,
        "seconds": plan.seconds,
        "parts": plan.parts,
        "tokens_per_second_per_gpu": plan.tokens / plan.seconds,
        "mfu": plan.mfu,
        "steps": total_steps(plan),
        "micro_batch": cost(seen.micro_batch),
        "optimizer": cost(seen.optimizer),
        "disk": plan.disk,
    }
    return found | ({"fits_with": change, "then": as_json(other, None, None)} if other else {})


if __name__ == "__main__":
    world.run(lambda: main(sys.argv[1:]))

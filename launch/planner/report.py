"""A plan in words and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from launch.planner.ledger import HOST
from launch.planner.plans import Plan
from launch.planner.search import changes
from launch.planner.stages import RLVR

GIB = 2**30


def table(plan: Plan, lm_config: Any) -> list[str]:
    config, seen, device = plan.config, plan.seen, plan.device
    name = (lm_config.architectures or [lm_config.model_type])[0]
    unit = {"sft": "conversations", "dpo": "pairs"}.get(plan.stage, "responses")
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
    for kind in sorted(seen.peak.kinds.keys() - {HOST}, key=lambda kind: (-seen.peak.kinds[kind], kind)):
        if max(seen.peak.kinds[kind], seen.steady.get(kind, 0)) >= scale / 200:
            lines.append(f"  {kind:<42}{seen.peak.kinds[kind] / scale:>12.2f}{seen.steady.get(kind, 0) / scale:>15.2f}")
    steady = sum(size for kind, size in seen.steady.items() if kind != HOST)
    lines.append(
        f"  {'allocator, peak in: ' + seen.peak.phase:<42}{seen.peak.total / scale:>12.2f}{steady / scale:>15.2f}"
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


def step_of(plan: Plan) -> str:
    return "an iteration" if plan.stage in RLVR else "a step"


def speed(plan: Plan) -> list[str]:
    rate, unit = plan.tokens / plan.seconds, step_of(plan)
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in plan.parts.items())
    mean = (
        "" if plan.config.mean_tokens is None else f" with sequences of {plan.config.mean_tokens:.0f} tokens on average"
    )
    lines = [
        f"at best {plan.seconds:.3g} s {unit}{mean} ({parts}), {rate:,.0f} tokens/s a rank, {rate * plan.ranks:,.0f} in"
        f" all, MFU {plan.mfu:.0%}"
    ]
    if plan.stage in RLVR:
        token = plan.seen.rollout["decode"]
        lines.append(
            f"sampling: {plan.seen.slots:,} responses at once, cache {plan.seen.pool / GIB:,.1f} GiB; a token of each:"
            f" {token.operations:,.0f} operations, {token.moved / 1e9:,.1f} GB, {1e3 * token.seconds:.3g} ms;"
            f" {plan.seen.slots / token.seconds:,.0f} tokens/s a rank"
        )
    exchanged, computed = plan.seen.micro_batch.communicating, plan.seen.micro_batch.computing
    if plan.ranks > 1:
        lines.append(
            f"a micro-batch computes for {computed:.3g} s and exchanges for {exchanged:.3g} s"
            + (": the links are the limit" if exchanged > computed else ", behind it")
        )
    if steps := total_steps(plan):
        lines.append(f"{steps:,} {unit.split()[-1]}s, {steps * plan.seconds / 3600:,.3g} hours at best")
    return lines


def total_steps(plan: Plan) -> int | None:
    config = plan.config
    if config.max_steps > 0:
        return config.max_steps  # whatever the epochs
    if config.num_examples is None:
        return None
    return -(-config.num_examples // min(config.batch_size, config.num_examples)) * config.num_train_epochs


def disk(plan: Plan) -> list[str]:
    return ["disk: " + ", ".join(f"{name} {size / GIB:,.2g} GiB" for name, size in plan.disk.items() if size)]


def suggestion(plan: Plan, change: dict[str, Any] | None, other: Plan | None) -> list[str]:
    if other is None or change is None:
        return [
            "no change of these flags makes it fit: "
            + ", ".join(dict.fromkeys(name for kind in changes(plan) for flags in kind for name in flags))
        ]
    words = " ".join(f"--{name}{as_words(value)}" for name, value in change.items())
    rate, before = other.tokens / other.seconds, plan.tokens / plan.seconds
    return [
        f"it fits with {words}: {other.needed / GIB:.1f} of {other.device.memory / GIB:.1f} GiB, at best"
        f" {other.seconds:.3g} s {step_of(plan)}, {rate:,.0f} tokens/s a rank ({rate / before - 1:+.0%})"
    ]


def as_words(value: Any) -> str:
    """A flag's value as it is given on a command line, with the space before it; a truth value has none."""
    return "" if value is True else f" {' '.join(value) if isinstance(value, tuple) else value}"


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

"""What to change where a plan does not fit: the cheapest change of flags that makes it fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

from engine.errors import UserError
from launch.planner.plans import Plan, make
from launch.planner.stages import RLVR

MOST_GPUS = 1024
Flags = dict[str, Any]


def changes(plan: Plan) -> list[list[dict[str, Any]]]:
    """Flags that may make it fit, by what they cost: speed alone; the optimizer's precision; what is trained; more
    nodes.
    """
    config, budget = plan.config, plan.config.micro_batch_tokens
    speed: list[Flags] = []
    precision: list[Flags] = []
    trained: list[Flags] = []
    nodes: list[Flags] = []
    if plan.ranks > 1:
        modes = ("last", "keep", "every")
        speed += [{"gradient_sync": mode} for mode in modes[modes.index(plan.seen.gradient_sync[0]) + 1 :]]
    while (budget := budget // 2) >= (2 if plan.stage == "dpo" else 1) * (config.max_seq_length - 1):
        speed.append({"micro_batch_tokens": budget})
    levels = ("none", "selective", "full")
    speed += [{"gradient_checkpointing": level} for level in levels[levels.index(config.gradient_checkpointing) + 1 :]]
    if not config.activation_offload and plan.device.name != "cpu":
        speed.append({"gradient_checkpointing": "full", "activation_offload": True})
    if plan.stage in RLVR and config.rollout_weights != "gather" and not config.rollout_ahead:
        speed.append({"rollout_weights": "gather"})
    if config.optimizer == "adamw":
        precision.append({"optimizer": "adamw_8bit"})
    if config.master_dtype == "float32":
        precision.append({"master_dtype": "bfloat16"})
    lora: Flags = {"use_lora": True}
    if config.add_special_tokens and not config.use_lora:  # whose rows have to be trained
        lora["lora_modules_to_save"] = plan.seen.vocabulary
    if not config.use_lora:
        trained.append(lora)
    if not config.load_in_4bit:
        trained.append(lora | {"load_in_4bit": True})
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
            estimates[key] = estimate(plan, adjusted(plan.stage, plan.config, flags), lm_config, value_config)
        return estimates[key]

    def attempt(flags: dict[str, Any]) -> Plan | None:
        if estimated(flags)[0] > 1.03 * plan.device.memory:
            return None
        other = make(plan.stage, adjusted(plan.stage, plan.config, flags), lm_config, value_config, plan.device)
        return other if other.fits else None

    *kinds, nodes = changes(plan)
    every = [flags for kind in kinds for flags in kind]
    together: Flags = {}
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


def adjusted(stage: str, config: Any, flags: dict[str, Any]) -> Any:
    """The configuration with these flags, and what they bring with them."""
    changed = dataclasses.replace(config, **flags)
    if stage != "sft" and changed.use_lora and not config.use_lora and config.reference == "copy":
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
    shallower = copy.deepcopy(lm_config)
    shallower.num_hidden_layers = layers
    if getattr(shallower, "layer_types", None):
        shallower.layer_types = shallower.layer_types[:layers]
    return shallower

"""A checkpoint, or a model with an adapter merged, as a Hugging Face directory.      python -m launch.export --help

    python -m launch.export output/dpo                      the newest checkpoint, into output/dpo/step-300
    python -m launch.export output/dpo --step 200 --output_dir exported --dtype bfloat16
    python -m launch.export --model_name_or_path BASE --adapter_name_or_path ADAPTER --output_dir merged

RUN is a run's directory, or one checkpoint's. A run that ended has its model in final/ already. Adapters are merged,
with the adapter itself in adapter/, unless the run was told otherwise; --merge and --adapter_only say it anew. Without
RUN a model is written again, with an adapter merged or in another dtype. Beside the weights lie tokenizer, chat
template, generation config, and README.md, a card that says what the model was made of.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import parse
from engine.errors import UserError
from engine.flags import AdapterFlags, MemoryFlags, ModelFlags, flag
from engine.model import Base, Policy, ValueModel, load_untrained, load_value_model, open_model
from engine.model import export as exporting
from engine.run import flags_in
from engine.train import card, checkpoint, masters
from engine.world import World, main, start
from launch import commands
from launch.runs import as_flags, find, read_state, run_of, step_of

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WITHOUT_RUN = ("adapter_name_or_path", "load_in_4bit", "double_quant", "model_revision", "add_special_tokens")
WITH_RUN = ("step", "merge", "adapter_only", "value_model")


@dataclass(frozen=True, kw_only=True)
class Config:
    __doc__ = __doc__
    run: str | None = flag(None, "a run's directory, or a checkpoint's", positional=True)
    step: int | None = flag(None, "the checkpoint after this step; without it the newest")
    output_dir: str | None = flag(None, "where the model goes; without it RUN/step-N")
    dtype: str | None = flag(
        None,
        "of the weights; without it the run's --export_dtype, or the input checkpoint's",
        choices=("bfloat16", "float16", "float32"),
    )
    merge: bool = flag(False, "the merged model, also of a run under --export_adapter")
    adapter_only: bool = flag(False, "the adapter alone, in PEFT's format")
    value_model: bool = flag(False, "also the value model of a PPO run, in value/")
    max_shard_size: str = flag("5GB", "a file of weights holds at most so much: 500MB, 2GiB, or bytes")
    model_name_or_path: str | None = flag(
        None, "without RUN: the model; with it: where the model that it started from lies now"
    )
    model_revision: str | None = flag(None, "without RUN: branch, tag or commit of the model on the hub")
    adapter_name_or_path: str | None = flag(None, "without RUN: an adapter to merge, in PEFT's format")
    load_in_4bit: bool = flag(False, "without RUN: merge into the model as NF4 holds it, as the adapter was trained")
    double_quant: bool = flag(False, "with --load_in_4bit, as in training")
    add_special_tokens: tuple[str, ...] | None = flag(
        None, "without RUN: tokens that the adapter was trained with", many=True
    )


def export(config: Config) -> None:
    """Writes the directory, whole or not at all."""
    world = start()
    world.agree("configuration", repr(config))
    if config.run is not None:
        export_checkpoint(config, world)
    elif config.model_name_or_path is not None:
        export_model(config, world)
    else:
        raise UserError("command line: RUN is missing, a run's directory (or give --model_name_or_path)")


def export_checkpoint(config: Config, world: World) -> None:
    """What a run had trained at some step. Raises UserError."""
    refuse(config, WITHOUT_RUN, "is not read with RUN, whose flags say it")
    name = str(config.run)
    if config.step is None and (final := final_of(name)):
        return world.say(final)
    path = find(name, config.step)
    run = run_of(path)
    own = flags_in(run)
    output_dir = output(config, (run or path.parent) / f"step-{step_of(path)}")
    state = read_state(path, world)
    adapter_only = is_adapter_wanted(config, state["settings"], own)
    if config.value_model and "value" not in state["optimizer_steps"]:
        raise UserError(f"--value_model: {name} has none, only launch.ppo trains one")
    base, policy, value_model = trained(config, path, state, world)
    facts = replace(
        facts_of(base, policy, state["settings"], adapter_only),
        step=state["step"],
        total=state.get("total_steps"),
        data=state["identity"].get("dataset", ""),
        rows=state.get("examples"),
        metrics=card.metrics_in(run / "metrics.jsonl", state["step"]) if run else (),
        recorded=card.recorded_in(run / "config.yaml") if run else None,
    )
    dtype = config.dtype or own.get("export_dtype")
    inside: dict[str, Path] = {}
    if value_model is not None:
        inside["value"] = output_dir.with_name(f".{output_dir.name}.value")
        exporting.export(value_model, base, world, inside["value"], dtype=dtype)
    notes: list[str] = []
    how = exporting.export(
        policy,
        base,
        world,
        output_dir,
        dtype=dtype,
        adapter_only=adapter_only,
        inside=inside,
        card=card.text(facts),
        file_bytes=size(config.max_shard_size),
        notes=notes,
    )
    world.say(*notes, f"done: step {state['step']} of {name}: {how}")


def final_of(name: str) -> str:
    """What is to be said of a run that has ended; '' for one that has not."""
    run = Path(name).expanduser()
    if not any((run / "final" / n).is_file() for n in ("config.json", "adapter_config.json")):
        return ""
    steps = ", ".join(str(step_of(path)) for path in checkpoint.complete(run / "checkpoints")) or "none"
    return (
        f"{name}/final is the model after the last step already: nothing to do (--step exports a checkpoint, there are:"
        f" {steps}; --model_name_or_path {name}/final with --dtype converts it)"
    )


def is_adapter_wanted(config: Config, values: dict[str, Any], own: dict[str, Any]) -> bool:
    """Alone, as the command line says, or else as the run's --export_adapter. Raises UserError."""
    if config.merge and config.adapter_only:
        raise UserError("--merge and --adapter_only are two things: give one of them")
    for word, given in (("adapter_only", config.adapter_only), ("merge", config.merge)):
        if given and not values.get("use_lora"):
            raise UserError(f"--{word} is not read: {config.run} trained no adapter")
    alone = config.adapter_only or (bool(own.get("export_adapter")) and not config.merge)
    if alone and config.dtype:
        raise UserError("--dtype is not read with an adapter alone, which is written as it is held; --merge merges it")
    return alone


def trained(config: Config, path: Path, state: dict[str, Any], world: World) -> tuple[Base, Policy, ValueModel | None]:
    """The model that the run started from, with what it had trained. Collective. Raises UserError."""
    values = state["settings"]
    flags = as_flags(AdapterFlags, values)
    if config.model_name_or_path is not None:
        flags = replace(flags, model_name_or_path=config.model_name_or_path)
    base = open_model(flags, world, memory=as_flags(MemoryFlags, values), adapters=flags)
    policy = load_untrained(base, world)
    if policy.identity != state["identity"]["model"]:
        raise UserError(
            f"{base.directory} is another model ({policy.identity}) than the one that the run started from"
            f" ({state['identity']['model']}); --model_name_or_path says where that lies now"
        )
    value_model = None
    if config.value_model:
        value_model = load_value_model(base, world, values.get("value_model_name_or_path"), policy)
    parts = {"policy": policy} if value_model is None else {"policy": policy, "value": value_model}
    masters.load_masters(path, parts)
    return base, policy, value_model


def export_model(config: Config, world: World) -> None:
    """A model without a run, perhaps with an adapter merged. Raises UserError."""
    refuse(config, WITH_RUN, "is not read without RUN")
    if config.output_dir is None:
        raise UserError("--output_dir is missing: where the model goes")
    if not config.adapter_name_or_path:
        refuse(config, ("load_in_4bit", "double_quant"), "is not read without --adapter_name_or_path")
    if config.double_quant and not config.load_in_4bit:
        raise UserError("--double_quant is not read without --load_in_4bit")
    output_dir = output(config, Path())
    words = {n: vars(config)[n] for n in ("model_name_or_path", *WITHOUT_RUN)}
    base = open_model(ModelFlags(**words, dtype="float32"), world)  # sums are rounded once, to what is written
    policy = load_untrained(base, world)
    facts = replace(facts_of(base, policy, {}, False), adapter=config.adapter_name_or_path or "")
    notes: list[str] = []
    how = exporting.export(
        policy,
        base,
        world,
        output_dir,
        dtype=config.dtype,
        keep_adapter=False,
        card=card.text(facts),
        file_bytes=size(config.max_shard_size),
        notes=notes,
    )
    world.say(*notes, f"done: {how}")


def facts_of(base: Base, policy: Policy, values: dict[str, Any], is_adapter: bool) -> card.Facts:
    """What a card says of any model."""
    architecture = type(policy.lm).__name__
    return card.Facts(values, base.name, base.revision, policy.base_weights, architecture, is_adapter=is_adapter)


def refuse(config: Config, names: tuple[str, ...], why: str) -> None:
    """Raises UserError where one of these flags was given."""
    for name in names:
        if vars(config)[name]:
            raise UserError(f"--{name} {why}")


def output(config: Config, default: Path) -> Path:
    """Where the model goes. Raises UserError for a place that is taken."""
    size(config.max_shard_size)
    directory = Path(config.output_dir).expanduser() if config.output_dir is not None else default
    if directory.is_file():
        raise UserError(f"--output_dir {directory}: is a file")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--output_dir {directory}: is not empty")
    return directory.absolute()


def size(text: str) -> int:
    """Bytes of '5GB'. Raises UserError."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?|\d{1,18}) ?([KMG]I?B)?", text.strip().upper())
    number = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if number < 1:
        raise UserError(f"--max_shard_size: expected a size like 5GB, 500MB or a number of bytes, got {text[:40]!r}")
    return number


if __name__ == "__main__":
    main(lambda: export(parse(Config, elsewhere=commands)))

"""Configuration: one frozen dataclass per launch file becomes its command line and its YAML file.

Precedence: command line, then `--config recipe.yaml`, then the dataclass default. An unknown key is an error that names
the nearest one; prefixes are not matched; the resolved configuration is saved and can be fed back.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from engine.errors import UserError, nearest

Config = TypeVar("Config", bound="RunConfig")
MAX_YAML_BYTES = 2**20


def flag(default: Any, help: str, *, choices: tuple[str, ...] = (), aliases: tuple[str, ...] = (), many: bool = False) -> Any:
    """A dataclass field that is a command-line flag. `aliases` are other names that people know it by."""
    return field(default=default, metadata={"help": help, "choices": choices, "aliases": aliases, "many": many})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training stage takes."""

    model_name_or_path: str | None = flag(None, "local directory or hub id of a decoder (default: a tiny Llama made on the spot)")
    model_revision: str | None = flag(None, "branch, tag or commit of the model on the hub")
    dataset_name: str | None = flag(None, "hub id, directory, .jsonl, .json or .parquet (default: embedded data)")
    dataset_revision: str | None = flag(None, "branch, tag or commit of the dataset on the hub")
    dataset_split: str = flag("train", "split of a hub dataset")
    mixer_list: tuple[str, ...] | None = flag(None, "a mixture instead of --dataset_name: NAME AMOUNT NAME AMOUNT ..., AMOUNT a fraction (1.0) or a number of rows (2000)", many=True)  # fmt: skip
    eval_dataset_name: str | None = flag(None, "held-out data, like --dataset_name", aliases=("eval_dataset",))
    eval_split: str = flag("test", "split of a hub dataset for --eval_dataset_name")
    eval_steps: int = flag(0, "evaluate every N steps (0: before the first and after the last)")
    output_dir: str = flag("output", "directory of the run: config.yaml, metrics.jsonl, checkpoints/, final/")
    cache_dir: str = flag("~/.cache/triptych", "tokenised data and reference log-probs, shared by all runs of a user")
    seed: int = flag(1, "data order is a function of it, and nothing else is random")
    max_seq_length: int = flag(2048, "prompt + response, in tokens", aliases=("max_length",))
    micro_batch_tokens: int = flag(8192, "tokens in memory at a time on each rank: the memory knob, without effect on results")
    per_device_train_batch_size: int | None = flag(None, "with --gradient_accumulation_steps and the world size: sets --batch_size")
    gradient_accumulation_steps: int | None = flag(None, "see --per_device_train_batch_size")
    lr_scheduler_type: str = flag("linear", "after the warm-up", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises linearly from 0")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (not on norms and biases)")
    max_grad_norm: float = flag(1.0, "global gradient norm is clipped to it (0: off)", aliases=("clip_grad_norm",))
    num_train_epochs: int = flag(1, "passes over the data", aliases=("num_epochs",))
    max_steps: int = flag(-1, "stop after N optimizer steps, whatever the epochs (-1: off)", aliases=("max_train_steps",))
    optimizer: str = flag("adamw", "AdamW in fp32", choices=("adamw",))
    dtype: str = flag("auto", "compute dtype; masters are fp32; auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "bfloat16", "float32", "float16"))  # fmt: skip
    export_dtype: str | None = flag(None, "dtype of final/ (default: the input checkpoint's)", choices=("bfloat16", "float16", "float32"))  # fmt: skip
    attention: str = flag("auto", "packed attention backend", choices=("auto", "flash4", "flash3", "flash2", "varlen", "sdpa", "eager"))  # fmt: skip
    head: str = flag("fused", "log-probs by chunks (fused) or with the whole logits in memory (naive)", choices=("fused", "naive"))
    gradient_sync: str = flag("auto", "reduce gradients after every micro-batch, or after the last, which keeps them unsharded (4 bytes a parameter)", choices=("auto", "every", "last"))  # fmt: skip
    compile: bool = flag(False, "torch.compile every decoder layer")
    deterministic: bool = flag(False, "bitwise repeatable on CUDA as well, at some cost")
    profile: bool = flag(False, "write a trace of steps 3 to 5 to output_dir/trace.json, for Perfetto")
    save_steps: int = flag(0, "checkpoint every N steps (0: none; the run still ends in final/)", aliases=("checkpointing_steps",))
    save_total_limit: int = flag(2, "checkpoints kept", aliases=("keep_last_n_checkpoints",))
    resume: str = flag("auto", "auto: from the newest checkpoint of output_dir; never: refuse a directory that is not empty; or a checkpoint's path")  # fmt: skip
    on_bad_row: str = flag("skip", "a malformed row stops the run or is skipped, counted and listed", choices=("error", "skip"))
    dry_run: bool = flag(False, "resolve everything, show one example with its mask, and stop before the weights are loaded")
    report_to: str = flag("none", "a second home for metrics.jsonl's rows", choices=("none", "tensorboard", "wandb"))
    given: dict = field(default_factory=dict, repr=False, compare=False, metadata={"help": None})


def parse(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """The configuration of a command line (default: sys.argv). Raises UserError; exits for --help."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {config_class.__module__}" if config_class.__module__ != "__main__" else None,
        description=config_class.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", help="a file of these flags, without the dashes; the command line wins")
    flags = {f.name: f for f in fields(config_class) if f.metadata["help"]}
    for name, f in flags.items():
        default = "" if f.default is None else f" [{'' if f.default is dataclasses.MISSING else f.default}]"
        options = {"nargs": "?", "const": "true"} if f.type in (bool, "bool") else {"nargs": "+"} if f.metadata["many"] else {}
        metavar = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else name.split("_")[-1].upper()
        names = [f"--{n}" for n in (name, *f.metadata["aliases"])]
        parser.add_argument(*names, dest=name, metavar=metavar, help=(f.metadata["help"] + default).replace("%", "%%"), **options)
    aliases = {alias: name for name, f in flags.items() for alias in f.metadata["aliases"]}
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"command line: {error}") from None
    for word in unknown:
        name = word.split("=")[0].lstrip("-")
        raise UserError(f"command line: unknown flag {word}{nearest(name, [*flags, *aliases, 'config'])}")
    words = vars(namespace)
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    if path := words.pop("config", None):
        for key, value in _read_yaml(Path(path)).items():
            name = aliases.get(key, key)
            if name not in flags:
                raise UserError(f"{path}: unknown key {key}{nearest(key, [*flags, *aliases])}")
            values[name], origins[name] = _convert(config_class, name, value, str(path)), str(path)
    for name, value in words.items():
        values[name], origins[name] = _convert(config_class, name, value, "command line"), "command line"
    return config_class(**values, given=origins)


def save(config: RunConfig, path: Path, extra: dict[str, Any]) -> None:
    """Writes the resolved flags that were read (None: not read, left out) with `extra` facts in comments."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in as_dict(config).items() if v is not None}
    comments = "".join(f"# {key}: {value}\n" for key, value in extra.items())
    path.write_text(comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def as_dict(config: RunConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["help"]}


def require_positive(config: RunConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be greater than 0, got {value}")


def resolve_batch_size(config: Config, world_size: int) -> tuple[Config, str]:
    """Applies --per_device_train_batch_size and --gradient_accumulation_steps; the second value says what happened, or ''."""
    if config.per_device_train_batch_size is None and config.gradient_accumulation_steps is None:
        return config, ""
    if "batch_size" in config.given:
        raise UserError("--batch_size says the same as --per_device_train_batch_size x --gradient_accumulation_steps x ranks: give one of them")  # fmt: skip
    require_positive(config, "per_device_train_batch_size", "gradient_accumulation_steps")
    per_device, accumulation = config.per_device_train_batch_size or 1, config.gradient_accumulation_steps or 1
    batch_size = per_device * accumulation * world_size
    line = f"{per_device} per device x {accumulation} accumulation x {world_size} ranks = --batch_size {batch_size}"
    resolved = dataclasses.replace(config, batch_size=batch_size, per_device_train_batch_size=None, gradient_accumulation_steps=None)
    return resolved, line


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, which plain YAML resolves silently to the last."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{loader.name}: key {key} stands twice")
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UserError(f"--config {path}: larger than 1 MiB, not a recipe")
    try:
        loader = _StrictLoader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        content = loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'flag: value' lines, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _convert(config_class: type, name: str, value: Any, where: str) -> Any:
    """A word of the command line or a YAML value as the field's type; UserError names both."""
    hint = typing.get_type_hints(config_class)[name]
    f = next(f for f in fields(config_class) if f.name == name)
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    if optional:
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and optional):
        if optional:
            return None
        raise UserError(f"{where}: --{name} needs a value")
    try:
        if f.metadata["many"]:
            converted = tuple(str(v) for v in (value if isinstance(value, list) else str(value).split()))
        elif hint is bool:
            converted = {"true": True, "false": False}[str(value).lower()]
        elif hint in (int, float):
            if isinstance(value, bool):
                raise ValueError(value)
            converted = hint(value) if not (hint is int and isinstance(value, float) and value != int(value)) else int(str(value))
            if hint is float and converted != converted:
                raise ValueError(value)
        else:
            converted = str(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{where}: --{name} expects {'true or false' if hint is bool else hint.__name__}, got {value!r}") from None
    choices = f.metadata["choices"]
    if choices and converted not in choices:
        raise UserError(f"{where}: --{name} {converted} is not one of {', '.join(choices)}{nearest(str(converted), choices)}")
    return converted



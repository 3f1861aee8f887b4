"""Configuration: one frozen dataclass per launch file becomes its command line and its YAML file.

Precedence: command line, then `--config recipe.yaml`, then the dataclass default. An unknown key is an error that names
the nearest one; prefixes are not matched; nothing is coerced that a reader of the file would not expect (`no` is not
the text 'False'); the resolved configuration is saved and can be fed back.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import reprlib
import shutil
import sys
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from engine.errors import UserError, nearest

Config = TypeVar("Config", bound="RunConfig")
MAX_YAML_BYTES = 2**20


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    many: bool = False,
    heading: str = "",
) -> Any:
    """A dataclass field that is a command-line flag. `aliases` are other names that people know it by; `heading` opens
    a part of --help.
    """
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "aliases": aliases, "many": many, "heading": heading},
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training stage takes."""

    model_name_or_path: str | None = flag(
        None, "local directory or hub id of a decoder; without it, a tiny Llama made on the spot", heading="model"
    )
    model_revision: str | None = flag(None, "branch, tag or commit of the model on the hub")

    dataset_name: str | None = flag(
        None, "hub id, directory, .jsonl, .json or .parquet; without it, embedded data", heading="data"
    )
    dataset_revision: str | None = flag(None, "branch, tag or commit of the dataset on the hub")
    dataset_split: str = flag("train", "split of a hub dataset, or of a directory whose files are named after splits")
    mixer_list: tuple[str, ...] | None = flag(
        None,
        "a mixture instead of --dataset_name: NAME AMOUNT NAME AMOUNT ..., AMOUNT a fraction (1.0) or a number of rows"
        " (2000)",
        many=True,
    )
    eval_dataset_name: str | None = flag(None, "held-out data, like --dataset_name", aliases=("eval_dataset",))
    eval_split: str = flag("test", "--dataset_split of --eval_dataset_name")
    dataset_num_proc: int | None = flag(None, "processes that tokenise a large dataset; without it, one per core")
    max_seq_length: int = flag(2048, "prompt + response, in tokens", aliases=("max_length",))
    on_bad_row: str = flag(
        "skip", "a malformed row stops the run or is skipped, counted and listed", choices=("error", "skip")
    )

    use_lora: bool = flag(
        False, "train low-rank adapters on the frozen model", aliases=("use_peft",), heading="adapters"
    )
    lora_rank: int | None = flag(None, "r of W + (alpha / r) B A; 16", aliases=("lora_r",))
    lora_alpha: float | None = flag(None, "alpha; 32")
    lora_target_modules: tuple[str, ...] | None = flag(
        None,
        "linear layers by the last part of their name (q_proj k_proj v_proj); without it, or with all-linear,"
        " every one",
        many=True,
    )
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r)")
    adapter_name_or_path: str | None = flag(
        None, "start from this adapter (PEFT's format): its rank, alpha and modules are taken"
    )
    load_in_4bit: bool = flag(False, "hold the frozen linear layers in NF4, 4 bits a weight, sharded (QLoRA)")
    double_quant: bool = flag(
        False,
        "NF4 scales in 8 bits as well: 4.13 bits a weight instead of 4.5",
        aliases=("bnb_4bit_use_double_quant", "use_bnb_nested_quant"),
    )
    export_adapter: bool = flag(
        False,
        "final/ is the adapter alone (PEFT's format); without it, the merged model with the adapter in final/adapter",
    )

    seed: int = flag(
        1, "every draw (data order, sampled tokens) is a function of it and of its own name", heading="optimization"
    )
    num_train_epochs: int = flag(1, "passes over the data", aliases=("num_epochs",))
    max_steps: int = flag(
        -1, "stop after N optimizer steps, whatever the epochs (-1: off)", aliases=("max_train_steps",)
    )
    per_device_train_batch_size: int | None = flag(
        None, "with --gradient_accumulation_steps and the number of ranks: sets --batch_size"
    )
    gradient_accumulation_steps: int | None = flag(None, "see --per_device_train_batch_size")
    optimizer: str = flag(
        "adamw",
        "AdamW in fp32, or with moments of 8 bits by blocks of 256 (bitsandbytes)",
        choices=("adamw", "adamw_8bit"),
    )
    lr_scheduler_type: str = flag("linear", "after the warm-up", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises linearly from 0")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (not on norms and biases)")
    max_grad_norm: float = flag(1.0, "global gradient norm is clipped to it (0: off)", aliases=("clip_grad_norm",))

    micro_batch_tokens: int = flag(
        8192,
        "tokens in memory at a time on each rank: the memory knob, without effect on results",
        heading="memory and speed",
    )
    dtype: str = flag(
        "auto",
        "compute dtype (masters: --master_dtype); auto: bfloat16 on CUDA, float32 on CPU",
        choices=("auto", "bfloat16", "float32", "float16"),
    )
    attention: str = flag(
        "auto", "packed attention backend", choices=("auto", "flash4", "flash3", "flash2", "varlen", "sdpa", "eager")
    )
    head: str = flag(
        "fused", "log-probs by chunks (fused) or with the whole logits in memory (naive)", choices=("fused", "naive")
    )
    gradient_sync: str = flag(
        "auto",
        "gather weights and reduce gradients for every micro-batch; keep weights gathered for a step; or also reduce"
        " after its last, which holds whole fp32 gradients",
        choices=("auto", "every", "keep", "last"),
    )
    gradient_checkpointing: str = flag(
        "none",
        "recomputed in the backward pass: nothing; all but matrix products and attention; every decoder layer, a third"
        " more work for a fraction of the activations",
        choices=("none", "selective", "full"),
    )
    activation_offload: bool = flag(
        False,
        "what the backward pass needs waits in host memory (CUDA; most useful with --gradient_checkpointing full)",
    )
    master_dtype: str = flag(
        "float32",
        "of the trained parameters and AdamW's arithmetic; bfloat16 halves both and loses small updates to rounding",
        choices=("float32", "bfloat16"),
    )
    compile: bool = flag(False, "torch.compile every decoder layer")
    deterministic: bool = flag(False, "bitwise repeatable on CUDA as well, at some cost")

    output_dir: str = flag(
        "output/run", "directory of the run: config.yaml, metrics.jsonl, checkpoints/, final/", heading="the run"
    )
    cache_dir: str = flag("~/.cache/triptych", "tokenised data and reference log-probs, shared by all runs of a user")
    save_steps: int = flag(
        0, "checkpoint every N steps (0: none; the run still ends in final/)", aliases=("checkpointing_steps",)
    )
    save_total_limit: int = flag(2, "checkpoints kept", aliases=("keep_last_n_checkpoints",))
    resume: str = flag(
        "auto",
        "auto: from the newest checkpoint of output_dir; never: refuse a directory that is not empty; or a checkpoint's"
        " path",
    )
    eval_steps: int = flag(0, "evaluate every N steps (0: before the first and after the last)")
    export_dtype: str | None = flag(
        None, "dtype of final/; without it, the input checkpoint's", choices=("bfloat16", "float16", "float32")
    )
    dry_run: bool = flag(
        False,
        "resolve everything, show one example with its mask and what the run will need (launch.plan), and stop before"
        " the weights are loaded",
    )
    profile: bool = flag(False, "write a trace of steps 3 to 5 to output_dir/trace.json, for Perfetto")
    report_to: str = flag("none", "a second home for metrics.jsonl's rows", choices=("none", "tensorboard", "wandb"))
    given: dict = field(default_factory=dict, repr=False, compare=False, metadata={"help": None})


@dataclass(frozen=True)
class _Flag:
    """One flag of a configuration class: its type without `| None`, and what flag() was told."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    many: bool
    heading: str


def _flags(config_class: type) -> dict[str, _Flag]:
    hints = typing.get_type_hints(config_class)
    flags = {}
    for f in fields(config_class):
        if f.metadata["help"]:
            options = typing.get_args(hints[f.name]) if isinstance(hints[f.name], types.UnionType) else (hints[f.name],)
            kind = next(option for option in options if option is not type(None))
            flags[f.name] = _Flag(f.name, kind, type(None) in options, f.default, **f.metadata)
    return flags


def parse(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """The configuration of a command line (default: sys.argv). Raises UserError; exits for --help."""
    flags = _flags(config_class)
    aliases = {alias: name for name, f in flags.items() for alias in f.aliases}
    try:
        namespace, unknown = _parser(config_class, flags).parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"command line: {error}") from None
    for word in unknown:
        if not word.startswith("-"):
            raise UserError(
                f"command line: unexpected word {word!r} (flags are given as --name value, a recipe as --config FILE)"
            )
        name = word.split("=")[0]
        raise UserError(
            f"command line: unknown flag {_shown(name)}{nearest(name.lstrip('-'), [*flags, *aliases, 'config'])}"
        )
    words = vars(namespace)
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    if path := words.pop("config", None):
        for key, value in _read_yaml(Path(path)).items():
            name = aliases.get(key, key)
            if name not in flags:
                raise UserError(f"{path}: unknown key {_shown(key)}{nearest(key, [*flags, *aliases])}")
            if name in values:
                raise UserError(f"{path}: {key} says the same as another key, {name}: give one of them")
            values[name], origins[name] = _convert(flags[name], value, f"{path}: {key}"), path
    for name, value in words.items():
        values[name], origins[name] = _convert(flags[name], value, f"--{name}"), "command line"
    return config_class(**values, given=origins)


def _parser(config_class: type, flags: dict[str, _Flag]) -> argparse.ArgumentParser:
    """Reads words as they are; what they mean is _convert's, the same for a YAML file."""
    main = sys.modules["__main__"].__spec__ if config_class.__module__ == "__main__" else None
    width = min(120, shutil.get_terminal_size().columns)
    parser = argparse.ArgumentParser(
        prog=f"python -m {main.name if main else config_class.__module__}",
        usage="%(prog)s [--config recipe.yaml] [--flag value ...]",
        description=config_class.__doc__,
        epilog="[ ] holds the default; what has none is off, or decided at the start.",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width),
    )
    group = parser.add_argument_group("general")
    group.add_argument("-h", "--help", action="help", help="this page")
    group.add_argument(
        "--config", metavar="FILE", help="a YAML file of the flags below, as `name: value` lines; the command line wins"
    )
    common = {f.name: f.metadata["heading"] for f in fields(RunConfig) if f.metadata["help"]}
    group = parser.add_argument_group("this stage")
    for f in sorted(flags.values(), key=lambda f: f.name in common):  # the stage's own first
        if heading := common.get(f.name, f.heading):  # a stage may redefine a common flag: it stays where it is
            group = parser.add_argument_group(heading)
        options: dict[str, Any] = {"dest": f.name, "nargs": "?" if f.type is bool else "+" if f.many else None}
        if f.type is bool:
            options["const"] = "true"
        words = {bool: "true|false", int: "N", float: "X"}
        metavar = "{" + ",".join(f.choices) + "}" if f.choices else words.get(f.type, f.name.split("_")[-1].upper())
        also = f" (also {', '.join('--' + alias for alias in f.aliases)})" if f.aliases else ""
        default = "" if f.default is None or f.default is False else f" [{f.default}]"
        group.add_argument(f"--{f.name}", metavar=metavar, help=(f.help + also + default).replace("%", "%%"), **options)
        for alias in f.aliases:
            group.add_argument(f"--{alias}", help=argparse.SUPPRESS, **options)
    return parser


def save(config: RunConfig, path: Path, extra: dict[str, Any]) -> None:
    """Writes the resolved flags that were read (None: not read, left out) with `extra` facts in comments."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in as_dict(config).items() if v is not None}
    comments = "".join(f"# {key}: {' '.join(str(value).split())}\n" for key, value in extra.items())
    path.write_text(comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def as_dict(config: RunConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["help"]}


def require_positive(config: RunConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be greater than 0, got {value}")


def resolve_batch_size(config: Config, world_size: int) -> tuple[Config, str]:
    """Applies --per_device_train_batch_size and --gradient_accumulation_steps; the second value says what happened, or
    ''.
    """
    if config.per_device_train_batch_size is None and config.gradient_accumulation_steps is None:
        return config, ""
    if "batch_size" in config.given:
        raise UserError(
            "--batch_size says the same as --per_device_train_batch_size x --gradient_accumulation_steps x ranks: give"
            " one of them"
        )
    require_positive(config, "per_device_train_batch_size", "gradient_accumulation_steps")
    per_device, accumulation = config.per_device_train_batch_size or 1, config.gradient_accumulation_steps or 1
    batch_size = per_device * accumulation * world_size
    line = f"{per_device} per device x {accumulation} accumulation x {world_size} ranks = --batch_size {batch_size}"
    resolved = dataclasses.replace(
        config, batch_size=batch_size, per_device_train_batch_size=None, gradient_accumulation_steps=None
    )
    return resolved, line


class _StrictLoader(yaml.SafeLoader):
    """Refuses keys that are not text and duplicate keys, which plain YAML resolves silently to the last."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                problem=f"key {_shown(key)} is not text", problem_mark=key_node.start_mark
            )
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                problem=f"key {_shown(key)} stands twice", problem_mark=key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Raises UserError for anything but an object of flags."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"--config {path}: no such file{nearest(path.name, siblings)}")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UserError(f"--config {path}: larger than 1 MiB, not a recipe")
    try:
        loader = _StrictLoader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        content = loader.get_single_data()
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, the 31st of February, an integer of 5000 digits
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        raise UserError(
            f"{path}{f':{mark.line + 1}' if mark else ''}: not a recipe ({' '.join(problem.split())})"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `flag: value` lines, got {_shown(content)}")
    return content


def _shown(value: Any) -> str:
    """A value in a message: on one line, and short whatever the value is."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 80 else reprlib.repr(value)


def _convert(f: _Flag, value: Any, where: str) -> Any:
    """A word of the command line or a YAML value as the flag's type. Raises UserError that says where."""
    if f.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}.get(
        f.type, "words"
    )
    try:
        converted = _many(value) if f.many else _one(f.type, value)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: expected {expected}, got {reprlib.repr(value)}") from None
    if f.choices and converted not in f.choices:
        raise UserError(
            f"{where}: {_shown(converted)} is not one of {', '.join(f.choices)}{nearest(converted, f.choices)}"
        )
    return converted


def _one(kind: type, value: Any) -> Any:
    """Raises ValueError for a value that is not written as a `kind`; a YAML 5e-7, which YAML takes for text, is a
    number.
    """
    if kind is str and isinstance(value, str) and value.strip():
        return value
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        number = kind(value)
        if math.isfinite(number) and (isinstance(value, str) or number == value):
            return number
    raise ValueError(value)


def _many(value: Any) -> tuple[str, ...]:
    """Words: of the command line, of a YAML text, or of a YAML list of texts and numbers."""
    words = value.split() if isinstance(value, str) else value
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(w, (str, int, float)) and not isinstance(w, bool) for w in words)
    ):
        raise ValueError(value)
    return tuple(map(str, words))

"""Configuration: one frozen dataclass per launch file becomes its command line and its YAML file.

Precedence: command line, then `--config recipe.yaml`, then the dataclass default. An unknown key is an error that names
the nearest one; prefixes are not matched; nothing is coerced that a reader of the file would not expect (`no` is not
the text 'False'); the resolved configuration is saved and can be fed back. Flags are declared in flags.py and by the
stages.
"""

from __future__ import annotations

import argparse
import math
import reprlib
import shutil
import sys
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from engine.errors import UserError, nearest
from engine.flags import HEADINGS

Config = TypeVar("Config")
MAX_YAML_BYTES = 2**20


@dataclass(frozen=True)
class Flag:
    """One flag of a configuration class: its type without `| None`, and what `flags.flag` was told."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    heading: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    excludes: tuple[str, ...]
    many: bool
    positional: bool


def flags_of(config_class: type) -> dict[str, Flag]:
    """Name → flag, in the order of --help's parts."""
    hints = typing.get_type_hints(config_class)
    found = {}
    for f in fields(config_class):
        options = typing.get_args(hints[f.name]) if isinstance(hints[f.name], types.UnionType) else (hints[f.name],)
        kind = next(option for option in options if option is not type(None))
        optional = type(None) in options or f.default is None
        found[f.name] = Flag(f.name, kind, optional, f.default, **_declared(config_class, f))
    return dict(sorted(found.items(), key=lambda item: HEADINGS.index(item[1].heading)))


def _declared(config_class: type, f: Any) -> dict[str, Any]:
    """What a group says of a flag, with what a stage says in its place."""
    if "override" not in f.metadata:
        return dict(f.metadata)
    fields_of = [vars(c).get("__dataclass_fields__", {}) for c in config_class.__mro__]
    group = next(of[f.name].metadata for of in fields_of if f.name in of and "override" not in of[f.name].metadata)
    return dict(group) | {key: f.metadata[key] for key in ("help", "choices") if f.metadata[key]}


def parse(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """The configuration of a command line (default: sys.argv). Raises UserError; exits for --help."""
    flags = flags_of(config_class)
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
    values: dict[str, Any] = {}
    if path := words.pop("config", None):
        for key, value in _read_yaml(Path(path)).items():
            name = aliases.get(key, key)
            if name not in flags:
                raise UserError(f"{path}: unknown key {_shown(key)}{nearest(key, [*flags, *aliases])}")
            if name in values:
                raise UserError(f"{path}: {key} says the same as another key, {name}: give one of them")
            values[name] = _convert(flags[name], value, f"{path}: {key}")
    for name, value in words.items():
        values[name] = _convert(flags[name], value, f"--{name}")
    for name, f in flags.items():
        if values.get(name) is not None and (other := next((o for o in f.excludes if values.get(o) is not None), None)):
            raise UserError(f"--{name} and --{other} are two ways to say one thing: give one of them")
    return config_class(**values)


def _parser(config_class: type, flags: dict[str, Flag]) -> argparse.ArgumentParser:
    """Reads words as they are; what they mean is _convert's, the same for a YAML file."""
    main = sys.modules["__main__"].__spec__ if config_class.__module__ == "__main__" else None
    positional = [f.name.upper() for f in flags.values() if f.positional]
    width = min(120, shutil.get_terminal_size().columns)
    parser = argparse.ArgumentParser(
        prog=f"python -m {main.name if main else config_class.__module__}",
        usage=" ".join(["%(prog)s", *positional, "[--config recipe.yaml] [--flag value ...]"]),
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
    boolean = {"action": "store_const"} if positional else {"nargs": "?"}
    heading = ""
    for f in flags.values():
        if f.heading != heading:
            group, heading = parser.add_argument_group(f.heading), f.heading
        options: dict[str, Any] = {"dest": f.name}
        options |= {"const": "true"} | boolean if f.type is bool else {"nargs": "+" if f.many else None}
        words = {bool: "true|false", int: "N", float: "X"}
        metavar = "{" + ",".join(f.choices) + "}" if f.choices else words.get(f.type, f.name.split("_")[-1].upper())
        if "action" not in options:
            options["metavar"] = metavar
        also = f" (also {', '.join('--' + alias for alias in f.aliases)})" if f.aliases else ""
        default = "" if f.default is None or f.default is False else f" [{f.default}]"
        help = (f.help + also + default).replace("%", "%%")
        if f.positional:
            group.add_argument(f.name, nargs="?", metavar=f.name.upper(), help=help)
            continue
        group.add_argument(f"--{f.name}", help=help, **options)
        options.pop("metavar", None)
        for alias in f.aliases:
            group.add_argument(f"--{alias}", help=argparse.SUPPRESS, **options)
    return parser


def as_dict(config: object) -> dict[str, Any]:
    """Name → value of every flag, in the order of --help."""
    return {name: vars(config)[name] for name in flags_of(type(config))}


def save(values: dict[str, Any], path: Path, extra: dict[str, Any]) -> None:
    """Writes the resolved flags that were read (None: not read, left out) with `extra` facts in comments."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
    comments = "".join(f"# {key}: {' '.join(str(value).split())}\n" for key, value in extra.items())
    path.write_text(comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: not UTF-8, the 31st of February, an integer of 5000 digits
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


def _convert(f: Flag, value: Any, where: str) -> Any:
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
            f"{where}: {_shown(converted)} is not one of {', '.join(f.choices)}{nearest(str(converted), f.choices)}"
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

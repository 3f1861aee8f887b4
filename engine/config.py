"""Configuration: one frozen dataclass per launch file becomes its command line and its YAML file.

Precedence: command line, then `--config recipe.yaml`, then the dataclass default. An unknown key is an error that names
the nearest one, or the command that it belongs to; prefixes are not matched; nothing is coerced that a reader of the
file would not expect (`no` is not the text 'False'); the resolved configuration is saved and can be fed back. Flags are
declared in flags/ and by the stages.
"""

from __future__ import annotations

import argparse
import math
import reprlib
import shutil
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from engine.disk import write_new
from engine.errors import UserError, nearest, on_one_line
from engine.flags import HEADINGS, foreign, table
from engine.flags import words as words_of_others
from engine.redact import check_flags, redact, redacted

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
    texts: bool
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


def parse(
    config_class: type[Config], argv: list[str] | None = None, elsewhere: Callable[[], Mapping[str, type]] | None = None
) -> Config:
    """The configuration of a command line (default: sys.argv). Raises UserError; exits for --help.

    Names and words of other trainers are translated (flags/table.py), and the first rank says into what. `elsewhere`
    gives the configurations of the other commands by name, so that a flag of theirs is answered with where it belongs.
    """
    flags = flags_of(config_class)
    try:
        parser = _parser(config_class, flags)
        several = any(f.positional and f.many for f in flags.values())  # which may stand on both sides of a flag
        namespace, rest = (parser.parse_known_intermixed_args if several else parser.parse_known_args)(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"command line: {error}") from None
    words = vars(namespace)
    path = words.pop("config", "")
    command, recipe = _Given(flags, elsewhere), _Given(flags, elsewhere, file=path)
    command.read(words)
    command.read_rest(rest)
    if path:
        recipe.read(_read_yaml(Path(path)))
    said = {name for name, value in command.values.items() if value is not None}
    for name, f in flags.items():  # of two ways to say a thing, too, the command line wins
        if said & {*f.excludes, *(other for other, o in flags.items() if name in o.excludes)}:
            recipe.values.pop(name, None)
    values = recipe.otherwise | command.otherwise | recipe.values | command.values
    for name, f in flags.items():
        for other in flags.keys() & f.excludes if values.get(name) is not None else ():
            if values.get(other) is not None:
                raise UserError(f"--{name} and --{other} are two ways to say one thing: give one of them")
            values[other] = None  # its default does not say it either
    check_flags(values)
    _say([line for names, line in recipe.lines if not names or not names <= command.values.keys()])
    _say([line for _, line in command.lines])
    return config_class(**values)


class _Given:
    """What a recipe or (without a file) the command line says, in our words."""

    def __init__(
        self, flags: dict[str, Flag], elsewhere: Callable[[], Mapping[str, type]] | None, file: str = ""
    ) -> None:
        self.flags, self.elsewhere = flags, elsewhere
        self.mark, self.dash = (f"{file}: ", "") if file else ("--", "--")
        self.place, self.kind = (f"{file}: ", "key") if file else ("command line: ", "flag")
        self.ours = {alias: name for name, f in flags.items() for alias in (name, *f.aliases)}
        self.choices = {name: f.choices for name, f in flags.items()}
        self.values: dict[str, Any] = {}
        self.lines: list[tuple[set[str], str]] = []  # of what was translated: our flags, a line
        self.otherwise: dict[str, Any] = {}  # what names of others mean where nothing says it
        self.said: dict[str, str] = {}  # our flag → the name that it was given by

    def read(self, given: Mapping[str, Any]) -> None:
        """Takes all names. Raises UserError for a name or a value that means nothing here."""
        for name, value in given.items():
            ours = self.ours.get(name)
            self._check_section(name, value)
            row = next((row for row in table.rows_of(ours or name) if row.needs <= self.flags.keys()), None)
            if row is None and ours is None:
                self._refuse(f"{self.dash}{name}", name)
            if value is None and ours is None:
                continue  # a key without a value says nothing
            meaning = None
            if row is not None and value is not None:
                meaning = foreign.translate(row, value, ours or name, f"{self.mark}{name}", self.choices)
            if meaning is None:
                self._take(str(ours), value, name)
                continue
            self.lines.append((set(meaning.values), meaning.line))
            for of_ours, word in meaning.values.items():
                self._take(of_ours, word, name)
            for of_ours, word in meaning.otherwise.items():
                self.otherwise[of_ours] = _convert(self.flags[of_ours], word, f"{self.mark}{name}")

    def read_rest(self, words: list[str]) -> None:
        """The words that argparse does not know: `--name=word`, or `--name` and the words up to the next one."""
        given: dict[str, list[str]] = {}
        name = ""
        for word in words:
            if word.startswith("--") and len(word) > 2:
                name, equals, first = word[2:].partition("=")
                given[name] = [first] if equals else []
            elif name and (not word.startswith("-") or _is_number(word)):
                given[name].append(word)
            elif word.startswith("-"):
                self._refuse(word.split("=")[0], word.lstrip("-"))
            else:
                self._refuse_word(word)
        if given and any(f.positional for f in self.flags.values()):
            self._refuse(f"--{next(iter(given))}", next(iter(given)))
        for name, values in given.items():
            self.read({name: values if len(values) > 1 else values[0] if values else "true"})

    def _take(self, name: str, value: Any, by: str) -> None:
        value = _convert(self.flags[name], value, f"{self.mark}{by}")
        if self.said.get(name, by) != by and value != self.values[name]:
            both = f"{self.mark}{self.said[name]} and {self.dash}{by}"
            raise UserError(f"{both} say the same thing, {self.dash}{name}, in two ways: give one of them")
        self.values[name], self.said[name] = value, by

    def _check_section(self, name: str, value: Any = None) -> None:
        """Raises UserError for a name with dots, as torchtune and verl have them, and for a section of such names."""
        keys = [f"{name}.{key}" for key in list(value)[:100]] if isinstance(value, dict) else [name]
        for key in filter(words_of_others.DOTTED.__contains__, keys):
            names = words_of_others.DOTTED[key].split()
            ours = next(filter(self.flags.__contains__, names), names[0])
            how = "flags are given as --name value" if self.dash else "keys stand at the margin"
            raise UserError(f"{self.place}{key} is {self.dash}{ours} here{self._whose(ours)} ({how})")

    def _refuse_word(self, word: str) -> None:
        """Raises UserError: a word on a command line before which no flag stands."""
        name, equals, _ = word.partition("=")
        self._check_section(name)
        theirs = (row.ours for row in table.rows_of(name) if row.ours in self.flags)
        if equals and (ours := self.ours.get(name) or next(theirs, None)):
            raise UserError(
                f"command line: {foreign.shown(word)}: flags are given as --name value, this one is --{ours}"
            )
        raise UserError(
            f"command line: unexpected word {word!r} (flags are given as --name value, a recipe as --config FILE)"
        )

    def _refuse(self, shown: str, name: str) -> None:
        """Raises UserError: what this unknown name may have been meant for."""
        if commands := self._commands(name):
            whole = f"; its recipe is for python -m {commands}" if not self.dash and " and " not in commands else ""
            raise UserError(f"{self.place}{self.dash}{name} belongs to {commands}{whole}")
        for row in table.rows_of(name):
            for ours in sorted(row.needs - self.flags.keys()):
                raise UserError(f"{self.place}{self.dash}{name} is {self.dash}{ours} here{self._whose(ours)}")
        names = [*self.ours, "config"] if self.dash else [*self.ours]
        snake = name.replace("-", "_")
        close = f" (did you mean {snake}?)" if table.rows_of(snake) else nearest(name, names)
        raise UserError(f"{self.place}unknown {self.kind} {foreign.shown(shown)}{close}")

    def _whose(self, name: str) -> str:
        """', which belongs to ...' for a flag that this command does not have."""
        if name in self.flags:
            return ""
        return f", which belongs to {self._commands(name) or 'another command'}"

    def _commands(self, name: str) -> str:
        """'launch.sft, launch.dpo and launch.ppo', which have this flag; or ''."""
        others = (self.elsewhere() if self.elsewhere else {}).items()
        having = [command for command, c in others if any(name in (f.name, *f.aliases) for f in flags_of(c).values())]
        return " and ".join(filter(None, (", ".join(having[:-1]), *having[-1:])))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _say(lines: list[str]) -> None:
    """On the first rank; the others have read the same."""
    if lines:
        from engine.world import is_first  # which takes torch, and launch.verify does without

        if is_first():
            print("\n".join(redact(on_one_line(line)) for line in lines), flush=True)


def _parser(config_class: type, flags: dict[str, Flag]) -> argparse.ArgumentParser:
    """Reads words as they are; what they mean is _convert's, the same for a YAML file."""
    main = sys.modules["__main__"].__spec__ if config_class.__module__ == "__main__" else None
    positional = [f.name.upper() + (" ..." if f.many else "") for f in flags.values() if f.positional]
    width = min(120, shutil.get_terminal_size().columns)
    parser = argparse.ArgumentParser(
        prog=f"python -m {main.name if main else config_class.__module__}",
        usage=" ".join(["%(prog)s", *positional, "[--config recipe.yaml] [--flag value ...]"]),
        description=config_class.__doc__,
        epilog="[ ] holds the default; what has none is off, or decided at the start.\n"
        "Flags of transformers, TRL, open-instruct and axolotl: docs/flags.md.",
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
        alone = f.type is bool or any("true" in (row.words or ()) for row in table.rows_of(f.name))
        options |= {"const": "true"} | boolean if alone else {"nargs": "+" if f.many else None}
        words = {bool: "true|false", int: "N", float: "X"}
        choices, metavar = ",".join(f.choices), words.get(f.type, f.name.split("_")[-1].upper())
        listed = f", one of {', '.join(f.choices)}" if len(f.name) + len(choices) > 72 else ""  # too long for one line
        metavar = f"{{{choices}}}" if choices and not listed else metavar
        if "action" not in options:
            options["metavar"] = metavar
        also = f" (also {', '.join('--' + alias for alias in f.aliases)})" if f.aliases else ""
        default = "" if f.default is None or f.default is False else f" [{f.default}]"
        help = (f.help + listed + also + default).replace("%", "%%")
        if f.positional:
            group.add_argument(f.name, nargs="*" if f.many else "?", metavar=f.name.upper(), help=help)
            continue
        if options.get("nargs") == "+":  # a flag that is given twice says both
            options["action"] = "extend"
        group.add_argument(f"--{f.name}", help=help, **options)
        options.pop("metavar", None)
        for alias in f.aliases:
            group.add_argument(f"--{alias}", help=argparse.SUPPRESS, **options | {"dest": alias})
    return parser


def as_dict(config: object) -> dict[str, Any]:
    """Name → value of every flag, in the order of --help."""
    return {name: vars(config)[name] for name in flags_of(type(config))}


def save(values: dict[str, Any], path: Path, extra: dict[str, Any]) -> None:
    """Writes the resolved flags that were read (None: not read, left out) with `extra` facts in comments."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
    comments = "".join(f"# {key}: {' '.join(str(value).split())}\n" for key, value in extra.items())
    write_new(path, redact(comments) + yaml.safe_dump(redacted(values), sort_keys=False, allow_unicode=True))


class _StrictLoader(yaml.SafeLoader):
    """Refuses keys that are not text and duplicate keys, which plain YAML resolves silently to the last."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                problem=f"key {foreign.shown(key)} is not text", problem_mark=key_node.start_mark
            )
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                problem=f"key {foreign.shown(key)} stands twice", problem_mark=key_node.start_mark
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
        raise UserError(f"{path}: expected `flag: value` lines, got {foreign.shown(content)}")
    return content


def _convert(f: Flag, value: Any, where: str) -> Any:
    """A word of the command line or a YAML value as the flag's type. Raises UserError that says where."""
    open_words = ("none", "null", "auto") if f.type in (int, float) else ("none", "null")
    if f.optional and (value is None or (isinstance(value, str) and value.lower() in open_words)):
        return None
    expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}.get(
        f.type, "words"
    )
    try:
        converted = _many(value, f.texts) if f.many else _one(f.type, value)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: expected {expected}, got {reprlib.repr(value)}") from None
    if f.choices and converted not in f.choices:
        close = nearest(str(converted), f.choices)
        raise UserError(f"{where}: {foreign.shown(converted)} is not one of {', '.join(f.choices)}{close}")
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


def _many(value: Any, texts: bool) -> tuple[str, ...]:
    """Words: of the command line, of a YAML text (one, if they are `texts`), or of a YAML list of texts and numbers."""
    words = ([value] if texts else value.split()) if isinstance(value, str) else value
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(w, (str, int, float)) and not isinstance(w, bool) for w in words)
    ):
        raise ValueError(value)
    return tuple(map(str, words))

"""The configuration: what a command line and a YAML file mean, and what they may not mean."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import string
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import config as configuration
from engine.config import Flag, as_dict, flags_of, parse, save
from engine.errors import UserError
from engine.flags import StageFlags, flag, override
from launch.dpo import Config as DpoConfig


@dataclass(frozen=True, kw_only=True)
class Config(StageFlags):
    """A stage of the tests. 100% of it."""

    batch_size: int = override(32, "rows per optimizer step, 5% of them odd")
    learning_rate: float = override(None)
    threshold: float = flag(0.5, "a number that must be there")


def recipe(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(Config, list(argv))
    message = str(error.value)
    assert message.isprintable(), message
    assert len(message) < 700
    return message


# --- precedence and names ---------------------------------------------------------------------------------------------


def test_defaults_need_no_argument():
    assert parse(Config, []) == Config()


def test_command_line_over_yaml_over_default(tmp_path):
    path = recipe(tmp_path, "seed: 7\nbatch_size: 16\nmax_length: 99\n")
    config = parse(Config, ["--seed", "8", "--config", str(path)])
    assert (config.seed, config.batch_size, config.max_seq_length, config.num_train_epochs) == (8, 16, 99, 1)


@pytest.mark.parametrize("cls", [Config, DpoConfig])
def test_every_flag_is_read_from_both(cls, tmp_path):
    """An independent table of values by type; each flag by each of its names, on the command line and in a file."""
    for f in flags_of(cls).values():
        words, values = {bool: "true", int: "3", float: "0.25"}, {bool: True, int: 3, float: 0.25}
        word = f.choices[-1] if f.choices else "a 0.5" if f.many else words.get(f.type, "word")
        want = ("a", "0.5") if f.many else values.get(f.type, word)
        for name in (f.name, *f.aliases):
            assert getattr(parse(cls, [f"--{name}", *word.split()]), f.name) == want, name
            assert getattr(parse(cls, ["--config", str(recipe(tmp_path, f"{name}: {word}\n"))]), f.name) == want, name
            if not f.many:
                assert getattr(parse(cls, [f"--{name}={word}"]), f.name) == want


def test_unknown_names_get_the_nearest(tmp_path):
    assert refusal("--learning_rat", "1") == "command line: unknown flag --learning_rat (did you mean learning_rate?)"
    assert refusal("--zzzzqqq=3") == "command line: unknown flag --zzzzqqq"
    assert "unknown flag --max-steps (did you mean max_steps?)" in refusal("--max-steps", "3")
    path = recipe(tmp_path, "lerning_rate: 1\n")
    assert refusal("--config", str(path)) == f"{path}: unknown key lerning_rate (did you mean learning_rate?)"
    for key in ("given", "config", "__class__"):
        assert f"unknown key {key}" in refusal("--config", str(recipe(tmp_path, f"{key}: x\n")))


@pytest.mark.parametrize("prefix", ["--learning", "--max_step", "--see", "--conf", "--batch", "-s", "-config"])
def test_prefixes_are_not_matched(prefix):
    assert f"unknown flag {prefix}" in refusal(prefix, "3")


def test_words_that_are_no_flags():
    assert "unexpected word 'recipe.yaml'" in refusal("recipe.yaml")
    assert "unexpected word 'b'" in refusal("--dataset_name", "a", "b")
    assert "--seed: expected one argument" in refusal("--seed")
    assert "--mixer_list: expected at least one argument" in refusal("--mixer_list", "--seed", "1")
    assert "unknown flag '--\\x1b[2J\\n'" in refusal("--\x1b[2J\n")


# --- values -----------------------------------------------------------------------------------------------------------

GOOD = [
    ("seed", "3", 3),
    ("max_steps", "-1", -1),
    ("threshold", "1", 1.0),
    ("threshold", "5e-7", 5e-7),
    ("threshold", "-2.5", -2.5),
    ("learning_rate", "none", None),
    ("learning_rate", "null", None),
    ("model_name_or_path", "None", None),
    ("report_to", "none", "none"),
    ("compile", "true", True),
    ("compile", "False", False),
    ("dtype", "float32", "float32"),
    ("output_dir", "123", "123"),
]
BAD = [
    ("seed", "abc", "a whole number"),
    ("seed", "1.5", "a whole number"),
    ("seed", "1e3", "a whole number"),
    ("seed", "", "a whole number"),
    ("seed", "nan", "a whole number"),
    ("seed", "none", "a whole number"),
    ("seed", "9" * 5000, "a whole number"),
    ("seed", "0x10", "a whole number"),
    ("threshold", "abc", "a finite number"),
    ("threshold", "nan", "a finite number"),
    ("threshold", "-inf", "a finite number"),
    ("threshold", "1e999", "a finite number"),
    ("threshold", "none", "a finite number"),
    ("compile", "maybe", "true or false"),
    ("compile", "1", "true or false"),
    ("output_dir", "", "text"),
    ("dataset_name", "  ", "text"),
]


@pytest.mark.parametrize(("name", "word", "want"), GOOD)
def test_words_that_are_values(name, word, want):
    got = getattr(parse(Config, [f"--{name}", word]), name)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(("name", "word", "expected"), BAD, ids=[f"{n}={w[:8]}" for n, w, _ in BAD])
def test_words_that_are_not(name, word, expected):
    message = refusal(f"--{name}={word}")
    assert message.startswith(f"--{name}: expected {expected}, got '")
    assert "\n" not in message


def test_bools():
    assert parse(Config, ["--compile"]).compile is True
    assert parse(Config, ["--compile", "--seed", "2"]).compile is True
    assert parse(Config, ["--compile", "false"]).compile is False
    assert parse(Config, ["--compile=TRUE"]).compile is True


YAML_GOOD = [
    ("threshold: 1", "threshold", 1.0),
    ("threshold: 5e-7", "threshold", 5e-7),
    ("seed: 10.0", "seed", 10),
    ("seed: '3'", "seed", 3),
    ("compile: yes", "compile", True),
    ("learning_rate: null", "learning_rate", None),
    ("learning_rate:", "learning_rate", None),
    ("mixer_list: [a, 1.0, b, 2000]", "mixer_list", ("a", "1.0", "b", "2000")),
    ("mixer_list: a 0.5", "mixer_list", ("a", "0.5")),
    ("output_dir: Zürich 🦙", "output_dir", "Zürich 🦙"),
    ("{}", "seed", 1),
    ("", "seed", 1),
    ("# only words\n", "seed", 1),
    ("\ufeffseed: 4", "seed", 4),
]
YAML_BAD = [
    ("seed: 1.5", "seed: expected a whole number, got 1.5"),
    ("seed: .inf", "seed: expected a whole number"),
    ("seed: true", "seed: expected a whole number, got True"),
    ("seed:", "seed: expected a whole number, got None"),
    ("seed: [1]", "seed: expected a whole number, got [1]"),
    ("seed: {a: 1}", "seed: expected a whole number"),
    ("seed: 2001-01-01", "seed: expected a whole number"),
    ("threshold: .nan", "threshold: expected a finite number, got nan"),
    ("threshold: '.inf'", "threshold: expected a finite number"),
    ("compile: 1", "compile: expected true or false, got 1"),
    ("resume: no", "resume: expected text, got False"),
    ("model_revision: 0123", "model_revision: expected text, got 83"),
    ("dataset_name: [a, b]", "dataset_name: expected text"),
    ("mixer_list: {a: 1.0}", "mixer_list: expected words"),
    ("mixer_list: [a, [1]]", "mixer_list: expected words"),
    ("mixer_list: [a, no]", "mixer_list: expected words"),
    ("mixer_list: []", "mixer_list: expected words"),
    ("seed: 1\nseed: 2", ":2: not a recipe (key seed stands twice)"),
    (
        "max_length: 1\nmax_seq_length: 2",
        ": max_length and max_seq_length say the same thing, max_seq_length, in two ways: give one",
    ),
    ("seed: !!python/object/apply:os.system ['touch x']", "not a recipe"),
    ("!!python/name:os.system {}", "not a recipe"),
    ("seed: !!binary aGk=", "whole number"),
    ("1: 2", "key 1 is not text"),
    ("? [a]\n: b", "is not text"),
    ("- seed", "expected `flag: value` lines"),
    ("seed", "expected `flag: value` lines"),
    ("seed: 1\n---\nseed: 2", "not a recipe"),
    ("seed: [", "not a recipe"),
    ("seed: 2001-99-99", "not a recipe"),
    ("seed: " + "9" * 5000, "not a recipe"),
    ("seed: \x07", "not a recipe"),
    ("[" * 20000, "not a recipe"),
    ("a: &a [*a]", "not a recipe"),
    ("<<: {seed: 1}", "not a recipe"),
]


@pytest.mark.parametrize(("text", "name", "want"), YAML_GOOD, ids=[t[:24] for t, _, _ in YAML_GOOD])
def test_yaml_that_is_a_recipe(text, name, want, tmp_path):
    got = getattr(parse(Config, ["--config", str(recipe(tmp_path, text))]), name)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(("text", "expected"), YAML_BAD, ids=[t[:24] for t, _ in YAML_BAD])
def test_yaml_that_is_not(text, expected, tmp_path):
    path = recipe(tmp_path, text)
    message = refusal("--config", str(path))
    assert message.startswith(f"{path}:")
    assert expected in message
    assert list(tmp_path.iterdir()) == [path]


def test_a_bomb_of_aliases_is_cheap(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert "unknown key a0" in refusal("--config", str(recipe(tmp_path, "\n".join(lines))))
    bomb = (
        "seed: "
        + "["
        + ", ".join(f"&b{i} [{'*b' + str(i - 1) + ', *b' + str(i - 1) if i else 'x'}]" for i in range(40))
        + "]"
    )
    assert "seed: expected a whole number" in refusal("--config", str(recipe(tmp_path, bomb)))


def test_many_keys_are_not_quadratic(tmp_path):
    assert "unknown key k0" in refusal("--config", str(recipe(tmp_path, "".join(f"k{i}: 1\n" for i in range(20000)))))


def test_files_that_are_no_recipes(tmp_path, monkeypatch):
    recipe(tmp_path, "seed: 1\n")
    assert refusal("--config", str(tmp_path / "recipes.yaml")).endswith("no such file (did you mean recipe.yaml?)")
    assert "no such file" in refusal("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("output_dir: Zürich\n".encode("latin-1"))
    assert "not a recipe" in refusal("--config", str(tmp_path / "latin.yaml"))
    (tmp_path / "large.yaml").write_bytes(b"# " + b"x" * 2**20)
    assert "larger than 1 MiB" in refusal("--config", str(tmp_path / "large.yaml"))
    (tmp_path / "limit.yaml").write_bytes((b"seed: 5\n" + b"# " + b"x" * 2**20)[: 2**20])
    assert parse(Config, ["--config", str(tmp_path / "limit.yaml")]).seed == 5


def test_choices_name_the_nearest():
    message = refusal("--dtype", "bfloat61")
    assert message == "--dtype: bfloat61 is not one of auto, bfloat16, float32, float16 (did you mean bfloat16?)"


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.text(max_size=12)
        | st.sampled_from(["--seed", "--compile", "--mixer_list", "--config", "--", "-1", "=", "--seed=", "none"]),
        max_size=5,
    )
)
def test_no_command_line_ends_in_a_traceback(argv):
    if {"-h", "--help"} & {word.split("=")[0] for word in argv}:
        return
    try:
        parse(Config, argv)
    except UserError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=150)
@given(
    st.text(alphabet=string.printable + "é\u2028", max_size=60)
    | st.dictionaries(
        st.sampled_from(["seed", "resume", "compile", "x"]),
        st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.booleans(), max_size=3),
    ).map(lambda d: yaml.safe_dump(d, allow_unicode=True))
)
def test_no_yaml_ends_in_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        parse(Config, ["--config", str(path)])
    except UserError as error:
        assert "\n" not in str(error)


# --- saved and fed back -----------------------------------------------------------------------------------------------


def values_of(f: Flag) -> st.SearchStrategy:
    word = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
        lambda s: s.strip() and s.lower() not in ("none", "null")
    )
    if f.choices:
        strategy = st.sampled_from(f.choices)
    elif f.many:
        strategy = st.lists(word, min_size=1, max_size=4).map(tuple)
    else:
        numbers = {int: st.integers(), float: st.floats(allow_nan=False, allow_infinity=False)}
        strategy = {bool: st.booleans(), str: word, **numbers}[f.type]
    return st.none() | strategy if f.optional else strategy


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries({name: values_of(f) for name, f in flags_of(DpoConfig).items()}))
def test_saved_and_fed_back_is_the_same(tmp_path_factory, values):
    # None is left out of the file, which therefore cannot undo a default; no flag has both
    flags = flags_of(DpoConfig).values()
    assert all(f.default is None for f in flags if f.optional)
    said_in_another_way = {other for f in flags if values[f.name] is not None for other in f.excludes}
    config, path = (
        DpoConfig(**values | dict.fromkeys(said_in_another_way)),
        tmp_path_factory.getbasetemp() / "saved.yaml",
    )
    save(as_dict(config), path, {"model_revision": "abc\nseed: 666"})
    assert parse(DpoConfig, ["--config", str(path)]) == config


def test_facts_are_comments(tmp_path):
    save(as_dict(Config(seed=3)), tmp_path / "c.yaml", {"world_size": 2})
    assert (tmp_path / "c.yaml").read_text().splitlines()[0] == "# world_size: 2"
    assert "learning_rate" not in yaml.safe_load((tmp_path / "c.yaml").read_text())


# --- batch size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "ranks", "want"), [("4 2", 8, 64), ("1 1", 1, 1), ("3 -", 5, 15), ("- 4", 2, 8), ("- -", 7, 32)]
)
def test_batch_size_of_devices_and_accumulation(argv, ranks, want):
    names = ("--per_device_train_batch_size", "--gradient_accumulation_steps")
    words = [w for name, word in zip(names, argv.split(), strict=True) if word != "-" for w in (name, word)]
    batch_size, line = parse(Config, words).batch_size_on(ranks)
    assert batch_size == want and (f"--batch_size {want}" in line) == bool(words)


@pytest.mark.parametrize(
    "words",
    [
        ("--batch_size", "8", "--per_device_train_batch_size", "4"),
        ("--gradient_accumulation_steps", "2", "--batch_size", "8"),
        ("--dataset_name", "x", "--mixer_list", "y", "1.0"),
    ],
)
def test_a_thing_is_said_once(words):
    assert "are two ways to say one thing: give one of them" in refusal(*words)


@pytest.mark.parametrize(
    "text, words, want",
    [
        ("warmup_ratio: 0.2", "--warmup_steps 50", {"warmup_steps": 50.0, "warmup_ratio": None}),
        ("warmup_steps: 50", "--warmup_ratio 0.2", {"warmup_steps": None, "warmup_ratio": 0.2}),
        ("warmup_steps: 50", "", {"warmup_steps": 50.0, "warmup_ratio": None}),
        ("batch_size: 8", "--per_device_train_batch_size 2", {"batch_size": 32, "per_device_train_batch_size": 2}),
        ("mixer_list: [a, 1.0]", "--dataset_name b", {"mixer_list": None, "dataset_name": "b"}),
        (
            "dataset_name: b",
            "--mixer_list a 1.0 --dataset_name none",
            {"mixer_list": ("a", "1.0"), "dataset_name": None},
        ),
    ],
)
def test_the_command_line_wins_also_in_another_way(text, words, want, tmp_path):
    got = as_dict(parse(Config, ["--config", str(recipe(tmp_path, text)), *words.split()]))
    assert {name: got[name] for name in want} == want


def test_accumulation_is_greater_than_0():
    with pytest.raises(UserError, match="--gradient_accumulation_steps must be greater than 0, got 0"):
        parse(Config, ["--gradient_accumulation_steps", "0"]).check()


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_a_page_for_people(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        parse(DpoConfig, ["--help"])
    assert end.value.code == 0
    page = capsys.readouterr().out
    own = page[page.index("\ngeneral:") :]  # what stands before is the docstring, as it is
    assert max(map(len, own.splitlines())) <= columns
    assert page.startswith("usage: python -m launch.dpo [--config recipe.yaml] [--flag value ...]\n")
    assert DpoConfig.__doc__.strip() in page
    for f in dataclasses.fields(DpoConfig):
        assert f.name == "given" or own.count(f"\n  --{f.name} ") == 1
        for alias in f.metadata.get("aliases", ()):
            assert not re.search(rf"\n  --{alias}\b", own)
            assert re.search(rf"\(also [^)]*--{alias}\b", " ".join(own.split()))
    headings = [line for line in own.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "general:",
        "this stage:",
        "model:",
        "data:",
        "adapters:",
        "optimization:",
        "memory and speed:",
        "the run:",
    ]
    assert own.index("--loss_type") < own.index("--model_name_or_path")


def test_percent_signs_in_help(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["-h"])
    assert "5% of them odd [32]" in " ".join(capsys.readouterr().out.split())


def test_the_parser_decides_nothing():
    """Types, defaults and choices are one mechanism for words and YAML: argparse only splits."""
    parser = configuration._parser(Config, configuration.flags_of(Config))
    assert isinstance(parser, argparse.ArgumentParser)
    assert all(a.type is None and a.choices is None and a.default in (None, argparse.SUPPRESS) for a in parser._actions)
    assert math.isclose(parse(Config, ["--threshold", "0.1"]).threshold, 0.1)

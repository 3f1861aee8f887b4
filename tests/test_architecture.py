"""What the code may look like: arrows between rooms, private names, sizes, flags, and what is forbidden."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from engine import flags
from engine.config import flags_of
from launch import commands, data, dpo, evaluate, ppo, sft
from launch.planner.plans import STAGES
from tests import sizes
from tests.sizes import OURS, ROOT, files, functions, room_of

ENGINE = {"torch", "transformers", "safetensors", "numpy", "tqdm"}
MAY_IMPORT = {
    "losses": {"torch", "triton"},
    "verifiers": {"sympy", "mpmath", "langdetect", "nltk"},
    "engine": ENGINE
    | {"yaml", "jinja2", "tokenizers", "huggingface_hub", "datasets", "pyarrow", "bitsandbytes", "wandb"}
    | {"flash_attn", "flash_attn_interface"},
    "rollout": ENGINE | {"triton", "flash_attn", "flash_attn_interface"},
    "launch": ENGINE | {"yaml", "jinja2", "matplotlib"},
}
BELOW = {  # room → the rooms that it may import besides itself
    "losses": set(),
    "verifiers": set(),
    "engine": set(),
    "engine.data": {"engine"},
    "engine.model": {"engine", "engine.data", "losses"},
    "engine.train": {"engine", "engine.data", "engine.model", "losses"},
    "rollout": {"engine", "engine.data", "engine.model", "engine.train", "verifiers"},
    "launch": {*sizes.ROOMS},
    "launch.planner": {*sizes.ROOMS},
    "launch.reports": {"engine", "engine.train", "launch.planner"},
}
COMMANDS = {"sft": sft.Config, "dpo": dpo.Config, "ppo": ppo.Config, "evaluate": evaluate.Config}
OTHERS = {  # with words of their own, such as --output
    command.removeprefix("launch."): of
    for command, of in commands().items()
    if of not in COMMANDS.values() and command not in ("launch.plan", "launch.data")
}


def imported(tree: ast.AST):
    """(module, name or '') of every import of a tree, and the module of every `-m` in a list of words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.List | ast.Tuple):
            words = [x.value if isinstance(x, ast.Constant) else None for x in node.elts]
            yield from ((str(b), "") for a, b in pairwise(words) if a == "-m")


def room_imported(module: str, name: str) -> str:
    return room_of(f"{module}.{name}" if (ROOT / module.replace(".", "/") / f"{name}.py").exists() else module)


# --- arrows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", BELOW)
def test_arrows_between_rooms_only_go_down(room):
    allowed = BELOW[room] | {room, ""}
    found = [
        f"{path} -> {module}.{name}"
        for path, text in files(room.split(".")[0])
        if room_of(path) == room
        for module, name in imported(ast.parse(text))
        if room_imported(module, name) not in allowed
    ]
    assert not found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_packages_that_a_folder_may_import(folder):
    allowed = MAY_IMPORT[folder] | {*OURS, "__future__"} | set(sys.stdlib_module_names)
    found = [
        f"{path}: {module}"
        for path, text in files(folder)
        for module, _ in imported(ast.parse(text))
        if module.split(".")[0] not in allowed
    ]
    assert not found


def test_no_private_name_of_another_module():
    """Neither imported, nor as an attribute of a module, nor by getattr or setattr."""
    found = []
    for path, text in files():
        tree = ast.parse(text)
        ours = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                ours |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
                found += [f"{path}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                found += [f"{path}: {node.value.id}.{node.attr}"] if re.match(r"_(?!_)", node.attr) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
                owner, name = node.args[:2]
                private = isinstance(name, ast.Constant) and re.match(r"_(?!_)", str(name.value))
                if private and isinstance(owner, ast.Name) and owner.id in ours:
                    found.append(f"{path}: {ast.unparse(node)}")
    assert not found


def test_nothing_is_patched_but_what_is_foreign_to_the_planner():
    """What stands in for another function has a seam; foreign code is replaced in launch/planner/foreign.py alone."""
    found = [f"{p}: {m}" for p, text in files() for m, _ in imported(ast.parse(text)) if m.startswith("unittest")]
    for path, text in files():
        modules = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if alias.name.islower()
        }
        for node in ast.walk(ast.parse(text)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            patched = [t for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) in modules]
            found += [f"{path}:{node.lineno} {ast.unparse(t)}" for t in patched if ast.unparse(t) != "sys.excepthook"]
    assert not found


# --- configurations ---------------------------------------------------------------------------------------------------


def test_no_one_asks_a_configuration_what_it_is():
    """A function takes the values or the group that it reads; transformers' configurations are another matter."""
    found = []
    for path, text in files("engine", "rollout", "launch"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "isinstance"):
                of = ast.unparse(node.args[0])
                ours = of == "flags" or (of == "config" and room_of(path) not in ("engine.model", "engine.data"))
                found += [f"{path}:{node.lineno} {ast.unparse(node)}"] if ours else []
    assert not found
    assert not sizes.whole_configurations("engine", "rollout")


def groups() -> list[type]:
    return [c for c in vars(flags).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


def test_every_flag_is_declared_once():
    """By a group or a stage; a stage may give a group's flag another default, by `override`."""
    declared = Counter(
        f.name
        for c in {*groups(), *COMMANDS.values()}
        for f in vars(c)["__dataclass_fields__"].values()
        if f.name in vars(c).get("__annotations__", {}) and "override" not in f.metadata
    )
    assert not [name for name, count in declared.items() if count > 1]


def test_the_command_lines_flags_are_these():
    """A flag that goes or changes its name breaks recipes: it stands here, and in CHANGELOG.md."""
    plans = {f"plan {stage}": config for stage, (_, config) in STAGES.items()}
    found = {name: flags_of(c) for name, c in (COMMANDS | OTHERS | plans).items()}
    lines = [f"{name}: {' '.join(sorted(found[name]))}" for name in sorted(found) if not name.startswith("plan")]
    of_the_plan = [set(found[f"plan {stage}"]) - set(found[stage]) for stage in STAGES]
    assert of_the_plan[0] == of_the_plan[1] == of_the_plan[2]
    lines.append(f"plan, besides the stage's: {' '.join(sorted(of_the_plan[0]))}")
    lines.append(
        f"also known as: {' '.join(sorted({a for of in found.values() for f in of.values() for a in f.aliases}))}"
    )
    of_the_data = [set(flags_of(config)) - set(found[stage]) for stage, config in data.CONFIGS.items()]
    assert of_the_data[0] == of_the_data[1] == of_the_data[2]
    lines.append(f"data, besides the stage's: {' '.join(sorted(of_the_data[0]))}")
    expected = (Path(__file__).parent / "flags.txt").read_text(encoding="utf-8").splitlines()
    assert lines == expected


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_files_and_functions_are_small():
    assert not [(path, n) for path, text in files() if (n := len(text.splitlines())) > 400]
    assert not [f for f in functions() if f.lines > (90 if f.name == "train" else 60)]
    assert not [f for f in functions() if f.positional > 6 and f.name not in HANDED]


# attention as transformers and autograd call it, and the formula behind it
HANDED = {"attention", "_written_out", "_gradients"}


def test_launch_files_are_the_algorithm():
    assert all(sizes.import_lines(path) <= 15 for path in sizes.stages())
    trains = [f for f in functions("launch") if f.name == "train"]
    assert len(trains) == 4 and all(f.documented for f in trains)


def test_the_formatter_decides_but_for_a_few_tables():
    marked = [
        line
        for _, text in files(*OURS, "tests", "benchmarks")
        for line in text.splitlines()
        if line.endswith("# fmt: skip")
    ]
    assert len(marked) <= 10 and not [line for line in marked if not re.match(r"^[\])}]", line)]


# --- what is forbidden ------------------------------------------------------------------------------------------------


def test_only_the_world_reads_the_environment():
    """And the pool, which gives its workers none, and what hides the secrets in it."""

    def reads(tree: ast.AST) -> bool:
        return any(isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") for n in ast.walk(tree))

    assert {path for path, text in files() if reads(ast.parse(text))} <= {
        "engine/redact.py",
        "engine/world.py",
        "verifiers/pool.py",
    }


def test_no_code_from_outside_is_run():
    """No pickle, eval, exec or trust_remote_code=True anywhere; no sympify or parse_expr in verifiers."""
    running = ("eval", "exec", "compile", "sympify", "parse_expr")
    found = []
    for path, text in files():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in running:
                found.append(f"{path}:{node.lineno} {node.func.id}")
            if isinstance(node, ast.keyword):
                value = getattr(node.value, "value", None)
                if node.arg in ("trust_remote_code", "allow_pickle") and value is not False:
                    found.append(f"{path}:{node.value.lineno} {node.arg}")
                if node.arg == "weights_only" and value is not True:
                    found.append(f"{path}:{node.value.lineno} weights_only")
        pickles = ("pickle", "dill", "joblib", "marshal", "shelve")
        found += [f"{path}: {module}" for module, _ in imported(tree) if module.split(".")[0] in pickles]
    assert not found


def test_public_surface():
    import losses

    of_preferences = {"chosen_nll", "dpo", "dpo_norm", "ipo", "simpo", "wpo"}
    of_ppo = {"diagnostics", "explained_variance", "gae", "kl", "ppo_policy", "ppo_value", "token_rewards", "whiten"}
    of_groups = {"cispo", "clipped_surrogate", "gspo_logprobs", "kl_loss", "token_weights", "truncated_ratio"}
    of_groups |= {f"{name}_advantages" for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp")}
    heads = {"linear_argmax", "linear_logprobs", "linear_loss", "naive_logprobs", "naive_loss"}
    assert set(losses.__all__) == of_preferences | of_ppo | of_groups | heads | {"sft"}
    for name in losses.__all__:
        assert getattr(losses, name).__doc__, f"losses.{name} has no docstring"


def test_modules_are_ours_and_documented():
    undocumented = [path for path, text in files() if not ast.get_docstring(ast.parse(text))]
    assert not undocumented
    for folder in OURS:
        assert Path(str(importlib.import_module(folder).__file__)).is_relative_to(ROOT)

"""The arrows between folders, who reads the environment, what is forbidden, and the public surface: in a second."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("losses", "verifiers", "engine", "rollout", "launch", "tests", "benchmarks")
MAY_IMPORT = {
    "losses": {"torch", "triton"},
    "verifiers": {"sympy", "mpmath", "langdetect", "nltk"},
    "engine": {
        "torch",
        "transformers",
        "safetensors",
        "datasets",
        "bitsandbytes",
        "numpy",
        "tqdm",
        "yaml",
        "jinja2",
        "losses",
        "huggingface_hub",
        "pyarrow",
        "tokenizers",
        "flash_attn",
        "flash_attn_interface",
        "wandb",
    },
    "rollout": {"torch", "engine", "numpy", "transformers"},
}


def trees(folder: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows(folder):
    allowed = MAY_IMPORT[folder] | {folder, "__future__"} | set(sys.stdlib_module_names)
    wrong = [f"{path}: {name}" for path, tree in trees(folder) for name in imported(tree) if name not in allowed]
    assert not wrong


def test_nothing_imports_launch():
    wrong = [
        path
        for folder in FOLDERS
        if folder not in ("launch", "tests", "benchmarks")
        for path, tree in trees(folder)
        if "launch" in imported(tree)
    ]
    assert not wrong


def test_only_the_world_reads_the_environment():
    def reads(tree):
        return any(isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") for n in ast.walk(tree))

    found = {
        str(path)
        for folder in ("losses", "verifiers", "engine", "rollout", "launch")
        for path, tree in trees(folder)
        if reads(tree)
    }
    assert found <= {"engine/world.py"}


def test_no_code_from_outside_is_run():
    """No pickle, eval, exec or trust_remote_code=True anywhere; no sympify or parse_expr in verifiers."""
    wrong = []
    for folder in ("losses", "verifiers", "engine", "rollout", "launch"):
        for path, tree in trees(folder):
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in ("eval", "exec", "compile", "sympify", "parse_expr")
                ):
                    wrong.append(f"{path}:{node.lineno} {node.func.id}")
                if (
                    isinstance(node, ast.keyword)
                    and node.arg in ("trust_remote_code", "allow_pickle")
                    and getattr(node.value, "value", None) is not False
                ):
                    wrong.append(f"{path}:{node.value.lineno} {node.arg}")
                if (
                    isinstance(node, ast.keyword)
                    and node.arg == "weights_only"
                    and getattr(node.value, "value", None) is not True
                ):
                    wrong.append(f"{path}:{node.value.lineno} weights_only")
            wrong += [
                f"{path}: {name}"
                for name in imported(tree)
                if name in ("pickle", "dill", "joblib", "marshal", "shelve")
            ]
    assert not wrong


def test_public_surface():
    import losses

    assert set(losses.__all__) == {
        "chosen_nll",
        "diagnostics",
        "dpo",
        "dpo_norm",
        "explained_variance",
        "gae",
        "ipo",
        "kl",
        "linear_argmax",
        "linear_logprobs",
        "linear_loss",
        "naive_logprobs",
        "naive_loss",
        "ppo_policy",
        "ppo_value",
        "sft",
        "simpo",
        "token_rewards",
        "whiten",
        "wpo",
    }
    for name in losses.__all__:
        assert getattr(losses, name).__doc__, f"losses.{name} has no docstring"


def test_modules_are_ours_and_documented():
    for folder in ("losses", "engine", "launch"):
        for path, tree in trees(folder):
            assert ast.get_docstring(tree), f"{path} has no docstring"
        assert Path(importlib.import_module(folder).__file__).is_relative_to(ROOT)

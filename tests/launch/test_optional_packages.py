"""What needs a package that is not installed says so in one line, before any weight is read; what does not need it
runs.

A package is made absent in the process that needs it, also where it is installed: its place in sys.modules says None.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError, require

ROOT = Path(__file__).parents[2]
WITHOUT = """
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None
from engine.model import build
load = build.load_policy
build.load_policy = lambda *args, **options: print("LOADING WEIGHTS", flush=True) or load(*args, **options)
sys.argv = {words!r}
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(absent: tuple[str, ...], module: str, *words: object) -> subprocess.CompletedProcess:
    program = WITHOUT.format(absent=absent, words=[module, *map(str, words)])
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("absent", "stage", "flags", "expected"),
    [
        (
            "bitsandbytes",
            "sft",
            ["--optimizer", "adamw_8bit"],
            "--optimizer adamw_8bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes",
        ),
        (
            "bitsandbytes",
            "dpo",
            ["--use_lora", "--load_in_4bit"],
            "--load_in_4bit needs the package bitsandbytes, which is not installed",
        ),
        (
            "pyarrow",
            "sft",
            ["--dataset_name", "x.parquet"],
            "x.parquet: a parquet file needs the package pyarrow, which is not installed",
        ),
        (
            "datasets",
            "sft",
            ["--dataset_name", "somebody/something"],
            "somebody/something: a dataset of the hub, or one that was saved to disk, needs the package datasets",
        ),
    ],
)
def test_one_line_before_any_weight(absent, stage, flags, expected, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    flags = [tmp_path / flag if flag == "x.parquet" else flag for flag in flags]
    done = run(
        (absent,), f"launch.{stage}", *flags, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"
    )
    assert done.returncode == 2 and "LOADING WEIGHTS" not in done.stdout, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert expected in line and "Traceback" not in done.stderr


def test_a_stage_and_its_plan_need_none_of_them(tmp_path):
    """On JSON lines, with adapters: training, and what --dry_run plans."""
    absent = ("bitsandbytes", "pyarrow", "datasets")
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(20)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = run(
        absent,
        "launch.sft",
        "--max_steps",
        1,
        "--output_dir",
        tmp_path / "first",
        "--cache_dir",
        tmp_path / "cache",
        "--sample_tokens",
        0,
    )
    assert made.returncode == 0, made.stderr
    flags = [
        "--model_name_or_path",
        tmp_path / "first" / "final",
        "--dataset_name",
        tmp_path / "x.jsonl",
        "--use_lora",
        "--max_steps",
        2,
        "--sample_tokens",
        0,
        "--cache_dir",
        tmp_path / "cache",
    ]
    trained = run(absent, "launch.sft", *flags, "--output_dir", tmp_path / "second")
    assert trained.returncode == 0 and (tmp_path / "second" / "final" / "model.safetensors").is_file(), trained.stderr
    planned = run(
        absent, "launch.plan", "sft", *flags, "--gpu", "h100-80gb", "--gpus", 1, "--output_dir", tmp_path / "third"
    )
    assert planned.returncode == 0 and "it fits" in planned.stdout, planned.stderr


def test_half_an_installation_is_named_as_such(tmp_path, monkeypatch):
    (tmp_path / "halved.py").write_text("raise OSError('libhalf.so: cannot open\\nshared object file')")
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    require("json", "--anything")
    with pytest.raises(
        UserError,
        match=(
            r"--x needs the package halved, which cannot be imported \(OSError: libhalf.so: cannot open shared object"
            r" file\)"
        ),
    ):
        require("halved", "--x")
    with pytest.raises(
        UserError,
        match=(
            r"needs_more, which cannot be imported \(ModuleNotFoundError: No module named 'a_package_that_nobody_has'\)"
        ),
    ):
        require("needs_more", "--x")
    with pytest.raises(
        UserError, match=r"nowhere_to_be_found, which is not installed: pip install nowhere_to_be_found"
    ):
        require("nowhere_to_be_found", "--x")

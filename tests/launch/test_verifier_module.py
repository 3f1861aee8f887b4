"""--verifier_module through the real entry points: it judges, it is part of the run, and it is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import ranks
from tests.launch.test_equivalence import Runs, rows

JUDGE = """
NAMES = ("short_ones",)

def check(ground_truth):
    if not isinstance(ground_truth, dict):
        raise ValueError("expected an object")

def verify(response, ground_truth):
    return (1 / (1 + len(response)), f"{len(response)} characters")
"""


@pytest.fixture(scope="module")
def runs(tuned, tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("module")
    (root / "judge.py").write_text(JUDGE)
    problems = next(Path(tuned).glob("embedded-v*")).glob("*problems*.jsonl")
    held = [json.loads(line) for path in problems for line in path.read_text().splitlines()][:24]
    names = ["judge", "Short_Ones", "gsm8k"]
    lines = [row | {"dataset": names[i % 3]} for i, row in enumerate(held)]
    lines = [row if row["dataset"] == "gsm8k" else row | {"ground_truth": {"of": i}} for i, row in enumerate(lines)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    flags = {
        "cache_dir": tuned,
        "dataset_name": root / "rows.jsonl",
        "verifier_module": root / "judge.py",
        "max_steps": 2,
        "batch_size": 6,
        "num_samples_per_prompt": 2,
        "num_ppo_epochs": 1,
        "eval_samples": 1,
    }
    return Runs("ppo", root, flags)


def test_a_run_is_rewarded_by_it_and_depends_on_its_content(runs):
    result = runs.launch("out")
    assert result.ok, result.output
    assert f"verifier of your own: {runs.root / 'judge.py'}#sha256=" in result.output
    found = [row for row in rows(runs.root / "out") if "loss" in row]
    assert len(found) == 2 and all(row["rollout/errors"] == 0 for row in found)
    scores = [row[f"verified/{name}"] for row in found for name in ("judge", "short_ones") if f"verified/{name}" in row]
    assert scores and all(0 < score < 1 for score in scores)
    (runs.root / "judge.py").write_text(JUDGE + "# another\n")
    try:
        again = runs.launch("out", log="again")
        config = Runs("ppo", runs.root, {}).launch("from_config", config=runs.root / "out" / "config.yaml")
    finally:
        (runs.root / "judge.py").write_text(JUDGE)
    assert again.codes == [2] and "holds a run with --verifier_module" in again.output, again.output
    assert config.codes == [2] and "judge.py has changed: its sha256 was" in config.output, config.output


def test_a_file_that_cannot_be_loaded_is_refused_before_anything_else(runs, tmp_path):
    (tmp_path / "broken.py").write_text("def verify(response, ground_truth)\n    return 1\n")
    result = runs.launch("broken", verifier_module=tmp_path / "broken.py", cache_dir=tmp_path / "cache")
    assert result.codes == [2] and result.output.count("error: ") == 1, result.output
    assert "broken.py: cannot be loaded: line 1: SyntaxError: expected ':'" in result.output
    assert "fine-tuning" not in result.output and not (tmp_path / "cache").exists()


def test_evaluation_judges_by_it(runs, tmp_path):
    flags = ["--cache_dir", runs.flags["cache_dir"], "--dataset_name", runs.flags["dataset_name"]]
    flags += ["--verifier_module", runs.flags["verifier_module"], "--num_seeds", 1, "--output", tmp_path / "out.jsonl"]
    result = ranks.launch(flags, 1, module="launch.evaluate", log=tmp_path / "log")
    assert result.ok and "verifier of your own" in result.output, result.output
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["dataset"] for row in written} == {"judge", "Short_Ones", "gsm8k"}
    ours = [row for row in written if row["dataset"] != "gsm8k"]
    assert all(row["reason"].endswith(" characters") and 0 < row["score"] < 1 for row in ours)

"""A user's own verifier: judged in processes that may be killed, refused in one line, bound to its content."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from verifiers import Checker, GroundTruthError, ModuleError, Pool, Verdict, pin

ROOT = Path(__file__).resolve().parents[2]
JUDGE = """
from __future__ import annotations
import os, time
from dataclasses import dataclass

NAMES = ["My_Task", "code"]

@dataclass
class Truth:
    text: str

def check(ground_truth):
    if ground_truth == "die":
        os._exit(1)
    if ground_truth == "bad":
        raise ValueError("no such truth:\\n'bad'")
    if ground_truth == "boom":
        {}["x"]
    while ground_truth == "hang":
        time.sleep(1)

def verify(response, ground_truth):
    while response == "hang":
        time.sleep(1)
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise RuntimeError("oh\\nno")
    if response == "exit":
        raise SystemExit(0)
    odd = {"two": 2, "minus": -0.1, "nan": float("nan"), "none": None, "text": "1", "pair": (0.5, "half\\nright")}
    return odd.get(response, Truth(response) == Truth(ground_truth))
"""


@pytest.fixture
def judge(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(JUDGE)
    return tmp_path / "mine.py"


def test_scores_reasons_and_errors(judge):
    expected = {
        "right": (1.0, "ok"),
        "wrong": (0.0, "ok"),
        "pair": (0.5, "ok"),
        "two": (0.0, "error"),
        "minus": (0.0, "error"),
        "nan": (0.0, "error"),
        "none": (0.0, "error"),
        "text": (0.0, "error"),
        "raise": (0.0, "error"),
        "exit": (0.0, "error"),
    }
    rows = [(response, "right", name) for response in expected for name in ("mine", " MY_TASK", "code")]
    with Pool(2, module=pin(str(judge))) as pool:
        verdicts = pool.score(rows).verdicts
        assert pool.killed == 0
        assert [(v.score, v.status) for v in verdicts] == [expected[row[0]] for row in rows]
        assert all("\n" not in v.reason for v in verdicts)
        said = {row[0]: v.reason for row, v in zip(rows, verdicts, strict=True)}
        assert said["pair"] == "half right" and said["raise"] == "mine.py: RuntimeError: oh no"
        several = pool.score([("42", ["42", "42", "x"], ["gsm8k", "mine", "code"]), ("42", "42", "gsm8k")])
        assert several.scores == [2.0, 1.0] and several.errors == 0


def test_one_that_hangs_or_dies_costs_its_row(judge):
    rows = [(("hang", "die", "a")[i % 3], "a", "mine") for i in range(6)] + [("it is 42", "42", "gsm8k")] * 30
    with Pool(2, module=pin(str(judge)), silence=1.0) as pool:
        batch = pool.score(rows)
        assert pool.killed == 4 and batch.errors == 4 and batch.scores[6:] == [1.0] * 30
    assert [v.status for v in batch.verdicts[:6]] == ["error", "error", "ok"] * 2
    assert batch.verdicts[0].reason == "the worker process gave no verdict within 1 s and was killed"


def test_rows_are_checked_in_a_process_too(judge):
    with Checker("default", pin(str(judge)), silence=1.0) as check:
        for row in (("mine", "x"), ("MINE", None), (["code", "gsm8k"], ["x", "42"]), ("math", "5")):
            check(*row)
        for dataset, truth, says in [
            ("mine", "bad", "ground_truth: mine.py: no such truth: 'bad'"),
            ("mine", "boom", "ground_truth: mine.py: KeyError: 'x'"),
            ("mine", "hang", "gave no verdict within 1 s"),
            ("mine", "die", "the worker process was killed"),
            ("mine", b"bytes", "holds what JSON does not"),
            ("min", "x", r"unknown verifier min \(nearest: mine\)"),
            ("code_stdio", "x", "code is not executed here"),
            ("gsm8k", "x", "no number"),
        ]:
            with pytest.raises(GroundTruthError, match=says) as problem:
                check(dataset, truth)
            assert "\n" not in str(problem.value)
        check("mine", "x")  # after all that


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def verify(response, ground_truth)\n    return 1\n", "cannot be loaded: line 1: SyntaxError"),
        ("import no_such_package\n", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise SystemExit(0)\n", "cannot be loaded: SystemExit"),
        ("import os; os._exit(0)\n", "the worker process was killed"),
        ("while True: pass\n", "gave no verdict within 2 s"),
        ("def verfy(response, ground_truth): return 1\n", r"no function verify\(.*\) \(nearest: verfy\)"),
        ("verify = 1\n", "no function verify"),
        ("def verify(response): return 1\n", r"cannot be called as verify\(response, ground_truth\)"),
        ("def verify(r, g): return 1\ncheck = 1\n", "check is no function"),
        ("def verify(r, g): return 1\ndef check(): pass\n", r"cannot be called as check\(ground_truth\)"),
        ("def verify(r, g): return 1\nNAMES = 'a'\n", "NAMES must be a list of texts"),
        ("def verify(r, g): return 1\nNAMES = ['Math']\n", "math is the name of a verifier that is here already"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_in_one_line(source, says, tmp_path):
    (tmp_path / "bad.py").write_text(source)
    with (
        pytest.raises(ModuleError, match=f"bad.py: .*{says}") as problem,
        Checker("default", pin(str(tmp_path / "bad.py")), silence=2.0),
    ):
        pass
    assert "\n" not in str(problem.value)


def test_the_name_of_a_verifier_is_taken(tmp_path):
    (tmp_path / "gsm8k.py").write_text(JUDGE)
    with (
        pytest.raises(ModuleError, match="give the file another name"),
        Checker("default", pin(str(tmp_path / "gsm8k.py"))),
    ):
        pass


def test_a_pin_is_the_content(judge):
    pinned = pin(str(judge))
    assert pin(pinned) == pinned and pinned.startswith(f"{judge}#sha256=")
    with Pool(1, module=pinned) as pool:
        judge.write_text(JUDGE + "\n")
        assert "has changed" in pool.score([("a", "a", "mine")]).verdicts[0].reason
    with pytest.raises(ModuleError, match=r"mine.py has changed: its sha256 was"):
        pin(pinned)
    with pytest.raises(ModuleError, match=r"min.py: No such file or directory \(nearest: mine.py\)"):
        pin(str(judge.with_name("min.py")))
    with pytest.raises(ModuleError, match="expected a Python file"):
        pin(str(judge.parent))


def test_it_is_never_run_in_the_process_itself(judge, monkeypatch):
    judge.write_text(JUDGE + "import os\nopen(__file__ + '.' + str(os.getpid()), 'w').close()\n")
    import os

    with Checker("default", pin(str(judge))) as check, Pool(1, module=pin(str(judge))) as pool:
        check("mine", "a")
        assert pool.score([("a", "a", "mine")]).scores == [1.0]
        assert check.own.judge("a", "a") == Verdict(
            0.0, "a user's verifier judges in the pool's processes alone", "error"
        )
    made = [path.suffix for path in judge.parent.glob("mine.py.*")]
    assert len(made) == 2 and f".{os.getpid()}" not in made


# --- python -m launch.verify ------------------------------------------------------------------------------------------


def run(tmp_path: Path, rows: list, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "launch.verify", str(tmp_path / "rows.jsonl"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_launch_verify_takes_it(judge, tmp_path):
    rows = [
        {"response": "a", "ground_truth": "a", "dataset": "mine"},
        {"response": "a", "ground_truth": "bad", "dataset": "My_Task"},
        {"response": "it is 42", "ground_truth": "42", "dataset": "gsm8k"},
        {"response": "print(1)", "ground_truth": "1", "dataset": "code_stdio"},
    ]
    done = run(tmp_path, rows, "--verifier_module", str(judge))
    assert done.returncode == 0, done.stderr
    assert f"verifier of your own: {judge}#sha256=" in done.stdout and "2 bad rows left out" in done.stdout
    assert f"rows.jsonl:1  {'mine':10}  1.00" in done.stdout and "rows.jsonl:3  gsm8k       1.00" in done.stdout
    assert "rows.jsonl:2: field ground_truth: mine.py: no such truth: 'bad'" in done.stderr
    assert "rows.jsonl:4: field dataset: code_stdio is not here" in done.stderr
    assert "code is not executed here" in done.stderr
    for words, says in [
        (["--dataset", "my_tas"], "error: --dataset: unknown verifier my_tas (nearest: my_task)"),
        (
            ["--verifier_module", str(tmp_path / "no.py")],
            f"error: --verifier_module {tmp_path / 'no.py'}: No such file",
        ),
    ]:
        wrong = run(tmp_path, rows, "--verifier_module", str(judge), *words)
        assert wrong.returncode == 2 and wrong.stderr.startswith(says) and wrong.stderr.count("\n") == 1, wrong.stderr

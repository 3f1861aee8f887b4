"""The pool keeps order, feeds no faster than it is served, survives its workers; launch.verify by its entry point."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from verifiers import Pool, ScoredBatch, Verdict, verify

ROOT = Path(__file__).resolve().parents[2]
ROWS = [(f"so {i}\n#### {i % 7}", str(i % 5), "gsm8k") for i in range(300)]


def judge(response, ground_truth, dataset, **options) -> Verdict:
    """A verifier for tests: 'die' ends its process, 'hang' never answers."""
    if response == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while response == "hang":
        time.sleep(1)
    return Verdict(float(len(response)), ground_truth)


@pytest.fixture
def odd_judge(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "test_pool:judge"


def test_the_order_and_the_verdicts_are_those_of_one_process():
    with Pool(2, in_flight=3) as pool:
        batch = pool.score(ROWS)
        again = pool.score(iter(ROWS))
    assert batch.verdicts == again.verdicts == [verify(*row) for row in ROWS]
    assert batch.errors == 0 and not batch.too_many_errors and all(batch.mask) and pool.killed == 0
    assert sum(batch.scores) == sum(i % 7 == i % 5 for i in range(300))


def test_rows_of_any_size_and_shape_pass_through():
    rows = [
        ("x" * 5_000_000 + " 42", "42", "gsm8k"),
        ("\ud800 42", "42", "gsm8k"),
        ("", {"func_name": "validate_no_commas"}, "ifeval"),
    ] * 6
    with Pool(2) as pool:
        assert pool.score(rows).scores == [1.0, 1.0, 0.0] * 6


def test_a_killed_worker_costs_one_row_and_is_replaced(odd_judge):
    rows = [("die" if i == 37 else "a" * (i % 9), str(i), "any") for i in range(120)]
    with Pool(2, judge=odd_judge) as pool:
        batch = pool.score(rows)
        assert pool.killed == 1
        assert [i for i, verdict in enumerate(batch.verdicts) if verdict.status == "error"] == [37]
        assert [v.reason for i, v in enumerate(batch.verdicts) if i != 37] == [str(i) for i in range(120) if i != 37]
        assert batch.errors == 1 and not batch.too_many_errors and not batch.mask[37]
        assert pool.score(rows[:30]).errors == 0


def test_a_silent_worker_is_replaced(odd_judge):
    with Pool(1, judge=odd_judge, silence=1.0, in_flight=4) as pool:
        batch = pool.score([("a", "0", ""), ("hang", "1", ""), ("bb", "2", "")])
    assert [verdict.status for verdict in batch.verdicts] == ["ok", "error", "ok"]


def test_a_worker_killed_from_outside(odd_judge):
    with Pool(2) as pool:
        threading.Timer(0.2, pool._workers[0].process.kill).start()
        batch = pool.score(ROWS * 20)
    assert len(batch.verdicts) == len(ROWS) * 20 and batch.errors <= 1


def test_more_than_one_percent_of_errors():
    fine, broken = Verdict(1.0, ""), Verdict(0.0, "", "error")
    assert not ScoredBatch([fine] * 99 + [broken], 1).too_many_errors
    assert ScoredBatch([fine] * 98 + [broken] * 2, 2).too_many_errors
    assert not ScoredBatch([], 0).too_many_errors


def test_rows_are_drawn_only_as_they_are_needed():
    drawn = []

    def rows():
        for i in range(5000):
            drawn.append(i)
            yield "#### 1", "1", "gsm8k"

    with Pool(1, in_flight=4) as pool:
        verdicts = pool.imap(rows())
        next(verdicts)
        assert len(drawn) < 600
        verdicts.close()


def test_the_verdict_does_not_depend_on_load():
    hard = [("\\boxed{\\sqrt{2}+\\sqrt{3}}", "\\sqrt{5+2\\sqrt{6}}", "math")] * 40
    stop = threading.Event()
    busy = [threading.Thread(target=lambda: [sum(range(500)) for _ in iter(stop.is_set, True)]) for _ in range(4)]
    for thread in busy:
        thread.start()
    try:
        with Pool(2) as pool:
            batch = pool.score(hard)
    finally:
        stop.set()
    assert batch.scores == [1.0] * 40 and batch.errors == 0


# --- python -m launch.verify ------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "launch.verify", *arguments], cwd=ROOT, capture_output=True, text=True)


def write(path: Path, rows: list) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def test_launch_verify_prints_verdicts_totals_and_bad_rows(tmp_path):
    commas = {"func_name": "validate_no_commas", "N": None}
    file = write(
        tmp_path / "r.jsonl",
        [
            {"response": "#### 41", "ground_truth": "42", "dataset": "GSM8K"},
            "",
            {"response": "\\boxed{\\frac12}", "ground_truth": "0.5", "dataset": "MATH"},
            "not json",
            {"respons": "x", "ground_truth": "42", "dataset": "gsm8k"},
            {"response": "x", "ground_truth": "42", "dataset": "gsm8"},
            {"response": "a\ud800", "ground_truth": json.dumps(commas), "dataset": "ifeval"},
        ],
    )
    done = run(file, "--output", str(tmp_path / "out.jsonl"))
    assert done.returncode == 0, done.stderr
    assert f"{file}:1  gsm8k       0.00   extracted 41, expected 42" in done.stdout
    assert f"{file}:3  math        1.00" in done.stdout and "3 bad rows left out" in done.stdout
    assert (
        f"{file}:4: not JSON" in done.stderr
        and f"{file}:5: field response is missing (nearest: respons)" in done.stderr
    )
    assert f"{file}:6: field dataset: unknown verifier gsm8 (nearest: gsm8k)" in done.stderr
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["line"], row["score"], row["status"]) for row in written] == [
        (1, 0.0, "ok"),
        (3, 1.0, "ok"),
        (7, 1.0, "ok"),
    ]
    assert run(file, "--on_bad_row", "error").returncode == 2


def test_launch_verify_with_workers_and_one_verifier_for_all(tmp_path):
    rows = [{"response": f"it is {i}", "ground_truth": "7"} for i in range(300)]
    done = run(write(tmp_path / "r.jsonl", rows), "--dataset", "gsm8k", "--workers", "2", "--failures_only")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 301 and lines[-1].split() == ["gsm8k", "300", "1", "0.0033", "0"]
    assert [int(line.split(":")[1].split()[0]) for line in lines[:-2]] == [i for i in range(1, 301) if i != 8]


def test_launch_verify_helps():
    done = run("--help")
    assert done.returncode == 0 and "ground_truth" in done.stdout and "--mode" in done.stdout
    wrong = run("x.jsonl", "--modee", "reference")
    assert wrong.returncode == 2 and "unknown flag --modee (did you mean mode?)" in wrong.stderr
    missing = run("no-such-file.jsonl")
    assert (
        missing.returncode == 2
        and "no-such-file.jsonl: No such file" in missing.stderr
        and "Traceback" not in missing.stderr
    )

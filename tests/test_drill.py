"""The drill itself: a suite that is blind is said to be, a case that raises or hangs ends nothing, and what is played
as a machine's death loses what no fsync had reached.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from pathlib import Path

import pytest

from benchmarks.faultdrill import __main__ as drill
from benchmarks.faultdrill import crash_points, lab, lanes, table
from benchmarks.faultdrill.events import listing, tear
from benchmarks.faultdrill.suite import Case, Suite


def raising(directory: Path) -> str:
    raise ValueError("of the drill's own")


def hanging(directory: Path) -> str:
    time.sleep(60)
    return ""


def of(*results: str):
    """Cases that end so."""
    return lambda count, seed: iter(Case(f"{i}", lambda _, result=r: result) for i, r in enumerate(results))


def suite(cases, **more) -> Suite:
    return Suite("name", "things", "all of them", (3, 9), cases, **more)


def test_what_a_suite_comes_to():
    """A control is caught by a verdict; neither by an error nor where all of its cases pass."""
    raised = lambda count, seed: iter([Case("raises", raising)])
    controls = {"caught": of("", "a wrong bit"), "blind": of("", ""), "broken": raised}
    said: list[str] = []
    found = table.run(
        suite(of("", "two\nlines", ""), controls=controls, baselines={"peer": of("", "x")}), 2, 7, True, said.append
    )
    assert (found.run, found.passed, found.ok) == (2, 1, False)
    assert found.failures[0].problem == "two lines" and found.failures[0].replay == "--replay name:7:1"
    assert found.controls["caught"] == "1: a wrong bit" and found.baselines == {"peer": [1, 2]}
    assert found.blind == {"blind": "every case of it passed", "broken": "ValueError: of the drill's own"}
    assert said[0] == "  failed: 1: two lines" and "1 of 3" in table.text([found])
    assert table.run(suite(of("")), 1, 1, False, print).ok


def test_a_peer_that_was_not_judged_is_said_to_be():
    """It may be the drill that is broken."""
    said: list[str] = []
    peers = {"peer": lambda count, seed: iter([Case("raises", raising), *of("x")(1, 1)])}
    found = table.run(suite(of(""), baselines=peers), 2, 1, True, said.append)
    assert said == ["  no verdict: peer: raises: ValueError: of the drill's own"] and found.baselines == {
        "peer": [0, 2]
    }


def test_no_case_ends_the_drill(monkeypatch, tmp_path):
    assert table.tried(Case("raises", raising), tmp_path) == ("ValueError: of the drill's own", False)
    began = time.monotonic()
    assert table.tried(Case("hangs", hanging), tmp_path, bound=0.2) == ("it took longer than 0 s", False)
    assert time.monotonic() - began < 5


def test_the_exit_status(monkeypatch, capsys, tmp_path):
    cases = {"good": suite(of("")), "bad": suite(of("wrong"))}
    for name, status in (("good", 0), ("bad", 1)):
        monkeypatch.setattr(drill, "discover", lambda name=name: ([cases[name]], []))
        assert drill.main(["--out", str(tmp_path / "out.json")]) == status
        assert json.loads((tmp_path / "out.json").read_text())["suites"][0]["passed"] == 1 - status
    assert drill.main(["--replay", "name:1:0"]) == 1 and "name 0: wrong" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--suite nobody: there is none, expected one of name"):
        drill.main(["--suite", "nobody"])


def test_lanes_take_all_suites_once_and_end_about_together():
    named = lambda name: Suite(name, "things", "all", (1, 1), of(""))
    suites = [named(name) for name in ("kills", "restarts", "damage", "storage", "overhead", "else")]
    beside, alone = lanes.split(suites, 2)
    assert beside == [["kills", "storage"], ["restarts", "damage", "else"]] and alone == ["overhead"]
    assert lanes.split(suites[:1], 2) == ([["kills"]], [])


def test_what_lanes_come_to_is_one_table(monkeypatch, capfd, tmp_path):
    """In the order of the suites, whichever lane was done first; one that dies is named, and the status is 1."""
    assert (
        drill.main(["--suite", "rows", "--suite", "configs", "--count", "2", "--out", str(tmp_path / "out.json")]) == 0
    )
    said = capfd.readouterr().out
    rows = [line.split("  ")[0] for line in said[said.index("suite  ") :].splitlines()[2:4]]
    assert rows == ["rows", "configs"] and said.count("left out here:") == 1
    assert [of["run"] for of in json.loads((tmp_path / "out.json").read_text())["suites"]] == [2, 2]
    start = lanes._start
    monkeypatch.setattr(lanes, "_start", lambda names, *of: start(names if "rows" in names else ["nobody"], *of))
    assert drill.main(["--suite", "rows", "--suite", "configs", "--count", "1"]) == 1
    assert "came to no end: configs" in capfd.readouterr().out


def test_every_suite_is_there_once_and_has_controls():
    """In the order of the table; cases come again from seed and name."""
    suites, absent = drill.discover()
    names = [of.name for of in suites]
    assert names[:2] == ["kills", "crash_points"] and len(set(names)) == len(names)
    assert all(of.controls and of.sizes[0] <= of.sizes[1] for of in suites)
    assert all(":" in line or "GPU" in line for line in absent)


def test_configurations_are_spread():
    """Few that follow each other differ: in a short drill every stage and method, on one rank and two."""
    for seed in range(5):
        every = lab.setups(seed)
        assert len(set(every)) == len(every) and {s.stage for s in every[:4]} == set(lab.STAGES)
        assert {s.ranks for s in every[:4]} == {1, 2}
        assert {s.method for s in every[:8]} == {s.method for s in every}


def remains(**changes) -> lab.Remains:
    known = {"final": {"final/a": "1"}, "checkpoints": {"step-2": {"s": "1"}, "step-4": {"s": "2"}}, "rows": ["1", "2"]}
    return lab.Remains(**(known | {"samples": []} | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"final": {}}, "there is no final/"),
        ({"final": {"final/a": "2"}}, "final/a is not that of"),
        ({"final": {"final/a": "1", "final/b": "1"}}, "final/b is not that of"),
        ({"checkpoints": {"step-3": {"s": "9"}, "step-4": {"s": "2"}}}, ""),  # one at which it was told to end
        ({"checkpoints": {"step-2": {"s": "1"}}}, "there is no step-4"),
        ({"checkpoints": {"step-4": {"s": "3"}}}, "step-4: masters or moments"),
        ({"rows": ["1"]}, r"rows of the trajectory differ from number 2 on \(1 of 2\)"),
        ({"samples": ["1"]}, "samples of the trajectory differ from number 1 on"),
    ],
)
def test_what_is_compared(changes, said):
    found = lab.difference(remains(**changes), remains())
    assert bool(found) == bool(said) and re.match(said, found)


def test_a_machine_that_dies_loses_what_no_fsync_had_reached(tmp_path):
    """Whole files, ends of files, and what was written anew under the same length."""
    root, synced = tmp_path / "root", tmp_path / "synced"
    root.mkdir()
    for name in ("old", "anew"):
        (root / name).write_text("0123456789")
    before = listing(root)
    for name in ("kept", "lost", "grown"):
        (root / name).write_text("0123456789")
    reached = [(root / name).stat() for name in ("kept", "grown")]
    synced.write_text("".join(json.dumps([s.st_ino, s.st_size, s.st_mtime_ns]) + "\n" for s in reached))
    time.sleep(0.01)
    with open(root / "grown", "a") as f:
        f.write("abcdef")
    (root / "anew").write_text("9876543210")
    (root / "kept").rename(root / "renamed")
    assert tear(root, before, synced) == 3
    left = {path.name: path.read_text() for path in root.iterdir()}
    expected = {"old": "0123456789", "renamed": "0123456789", "grown": "0123456789a", "lost": "01", "anew": "98"}
    assert left == expected


NEVER = 10**6  # a change that is not reached: the machine dies after all of it
DURABLE = ("metrics", "directory", "new directory", "store", "export")


@pytest.mark.parametrize("work", DURABLE)
def test_what_has_its_name_outlives_the_machine(work, tmp_path):
    """A file that replaces another, a directory that is finished: all of it is on the disk before it is named."""
    point = crash_points.Point(work, 1, 0, NEVER, "torn")
    for control, kept in (("", True), ("no fsync", False)):
        (tmp_path / control).mkdir(exist_ok=True)
        assert (crash_points.strike(point, control, tmp_path / control) == "") == kept


@pytest.mark.parametrize("number", [NEVER, 3])
def test_points_at_which_a_checkpoint_is_left(number, tmp_path):
    for variant in crash_points.VARIANTS:
        (tmp_path / variant).mkdir()
        point = crash_points.Point("save", 1, 0, number, variant)
        assert crash_points.strike(point, "", tmp_path / variant) == ""
    strike = functools.partial(crash_points.strike, crash_points.Point("save", 1, 0, NEVER, "torn"), "unchecked shards")
    (tmp_path / "control").mkdir()
    assert strike(tmp_path / "control") != "" and os.listdir(tmp_path / "control")

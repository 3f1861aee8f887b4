"""The drill's own suites: a name makes its case again, some cases of each hold, and each of them can see."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from benchmarks.faultdrill import baseline, baseline_runs, damage, numerics, storage, trainer_runs, world_sizes
from benchmarks.faultdrill.suite import Suite

MODULES = {module.SUITE.name: module for module in (damage, numerics, storage, world_sizes)}
HOLD = {
    "damage": ("sft-2/shard/numbers/0", "sft-2/config/truncate/0"),
    "numerics": ("sft/loss:nan/rank1", "sft/moments:nan/rank0"),
    "storage": ("sft/full/output/30", "sft/read-only/cache/1"),
    "world-sizes": ("position/0.1", "run/sft/1-2/2"),
}
FAIL = {
    "damage": ("shards_are_not_verified", "sft-2/shard/numbers/0", "other bits, and the run ended as if"),
    "numerics": (False, "sft/weights:nan/rank1", "holds numbers that are none"),
    "storage": ("final_is_written_in_place", "sft/readers/final/1", "readings found"),
    "world-sizes": ("positions_are_of_a_rank", "position/0.1", "hold other examples"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_name_makes_its_case_again(name):
    """Of every size, no case twice; another seed makes others."""
    suite: Suite = MODULES[name].SUITE
    for count in suite.sizes:
        drawn = [case.name for case in suite.cases(count, 3)]
        assert len(drawn) == len(set(drawn)) == count
        assert [case.name for case in suite.cases(count, 3)] == drawn
        assert [MODULES[name].case(word).name for word in drawn] == drawn
    assert [case.name for case in suite.cases(suite.sizes[0], 4)] != [
        case.name for case in suite.cases(suite.sizes[0], 3)
    ]
    for controls in suite.controls.values():
        assert 1 <= len(list(controls(3, 0))) <= 3


def test_damage_is_drawn_evenly():
    """Each target before any twice, each kind about as often."""
    targets = sum(len(there) for there in damage.SCENES.values())
    drawn = [case.name.split("/") for case in damage.SUITE.cases(targets, 0)]
    assert len({(scene, target) for scene, target, *_ in drawn}) == targets
    often = [sum(kind == of for _, _, kind, _ in drawn) for of in damage.KINDS]
    assert min(often) >= targets / len(often) / 3


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in HOLD.items() for case in cases])
def test_some_cases_hold(name, case, tmp_path):
    assert MODULES[name].case(case).run(tmp_path) == ""


@pytest.mark.parametrize("name", FAIL)
def test_a_broken_variant_is_caught(name, tmp_path):
    hook, case, expected = FAIL[name]
    assert expected in MODULES[name].case(case, hook).run(tmp_path)


def test_stock_dcp_is_asked_for_the_same(tmp_path):
    """And takes a flipped bit for a number."""
    cases = list(baseline.DAMAGE["torch.distributed.checkpoint, load"](2, 0))
    found = []
    for number, case in enumerate(cases):
        (place := tmp_path / str(number)).mkdir()
        found.append(case.run(place))
    assert found[0].startswith("other bits") and found[1].startswith("a traceback")


TRACEBACK = "Traceback (most recent call last):\n  File\nOSError: no /tmp/faultdrill-x/run/checkpoint-2 here\n"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (baseline_runs.came_to(0, "", "a", "a"), ""),
        (baseline_runs.came_to(0, "", "b", "a"), "other bits"),
        (baseline_runs.came_to(-9, "", "", "a"), "died by signal 9"),
        (baseline_runs.came_to(3, "one line\n", "", "a"), "exit status 3"),
        (baseline_runs.came_to(1, TRACEBACK, "a", "a"), "a traceback: OSError: no run/checkpoint-2 here"),
        (baseline_runs.refusal(1, "error: no room\n"), ""),
        (baseline_runs.refusal(1, "error: no room\nand more\n"), "exit status 1 and 2 lines"),
        (baseline_runs.refusal(1, TRACEBACK), "a traceback"),
        (baseline_runs.refusal(0, "error: no room\n"), "status 0"),
        (baseline_runs.both("", ""), ""),
        (baseline_runs.both("", "other bits"), "one line; with room: other bits"),
        (baseline_runs.both("status 0", ""), "status 0; with room: the same bits"),
        (baseline_runs.stopped(85, "stopped: ...\n", 1, False, ""), ""),
        (baseline_runs.stopped(0, "", 9, True, ""), ""),  # it came too late
        (baseline_runs.stopped(0, "", 1, False, ""), "status 0 and final/, as if it were finished; the same bits"),
        (baseline_runs.stopped(-15, "", 3, False, ""), "died by signal 15; 3 steps lost; the same bits"),
        (baseline_runs.stopped(85, "", 2, False, ""), "2 steps lost; the same bits"),
        (baseline_runs.stopped(85, "", 1, False, "other bits"), "other bits"),
        (baseline_runs.trained_on(1, "error: step 3 is not finite\n", []), ""),
        (baseline_runs.trained_on(1, "error: not finite\n", []), "no step is named"),
        (baseline_runs.trained_on(0, "", []), "it went on"),
        (baseline_runs.trained_on(1, "step 3: nan\n", ["a"]), "1 files of weights.*with status 1; the number is in"),
        (baseline_runs.trained_on(0, "information\n", ["a"]), "1 files of weights.*all were well; not a word"),
    ],
)
def test_how_a_peer_is_judged(found, said):
    """By what the engine is asked for, so that it could pass."""
    assert bool(found) == bool(said) and re.match(said, found)


def test_a_peer_is_named_where_it_cannot_run(monkeypatch, capsys):
    """In place of cases that it would fail; else at most eight, whose names say what is planted."""
    kinds = (baseline_runs.KILLED, baseline_runs.TOLD, baseline_runs.PLANTED, baseline_runs.DISKS)
    suites = (baseline_runs.KILLS, baseline_runs.SIGNALS, baseline_runs.NUMBERS, baseline_runs.STORAGE)
    for ready, why in ((False, "there is no accelerate"), (True, "")):
        monkeypatch.setattr(trainer_runs, "warm", lambda why=why: SimpleNamespace(unusable=why))
        monkeypatch.setattr(baseline_runs, "whole", lambda of: None)
        for names, baselines in zip(kinds, suites, strict=True):
            for cases in baselines.values():
                drawn = [case.name for case in cases(99, 1)]
                assert drawn == [f"{name}.{i}" for i, name in enumerate(names)] * ready and len(drawn) <= 8
                assert len(list(cases(2, 1))) == 2 * ready
        assert (f"not run: {why}" in capsys.readouterr().out) != ready


def test_the_newest_checkpoint_is_one_that_was_finished(tmp_path):
    """By its number."""
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-11").mkdir()
    assert baseline_runs.newest(tmp_path).name == "checkpoint-10" and baseline_runs.newest(tmp_path / "none") is None
    assert baseline_runs.newest(tmp_path, "").name == "checkpoint-11"

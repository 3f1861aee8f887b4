"""The drill's own suites: a name makes its case again, some cases of each hold, and each of them can see."""

from __future__ import annotations

import pytest

from benchmarks.faultdrill import baseline, damage, numerics, storage, world_sizes
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

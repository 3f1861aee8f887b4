"""A run's directory: which configuration it holds, and which may go on in it."""

from __future__ import annotations

import pytest
import yaml

from engine import run
from engine.errors import UserError

DEFAULTS = {"learning_rate": 1e-3, "system_role": "template", "beta": None}


@pytest.mark.parametrize(
    ("earlier", "now", "differs"),
    [
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-3, "system_role": "template"}, ""),  # a flag that is new
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-3, "system_role": "fold"}, "--system_role None, now it is fold"),
        ({"learning_rate": 1e-3, "system_role": "fold"}, {"learning_rate": 1e-3}, "--system_role fold, now it is None"),
        ({"learning_rate": 2e-3}, {"learning_rate": 1e-3}, "--learning_rate 0.002, now it is 0.001"),
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-3, "beta": 0.1}, "--beta None, now it is 0.1"),
    ],
)
def test_which_configuration_goes_on(earlier, now, differs, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier))
    if not differs:
        run._check_same_configuration(now, DEFAULTS, tmp_path / "config.yaml")
        return
    with pytest.raises(UserError, match=differs):
        run._check_same_configuration(now, DEFAULTS, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "damaged", ["", "ada", "- 1", "1: 2\nlearning_rate: 3", "x: 2026-13-45", "{", "\0", "x: !!int a"]
)
def test_a_damaged_configuration_is_one_line(damaged, tmp_path):
    (tmp_path / "config.yaml").write_text(damaged)
    with pytest.raises(UserError, match=r"config.yaml is damaged: delete it or give another"):
        run._check_same_configuration({"learning_rate": 1e-3}, DEFAULTS, tmp_path / "config.yaml")


def test_a_final_that_was_damaged_is_no_finished_run(tmp_path):
    """Weights and configurations, at any depth, by every byte; what else is there is its reader's. None is noted by an
    earlier version, or once another is about to be written.
    """
    final = tmp_path / "final"
    files = {
        name: name.encode() for name in ("model.safetensors", "config.json", "value/model.safetensors", "README.md")
    }
    for name, content in files.items():
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        (final / name).write_bytes(content)
    run._check_final(tmp_path)
    run.remember_final(tmp_path)
    run._check_final(tmp_path)
    for name, content in files.items():
        for damaged in (content[:-1] + b"x", content[:-1], b"", None):
            (final / name).unlink() if damaged is None else (final / name).write_bytes(damaged)
            if name == "README.md":
                run._check_final(tmp_path)
                continue
            with pytest.raises(UserError, match=f"{final / name} is missing or damaged: delete {final}, and the same"):
                run._check_final(tmp_path)
        (final / name).write_bytes(content)
    for damaged in ("[]", "3", '{"config.json": 3}', "nul", '{"config.json": [1]}'):
        (tmp_path / run.FINAL).write_text(damaged)
        with pytest.raises(UserError, match=r"which says what .* holds, is damaged"):
            run._check_final(tmp_path)
    run.forget_final(tmp_path)
    run._check_final(tmp_path)


def test_a_kill_while_a_directory_is_replaced_leaves_a_whole_one_or_none(tmp_path, monkeypatch):
    """At whichever rename or removal; and the next attempt ends in the new one alone."""
    import shutil
    from pathlib import Path

    class Killed(BaseException):
        pass

    def attempt(at: int) -> bool:
        """Whether it was killed, before its `at`-th event."""
        count = 0

        def before(original):
            def event(*args, **options):
                nonlocal count
                count += 1
                if count == at:
                    raise Killed
                return original(*args, **options)

            return event

        partial = tmp_path / ".final.partial"
        partial.mkdir(exist_ok=True)
        for name in ("a", "b"):
            (partial / name).write_text("new")
        with monkeypatch.context() as m:
            m.setattr(Path, "rename", before(Path.rename))
            m.setattr(shutil, "rmtree", before(shutil.rmtree))
            try:
                run.publish(partial, tmp_path / "final", None)
            except Killed:
                return True
        return False

    for at in range(1, 9):
        shutil.rmtree(tmp_path / "final", ignore_errors=True)
        (tmp_path / "final").mkdir()
        for name in ("a", "b"):
            (tmp_path / "final" / name).write_text("old")
        was_killed = attempt(at)
        found = {path.read_text() for path in (tmp_path / "final").glob("*")}
        assert found in ({"old"}, {"new"}, set()) and len(list((tmp_path / "final").glob("*"))) in (0, 2)
        assert was_killed or found == {"new"}
        attempt(0)
        assert {p.read_text() for p in (tmp_path / "final").iterdir()} == {"new"}
        assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert not was_killed

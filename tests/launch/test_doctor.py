"""What a machine can do: what is said of each thing, and when training cannot start."""

from __future__ import annotations

import re
import shutil
import tomllib
from types import SimpleNamespace

import pytest

from engine.errors import UserError
from engine.model import attention
from launch import doctor
from tests.sizes import ROOT


def test_every_thing_has_its_line(tmp_path, capsys):
    doctor.examine(doctor.Config(output_dir=str(tmp_path / "not" / "yet"), cache_dir=str(tmp_path)))
    said = capsys.readouterr().out
    rows = dict(re.findall(r"^  (\S(?:.*?\S)?) {2,}(\S.*)$", said, re.MULTILINE))
    assert {*doctor.NEEDED, *doctor.OPTIONAL, *attention.BACKENDS, "bf16", "memory", "collectives"} <= rows.keys()
    assert sum("--attention auto takes it" in row for row in rows.values()) == 1
    assert "GiB free" in rows["--output_dir"] and not (tmp_path / "not").exists()
    assert said.splitlines()[-1].startswith("done: training can start here")


def test_the_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split("[<>=]", line)[0]: line for line in project["dependencies"]}
    assert wanted.keys() <= doctor.NEEDED.keys() | doctor.OPTIONAL.keys()
    for package, (oldest, too_new) in doctor.NEEDED.items():
        bounds = [f">={oldest}"] * bool(oldest) + [f"<{too_new}"] * bool(too_new)
        assert wanted[package] == package + ",".join(bounds)


@pytest.mark.parametrize(
    "version, said",
    [
        ("2.9.1", r"torch: 2.9.1 is older than 2.11 \(pip install 'torch>=2.11,<2.14'\)"),
        ("2.14.0a0+cu130", "torch: 2.14.0a0.cu130 is newer than what is tested, below 2.14"),
        (None, "torch: not installed"),
        ("2.11.0", ""),
        ("2.13.4+cpu", ""),
    ],
)
def test_a_package_that_does_not_fit_is_named(version, said, tmp_path, monkeypatch):
    known = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda package: version if package == "torch" else known(package))
    config = doctor.Config(output_dir=str(tmp_path), cache_dir=str(tmp_path))
    if not said:
        return doctor.examine(config)
    with pytest.raises(UserError, match=f"training cannot start here: {said}"):
        doctor.examine(config)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * doctor.GIB))
    rows = list(doctor.room(doctor.Config(output_dir=str(tmp_path), cache_dir=str(tmp_path))))
    assert "3 GiB free; little for checkpoints: --output_dir elsewhere" in rows[1].value

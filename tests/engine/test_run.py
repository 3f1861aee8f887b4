"""A run's directory: which configuration it holds, and which may go on in it."""

from __future__ import annotations

import pytest
import yaml

from engine import run
from engine.errors import UserError

DEFAULTS = {"learning_rate": 1e-3, "system_role": "template", "beta": None}


@pytest.mark.parametrize("content", ["lear", "learning_rate: [1", "- 1", "", b"\xff\xfe"])
def test_a_damaged_configuration_is_one_line(content, tmp_path):
    """Cut off anywhere, it may still be YAML."""
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"config.yaml is damaged: delete it or give another --output_dir"):
        run._check_same_configuration({"learning_rate": 1e-3}, DEFAULTS, path)


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

"""Shared fixtures: one thread, small models and data made on the spot, real data where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # before any operation, so that forked or compared runs see one summation order

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real data (../shared/data) is not here")
    return SHARED


@pytest.fixture(scope="session")
def tuned(tmp_path_factory) -> Path:
    """A cache directory that holds the embedded model fine-tuned on sums, made as a first run of launch.ppo makes
    it.
    """
    from tests.launch.test_equivalence import Runs

    cache = tmp_path_factory.mktemp("cache")
    Runs("ppo", cache, {"cache_dir": cache, "max_steps": 1, "num_ppo_epochs": 1, "eval_samples": 1}).run("first", 2)
    return cache


@pytest.fixture(scope="session")
def embedded_dir(tmp_path_factory):
    """The embedded default: its model directory and data files, by name."""
    from engine.data.embedded import embedded

    return embedded(tmp_path_factory.mktemp("embedded"))

"""Marks of tests that need a package which the suite runs without as well."""

from __future__ import annotations

import importlib.util

import pytest

bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
langdetect = pytest.mark.skipif(importlib.util.find_spec("langdetect") is None, reason="langdetect is not installed")
peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")

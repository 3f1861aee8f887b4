"""Checks that a run is without, and numbers that go bad in it: what benchmarks/faultdrill plants in tests/ranks.py's
ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def word(argv: list[str], name: str) -> str:
    """The value of a flag of the drill's own, which the stage does not see."""
    at = argv.index(f"--{name}")
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


# --- controls of the damage suite -------------------------------------------------------------------------------------


def shards_are_not_verified() -> None:
    from engine.train import checkpoint

    checkpoint.damage = lambda path, world: "" if (path / "COMPLETE").is_file() else "it has no COMPLETE"


def manifests_may_list_nothing() -> None:
    """What is listed is verified, as before."""
    import json
    from pathlib import Path

    from engine.train import checkpoint

    def tolerant(path: Path, world: Any) -> str:
        for name, facts in json.loads((path / "COMPLETE").read_text()).items():
            if checkpoint._sha256(path / name) != facts["sha256"]:
                return f"{name} is damaged"
        return ""

    checkpoint.damage = tolerant


def segments_are_not_checked() -> None:
    from engine.train import refcache

    def unchecked(directory):
        for path in sorted(directory.glob("rows-*.safetensors")):
            with refcache.safe_open(path, framework="numpy") as f:
                yield {name: f.get_tensor(name) for name in ("keys", "logprobs", "counts")}

    refcache._segments = unchecked


def examples_are_not_checked() -> None:
    from itertools import pairwise

    from engine.data.store import TokenStore

    def unchecked(self, example):
        first = example * self.per_example
        bounds = self.offsets[first : first + self.per_example + 1]
        return [(self.ids[a:b], self.mask[a:b]) for a, b in pairwise(bounds)]

    TokenStore.sequences = unchecked

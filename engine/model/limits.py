"""What a model's configuration may ask for, looked at before any library builds something by it.

A config.json of a hundred bytes can ask for a billion layers, labels or tokens, each an object in memory. Numbers of
things are bounded here, far above the largest models; once a model is built without memory, `weights.check_room`
compares it with its files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine import headers
from engine.errors import UserError

MAX_BYTES = 2**23  # of a configuration; one that lists all labels of a classifier has some
LIMITS = (  # of whole numbers by name, at any depth: the first that matches
    (re.compile(r"layers$|^n_layer$|blocks$"), 1_000),
    (re.compile(r"experts"), 4_096),
    (re.compile(r"(heads?|groups|heads_list)$"), 4_096),
    (re.compile(r"^num_labels$|codebooks$"), 2**16),
    (re.compile(r"(_size|_dim|_rank|^d_model|^d_ff|^d_kv|^n_embd|^n_inner|_conv|^n_ctx|_positions)$"), 2**24),
)
CODE = ("auto_map", "custom_pipelines", "custom_generate")


def read_json(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a file of an artefact. Raises UserError for one that is too large, is none, or has a key twice."""
    try:
        if path.stat().st_size > most:
            raise UserError(f"{path}: larger than {most:,} bytes, not what it is named for")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=headers.once)
    except (headers.Unsound, OSError, ValueError, RecursionError) as why:
        raise UserError(f"{path}: not readable JSON ({' '.join(str(why).split())[:120]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {str(content)[:40]}")
    return content


def check_numbers(path: Path, described: dict[str, Any]) -> None:
    """Raises UserError for a number of things that no model has."""
    for name, value in _numbers(described):
        for pattern, most in LIMITS:
            if pattern.search(name):
                if not 0 <= value <= most and value != -1:
                    raise UserError(f"{path}: {name}: expected at most {most:,}, got {_shown(value)}")
                break


def _numbers(described: Any) -> Iterator[tuple[str, int]]:
    todo: list[tuple[str, Any]] = [("", described)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += value.items()
        elif isinstance(value, list):
            todo += [(name, x) for x in value]
        elif type(value) is int:
            yield name, value


def _shown(value: int) -> str:
    return f"{value:,}" if value.bit_length() < 64 else f"a number of {value.bit_length()} bits"


def code_of_its_own(directory: Path) -> str:
    """A line on code that a directory wants to be run with, which it never is; '' where there is none."""
    named: dict[str, Any] = {}
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (directory / file).is_file():
            described = read_json(directory / file)
            named |= {f"{file}: {key}": described[key] for key in CODE if described.get(key)}
    if not named:
        return ""
    place, what = next(iter(named.items()))
    return f"warning: {directory / place} names code of its own ({str(what)[:120]}); it is not run"


def check_layers(directory: Path, layers: int, tensors: int) -> None:
    """Raises UserError for more layers than the files have tensors: a module is built for each."""
    if layers > tensors:
        raise UserError(f"{directory}: config.json describes {layers:,} layers, and the files hold {tensors:,} tensors")

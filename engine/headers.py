"""The header of a safetensors file, checked before anything is read by it.

The library refuses most damage; what it takes and we do not: a tensor that stands twice (the last would win), a header
of 100 MB, fields that mean nothing to it. Here a header is bounded, every name stands once, dtype and shape give the
bytes that the offsets say, and the tensors fill the file from its first byte to its last, without a hole or an overlap.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

MAX_HEADER = 2**25  # bytes: 200,000 tensors take 24 million
MAX_DIMENSIONS = 16
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
METADATA = "__metadata__"


class Unsound(Exception):
    """What is wrong with a header, in words that follow the file's name."""


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def floating(self) -> bool:
        return "F" in self.dtype  # BF16 too

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read(path: Path) -> Mapping[str, Entry]:
    """Name → tensor, of a file whose header is sound. Raises Unsound, and OSError for a file that cannot be read."""
    there = path.stat()
    return _read(path, there.st_size, there.st_mtime_ns)


def forget() -> None:
    """Files are read again, also those that have not changed."""
    _read.cache_clear()


@functools.lru_cache(maxsize=256)
def _read(path: Path, size: int, _changed: int) -> Mapping[str, Entry]:
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise Unsound(f"cut off: it says that its header has {length:,} bytes, and it has {size:,}")
        if length > MAX_HEADER:
            raise Unsound(f"a header of {length:,} bytes, more than {MAX_HEADER:,}")
        text = f.read(length)
    try:
        described = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Unsound(f"its header is not JSON ({str(error)[:80]})") from None
    if not isinstance(described, dict):
        raise Unsound("its header is no JSON object")
    about = described.pop(METADATA, {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise Unsound(f"{METADATA} is no object of texts")
    entries = {name: _entry(name, fields) for name, fields in described.items()}
    _check_filled(entries, size - 8 - length)
    return MappingProxyType(entries)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object, each of whose names stands once. Raises Unsound."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Unsound(f"{name[:80]} stands twice")
    return made


def _no_number(word: str) -> None:
    raise Unsound(f"{word} stands in its header")


def _is_size(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**62


def _entry(name: str, fields: Any) -> Entry:
    name = name[:80]
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unsound(f"{name}: expected dtype, shape and data_offsets, got {str(fields)[:80]}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Unsound(f"{name}: no dtype {str(dtype)[:20]!r} is known")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise Unsound(f"{name}: {str(shape)[:80]} is no shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise Unsound(f"{name}: {str(offsets)[:80]} are no offsets")
    needed = -(-math.prod(shape) * BITS[dtype] // 8)
    if offsets[1] - offsets[0] != needed:
        raise Unsound(f"{name}: {dtype} {shape} takes {needed:,} bytes, its offsets say {offsets[1] - offsets[0]:,}")
    return Entry(dtype, tuple(shape), *offsets)


def _check_filled(entries: dict[str, Entry], size: int) -> None:
    at, before = 0, "the beginning"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlaps with" if entry.begin < at else "leaves a hole behind"
            raise Unsound(f"{name[:80]} {what} {before[:80]}")
        at, before = entry.end, name
    if at != size:
        raise Unsound(f"its tensors take {at:,} bytes, behind its header are {size:,}")

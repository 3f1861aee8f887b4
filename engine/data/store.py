"""Tokenised examples on disk, memory-mapped: built once, keyed by everything that determines them, shared by ranks and
runs.

A store is a directory of raw little-endian arrays: `ids` (int32) and `mask` (bool) of all sequences end to end,
`offsets` (int64, N + 1), `keys` (N x 16 bytes: a hash of each sequence's ids and mask, the reference cache's address),
`counts` (int32: trained tokens of each sequence), and a header.json. It is built under a temporary name and renamed
when complete, so a killed build leaves nothing that is read, and under a lock, so that runs that start together build
it once. A damaged one is named and built again; what is read of an example is compared with its keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine import terminal
from engine.data import bad_rows
from engine.data.files import Source
from engine.data.messages import note_lines
from engine.data.tokenise import Encoded, Encoder, sequence_key, tokenise
from engine.disk import fresh_directory, keep, only_mine, take_in_turn
from engine.errors import UserError

VERSION = 5  # of the encoding: raise it when the same rows would give other ids, masks or words for bad rows


class Damaged(Exception):
    """A store that is not what was written."""


class TokenStore:
    """N sequences, `per_example` of them to an example (preference pairs: chosen, rejected). Raises Damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.header: dict[str, Any] = json.loads((directory / "header.json").read_text(encoding="utf-8"))
            if not isinstance(self.header, dict) or self.header.get("digest") != _digest(directory, self.header):
                raise Damaged("its keys, counts, offsets or header are not what was written")
            self.per_example: int = self.header["per_example"]
            self.offsets = _map(directory / "offsets", np.int64)
            self.ids = _map(directory / "ids", np.int32)
            self.mask = _map(directory / "mask", np.bool_)
            self.keys = _map(directory / "keys", np.dtype("V16"))
            self.counts = _map(directory / "counts", np.int32)
            sizes = {len(self.ids), len(self.mask), int(self.offsets[-1])}
            same = {len(self.keys), len(self.counts), len(self.offsets) - 1, self.header["sequences"]}
            whole_examples = len(self.keys) % self.per_example == 0
            _ = [self.header[name] for name in ("key", "rows", "dropped", "bad_rows", "bad_list", "bad_files", "notes")]
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise Damaged(str(error)) from None
        rising = self.offsets[0] == 0 and (np.diff(self.offsets) >= 0).all()
        if not rising or not whole_examples or len(sizes) > 1 or len(same) > 1:
            raise Damaged("its arrays do not fit together")

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.per_example

    def sequences(self, example: int) -> Encoded:
        first = example * self.per_example
        bounds = self.offsets[first : first + self.per_example + 1]
        found = [(self.ids[a:b], self.mask[a:b]) for a, b in pairwise(bounds)]
        expected = zip(self.example_keys(example), self.counts[first : first + self.per_example], strict=True)
        if [(sequence_key(ids, mask), mask[1:].sum()) for ids, mask in found] != [
            (key.tobytes(), count) for key, count in expected
        ]:
            raise UserError(f"{self.directory}: damaged in its ids or mask: delete it, it will be made again")
        return found

    def example_keys(self, example: int) -> np.ndarray:
        return self.keys[example * self.per_example : (example + 1) * self.per_example]

    def tokens(self) -> np.ndarray:
        """Tokens that each example feeds to the model (its last token is only a target)."""
        return np.diff(self.offsets).reshape(-1, self.per_example).sum(1) - self.per_example


class Examples:
    """Examples of one or several stores under one numbering, which is a mixture's or simply all of them."""

    def __init__(self, stores: Sequence[TokenStore], chosen: Sequence[np.ndarray]) -> None:
        self.stores = stores
        self._store = np.concatenate([np.full(len(index), s, np.int32) for s, index in enumerate(chosen)])
        self._index = np.concatenate(chosen)
        self.tokens = np.concatenate([store.tokens()[index] for store, index in zip(stores, chosen, strict=True)])

    def __len__(self) -> int:
        return len(self._index)

    def sequences(self, example: int) -> Encoded:
        return self.stores[self._store[example]].sequences(int(self._index[example]))

    def keys(self, examples: np.ndarray) -> np.ndarray:
        """The sequences' keys of some examples, (N, per_example) of 16 bytes."""
        return self._gather("keys", examples)

    def counts(self, examples: np.ndarray) -> np.ndarray:
        """The trained tokens of some examples' sequences, (N, per_example) int32."""
        return self._gather("counts", examples)

    def _gather(self, name: str, examples: np.ndarray) -> np.ndarray:
        per_example = self.stores[0].per_example
        arrays = [getattr(store, name) for store in self.stores]
        out = np.empty((len(examples), per_example), arrays[0].dtype)
        for s, array in enumerate(arrays):
            mine = self._store[examples] == s
            out[mine] = array.reshape(-1, per_example)[self._index[examples[mine]]]
        return out

    @property
    def fingerprint(self) -> str:
        """Of the examples' tokens and masks, and their order: the same from any version that reads them alike."""
        digest = hashlib.sha256(self._store.tobytes() + self._index.tobytes())
        for store in self.stores:
            digest.update(store.keys.tobytes())
        return digest.hexdigest()


def _map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _digest(directory: Path, header: dict[str, Any]) -> str:
    """Of all but what is compared with its keys as it is read."""
    rest = {name: value for name, value in header.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in ("offsets", "keys", "counts"):
        with open(directory / name, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def build_once(directory: Path, is_whole: Callable[[], bool], build: Callable[[Path], None]) -> None:
    """`directory` with what `build(temporary directory)` puts there, unless `is_whole()`; runs that start together
    build it once.
    """
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(directory.parent / f".{directory.name}.lock", "w", opener=only_mine) as lock:
        take_in_turn(lock.fileno())  # the others wait here; a killed builder's lock goes with it
        if is_whole():
            return
        partial = directory.parent / f".{directory.name}.partial"
        shutil.rmtree(directory, ignore_errors=True)
        fresh_directory(partial, 0o700)
        try:
            build(partial)
            keep(partial)
            partial.rename(directory)
        except OSError as error:  # a write to a full disk names no file
            error.filename = error.filename or str(directory)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def open_or_build(
    root: Path,
    source: Source,
    encode: Encoder,
    determinants: dict[str, Any],
    *,
    per_example: int = 1,
    on_bad_row: str = "skip",
    max_bad_rows: float = math.inf,
    workers: int = 1,
) -> TokenStore:
    """The store of `source` under `root`, built if it is not there. Raises UserError.

    `encode(row)` gives an example's sequences, or a word for why the row is dropped (counted), or raises BadRow
    (listed; with on_bad_row 'error', the run stops). `determinants` are what, besides the rows, decides the result:
    `max_bad_rows` is none of it, and what was built is there for a start with another bound.
    """
    key = hashlib.sha256(
        json.dumps([VERSION, source.fingerprint, per_example, determinants], sort_keys=True).encode()
    ).hexdigest()
    directory = root / key[:32]

    def is_whole() -> bool:
        if not directory.exists():
            return False
        try:
            if TokenStore(directory).header["key"] == key:
                return True
            raise Damaged("it holds other data than its name says")
        except Damaged as damage:
            terminal.say(f"warning: {directory}: damaged ({damage}), tokenising again")
            return False

    def build(partial: Path) -> None:
        header = tokenise(partial, source, encode, on_bad_row, workers) | {"key": key, "per_example": per_example}
        header = json.loads(json.dumps(header))  # as it will be read
        described = header | {"digest": _digest(partial, header)}
        (partial / "header.json").write_text(json.dumps(described), encoding="utf-8")

    build_once(directory, is_whole, build)
    store = TokenStore(directory)
    store.header["name"] = source.name  # the same rows may stand under another name by now
    if store.header["bad_rows"] and on_bad_row == "error":
        raise UserError(source.name + store.header["bad_list"][0])
    if why := bad_rows.refusal(source.name, store.header, max_bad_rows):
        raise UserError(why)
    return store


def summary(stores: Iterable[TokenStore]) -> Iterator[str]:
    """What a user should know of the rows: kept, dropped and why, bad and where."""
    for store in stores:
        h = store.header
        dropped = "".join(f", {n} dropped ({why})" for why, n in h["dropped"].items())
        bad = f", {h['bad_rows']} bad" if h["bad_rows"] else ""
        yield f"{h['name']}: {h['rows']} rows, {len(store)} kept{dropped}{bad}"
        yield from note_lines(Counter({(what, which): count for what, which, count in h["notes"]}))
        yield from bad_rows.lines(h["name"], h)

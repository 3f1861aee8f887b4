"""Rows → arrays of token ids, masks and keys, streamed to files: parallel, in order, in bounded memory.

The main process reads; chunks of rows are encoded here, or, once a source has shown that it is large, by worker
processes; a few chunks are under way at a time, so memory does not grow with the dataset, and the files do not depend
on the workers.
"""

from __future__ import annotations

import collections
import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from engine import redact, signals, terminal
from engine.data.bad_rows import BadRows, file_of
from engine.data.files import Source
from engine.data.messages import Notes
from engine.data.rows import BadRow
from engine.errors import UserError

CHUNK_ROWS = 256
ROWS_BEFORE_WORKERS = 16_384  # starting workers takes seconds: what is encoded sooner than that stays in this process
Encoded = list[tuple[np.ndarray, np.ndarray]]
Encoder = Callable[[dict, Notes], Encoded | str]
Row = tuple[str, dict | BadRow]
Rows = list[Row]


def sequence_key(ids: np.ndarray, mask: np.ndarray) -> bytes:
    """16 bytes that address a sequence by its content."""
    content = np.ascontiguousarray(ids, "<i4").tobytes() + np.ascontiguousarray(mask, np.bool_).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclass
class Chunk:
    """What became of some rows, as bytes ready for the files."""

    files: collections.Counter[str] = field(default_factory=collections.Counter)  # rows of each
    arrays: dict[str, bytearray] = field(
        default_factory=lambda: {name: bytearray() for name in ("ids", "mask", "keys", "counts", "lengths")}
    )
    dropped: collections.Counter = field(default_factory=collections.Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: Notes = field(default_factory=collections.Counter)


def encode_rows(encode: Encoder, rows: Rows) -> Chunk:
    chunk = Chunk(collections.Counter(file_of(place) for place, _ in rows))
    for place, row in rows:
        noted: Notes = collections.Counter()
        try:
            if isinstance(row, BadRow):
                raise row
            sequences = encode(row, noted)
        except BadRow as bad:
            chunk.bad.append((place, str(bad)))
            continue
        chunk.notes += noted
        if isinstance(sequences, str):
            chunk.dropped[sequences] += 1
            continue
        for ids, mask in sequences:
            chunk.arrays["ids"] += np.ascontiguousarray(ids, "<i4").tobytes()
            chunk.arrays["mask"] += np.ascontiguousarray(mask, np.bool_).tobytes()
            chunk.arrays["keys"] += sequence_key(ids, mask)
            chunk.arrays["counts"] += np.int32(mask[1:].sum()).tobytes()
            chunk.arrays["lengths"] += np.int32(len(ids)).tobytes()
    return chunk


def tokenise(directory: Path, source: Source, encode: Encoder, on_bad_row: str, workers: int) -> dict[str, Any]:
    """Writes the files of a store and returns its header. Raises UserError for the first bad row if `on_bad_row` is
    'error', Stopped between two chunks of rows.
    """
    header: dict[str, Any] = {"rows": 0, "sequences": 0}
    bad_rows = BadRows()
    dropped: collections.Counter = collections.Counter()
    notes: Notes = collections.Counter()
    offset = 0
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(directory / name, "wb"))
            for name in ("ids", "mask", "keys", "counts", "offsets")
        }
        stack.callback(terminal.rest)
        files["offsets"].write(np.int64(0).tobytes())
        for chunk in stack.enter_context(Chunks(source.rows(), partial(encode_rows, encode), workers)):
            if chunk.bad and on_bad_row == "error":
                place, message = chunk.bad[0]
                raise UserError(f"{source.name}{place}: {message}")
            lengths = np.frombuffer(chunk.arrays["lengths"], np.int32)
            files["offsets"].write((offset + np.cumsum(lengths, dtype=np.int64)).tobytes())
            offset += int(lengths.sum())
            for name in ("ids", "mask", "keys", "counts"):
                files[name].write(chunk.arrays[name])
            dropped += chunk.dropped
            notes += chunk.notes
            bad_rows.rows += chunk.files
            header["rows"] += chunk.files.total()
            header["sequences"] += len(lengths)
            for place, message in chunk.bad:
                bad_rows.add(place, message)
            terminal.phase("tokenising, rows", header["rows"])
            signals.end_if_asked("while data was tokenised")
    listed = [[what, which, count] for (what, which), count in sorted(notes.items())]
    return header | bad_rows.header() | {"dropped": dict(dropped), "notes": listed}


_of_worker: Callable[[Rows], Any] | None = None  # of a worker process, set once when it starts


def _start_worker(work: Callable[[Rows], Any]) -> None:
    global _of_worker
    _of_worker = work
    redact.guard()
    signals.ignore()  # what is sent to all processes of a job is the main one's to answer


def _work(rows: Rows) -> Any:
    assert _of_worker is not None, "_start_worker has set it"
    return _of_worker(rows)


class Chunks:
    """What `work`, which can be sent to a process, makes of the chunks of `rows`, in order; leaving it ends the
    workers.
    """

    def __init__(self, rows: Iterable[Row], work: Callable[[Rows], Any], workers: int) -> None:
        self.rows, self.work, self.workers = iter(rows), work, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Iterator[Any]:
        return self._iterate()

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _next_rows(self) -> Rows:
        return list(islice(self.rows, CHUNK_ROWS))

    def _iterate(self) -> Iterator[Any]:
        for _ in range(ROWS_BEFORE_WORKERS // CHUNK_ROWS if self.workers > 1 else 2**62):
            if not (rows := self._next_rows()):
                return
            yield self.work(rows)
        if not (first := self._next_rows()):
            return
        # this process has threads, and a fork would copy their locks
        context = multiprocessing.get_context("forkserver")
        self._pool = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_start_worker, initargs=(self.work,)
        )
        under_way: collections.deque = collections.deque()
        for rows in chain([first], iter(self._next_rows, [])):
            under_way.append(self._pool.submit(_work, rows))
            if len(under_way) > 3 * self.workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

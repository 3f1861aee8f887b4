"""The rows of one file: .jsonl, .json, .csv, .tsv, .parquet or .arrow; text also packed by gzip (.gz) or zstd (.zst).

Every reader yields (number, row), a row being what the file holds, or BadRow where there is none. The number is the
line where a row of text begins, from 1, or a row's index, from 0, in a .json list, .parquet and .arrow. A file that is
cut short or damaged raises UserError with the last row before the damage: what was read of it is no dataset.

A csv has a header, and nothing but text: an empty cell is None, as a missing value is in the other formats, and what
else a cell holds (JSON, a number) is left to who reads the field. Quotes are read in .tsv as well. Damage to bytes that
a format has no checksum for (zstd without one, Arrow's values) shows only where it breaks the format.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.data.lists import Broken, rows_of_list
from engine.data.rows import BadRow, parse_json
from engine.disk import disguised
from engine.errors import UserError, require

MAX_ROW_BYTES = 2**24  # of a line, or of a row's values; some texts in it may be bounded further (cuts.py)
BATCH_BYTES = 4 * MAX_ROW_BYTES  # of the rows of a table that are read at a time
BOM = b"\xef\xbb\xbf"
PACKED = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd"}  # suffix → how such a file begins
PACKED_INSIDE = (".parquet", ".arrow")

Numbered = Iterator[tuple[int, Any]]  # rows of one file; a BadRow where there is none


def suffixes(path: Path) -> tuple[str, str]:
    """('.jsonl', '') of x.jsonl, ('.jsonl', '.gz') of x.jsonl.gz: what decides how a file is read, known or not."""
    packing = path.suffix if path.suffix in PACKED else ""
    return Path(path.name.removesuffix(packing)).suffix, packing


def is_data(path: Path) -> bool:
    """Whether a file of this name holds rows; also one that is not read as it is, as .parquet.gz."""
    return suffixes(path)[0] in READERS


def check_name(path: Path) -> None:
    """Raises UserError if a file of this name cannot be read."""
    form, packing = suffixes(path)
    if form not in READERS:
        raise UserError(f"{path}: expected a file ending in {', '.join(READERS)}, text also in {' or '.join(PACKED)}")
    if packing and form in PACKED_INSIDE:
        raise UserError(f"{path}: {form} is packed inside already, and not read from {packing}: unpack it first")


def read_file(file: Path) -> Numbered:
    """Rows of a file that check_name lets pass. Raises UserError where it cannot be read to its end."""
    form, packing = suffixes(file)
    after = "at its start"
    if what := disguised(file):
        raise UserError(f"{file}: {what}")
    try:
        for number, row in READERS[form](file):
            yield number, row
            after = f"after the row at :{number}"
    except (OSError, EOFError, zlib.error) as error:
        why = " ".join((str(error) or type(error).__name__).split())[:160]
        raise UserError(f"{file}: not a readable {form[1:]}{packing} file {after} ({why})") from None


# --- bytes ------------------------------------------------------------------------------------------------------------


class _Zstd(io.RawIOBase):
    """What a zstd file unpacks to. Python has no zstd of its own before 3.14; pyarrow has."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        self._error = pyarrow.ArrowException
        try:
            self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
        except self._error as error:  # built without the codec
            raise OSError(str(error)) from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._stream.read(len(buffer))
        except self._error as error:
            raise OSError(str(error)) from None
        buffer[: len(found)] = found
        return len(found)


def _open(file: Path) -> io.BufferedIOBase:
    """The unpacked bytes of a file of text, a few at a time; reading them raises OSError, EOFError or zlib.error."""
    with open(file, "rb") as f:
        start = f.read(4)
    if file.suffix not in PACKED:
        for suffix, magic in PACKED.items():
            if start.startswith(magic):
                raise OSError(f"it is packed: name it {file.name}{suffix}")
        return open(file, "rb")
    if not start:
        raise EOFError("it is empty; even nothing at all packs to some bytes")
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    require("pyarrow", f"{file}: a file packed by zstd")
    return io.BufferedReader(_Zstd(file), 2**18)


def _lines(f: io.BufferedIOBase) -> Iterator[tuple[int, bytes | None]]:
    """(number, line without the file's byte order mark), or None for a line longer than MAX_ROW_BYTES."""
    number = 0
    while line := f.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) <= MAX_ROW_BYTES:
            yield number, line
            continue
        yield number, None
        while line and not line.endswith(b"\n"):
            line = f.readline(MAX_ROW_BYTES)


# --- text -------------------------------------------------------------------------------------------------------------


def _jsonl(file: Path) -> Numbered:
    with _open(file) as f:
        for number, line in _lines(f):
            if line is None:
                yield number, BadRow(f"longer than {MAX_ROW_BYTES:,} bytes")
            elif line.strip():
                try:
                    yield number, parse_json(line)
                except BadRow as bad:
                    yield number, bad


def _json(file: Path) -> Numbered:
    """A list of rows, or lines of objects under the wrong name, as some tools write them."""
    with _open(file) as f:
        start = f.read(4096)
        if start.removeprefix(BOM).lstrip()[:1] == b"{":
            yield from _jsonl(file)
            return
    with _open(file) as f:
        try:
            yield from rows_of_list(f, MAX_ROW_BYTES)
        except Broken as broken:
            raise UserError(f"{file}: {broken}") from None


def _csv(file: Path) -> Numbered:
    return _table(file, ",")


def _tsv(file: Path) -> Numbered:
    return _table(file, "\t")


def _table(file: Path, delimiter: str) -> Numbered:
    """Rows of text under a header. Where quotes are wrong, no one knows where the next row begins: UserError."""
    begins, unread, size = 1, 1, 0  # line where the row at hand begins, line to be read next, bytes of the row so far

    def lines(f: io.BufferedIOBase) -> Iterator[str]:
        nonlocal unread, size
        for number, line in _lines(f):
            unread, size = number + 1, size + (MAX_ROW_BYTES + 1 if line is None else len(line))
            if line is None or size > MAX_ROW_BYTES:
                raise csv.Error(f"longer than {MAX_ROW_BYTES:,} bytes")
            yield line.decode("utf-8", "surrogateescape")

    csv.field_size_limit(MAX_ROW_BYTES)
    header: list[str] = []
    with _open(file) as f:
        reader = csv.reader(lines(f), delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells and not header:
                    header = _header(cells, delimiter, f"{file}:{begins}")
                elif cells:
                    yield begins, _row(header, cells)
                begins, size = unread, 0
        except csv.Error as error:
            raise UserError(f"{file}:{begins}: from here on no row can be told from the next ({error})") from None
    if not header:
        raise UserError(f"{file}: expected a header, the names of its columns, got an empty file")


def _header(names: list[str], delimiter: str, place: str) -> list[str]:
    for i, name in enumerate(names, start=1):
        if problem := _unreadable(name):
            raise UserError(f"{place}: expected names of columns, got {problem} in column {i}")
        if not name.strip():
            hint = ": pandas leaves its index out by index=False" if i == 1 else ""
            raise UserError(f"{place}: expected names of columns, got none for column {i}{hint}")
    [(name, count)] = Counter(names).most_common(1)
    if count > 1:
        raise UserError(f"{place}: expected every column once, got {name[:40]!r} {count} times")
    if len(names) == 1 and (other := set(";\t,") & {*name}):
        raise UserError(f"{place}: expected {delimiter!r} between columns, got one column with {min(other)!r} in it")
    return names


def _row(header: list[str], cells: list[str]) -> dict[str, str | None] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"expected {len(header)} fields, as the header has, got {len(cells)}")
    for name, cell in zip(header, cells, strict=True):
        if problem := _unreadable(cell):
            return BadRow(f"{name}: expected text, got {problem}")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _unreadable(cell: str) -> str:
    """What keeps a cell from being text, or ''."""
    try:
        cell.encode()
    except UnicodeEncodeError as error:  # a byte that is not UTF-8 stands there as a lone surrogate
        return f"byte {ord(cell[error.start]) - 0xDC00:#04x}, which is not UTF-8"
    return "a NUL byte" if "\0" in cell else ""


# --- tables that pyarrow reads ----------------------------------------------------------------------------------------


def _parquet(file: Path) -> Numbered:
    require("pyarrow", f"{file}: a parquet file")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        size = sum(table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups))
        at_a_time = BATCH_BYTES * table.metadata.num_rows // max(size, 1)
        yield from _rows_of(table.iter_batches(batch_size=min(1024, max(1, at_a_time))))
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:  # what damage to a schema raises
        raise OSError(str(error)) from None


def _arrow(file: Path) -> Numbered:
    """Both of Arrow's IPC formats: files, and streams, which save_to_disk writes."""
    require("pyarrow", f"{file}: an arrow file")
    import pyarrow

    try:
        with pyarrow.OSFile(str(file)) as f:  # not mapped: a file that shrinks would end the process
            is_file = f.read(6) == b"ARROW1"
            f.seek(0)
            yield from _rows_of(_checked(_file_batches(f) if is_file else _stream_batches(f)))
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:  # what damage to a schema raises
        raise OSError(str(error)) from None


def _file_batches(f: Any) -> Iterator[Any]:
    import pyarrow

    reader = pyarrow.ipc.open_file(f)
    for i in range(reader.num_record_batches):
        yield reader.get_batch(i)


def _stream_batches(f: Any) -> Iterator[Any]:
    """Batches up to the stream's end mark. pyarrow takes a stream that is cut between two batches for a whole one, and
    of two that stand one after the other it reads the first.
    """
    import pyarrow

    reader = pyarrow.ipc.open_stream(f)
    read_to = f.tell()
    for batch in reader:
        yield batch
        read_to = f.tell()
    if f.tell() != f.size():
        raise OSError(f"{f.size() - f.tell():,} bytes behind the end of its stream")
    if not 4 <= f.size() - read_to <= 8:
        raise OSError("cut short: its stream has no end mark")


def _checked(batches: Iterator[Any]) -> Iterator[Any]:
    """pyarrow believes a file about where its values lie: unchecked, a damaged one is read beyond its memory."""
    for batch in batches:
        for column in batch.columns:
            as_bytes = _as_bytes(column.type)
            (column if column.type == as_bytes else column.view(as_bytes)).validate(full=True)
        yield batch


def _as_bytes(of: Any) -> Any:
    """A type with bytes for text: that text is UTF-8 is checked row by row."""
    import pyarrow

    if pyarrow.types.is_string(of):
        return pyarrow.binary()
    if pyarrow.types.is_large_string(of):
        return pyarrow.large_binary()
    if pyarrow.types.is_list(of):
        return pyarrow.list_(of.value_field.with_type(_as_bytes(of.value_type)))
    if pyarrow.types.is_large_list(of):
        return pyarrow.large_list(of.value_field.with_type(_as_bytes(of.value_type)))
    if pyarrow.types.is_struct(of):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in of])
    return of


def _rows_of(batches: Iterator[Any]) -> Numbered:
    number = 0
    for batch in batches:
        [(name, count)] = Counter(batch.schema.names).most_common(1) or [("", 1)]
        if count > 1:
            raise OSError(f"expected every column once, got {name[:40]!r} {count} times")
        may_be_long = batch.nbytes > MAX_ROW_BYTES
        for i in range(batch.num_rows):
            if may_be_long and batch.slice(i, 1).nbytes > MAX_ROW_BYTES:
                yield number, BadRow(f"longer than {MAX_ROW_BYTES:,} bytes")
                number += 1
                continue
            try:
                yield number, batch.slice(i, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time beyond the calendar
                yield number, BadRow(f"not readable ({str(error)[:120]})")
            number += 1


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}

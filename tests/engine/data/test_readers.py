"""One file: rows come back as they were written, at their places, and a file that is cut short or damaged is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from engine.data import readers
from engine.data.readers import check_name, read_file
from engine.data.rows import BadRow
from engine.errors import UserError

ROWS = [{"id": i, "words": f"line {i}\u2028é🦙" + "x" * (i % 7), "list": [None, {"a": "b" * i}]} for i in range(12)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = 'prompt,answer,system\r\n"a, ""b""\nc",d,\r\n\r\ne,"f",é\r\n'.encode()


def read(path: Path, content: bytes) -> list:
    path.write_bytes(content)
    check_name(path)
    return list(read_file(path))


def refused(path: Path, content: bytes) -> str:
    with pytest.raises(UserError) as error:
        read(path, content)
    assert str(error.value).startswith(f"{path}:") and str(error.value).isprintable()
    return str(error.value).removeprefix(f"{path}:").strip()


def good(found: list) -> list:
    return [row for _, row in found if not isinstance(row, BadRow)]


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as f:
        f.write(content)
    return packed.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".zst": zstd}
packings = pytest.mark.parametrize("packing", PACK)


# --- packed text ------------------------------------------------------------------------------------------------------


@packings
def test_packed_text_is_the_text(packing, tmp_path):
    pack = PACK[packing]
    texts = {
        "x.jsonl": LINES,
        "x.json": json.dumps(ROWS).encode(),
        "l.json": LINES,
        "x.csv": CSV,
        "x.tsv": b"a\tb\n1\t2",
    }
    for name, content in texts.items():
        plain = read(tmp_path / name, content)
        assert plain and read(tmp_path / (name + packing), pack(content)) == plain
        halves = pack(content[:50]) + pack(content[50:])  # as `cat a.gz b.gz` makes them
        assert read(tmp_path / (name + packing), halves) == plain
    assert [number for number, _ in read(tmp_path / "x.jsonl", LINES)] == [*range(1, 13)]


@packings
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_packed_text_that_is_cut_anywhere_is_refused(packing, name, tmp_path):
    content = {"x.jsonl": LINES, "x.json": json.dumps(ROWS).encode(), "x.csv": CSV}[name]
    packed = PACK[packing](content)
    for end in range(len(packed)):
        line = refused(tmp_path / (name + packing), packed[:end])
        assert line.startswith(f"not a readable {name[2:]}{packing} file a"), (end, line)


@packings
def test_the_last_row_before_the_damage_is_named(packing, tmp_path):
    noise = random.Random(0)
    lines = b"".join(b'{"n": "%x"}\n' % noise.getrandbits(4000) for _ in range(3000))
    packed = PACK[packing](lines)
    path = tmp_path / f"x.jsonl{packing}"
    path.write_bytes(packed[: len(packed) // 2])
    found = []
    with pytest.raises(UserError) as error:
        found.extend(number for number, _ in read_file(path))
    assert f"not a readable jsonl{packing} file after the row at :{found[-1]} (" in str(error.value)
    assert found == [*range(1, len(found) + 1)] and 1000 < len(found) < 2000


def test_packed_text_that_is_damaged(tmp_path):
    packed = gzip.compress(LINES)
    for i in range(10, len(packed) - 4):  # behind the header, of which some bytes mean nothing
        damaged = bytearray(packed)
        damaged[i] ^= 4
        refused(tmp_path / "x.jsonl.gz", bytes(damaged))
    for suffix, pack in PACK.items():
        refused(tmp_path / f"x.jsonl{suffix}", pack(LINES) + b"words")
        assert "at its start" in refused(tmp_path / f"x.jsonl{suffix}", LINES)
        assert "even nothing at all packs to some bytes" in refused(tmp_path / f"x.jsonl{suffix}", b"")
        assert read(tmp_path / f"x.jsonl{suffix}", pack(b"")) == []
        expected = f"not a readable jsonl file at its start (it is packed: name it x.jsonl{suffix})"
        assert refused(tmp_path / "x.jsonl", pack(LINES)) == expected


@packings
def test_what_unpacks_to_very_much_is_read_in_bounded_memory(packing, tmp_path, monkeypatch):
    """16 MB of one letter are some kilobytes: as lines, as a list, and as a cell."""
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**20)
    starts = (b'{"a": 1}\n"', b"[1,", b'a,b\n1,2\n3,"', b'[1,"')
    line, list_, cell, word = (PACK[packing](start + b" " * 2**24) for start in starts)
    tracemalloc.start()
    [(_, first), (number, second)] = read(tmp_path / f"x.jsonl{packing}", line)
    assert first == {"a": 1} and number == 2 and "longer than 1,048,576 bytes" in str(second)
    assert refused(tmp_path / f"x.json{packing}", list_) == "expected JSON (the list does not end: line 1)"
    assert "longer than 1,048,576 bytes, and" in refused(tmp_path / f"x.json{packing}", word)
    assert refused(tmp_path / f"x.csv{packing}", cell).startswith("3: from here on no row")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


def test_names_say_how_a_file_is_read():
    for name in ("x.jsonl", "x.y.csv.gz", "x.tsv.zst", "x.arrow", "x.snappy.parquet", "x.gz.parquet"):
        check_name(Path(name))
    for name in ("x.parquet.gz", "x.arrow.zst"):
        with pytest.raises(UserError, match=rf"^{name}: \.\w+ is packed inside already, .*: unpack it first$"):
            check_name(Path(name))
    for name in ("x.gz", "x.txt", "x.tar.gz", "x.jsonl.bz2", "x.jsonl.gz.gz", "x", ".gz", "x.JSONL"):
        with pytest.raises(UserError, match=rf"^{name}: expected a file ending in \.jsonl, .*, text also in"):
            check_name(Path(name))


@pytest.mark.parametrize(("name", "what"), [("x.jsonl.zst", "a file packed by zstd"), ("x.arrow", "an arrow file")])
def test_pyarrow_is_asked_for_where_it_is_needed(name, what, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tmp_path / name, b"(\xb5/\xfd").startswith(f"{what} needs the package pyarrow, which ")


# --- csv --------------------------------------------------------------------------------------------------------------

cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ['"', '""', "\n", "\r\n", "\r", ",", "\t", '[{"role": "user"}]', " ", "\ufeff", "\u2028", "7"]
)
tables = st.integers(1, 4).flatmap(
    lambda width: st.tuples(
        st.lists(st.text("abcé;,\t\"' x\n", min_size=1, max_size=5), min_size=width, max_size=width, unique=True),
        st.lists(st.lists(cells, min_size=width, max_size=width), max_size=5),
    )
)


@settings(deadline=None, max_examples=150)
@given(tables, st.sampled_from(["\n", "\r\n"]), st.sampled_from([".csv", ".tsv"]), st.booleans(), st.booleans())
def test_tables_come_back_as_they_were_written(tmp_path_factory, table, end, suffix, bom, quoted):
    header, rows = table
    assume(all(name.strip() for name in header) and (len(header) > 1 or not set(header[0]) & {*";,\t"}))
    out, begins = io.StringIO(newline=""), []
    form = {"delimiter": "," if suffix == ".csv" else "\t", "lineterminator": end}
    quoted |= "\r" in "".join(cell for row in rows for cell in row)  # which some of Python's writers leave bare
    writer = csv.writer(out, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL, **form)
    for row in [header, *rows]:
        begins.append(out.getvalue().count("\n") + 1)
        writer.writerow(row)
    content = b"\xef\xbb\xbf" * bom + out.getvalue().encode()
    found = read(tmp_path_factory.getbasetemp() / f"table{suffix}", content)
    want = [dict(zip(header, (cell or None for cell in row), strict=True)) for row in rows]
    assert found == [*zip(begins[1:], want, strict=True)]


def test_rows_of_a_csv_stand_where_they_begin(tmp_path):
    assert read(tmp_path / "x.csv", CSV) == [
        (2, {"prompt": 'a, "b"\nc', "answer": "d", "system": None}),
        (5, {"prompt": "e", "answer": "f", "system": "é"}),
    ]
    content = b"\n\na,b\n1,2\n1\n1,2,3\n\n1,\xff\n1,\xed\xa0\x80\n\0,2\n3,4"
    found = read(tmp_path / "x.csv", content)
    assert [(number, str(row)) for number, row in found] == [
        (4, "{'a': '1', 'b': '2'}"),
        (5, "expected 2 fields, as the header has, got 1"),
        (6, "expected 2 fields, as the header has, got 3"),
        (8, "b: expected text, got byte 0xff, which is not UTF-8"),
        (9, "b: expected text, got byte 0xed, which is not UTF-8"),
        (10, "a: expected text, got a NUL byte"),
        (11, "{'a': '3', 'b': '4'}"),
    ]
    assert len(good(found)) == 2
    assert read(tmp_path / "x.csv", b"a,b\n") == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a header, the names of its columns, got an empty file"),
        (b"\n\r\n", "expected a header, the names of its columns, got an empty file"),
        (b"\n,a\n1,2", "2: expected names of columns, got none for column 1: pandas leaves its index out by index="),
        (b"a, ,b\n", "1: expected names of columns, got none for column 2"),
        (b"a,b,a\n", "1: expected every column once, got 'a' 2 times"),
        (b"a;b\n1;2\n", "1: expected ',' between columns, got one column with ';' in it"),
        (b"a\tb\n1\t2\n", "1: expected ',' between columns, got one column with '\\t' in it"),
        (b"a,\xff\n1,2\n", "1: expected names of columns, got byte 0xff, which is not UTF-8 in column 2"),
        ("a,b\n1,2\n".encode("utf-16"), "1: expected names of columns, got byte 0xff, which is not UTF-8 in column 1"),
        ("a,b\n1,2\n".encode("utf-16-le"), "1: expected names of columns, got a NUL byte in column 1"),
        (b'a,b\n1,2\n3,"4\n5,6\n7,8\n', "3: from here on no row can be told from the next (unexpected end of data)"),
        (b'a,b\n1,"2"x\n', "2: from here on no row can be told from the next ("),
        (b"a,b\r1,2\r3,4\r", "1: from here on no row can be told from the next (new-line"),
    ],
)
def test_tables_that_are_refused(content, expected, tmp_path):
    assert refused(tmp_path / "x.csv", content).startswith(expected)


def test_a_row_of_a_csv_has_a_longest_length(tmp_path, monkeypatch):
    """In one cell, in many, on one line, on many; and above the limit of Python's reader."""
    assert read(tmp_path / "x.csv", b"a,b\n1," + b"x" * 200_000) == [(2, {"a": "1", "b": "x" * 200_000})]
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    assert len(good(read(tmp_path / "x.csv", b"a\n" + b"x" * 999 + b"\n" + b"y" * 999 + b"\n"))) == 2
    for row in (b"x" * 1001, b"x," * 600, b'"' + b"xy\n" * 400 + b'"'):
        expected = "3: from here on no row can be told from the next (longer than 1,000 bytes)"
        assert refused(tmp_path / "x.csv", b"a,b\n1,2\n" + row + b"\n3,4\n") == expected
    assert len(read(tmp_path / "x.csv", b"a,b\n" + b"1,2\n" * 1000)) == 1000


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=6) | st.sampled_from([b'"', b",", b"\n", b"\r\n", b"\r", b"a", b"\0"]), max_size=20))
@example([b"a\n", b'"'])
def test_any_bytes_are_a_table_or_refused(tmp_path_factory, parts):
    """Nothing but UserError; every row is a BadRow or has the header's columns; places rise."""
    path = tmp_path_factory.getbasetemp() / "any.csv"
    try:
        found = read(path, b"a,b\n" + b"".join(parts))
    except UserError as error:
        assert str(error).isprintable()
        return
    assert all([*row] == ["a", "b"] for row in good(found))
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers)) and all(2 <= n <= 2 + b"".join(parts).count(b"\n") for n in numbers)


# --- arrow ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pyarrow():
    pytest.importorskip("pyarrow.ipc")
    import pyarrow as package

    return package


def arrow(package, table, is_file: bool, batch: int = 5, compression: str | None = None) -> bytes:
    out = package.BufferOutputStream()
    new = package.ipc.new_file if is_file else package.ipc.new_stream
    with new(out, table.schema, options=package.ipc.IpcWriteOptions(compression=compression)) as writer:
        for start in range(0, table.num_rows, batch):
            writer.write_table(table.slice(start, batch))
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "stream"])
def test_arrow_comes_back_and_is_refused_wherever_it_is_cut(is_file, pyarrow, tmp_path):
    table = pyarrow.Table.from_pylist([*ROWS, dict.fromkeys(ROWS[0])])
    table = table.append_column("kind", pyarrow.array(["a", "b", None] * 4 + ["a"]).dictionary_encode())
    for compression in (None, "zstd", "lz4"):
        content = arrow(pyarrow, table, is_file, compression=compression)
        assert read(tmp_path / "x.arrow", content) == [*enumerate(table.to_pylist())]
    content = arrow(pyarrow, table.select(["kind", "id"]).slice(0, 4), is_file, batch=2)
    for end in range(len(content)):
        assert refused(tmp_path / "x.arrow", content[:end]).startswith("not a readable arrow file a"), end
    assert is_file or "behind the end of its stream" in refused(tmp_path / "x.arrow", content + content)
    assert read(tmp_path / "x.arrow", arrow(pyarrow, table.slice(0, 0), is_file)) == []


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.booleans())
def test_damaged_arrow_is_rows_or_refused(pyarrow, tmp_path, noise, is_file):
    """Offsets that point out of a buffer would end the process if they were believed."""
    content = bytearray(arrow(pyarrow, pyarrow.Table.from_pylist(ROWS), is_file))
    for _ in range(noise.choice([1, 4])):
        content[noise.randrange(len(content))] = noise.choice([0, 127, 255, noise.randrange(256)])
    try:
        found = read(tmp_path / "x.arrow", bytes(content))
    except UserError as error:
        assert "not a readable arrow file" in str(error)
    else:
        assert all(isinstance(row, (dict, BadRow)) for _, row in found)


def test_arrow_with_text_that_is_not(pyarrow, tmp_path):
    """Also within lists of objects: a bad value takes no neighbour along."""
    data = pyarrow.array([b"good", b"\xff\xfe", b"fine"])
    broken = pyarrow.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    nested = pyarrow.ListArray.from_arrays([0, 1, 2, 3], pyarrow.StructArray.from_arrays([broken], ["content"]))
    for column, wrap in ((broken, lambda x: x), (nested, lambda x: [{"content": x}])):
        (_, a), (_, b), (_, c) = read(tmp_path / "x.arrow", arrow(pyarrow, pyarrow.table({"t": column}), False))
        assert [a, c] == [{"t": wrap("good")}, {"t": wrap("fine")}] and isinstance(b, BadRow)


def test_offsets_beyond_the_values_are_not_followed(pyarrow, tmp_path):
    """Built wrong, not by chance: an offset in the middle, which the cheap check of the ends does not see."""
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2**30, 4)))
    broken = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"word"))
    content = arrow(pyarrow, pyarrow.table({"t": broken}), True)
    assert "not a readable arrow file at its start" in refused(tmp_path / "x.arrow", content)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_a_column_that_stands_twice_is_refused(suffix, pyarrow, tmp_path):
    """As a dictionary it would be there once, with one of its two values."""
    table = pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    if suffix == ".arrow":
        content = arrow(pyarrow, table, False)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        out = pyarrow.BufferOutputStream()
        parquet.write_table(table, out)
        content = out.getvalue().to_pybytes()
    assert "expected every column once, got 'a' 2 times" in refused(tmp_path / f"x{suffix}", content)

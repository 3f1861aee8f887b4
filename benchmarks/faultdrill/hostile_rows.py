"""Hostile rows and files: real rows with bytes changed, in every format, and files that are made to hurt.

Each is read as a stage reads it, in a process of its own: to its end, or refused in one line. No traceback, no hang, no
crash of a library, and no more memory than rows of the size that is allowed take.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from benchmarks.faultdrill.apart import apart
from benchmarks.faultdrill.reading import SCHEMAS, read
from benchmarks.faultdrill.rows import good
from benchmarks.faultdrill.suite import Case, Cases, Suite
from engine.errors import UserError, on_one_line

LIMIT = 60.0  # seconds on a busy machine; the slowest takes five on an idle one
GROWTH = 300  # MB, of a process that reads rows of 16 MiB
ROWS = 30
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "json.gz", "csv.gz")
STRUCTURE = (*b'{}[]",:\\\n\r\t\0', 0xFF, 0xC0, 0xED)
SPLICES = (b"\\ud800", b'"role"', b"NaN", b"1e999", b'"' * 9, b"[" * 2000, b"9" * 5000, b"\xe2\x80\xa8", b"<|end|>")


# --- changed bytes ----------------------------------------------------------------------------------------------------


def mutated(schema: str, form: str, seed: int, directory: Path) -> str:
    draw = random.Random(seed)
    content = bytearray(_written(schema, form.partition(".")[0], directory))
    packed = form.endswith(".gz") and draw.random() < 0.5  # the bytes are changed before they are packed, or after it
    if packed:
        content = bytearray(gzip.compress(content))
    for _ in range(draw.choice((1, 2, 5, 20))):
        _change(content, draw)
    path = directory / f"rows.{form}"
    path.write_bytes(gzip.compress(bytes(content)) if form.endswith(".gz") and not packed else content)
    return _read(schema, path)


def _change(content: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(content)) if content else 0
    match draw.randrange(6):
        case 0 if content:
            content[at] ^= 1 << draw.randrange(8)
        case 1 if content:
            content[at] = draw.choice(STRUCTURE)
        case 2:
            del content[at : at + draw.choice((1, 2, 10, 100))]
        case 3:
            content[at:at] = draw.choice(SPLICES)
        case 4:
            content[at:at] = content[max(0, at - draw.choice((1, 10, 100))) : at]
        case 5 if draw.random() < 0.3:
            del content[at:]


def _written(schema: str, form: str, directory: Path) -> bytes:
    rows = [good(schema, i) for i in range(ROWS)]
    if form == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if form == "json":
        return json.dumps(rows, indent=1).encode()
    if form in ("csv", "tsv"):
        import csv

        out = io.StringIO()
        table = csv.DictWriter(out, [*rows[0]], delimiter="\t" if form == "tsv" else ",")
        table.writeheader()
        for row in rows:
            table.writerow({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()})
        return out.getvalue().encode()
    return _table(rows, form)


def _table(rows: list[dict], form: str) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    if form == "parquet":
        parquet.write_table(table, out)
    else:
        with pyarrow.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue()


def _read(schema: str, path: Path) -> str:
    """'' for rows or a refusal in one line."""
    began = time.monotonic()
    try:
        found = read(schema, path, path.parent / "cache")
    except UserError as error:
        line = str(error)
        if "\n" in line or not on_one_line(line).strip():
            return f"not one line: {line[:200]!r}"
    except Exception as error:  # the traceback that a user would see
        return f"{type(error).__name__}: {str(error)[:200]}"
    else:
        if found.rows != len(found.kept) + found.num_bad + sum(found.dropped.values()):
            return f"{found.rows} rows, {len(found.kept)} kept, {found.num_bad} bad, {found.dropped} dropped"
    return "" if time.monotonic() - began < LIMIT / 2 else f"took {time.monotonic() - began:.0f} s"


# --- made to hurt -----------------------------------------------------------------------------------------------------


Made = tuple[str, Iterable[bytes]]  # (name of the file, what it holds)
HURTS: dict[str, Callable[[str], Made]] = {}


def hurts(make: Callable[[str], Made]) -> Callable[[str], Made]:
    HURTS[make.__name__.strip("_").replace("_", " ")] = make
    return make


def _around(schema: str, line: bytes) -> bytes:
    """A line between good rows."""
    rows = [json.dumps(good(schema, i)).encode() for i in range(8)]
    return b"\n".join([*rows[:4], line, *rows[4:]])


def _value(schema: str, value: Any) -> bytes:
    """A good row with this in place of its text."""
    row = good(schema, 7)
    column = "chosen" if schema == "dpo" else "messages"
    row[column] = [*row[column][:-1], row[column][-1] | {"content": value}]
    return json.dumps(row, ensure_ascii=False).encode()


@hurts
def a_line_of_150_MB(schema: str) -> Made:
    head, _, tail = _around(schema, b'{"messages": "@"}').partition(b"@")
    return "x.jsonl", chain([head], repeat(b"x" * 1_000_000, 150), [tail])


@hurts
def a_packed_line_of_150_MB(schema: str) -> Made:
    head, _, tail = _around(schema, b'{"messages": "@"}').partition(b"@")
    return "x.jsonl.gz", chain([gzip.compress(head)], repeat(gzip.compress(b"x" * 10**6), 150), [gzip.compress(tail)])


@hurts
def a_packed_list_of_150_MB(schema: str) -> Made:
    spaces = repeat(gzip.compress(b" " * 10**6), 150)
    return "x.json.gz", chain([gzip.compress(b"[")], spaces, [gzip.compress(b"1]")])


@hurts
def a_packed_list_of_thousands_of_rows(schema: str) -> Made:
    return "x.json.gz", gzip.compress(b"[" + b"{}," * 30_000 + b"{}]", 1)


@hurts
def a_list_a_million_deep(schema: str) -> Made:
    return "x.json", b"[" * 1_000_000


@hurts
def objects_a_million_deep(schema: str) -> Made:
    return "x.jsonl", _around(schema, b'{"a":' * 1_000_000)


@hurts
def a_word_of_15_MB(schema: str) -> Made:
    return "x.jsonl", _around(schema, _value(schema, "x" * 15_000_000))


@hurts
def spaces_of_15_MB(schema: str) -> Made:
    return "x.jsonl", _around(schema, _value(schema, " " * 15_000_000))


@hurts
def digits_of_15_MB(schema: str) -> Made:
    return "x.jsonl", _around(schema, _value(schema, "7" * 15_000_000))


@hurts
def letters_without_a_place_to_cut(schema: str) -> Made:
    return "x.jsonl", _around(schema, _value(schema, "é語" * 2_500_000))


@hurts
def marks_of_thoughts(schema: str) -> Made:
    return "x.jsonl", _around(schema, _value(schema, "<think></think>" * 100_000))


@hurts
def brackets_that_begin_a_mark(schema: str) -> Made:
    return "x.jsonl", _around(schema, _value(schema, "<|" * 1_000_000))


@hurts
def turns_of_a_transcript(schema: str) -> Made:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b" * 50_000, "rejected": "\n\nHuman: " * 200_000}
    return "x.jsonl", _around(schema, json.dumps(row).encode())


@hurts
def a_hundred_thousand_columns(schema: str) -> Made:
    return "x.jsonl", _around(schema, json.dumps({f"c{i}": i for i in range(100_000)} | good(schema, 7)).encode())


@hurts
def ten_thousand_messages(schema: str) -> Made:
    row = good(schema, 7)
    column = "chosen" if schema == "dpo" else "messages"
    return "x.jsonl", _around(schema, json.dumps(row | {column: row[column] * 10_000}).encode())


@hurts
def a_key_of_15_MB(schema: str) -> Made:
    return "x.jsonl", _around(schema, json.dumps({"k" * 15_000_000: 1, **good(schema, 7)}).encode())


@hurts
def a_million_blank_lines(schema: str) -> Made:
    return "x.jsonl", b"\n" * 1_000_000 + _around(schema, b"")


@hurts
def bad_rows_alone(schema: str) -> Made:
    return "x.jsonl", b"{\n" * 5_000


@hurts
def an_open_quote(schema: str) -> Made:
    return "x.csv", b'messages,chosen\n"' + b"a,\n" * 6_000_000


@hurts
def columns_without_end(schema: str) -> Made:
    return "x.csv", b"a," * 300_000 + b"b\n1,2\n"


@hurts
def cells_of_text_that_look_like_messages(schema: str) -> Made:
    return "x.csv", b"messages\n" + b'"[{' * 200_000


@hurts
def a_parquet_of_huge_values(schema: str) -> Made:
    values = [good(schema, i) | {"other": "x" * (20_000_000 if i == 3 else 5)} for i in range(8)]
    return "x.parquet", _table(values, "parquet")


@hurts
def an_arrow_of_huge_values(schema: str) -> Made:
    values = [good(schema, i) | {"other": "x" * (20_000_000 if i == 3 else 5)} for i in range(8)]
    return "x.arrow", _table(values, "arrow")


@hurts
def two_bytes_to_a_character(schema: str) -> Made:
    return "x.jsonl", _around(schema, b"").decode().encode("utf-16")


@hurts
def nothing_at_all(schema: str) -> Made:
    return "x.jsonl", b""


@hurts
def another_format_s_name(schema: str) -> Made:
    return "x.parquet", _around(schema, b"")


def hurtful(schema: str, name: str, directory: Path) -> str:
    file, content = HURTS[name](schema)
    path = directory / file
    with open(path, "wb") as f:
        f.writelines([content] if isinstance(content, bytes) else content)
    return _read(schema, path)


# --- the suite --------------------------------------------------------------------------------------------------------


def cases(count: int, seed: int) -> Iterator[Case]:
    """All that is made to hurt, then changed bytes in every format in turn."""
    made = [(SCHEMAS[(i + seed) % 3], name) for i, name in enumerate(HURTS)]
    for schema, name in made[: count - 1]:
        work = functools.partial(hurtful, schema, name)
        yield Case(f"{schema}: {name}", functools.partial(apart, work, limit=LIMIT, growth_mb=GROWTH))
    for i in range(max(0, count - len(made))):
        schema, form = SCHEMAS[i % 3], FORMATS[i % len(FORMATS)]
        work = functools.partial(mutated, schema, form, 1000 * seed + i)
        yield Case(f"{schema}: changed {form} {i}", functools.partial(apart, work, limit=LIMIT, growth_mb=GROWTH))


def control(hook: str, *chosen: tuple[str, str], limit: float = LIMIT) -> Cases:
    def of(count: int, seed: int) -> Iterator[Case]:
        for schema, name in chosen:
            work = functools.partial(hurtful, schema, name)
            run = functools.partial(apart, work, hook=f"tests.faults:{hook}", limit=limit, growth_mb=GROWTH)
            yield Case(f"{schema}: {name}", run)

    return of


SUITE = Suite(
    name="hostile_rows",
    unit="hostile rows and files",
    promise=f"read, or refused in one line: no hang, no traceback, at most {GROWTH} MB more",
    sizes=(60, 200),
    cases=cases,
    controls={
        "lines of any length": control("lines_of_any_length", ("sft", "a line of 150 MB")),
        "texts of any length in one piece": control("texts_of_any_length", ("sft", "digits of 15 MB"), limit=12.0),
        "errors of the decoder as they are": control(
            "rows_as_json_loads_takes_them", ("dpo", "objects a million deep")
        ),
    },
    left_out=(
        "a parquet file of which one huge value, stored once, stands in thousands of rows: pyarrow gives whole batches",
    ),
)

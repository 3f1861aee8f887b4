"""A JSON list read row by row is what json.loads makes of it whole, wherever the text is cut into reads; what is wrong
with a row is that row's alone, and what is wrong with the list ends it.
"""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import lists
from engine.data.lists import Broken, rows_of_list
from engine.data.rows import BadRow
from tests.engine.data.test_rows import json_values


def read(content: bytes, step: int = 2**18, longest: int = 10**6) -> list:
    lists.STEP, whole = step, lists.STEP
    try:
        return list(rows_of_list(io.BufferedReader(io.BytesIO(content)), longest))
    finally:
        lists.STEP = whole


@settings(deadline=None, max_examples=60)
@given(st.lists(json_values, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_rows_are_those_of_the_whole(values, step, indent, ascii_):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_)
    content = text.encode("utf-8", "surrogatepass")
    if "\ud800" in text:
        with pytest.raises(Broken, match="expected UTF-8, got byte 0xed"):
            read(content, step)
        return
    found = read(content, step)
    assert [number for number, _ in found] == [*range(len(values))]
    for (_, row), value in zip(found, values, strict=True):
        if isinstance(row, BadRow):
            said = json.dumps(value)
            assert "NaN" in said or "Infinity" in said
        else:
            assert json.dumps(row) == json.dumps(value)
    for end in range(0, len(content), 3):
        with pytest.raises(Broken):
            read(content[:end], 3)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"a": 1, "a": 2}', "a: expected once in an object, got twice"),
        (b'{"a": [{"b": 1, "b": 2}]}', "b: expected once"),
        (b"[NaN]", "expected JSON, got NaN"),
        (b"9" * 5000, r"expected JSON \(Exceeds the limit"),
        (b'"' + b"x" * 99 + b'"', "longer than 100 bytes"),
    ],
)
def test_a_row_that_cannot_be_used_is_bad_alone(row, said):
    found = read(b'[{"a": 1}, ' + row + b', {"a": 2}]', 7, longest=100 if b"xx" in row else 10**6)
    assert [number for number, _ in found] == [0, 1, 2] and [found[0][1], found[2][1]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(BadRow, match=f"^{said}"):
        raise found[1][1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected JSON"),
        (b"7", "expected a list of rows, got a number"),
        (b"[1,\n\n2 3]", r"behind a row: line 3\)"),
        (b"[1,\n{]", "line 2"),
        (b"[1]\n\nx", r"Extra data behind the list: line 3\)"),
        (b"[" * 100_000, "expected JSON"),
        (b'["\xff"]', "expected UTF-8, got byte 0xff"),
        (b'["' + b"x" * 10**6, "longer than 1,000 bytes, and where the next row begins is not known"),
        (b"[,", "expected JSON"),
    ],
)
def test_a_broken_list_is_refused(content, said):
    with pytest.raises(Broken, match=said):
        read(content, 64, longest=1000 if b"xxx" in content else 10**6)
    assert read(b"\xef\xbb\xbf [ ] \n") == []

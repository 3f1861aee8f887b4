"""Rows of files: what is read, what is refused, and that every refusal says file, line and field on one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.data import rows
from engine.data.preferences import conversations
from engine.data.rows import BadRow, open_source
from engine.errors import UserError

USER, BOT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She."}
GOOD = {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "He."}]}


def read(path: Path | str, split: str = "train") -> list[str]:
    """Every row of a source: 'place: ok' or 'place: defect', as a stage that wants preferences sees them."""
    source = open_source(str(path), split, None)
    lines = []
    for place, row in source.rows():
        try:
            if isinstance(row, BadRow):
                raise row
            conversations(row)
            lines.append(f"{source.name}{place}: ok")
        except BadRow as bad:
            lines.append(f"{source.name}{place}: {bad}")
    return lines


def bad(chosen) -> bytes:
    return json.dumps(GOOD | {"chosen": chosen}).encode()


def deep(n: int) -> bytes:
    return b'{"chosen": ' + b"[" * n + b"]" * n + b', "rejected": ""}'


# What stands in the file, and what must stand in the message. Kinds 1 to 24 are those of the field's experience with
# JSON loaders.
KINDS = {
    "truncated": (json.dumps(GOOD).encode()[:-9], "expected JSON"),
    "not JSON": (b"chosen: yes", "expected JSON"),
    "list": (b'["chosen", "rejected"]', "expected an object, got a list"),
    "number": (b"7", "expected an object, got a number"),
    "null": (b"null", "expected an object, got null"),
    "duplicate key": (
        b'{"chosen": "a", "rejected": "b", "chosen": "c"}',
        "chosen: expected once in an object, got twice",
    ),
    "nested duplicate": (
        b'{"chosen": [{"role": "user", "role": "user"}]}',
        "role: expected once in an object, got twice",
    ),
    "lone surrogate": (
        bad([USER, {"role": "assistant", "content": "\ud800"}]),
        "chosen[1].content: expected text, got a lone surrogate",
    ),
    "BOM inside": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "expected JSON (Unexpected UTF-8 BOM"),
    "5000 digits": (b'{"chosen": ' + b"9" * 5000 + b', "rejected": 1}', "expected JSON"),
    "3000 deep": (deep(3000), ""),
    "300000 deep": (deep(300_000), "expected JSON"),
    "bad UTF-8": (b'{"chosen": "\xff\xfe"}', "expected UTF-8, got byte 0xff at 12"),
    "overlong UTF-8": (b'{"chosen": "\xc0\xaf"}', "expected UTF-8, got byte 0xc0 at 12"),
    "NaN": (b'{"chosen": NaN}', "expected JSON, got NaN"),
    "Infinity": (b'{"chosen": -Infinity}', "expected JSON, got -Infinity"),
    "missing key": (b'{"rejected": "x"}', "chosen: expected text or a list of messages, got nothing"),
    "misspelt key": (
        b'{"choosen": "x", "rejected": "x"}',
        "chosen: expected text or a list of messages, got nothing (did you mean choosen?)",
    ),
    "null for text": (bad(None), "chosen: expected text or a list of messages, got null"),
    "number for text": (bad(3), "chosen: expected text or a list of messages, got a number"),
    "bool for text": (bad(True), "chosen: expected text or a list of messages, got true or false"),
    "object for text": (bad({"a": 1}), "chosen: expected text or a list of messages, got an object"),
    "empty list": (bad([]), "chosen: expected a list of messages, got an empty one"),
    "list of texts": (bad(["Who?"]), "chosen[0]: expected an object with role and content, got text"),
    "no role": (bad([{"content": "x"}]), "chosen[0].role: expected text, got nothing"),
    "no content": (
        bad([USER, {"role": "assistant", "contents": "x"}]),
        "chosen[1].content: expected text, got nothing (did you mean contents?)",
    ),
    "null content": (bad([USER, {"role": "assistant", "content": None}]), "chosen[1].content: expected text, got null"),
    "parts for content": (
        bad([{"role": "user", "content": [{"type": "text"}]}]),
        "chosen[0].content: expected text, got a list",
    ),
    "number for role": (bad([{"role": 1, "content": "x"}]), "chosen[0].role: expected text, got a number"),
    "unknown role": (bad([{"role": "asistant", "content": "x"}]), "got 'asistant' (did you mean assistant?)"),
    "role in capitals": (
        bad([{"role": "User", "content": "x"}]),
        "chosen[0].role: expected one of system, user, assistant, tool, got 'User'",
    ),
    "user at the end": (bad([USER]), "chosen: expected the assistant's turn at the end, got the user's"),
    "control characters": (b'{"a\\u001b[2J\\nb": 1, "a\\u001b[2J\\nb": 1}', r"a\x1b[2J\nb: expected once"),
    "raw tab in text": (b'{"chosen": "a\tb"}', "expected JSON"),
    "two objects": (b"{} {}", "expected JSON"),
}


@pytest.mark.parametrize("position", [1, 2, 11, 20, 21])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_bad_rows_are_named(position, newline, tmp_path):
    """One file for every kind, 21 lines each, of which one is bad."""
    for kind, (line, expected) in KINDS.items():
        if kind == "BOM inside" and position == 1:
            continue  # there it is a file's BOM
        path = tmp_path / f"{kind}.jsonl"
        lines = [json.dumps(GOOD).encode()] * 21
        lines[position - 1] = line
        path.write_bytes(newline.join(lines) + newline * (position % 2))
        got = read(path)
        assert len(got) == 21, kind
        for number, message in enumerate(got, start=1):
            assert message.startswith(f"{path}:{number}: "), (kind, message)
            assert message.isprintable(), (kind, message)
            assert message.endswith(": ok") == (number != position), (kind, message)
        assert expected in got[position - 1], kind
        assert len(got[position - 1]) < len(str(path)) + 450


def test_what_is_accepted(tmp_path):
    """Extra keys, escapes, an empty text, NUL, line separators inside text, a long line: data, not damage."""
    strange = ["", "\0", "\u2028 \u2029 \x85", "\\n", "é", "𝔘🦙", "x" * 2**20, "<b>", '"']
    lines = [
        json.dumps(
            GOOD | {"id": i, "chosen": [USER, {"role": "assistant", "content": text, "name": 1}]},
            ensure_ascii=i % 2 == 0,
        )
        for i, text in enumerate(strange)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert read(path) == [f"{path}:{i}: ok" for i in range(1, len(strange) + 1)]
    found = [conversations(row)[0][1]["content"] for _, row in open_source(str(path), "train", None).rows()]
    assert found == strange


def test_empty_lines_count_but_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n\n" + json.dumps(GOOD).encode() + b"\r\n   \n\t\n7\n")
    assert read(path) == [f"{path}:3: ok", f"{path}:6: expected an object, got a number"]


def test_byte_order_mark_of_the_file(tmp_path):
    for name, content in (("a.jsonl", json.dumps(GOOD)), ("b.json", json.dumps([GOOD])), ("c.json", json.dumps(GOOD))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert [line.endswith(": ok") for line in read(tmp_path / name)] == [True]


def test_utf_16_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes((json.dumps(GOOD) + "\n").encode("utf-16"))
    assert "expected UTF-8, got byte 0xff at 0" in read(tmp_path / "x.jsonl")[0]


def test_lines_longer_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    good, path = json.dumps(GOOD).encode(), tmp_path / "x.jsonl"
    for length in (1001, 1002, 1999, 2000, 2001, 2002, 7000):
        path.write_bytes(good + b"\n" + b"x" * length + b"\n" + good + b"\n" + b"x" * length)
        got = read(path)
        assert [line.endswith(": ok") for line in got] == [True, False, True, False]
        assert got[1] == f"{path}:2: longer than 1,000 bytes"
        assert got[3] == f"{path}:4: longer than 1,000 bytes"
    path.write_bytes(good[:-1] + b" " * (1000 - len(good)) + b"}")
    assert read(path) == [f"{path}:1: ok"]


# --- other containers -------------------------------------------------------------------------------------------------


def test_json_is_a_list_or_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([GOOD, 7, GOOD | {"chosen": 1}], indent=1))
    assert [line.split(": ", 1)[0] for line in read(path)] == [f"{path}:{i}" for i in range(3)]
    assert read(path)[1].endswith("expected an object, got a number")
    path.write_text("\n".join(map(json.dumps, [GOOD, GOOD])))
    assert read(path) == [f"{path}:1: ok", f"{path}:2: ok"]
    for content, expected in (
        ("[1, 2", "expected JSON"),
        ("7", "expected a list of rows, got a number"),
        ("", "expected JSON"),
        ('[{"a": 1, "a": 2}]', "a: expected once"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=f"^{path}: {expected}"):
            read(path)


@pytest.fixture
def pyarrow():
    pytest.importorskip("pyarrow.parquet")
    import pyarrow as package

    return package


def test_parquet(pyarrow, tmp_path):
    path = tmp_path / "x.parquet"
    rows_ = [GOOD, {"chosen": None, "rejected": GOOD["rejected"]}, GOOD | {"chosen": [{"role": None, "content": "x"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_), path)
    got = read(path)
    assert got[0] == f"{path}:0: ok"
    assert got[1] == f"{path}:1: chosen: expected text or a list of messages, got null"
    assert got[2] == f"{path}:2: chosen[0].role: expected text, got null"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"chosen": i} for i in range(2500)]), path)
    assert [place for place, _ in open_source(str(path), "train", None).rows()] == [f":{i}" for i in range(2500)]


def test_parquet_with_text_that_is_not(pyarrow, tmp_path):
    """Arrow trusts writers about UTF-8; one bad value must not take its thousand neighbours along."""
    data = pyarrow.array([b"good", b"\xff\xfe", b"fine"]).cast(pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "x.parquet")
    found = [row for _, row in open_source(str(tmp_path / "x.parquet"), "train", None).rows()]
    assert [found[0], found[2]] == [{"text": "good"}, {"text": "fine"}]
    assert isinstance(found[1], BadRow)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "middle"])
def test_damaged_parquet(damage, pyarrow, tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"a": "some words " * 10 + str(i)} for i in range(3000)]), path
    )
    whole = path.read_bytes()
    zeros = whole[:40] + bytes(len(whole) // 2) + whole[40 + len(whole) // 2 :]
    path.write_bytes({"empty": b"", "text": b"{}\n", "truncated": whole[:-20], "middle": zeros}[damage])
    with pytest.raises(UserError, match="not a readable parquet file") as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable()


def write(path: Path, *rows_: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))


def test_a_directory_is_its_data_files(tmp_path):
    write(tmp_path / "b.jsonl", GOOD, 7)
    write(tmp_path / "a" / "z.jsonl", GOOD)
    write(tmp_path / ".hidden" / "x.jsonl", 1)
    write(tmp_path / "a" / ".x.jsonl", 1)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "dataset_infos.json").write_text("{}")
    want = [
        f"{tmp_path}/a/z.jsonl:1: ok",
        f"{tmp_path}/b.jsonl:1: ok",
        f"{tmp_path}/b.jsonl:2: expected an object, got a number",
    ]
    assert read(tmp_path) == want
    assert read(f"{tmp_path}/") == want


SPLIT = {
    "train-00000-of-00002.jsonl": 0,
    "train-00001-of-00002.jsonl": 1,
    "test-00000-of-00001.jsonl": 2,
    "other.jsonl": 3,
}


@pytest.mark.parametrize(
    ("names", "split", "want"),
    [
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"], "train", [0, 1]),
        (["train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"], "test", [2]),
        (["other.jsonl", "test-00000-of-00001.jsonl"], "train", [3]),
        (["other.jsonl"], "test", [3]),
        (["test-00000-of-00001.jsonl"], "train", None),
        (["train-00000-of-00002.jsonl"], "validation", None),
    ],
)
def test_a_directory_with_splits(names, split, want, tmp_path):
    for name in names:
        write(tmp_path / "data" / name, {"number": SPLIT[name]})
    if want is None:
        with pytest.raises(UserError, match=f"no file of the split {split} among data/t"):
            open_source(str(tmp_path), split, None)
    else:
        assert [row["number"] for _, row in open_source(str(tmp_path), split, None).rows()] == want


def test_directories_saved_by_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([GOOD, GOOD | {"chosen": None}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "two")
    for path in (tmp_path / "one", tmp_path / "two"):
        assert [line.removeprefix(str(path))[:9] for line in read(path)] == ["[train]:0", "[train]:1"]
    assert len(read(tmp_path / "two", "test")) == 1
    with pytest.raises(UserError, match=r"cannot be loaded as a dataset \(KeyError"):
        read(tmp_path / "two", "validation")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="cannot be loaded as a dataset"):
        read(tmp_path / "nothing")


def test_missing_files_get_the_nearest_name(tmp_path):
    write(tmp_path / "preferences.jsonl", GOOD)
    with pytest.raises(UserError, match=r"no such file or directory \(did you mean preferences.jsonl\?\)$"):
        open_source(str(tmp_path / "preference.jsonl"), "train", None)
    for name in (str(tmp_path / "zzz.parquet"), "./nowhere", "nowhere.json", "a/b/c", "~/nowhere/at/all", "nowhere"):
        with pytest.raises(UserError, match=r"no such file or directory$"):
            open_source(name, "train", None)
    with pytest.raises(UserError, match=r"expected a file ending in \.jsonl"):
        (tmp_path / "x.csv").write_text("a,b")
        open_source(str(tmp_path / "x.csv"), "train", None)
    with pytest.raises(UserError, match="cannot be read"):
        open_source("/" + "x" * 300 + "/y.jsonl", "train", None)


def test_the_fingerprint_is_of_the_rows(tmp_path):
    def fingerprint(name, *rows_):
        write(tmp_path / name, *rows_)
        return open_source(str(tmp_path / name), "train", None).fingerprint

    same = fingerprint("a.jsonl", [GOOD])
    assert fingerprint("b.jsonl", [GOOD]) == same
    assert fingerprint("b.jsonl", [GOOD], [GOOD]) != same
    assert fingerprint("a.json", [GOOD]) != same  # there it is a list of one row, here a line that is no object
    write(tmp_path / "d" / "1.jsonl", GOOD)
    write(tmp_path / "d" / "2.jsonl", 1)
    before = open_source(str(tmp_path / "d"), "train", None).fingerprint
    write(tmp_path / "d" / "1.jsonl", GOOD, 1)
    (tmp_path / "d" / "2.jsonl").write_text("")
    assert open_source(str(tmp_path / "d"), "train", None).fingerprint != before


# --- properties -------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["user", "assistant", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
rows_like = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "id"]), json_values, max_size=4)
lines_like = st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")) | (json_values | rows_like).map(
    lambda v: json.dumps(v).encode()
)


@settings(deadline=None, max_examples=300)
@given(st.lists(lines_like, max_size=6), st.booleans())
@example([b"\xef\xbb\xbf", b"{}"], True)
@example([b"\x0b", b"\x1c{}", b"\r"], False)
def test_any_bytes_are_rows_or_bad_rows(tmp_path_factory, lines, ends):
    """The reader and the preference schema raise nothing but BadRow, and number the lines as `split` does."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    got = read(path)
    physical = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [int(line.removeprefix(f"{path}:").split(":")[0]) for line in got] == [
        n for n, line in enumerate(physical, 1) if line.strip()
    ]
    assert all(line.isprintable() for line in got)


@settings(deadline=None, max_examples=200)
@given(json_values)
def test_json_is_python_s_own_where_it_is_json(value):
    """Against an independent reading: what is accepted is what json.loads gives; what is refused has NaN or Infinity in
    it.
    """
    line = json.dumps(value).encode()
    try:
        assert rows.parse_json(line) == json.loads(line)
    except BadRow as bad_row:
        assert "NaN" in str(bad_row) or "Infinity" in str(bad_row)


@settings(deadline=None, max_examples=200)
@given(json_values)
def test_messages_are_two_texts_each_or_refused(value):
    try:
        clean = rows.messages(value, "messages")
    except BadRow as bad_row:
        assert str(bad_row).startswith("messages")
    else:
        assert clean == [{"role": m["role"], "content": m["content"]} for m in value]
        assert all(
            m["role"] in ("system", "user", "assistant", "tool") and m["content"].encode() is not None for m in clean
        )


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(), max_size=600))
def test_bad_rows_say_it_on_one_line(message):
    shown = str(BadRow(message))
    assert shown == "" or shown.isprintable()
    assert not message.isprintable() or message[:400] == shown

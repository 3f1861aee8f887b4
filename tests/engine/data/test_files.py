"""Files and directories: what is read of them, with which places, and that what is damaged is named on one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from engine.data import readers
from engine.data.files import open_source
from engine.data.rows import BadRow
from engine.errors import UserError
from tests.engine.data.test_rows import json_values, rows_like

USER, BOT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She."}
GOOD = {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "He."}]}


def read(path: Path | str, split: str = "train") -> list[str]:
    """Every row of a source: 'place: ok' or 'place: defect'."""
    source = open_source(str(path), split, None)
    return [f"{source.name}{place}: {row if isinstance(row, BadRow) else 'ok'}" for place, row in source.rows()]


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
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
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
    assert list(open_source(str(path), "train", None).rows()) == [(f":{i}", row) for i, row in enumerate(rows_)]
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
        (tmp_path / "x.txt").write_text("a,b")
        open_source(str(tmp_path / "x.txt"), "train", None)
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

lines_like = st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")) | (json_values | rows_like).map(
    lambda v: json.dumps(v).encode()
)


@settings(deadline=None, max_examples=300)
@given(st.lists(lines_like, max_size=6), st.booleans())
@example([b"\xef\xbb\xbf", b"{}"], True)
@example([b"\x0b", b"\x1c{}", b"\r"], False)
def test_any_bytes_are_rows_or_bad_rows(tmp_path_factory, lines, ends):
    """The reader raises nothing but BadRow, and number the lines as `split` does."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    assume(not path.read_bytes().startswith(tuple(readers.PACKED.values())))  # which is refused by name
    got = read(path)
    physical = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [int(line.removeprefix(f"{path}:").split(":")[0]) for line in got] == [
        n for n, line in enumerate(physical, 1) if line.strip()
    ]
    assert all(line.isprintable() for line in got)

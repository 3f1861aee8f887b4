"""Files and directories: what is read of them, with which places, and that what is damaged is named on one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from engine import disk
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
        ("[1,]", "expected JSON"),
        ("[1 2]", "expected JSON"),
        ("[1] 2", "expected JSON"),
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


def test_a_directory_of_packed_files_and_several_formats(tmp_path):
    packed = gzip.compress(b'{"n": 2}\n7\n')
    files = {
        "train-0.jsonl": b'{"n": 1}',
        "train-1.jsonl.gz": packed,
        "train-2.csv": b"n\n3\n",
        "test.jsonl.gz": packed,
    }
    for name, content in files.items() | {"README.md": b"words", "notes.gz": b"x", "cache-1f.arrow": b"x"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "old.jsonl").mkdir()  # as some tools name the directory of a file's parts
    (tmp_path / "old.jsonl" / "part-0.jsonl").write_bytes(b'{"n": 0}')
    assert [place for place, _ in open_source(str(tmp_path), "train", None).rows()] == [
        "/train-0.jsonl:1",
        "/train-1.jsonl.gz:1",
        "/train-1.jsonl.gz:2",
        "/train-2.csv:2",
    ]
    assert len(read(tmp_path, "test")) == 2
    (tmp_path / "train-3.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-3.parquet.gz: \.parquet is packed inside already"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "twice"),
    [
        (["train.jsonl", "train.jsonl.gz"], True),
        (["train.json", "train.parquet"], True),
        (["a/train.csv", "a/train.tsv.zst"], True),
        (["csv/train.csv", "jsonl/train.jsonl"], True),
        (["train.jsonl", "parquet/train.parquet"], True),
        (["train.v1.jsonl", "train.v2.jsonl.gz"], False),
        (["en/train.jsonl", "fr/train.csv"], False),
        (["train.jsonl", "test.csv", "test.jsonl"], False),  # another split's are not read
    ],
)
@pytest.mark.parametrize("pattern", ["", "/**"])
def test_the_same_rows_in_two_formats_are_not_counted_twice(names, twice, pattern, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    if twice:
        with pytest.raises(
            UserError, match=rf"^{tmp_path}: \S+ and \S+ look like the same rows twice: name one of them$"
        ):
            open_source(f"{tmp_path}{pattern}", "train", None)
    else:
        open_source(f"{tmp_path}{pattern}", "train", None)


def test_patterns(tmp_path, monkeypatch):
    for i, name in enumerate(
        ["b.jsonl", "a.jsonl", "x/train-1.jsonl", "x/y/train-0.jsonl", "x/test.jsonl", "x/.h.jsonl"]
    ):
        write(tmp_path / name, {"n": i})
    (tmp_path / "README.md").write_text("words")
    monkeypatch.chdir(tmp_path)

    def found(pattern, split="train"):
        source = open_source(pattern, split, None)
        return [f"{source.name}{place}" for place, _ in source.rows()]

    assert found("*.jsonl") == ["./a.jsonl:1", "./b.jsonl:1"]
    assert found(f"{tmp_path}/[b-z].jsonl") == [f"{tmp_path}/b.jsonl:1"]
    assert found("x/**/train-*.jsonl") == ["x/train-1.jsonl:1", "x/y/train-0.jsonl:1"]
    assert found("**/test*") == ["./x/test.jsonl:1"]  # named by the pattern, whatever the split
    assert found("x/**/*.jsonl") == ["x/train-1.jsonl:1", "x/y/train-0.jsonl:1"]
    assert found("x/*l", "test") == ["x/test.jsonl:1"]
    (tmp_path / "odd[1]*").mkdir()
    write(tmp_path / "odd[1]*" / "a[b].jsonl", 1)
    write(tmp_path / "odd[1]*" / "c.jsonl", 1)
    assert found("odd[1]*/a[b].jsonl") == ["odd[1]*/a[b].jsonl:1"]
    assert found("odd[1]*/?.jsonl") == ["odd[1]*/c.jsonl:1"]
    for pattern, expected in (
        ("x/*.csv", r"x/\*.csv: matches no file; x has test.jsonl, train-1.jsonl, y$"),
        ("*.csv", r"\*.csv: matches no file; \. has README.md, a.jsonl, b.jsonl, odd\[1\]\* and 1 more$"),
        ("no/where/*.csv", r"matches no file; \. has"),
        ("x/.h*/*", r"matches no file"),
        ("*.md", r"README.md: expected a file ending in"),
        ("x/*", r"x/\*: matches x/y, and not train-0.jsonl in it"),
        ("x/valid[a-z]*.jsonl", "matches no file"),
    ):
        with pytest.raises(UserError, match=expected):
            found(pattern)
    with pytest.raises(UserError, match=r"x: no file of the split valid among test.jsonl, train-1.jsonl$"):
        found("x/*.jsonl", "valid")


def test_a_local_path_may_have_a_colon(tmp_path, monkeypatch):
    write(tmp_path / "a" / "b:c.jsonl", GOOD)
    write(tmp_path / "d" / "e:main" / "x.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    assert read("a/b:c.jsonl") == ["a/b:c.jsonl:1: ok"]
    assert read("d/e:main") == ["d/e:main/x.jsonl:1: ok"]
    for name in ("a/b:d.jsonl", "a/x.jsonl:main", "./a:main", "d/e:", "nowhere:main", "a/b/c:main"):
        with pytest.raises(UserError, match=f"^{name}: no such file or directory"):
            open_source(name, "train", None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library's own loader, on a directory in the place of the hub: somebody/sums has the parts main and hard."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for part in ("main", "hard"):
        write(tmp_path / "far" / part / "train.jsonl", {"part": part})
    parts = "".join(f"- config_name: {part}\n  data_files: {part}/*.jsonl\n" for part in ("main", "hard"))
    (tmp_path / "far" / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    load = datasets.load_dataset

    def load_dataset(name, config=None, **options):
        assert (name, options.pop("revision")) == ("somebody/sums", "v1")
        data = load(str(tmp_path / "far"), config, cache_dir=str(tmp_path / "cache"), **options)
        data._fingerprint = "of the files"  # that a configuration is part of it is not left to the library
        return data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)  # it answers


def test_the_configuration_of_a_hub_dataset(hub):
    sources = [open_source(f"somebody/sums:{part}", "train", "v1") for part in ("main", "hard")]
    assert [[*source.rows()] for source in sources] == [
        [("[train]:0", {"part": "main"})],
        [("[train]:0", {"part": "hard"})],
    ]
    assert [source.name for source in sources] == ["somebody/sums:main", "somebody/sums:hard"]
    assert sources[0].fingerprint != sources[1].fingerprint
    for name, expected in (
        ("somebody/sums", "expected a configuration, one of main, hard, as in somebody/sums:main"),
        ("somebody/sums:mian", r"expected a configuration, one of main, hard, got mian \(did you mean main\?\)"),
    ):
        with pytest.raises(UserError, match=f"^{name}: {expected}$"):
            open_source(name, "train", "v1")
    with pytest.raises(UserError, match=r"^somebody/sums:main: is no .*, and cannot be loaded from the hub"):
        open_source("somebody/sums:main", "nowhere", "v1")


def test_files_that_the_library_saved_may_be_given_alone(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([GOOD, GOOD | {"chosen": None}]).save_to_disk(tmp_path / "one")
    (path,) = (tmp_path / "one").glob("*.arrow")
    assert [row for _, row in open_source(str(path), "train", None).rows()] == [GOOD, GOOD | {"chosen": None}]
    assert read(path) == [f"{path}:0: ok", f"{path}:1: ok"]


def test_the_fingerprint_is_of_the_rows(tmp_path):
    def fingerprint(name, *rows_):
        write(tmp_path / name, *rows_)
        return open_source(str(tmp_path / name), "train", None).fingerprint

    same = fingerprint("a.jsonl", [GOOD])
    assert fingerprint("b.jsonl", [GOOD]) == same
    assert fingerprint("b.jsonl", [GOOD], [GOOD]) != same
    assert fingerprint("a.json", [GOOD]) != same  # there it is a list of one row, here a line that is no object
    content = (tmp_path / "a.jsonl").read_bytes()
    of = {}
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.json"):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(content)
        of |= {n: open_source(str(tmp_path / n), "train", None).fingerprint for n in (name, f"{name}.gz")}
    assert len({*of.values()}) == 8
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
    assume(not disk.disguised(path))  # and so are a web page and a pointer
    got = read(path)
    physical = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [int(line.removeprefix(f"{path}:").split(":")[0]) for line in got] == [
        n for n, line in enumerate(physical, 1) if line.strip()
    ]
    assert all(line.isprintable() for line in got)

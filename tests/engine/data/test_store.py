"""The store of tokenised examples: built once, of exactly these rows, whole or not at all; and which examples a step
takes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import sources as data
from engine.data import store
from engine.data.files import Source, open_source
from engine.data.mixture import Steps, mixture_index, permutation
from engine.data.rows import BadRow
from engine.data.store import Examples, TokenStore, open_or_build, summary
from engine.errors import UserError
from engine.flags import MixtureFlags

ROWS = [{"a": [5, 6, 7], "b": [8, 9]}, {"a": [1, 2], "b": [3, 4, 5, 6]}, {"a": [70_000, 1], "b": [2, 3]}]


class Encoder:
    """Two sequences of a row, all but the first token trained; counts its calls."""

    def __init__(self, fault=lambda n: None) -> None:
        self.calls, self.fault = 0, fault

    def __call__(self, row: dict, notes: Counter):
        self.calls += 1
        self.fault(self.calls)
        if "drop" in row:
            return row["drop"]
        if "bad" in row:
            raise BadRow(f"bad: expected better, got {row['bad']}")
        return [(np.array(row[side], np.int32), np.arange(len(row[side])) > 0) for side in ("a", "b")]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(root: Path, path: Path, encode=None, determinants=None, on_bad_row="skip") -> TokenStore:
    return open_or_build(
        root / "store",
        open_source(str(path), "train", None),
        encode or Encoder(),
        determinants or {"length": 9},
        per_example=2,
        on_bad_row=on_bad_row,
    )


def contents(tokens: TokenStore) -> list:
    return [[ids.tolist() for ids, _ in tokens.sequences(i)] for i in range(len(tokens))]


WANT = [[row["a"], row["b"]] for row in ROWS]


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "x.jsonl", ROWS)


# --- built once, of these rows ----------------------------------------------------------------------------------------


def test_what_was_encoded_is_what_is_read(tmp_path, path):
    tokens = build(tmp_path, path)
    assert contents(tokens) == WANT
    assert [mask.tolist() for _, mask in tokens.sequences(0)] == [[False, True, True], [False, True]]
    assert tokens.tokens().tolist() == [3, 4, 2]
    assert tokens.counts.tolist() == [2, 1, 1, 3, 1, 1]
    keys = [k.tobytes() for k in tokens.keys]
    assert len(set(keys)) == 6
    want = hashlib.blake2b(np.array([3, 4, 5, 6], "<i4").tobytes() + bytes([0, 1, 1, 1]), digest_size=16).digest()
    assert keys[3] == tokens.example_keys(1)[1].tobytes() == want


def test_the_second_start_encodes_nothing(tmp_path, path):
    first, second = Encoder(), Encoder()
    build(tmp_path, path, first)
    moved = tmp_path / "elsewhere.jsonl"
    path.rename(moved)
    os.utime(moved, (1, 1))
    assert contents(build(tmp_path, moved, second)) == WANT
    assert (first.calls, second.calls) == (3, 0)


@pytest.mark.parametrize("change", ["a row", "order", "one more", "length", "template", "version", "sequences"])
def test_whatever_determines_it_makes_another(change, tmp_path, path, monkeypatch):
    build(tmp_path, path)
    determinants, per_example = {"length": 9}, 2
    if change == "a row":
        write(path, [ROWS[0] | {"a": [5, 6, 8]}, *ROWS[1:]])
    elif change == "order":
        write(path, ROWS[::-1])
    elif change == "one more":
        write(path, [*ROWS, ROWS[0]])
    elif change == "version":
        monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    elif change == "sequences":
        per_example = 1
    else:
        determinants = {"length": 10} if change == "length" else {"length": 9, "template": "x"}
    encode = Encoder()
    open_or_build(
        tmp_path / "store", open_source(str(path), "train", None), encode, determinants, per_example=per_example
    )
    assert encode.calls == (4 if change == "one more" else 3)
    assert len([d for d in (tmp_path / "store").iterdir() if d.is_dir()]) == 2


def test_an_empty_dataset(tmp_path, path):
    path.write_text("\n\n")
    tokens = build(tmp_path, path)
    assert len(tokens) == 0
    assert len(tokens.tokens()) == 0
    assert len(Examples([tokens], [np.arange(0)])) == 0
    assert len(build(tmp_path, path)) == 0


# --- whole or not at all ----------------------------------------------------------------------------------------------


def in_child(work) -> int:
    """The wait status of a forked process that runs `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["first row", "last row", "before the header", "before the rename"])
def test_a_killed_build_leaves_nothing_that_is_read(moment, tmp_path, path):
    def build_and_die():
        encode = Encoder(
            {"first row": lambda n: die(), "last row": lambda n: n == 3 and die()}.get(moment, lambda n: None)
        )
        if moment == "before the header":
            store.tokenise = lambda *args: die()
        if moment == "before the rename":
            Path.rename = die
        build(tmp_path, path, encode)

    assert os.WTERMSIG(in_child(build_and_die)) == signal.SIGKILL
    assert all(p.name.startswith(".") for p in (tmp_path / "store").iterdir())
    encode = Encoder()
    assert contents(build(tmp_path, path, encode)) == WANT
    assert encode.calls == 3
    assert not list((tmp_path / "store").glob("*.partial"))


def test_a_failed_build_leaves_nothing(tmp_path, path):
    def fail(n):
        if n == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        build(tmp_path, path, Encoder(fail))
    assert [p.suffix for p in (tmp_path / "store").iterdir()] == [".lock"]


def test_runs_that_start_together_build_once(tmp_path, path):
    log = tmp_path / "log"

    def build_slowly():
        def note(n):
            with open(log, "a") as f:
                f.write(f"{os.getpid()}\n")
            time.sleep(0.1)

        assert contents(build(tmp_path, path, Encoder(note))) == WANT
        os._exit(7)

    children = [os.fork() for _ in range(3) if os.getpid() == PARENT]
    if os.getpid() != PARENT:
        try:
            build_slowly()
        finally:
            os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [7, 7, 7]
    assert len(log.read_text().split()) == 3
    assert len(set(log.read_text().split())) == 1


PARENT = os.getpid()
FILES = ["ids", "mask", "offsets", "keys", "counts", "header.json"]


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "half", "longer", "zeros"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_made_good(name, damage, tmp_path, path, capfd):
    """Or, where the sizes fit and only content is wrong, refused at the first example that has it."""
    build(tmp_path, path)
    (directory,) = (d for d in (tmp_path / "store").iterdir() if d.is_dir())
    file = directory / name
    content = file.read_bytes()
    changed = {
        "gone": b"",
        "empty": b"",
        "cut": content[:-1],
        "half": content[: len(content) // 2],
        "longer": content + b"x" * 16,
        "zeros": bytes(len(content)),
    }
    file.write_bytes(changed[damage])
    if damage == "gone":
        file.unlink()
    encode = Encoder()
    tokens = build(tmp_path, path, encode)
    out = capfd.readouterr().out
    if encode.calls:
        assert f"{directory}: damaged (" in out
        assert contents(tokens) == WANT
    else:
        with pytest.raises(UserError, match=f"{directory}: damaged in its ids or mask"):
            contents(tokens)
    assert encode.calls or damage == "zeros"


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{}",
        '{"per_example": 2}',
        "null",
        '{"per_example": "2", "sequences": 6}',
        '{"per_example": 2, "sequences": 5}',
        "\x00",
    ],
)
def test_headers_that_are_not(header, tmp_path, path, capfd):
    build(tmp_path, path)
    (directory,) = (d for d in (tmp_path / "store").iterdir() if d.is_dir())
    (directory / "header.json").write_text(header)
    encode = Encoder()
    assert contents(build(tmp_path, path, encode)) == WANT
    assert encode.calls == 3
    assert "damaged" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["ids", "mask", "keys", "offsets", "counts"])
def test_every_flipped_bit_is_noticed(name, tmp_path, path):
    build(tmp_path, path)
    (directory,) = (d for d in (tmp_path / "store").iterdir() if d.is_dir())
    content = (directory / name).read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (directory / name).write_bytes(flipped)
        with pytest.raises((UserError, store.Damaged)):
            contents(TokenStore(directory))
    (directory / name).write_bytes(content)
    assert contents(TokenStore(directory)) == WANT


# --- bad and dropped rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["offsets", "keys", "counts", "header.json"])
def test_all_but_ids_and_masks_are_checked_as_a_store_is_opened(name, tmp_path, path, capfd):
    """Of every file every byte counts, and of the header every field, that it has a digest too."""
    whole = contents(build(tmp_path, path))
    (directory,) = (d for d in (tmp_path / "store").iterdir() if d.is_dir())
    file, content = directory / name, (directory / name).read_bytes()
    for at in range(0, len(content), 7):
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        file.write_bytes(flipped)
        encode = Encoder()
        assert contents(build(tmp_path, path, encode)) == whole
        assert encode.calls or (name == "header.json" and _says_the_same(content, flipped)), (name, at)
        assert encode.calls == 0 or f"{directory}: damaged (" in capfd.readouterr().out
        file.write_bytes(content)
    header = json.loads((directory / "header.json").read_text())
    del header["digest"]
    (directory / "header.json").write_text(json.dumps(header))
    encode = Encoder()
    assert contents(build(tmp_path, path, encode)) == whole and encode.calls
    assert f"{directory}: damaged (its keys, counts, offsets or header are not" in capfd.readouterr().out


def _says_the_same(content: bytes, flipped: bytes) -> bool:
    """As JSON."""
    try:
        return json.loads(flipped) == json.loads(content)
    except ValueError:
        return False


def test_every_byte_of_a_header_counts(tmp_path, path):
    """A header with one byte changed is not opened, or says the same: in its names too, and in that of the digest."""
    build(tmp_path, path)
    (directory,) = (d for d in (tmp_path / "store").iterdir() if d.is_dir())
    file, content = directory / "header.json", (directory / "header.json").read_bytes()
    opened = 0
    for at, bit in product(range(len(content)), (1, 2, 32)):
        flipped = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        file.write_bytes(flipped)
        try:
            found = TokenStore(directory)
        except store.Damaged:
            continue
        opened += 1
        assert found.header == json.loads(content), flipped
    assert opened < len(content) / 100


def test_a_store_of_other_rows_under_this_name_is_named(tmp_path, path, capfd):
    """As a copy of a cache may leave it: its own header and arrays agree, and they are another's."""
    whole = contents(build(tmp_path, path))
    (mine,) = (d for d in (tmp_path / "store").iterdir() if d.is_dir())
    build(tmp_path, write(tmp_path / "other.jsonl", ROWS[:1]))
    (other,) = (d for d in (tmp_path / "store").iterdir() if d.is_dir() and d != mine)
    shutil.rmtree(mine)
    other.rename(mine)
    capfd.readouterr()
    assert contents(build(tmp_path, path)) == whole
    assert f"{mine}: damaged (it holds other data than its name says)" in capfd.readouterr().out


def test_rows_are_counted_and_listed(tmp_path, path, monkeypatch):
    bad = [{"bad": i} for i in range(23)]
    write(
        path,
        [bad[0], ROWS[0], {"drop": "too long"}, [1], {"drop": "too long"}, {"drop": "too short"}, ROWS[1], *bad[1:]],
    )
    tokens = build(tmp_path, path)
    assert contents(tokens) == WANT[:2]
    lines = list(summary([tokens]))
    assert lines[0] == f"{path}: 29 rows, 2 kept, 2 dropped (too long), 1 dropped (too short), 24 bad"
    kinds = "23 x bad: expected better, got …; 1 x expected an object, got a list"
    assert lines[1] == f"  24 of 29 rows are bad in {path}: {kinds}"
    assert lines[2] == f"  bad row {path}:1: bad: expected better, got 0"
    assert lines[3] == f"  bad row {path}:4: expected an object, got a list"
    assert len(lines) == 23
    assert lines[-1] == "  and 4 more"

    moved = path.rename(tmp_path / "moved.jsonl")
    assert list(summary([build(tmp_path, moved)]))[2] == f"  bad row {moved}:1: bad: expected better, got 0"
    with pytest.raises(UserError, match=f"^{moved}:1: bad: expected better, got 0$"):
        build(tmp_path, moved, on_bad_row="error")


def test_the_first_bad_row_stops_the_run_where_it_is_told_to(tmp_path, path):
    write(path, [ROWS[0], {"bad": "x"}, {"bad": "y"}])
    encode = Encoder()
    with pytest.raises(UserError, match=f"^{path}:2: bad: expected better, got x$"):
        build(tmp_path, path, encode, on_bad_row="error")
    assert not [d for d in (tmp_path / "store").iterdir() if d.is_dir()]
    assert next(summary([build(tmp_path, path)])) == f"{path}: 3 rows, 1 kept, 2 bad"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "the dataset is empty: name one that has rows"),
        (
            [{"bad": 1}, {"bad": 2}, {"drop": "x"}],
            "no usable row, the first bad one is {path}:1: bad: expected better, got 1",
        ),
        (
            [{"bad": 1}, {"drop": "no counted token within 9 tokens"}, {"drop": "x"}],
            "--max_seq_length 2048 is too small: no row keeps a counted token",
        ),
    ],
)
def test_why_nothing_is_left(rows, expected, tmp_path, path):
    tokens = build(tmp_path, write(path, rows))
    assert data._why_empty([tokens], MixtureFlags()) == expected.format(path=path)


def test_a_trained_first_token_counts_for_nothing(tmp_path, path):
    """Nothing predicts it: a sequence trained from its first token on has one counted token less than tokens."""
    whole = lambda row, notes: [(np.array(row[side], np.int32), np.ones(len(row[side]), bool)) for side in ("a", "b")]
    tokens = build(tmp_path, path, whole)
    assert tokens.counts.tolist() == [len(row[side]) - 1 for row in ROWS for side in ("a", "b")]
    assert [ids.tolist() for ids, _ in tokens.sequences(1)] == [ROWS[1]["a"], ROWS[1]["b"]]


# --- mixtures ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(0, 200) | st.floats(0, 3).map(lambda f: round(f, 3)), st.integers(0, 3))
def test_a_mixture_takes_that_many_as_evenly_as_can_be(n, amount, seed):
    index = mixture_index(n, str(amount), seed, "name")
    want = 0 if n == 0 else amount if isinstance(amount, int) else round(amount * n)
    assert len(index) == want
    assert (np.diff(index) >= 0).all()
    times = Counter(index.tolist())
    assert set(times) <= set(range(n))
    if want:
        assert set(times.values()) <= {want // n, -(-want // n)}
        assert len(times) == min(n, want)
    assert index.tolist() == mixture_index(n, str(amount), seed, "name").tolist()


def test_a_mixture_is_a_function_of_seed_and_name():
    draws = {tuple(mixture_index(100, "0.5", seed, name)) for seed in (1, 2) for name in ("a", "b")}
    assert len(draws) == 4


@pytest.mark.parametrize("amount", ["", "half", "-1", "-0.5", ".nan", "1.0e999", "0x5", "1,5", "nan", "inf"])
def test_amounts_that_are_not(amount):
    with pytest.raises(UserError, match=r"--mixer_list name .*: expected a fraction such as 0\.5 or a number of rows"):
        mixture_index(10, amount, 1, "name")


def test_examples_of_several_stores(tmp_path):
    one = build(tmp_path, write(tmp_path / "1.jsonl", ROWS))
    two = build(tmp_path, write(tmp_path / "2.jsonl", ROWS[::-1]))
    examples = Examples([one, two], [np.array([2, 0]), np.array([1, 1, 2])])
    assert len(examples) == 5
    assert [[ids.tolist() for ids, _ in examples.sequences(i)] for i in range(5)] == [
        WANT[2],
        WANT[0],
        WANT[1],
        WANT[1],
        WANT[0],
    ]
    assert examples.tokens.tolist() == [2, 3, 4, 4, 3]
    some = np.array([4, 0, 2])
    assert examples.counts(some).tolist() == [[2, 1], [1, 1], [1, 3]]
    assert [k.tobytes() for k in examples.keys(some)[0]] == [k.tobytes() for k in one.example_keys(0)]
    others = [
        Examples([one, two], [np.array([0, 2]), np.array([1, 1, 2])]),
        Examples([two, one], [np.array([2, 0]), np.array([1, 1, 2])]),
    ]
    assert len({examples.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert examples.fingerprint == Examples([one, two], [np.array([2, 0]), np.array([1, 1, 2])]).fingerprint


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dataset_name": "x"}, [("x", "")]),
        ({"mixer_list": ("x", "0.5", "y", "20")}, [("x", "0.5"), ("y", "20")]),
        ({"mixer_list": ("x", "0.5", "y")}, "expected NAME AMOUNT pairs, got 3 words"),
    ],
)
def test_names_of_a_mixture(values, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            data.mixture(MixtureFlags(**values))
    else:
        assert data.mixture(MixtureFlags(**values)) == expected


# --- which examples, in which order -----------------------------------------------------------------------------------


def philox(key: int, n: int) -> list[int]:
    """Philox 4x64-10 (Salmon et al. 2011), word by word."""
    multipliers, weyl, word = (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B), 2**64
    out: list[int] = []
    for counter in range(1, n // 4 + 2):
        c, k = [counter, 0, 0, 0], [key % word, key // word]
        for _ in range(10):
            (high0, low0), (high1, low1) = divmod(multipliers[0] * c[0], word), divmod(multipliers[1] * c[2], word)
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
            k = [(a + b) % word for a, b in zip(k, weyl, strict=True)]
        out += c
    return out[:n]


def test_the_order_is_the_same_on_every_machine():
    """A golden one, and any against arithmetic on Python's own integers."""
    assert permutation(12, 1, "order", 0).tolist() == [6, 1, 3, 4, 9, 8, 2, 11, 7, 5, 10, 0]
    for n, name in ((1, (1,)), (9, (7, "order", 3)), (1000, (1, "mixture", "ü"))):
        key = int.from_bytes(hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest(), "little")
        stream = philox(key, n)
        assert permutation(n, *name).tolist() == sorted(range(n), key=stream.__getitem__)


def test_names_do_not_collide():
    names = [
        (1, "order", 0),
        (1, "order", 1),
        (2, "order", 0),
        (1, "mixture", "0"),
        (1, "mixture", 0),
        ("1", "order", 0),
        (11, "order"),
        (1, "1", "order"),
    ]
    assert len({tuple(permutation(50, *name)) for name in names}) == len(names)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(1, 3), st.integers(-1, 30), st.integers(0, 5))
def test_steps(n, batch_size, epochs, max_steps, seed):
    steps = Steps(n, batch_size, epochs, max_steps, seed)
    assert steps.total == (max_steps if max_steps > 0 else -(-n // batch_size) * epochs)
    batches = [steps.examples(step).tolist() for step in range(steps.total)]
    per_epoch = -(-n // batch_size)
    for epoch in range(0, len(batches), per_epoch):
        one = batches[epoch : epoch + per_epoch]
        seen = list(chain(*one))
        assert len(set(seen)) == len(seen)
        if len(one) == per_epoch:
            assert sorted(seen) == list(range(n))
            assert len(one[-1]) == n - (per_epoch - 1) * batch_size  # the short last one is kept
        assert all(len(batch) == batch_size for batch in one[: per_epoch - 1])
    assert steps.used().tolist() == sorted(set(chain(*batches)))
    again = Steps(n, batch_size, epochs, max_steps, seed)
    for step in reversed(range(steps.total)):  # a resumed run starts anywhere
        assert again.examples(step).tolist() == batches[step]


def test_epochs_and_seeds_differ():
    orders = {tuple(Steps(40, 40, 9, -1, seed).examples(step)) for seed in (1, 2) for step in range(3)}
    assert len(orders) == 6


def test_the_step_after():
    """Of 5 examples in batches of 2: the short batch of the first epoch, the next epoch, and nothing after the last."""
    steps = Steps(5, 2, 2, -1, 1)
    assert [steps.after(step).tolist() for step in range(5)] == [steps.examples(step + 1).tolist() for step in range(5)]
    assert steps.after(5) is None and Steps(5, 2, 9, 1, 1).after(0) is None


# --- workers ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EveryThirdIsBad:
    """An encoder that workers can be given: three tokens a row, bad and dropped rows among them."""

    def __call__(self, row: dict, notes: Counter):
        n = row["n"]
        if n % 30 == 7:
            raise BadRow(f"n: expected another number, got {n}")
        return "a multiple of 11" if n % 11 == 0 else [(np.arange(n, n + 3), np.array([False, True, True]))]


def test_workers_write_the_same_bytes(tmp_path, monkeypatch):
    """The files do not depend on how many processes encode, nor where the work is handed over to them."""
    from engine.data import tokenise

    monkeypatch.setattr(tokenise, "ROWS_BEFORE_WORKERS", 512)
    source = Source("x", "", lambda: ((f":{n}", {"n": n}) for n in range(3000)))
    headers = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        headers.append(tokenise.tokenise(tmp_path / str(workers), source, EveryThirdIsBad(), "skip", workers))
    assert headers[0] == headers[1] and headers[0]["rows"] == 3000 and headers[0]["bad_rows"] == 100
    for name in ("ids", "mask", "keys", "counts", "offsets"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    with pytest.raises(UserError, match="x:7: n: expected another number"):
        tokenise.tokenise(tmp_path / "1", source, EveryThirdIsBad(), "error", 2)

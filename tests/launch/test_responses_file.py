"""launch/evaluation/file.py: a file cut anywhere is gone on with and ends the same; another's file stays as it is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from launch.evaluation.file import ResponseFile
from tests.launch.test_compare import row

TEXTS = ["", "a\nb", "\u2028 \ud83d", '"}', "x" * 300]
ROWS = [
    row(
        f"k{i}", i / 4, seed=s, sample=j, response=TEXTS[(i + s + j) % 5], settings={"temperature": 1.0, "weights": "w"}
    )
    for s in (1, 2)
    for i in range(5)
    for j in (0, 1)
]
LINES = [json.dumps(r) + "\n" for r in ROWS]
WANTED = {(r["key"], r["seed"], r["sample"]): "gsm8k" for r in ROWS}
BY_NAME = dict(zip(WANTED, LINES, strict=True))
WHOLE = "".join(LINES).encode()
SETTINGS = ROWS[0]["settings"]


def gone_on_with(path: Path, order: list[int], stop: int | None = None) -> list:
    """What was missing; written in this order, `stop` of them before a kill."""
    file = ResponseFile(path, WANTED)
    file.check(SETTINGS)
    missing = file.missing
    for name in sorted(missing, key=lambda name: order[list(WANTED).index(name)])[:stop]:
        file.write(BY_NAME[name])
    if stop is None:
        file.finish()
    file.close()
    return missing


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(WHOLE)), st.permutations(range(20)), st.integers(0, 20), st.booleans())
def test_a_file_cut_at_any_byte_ends_the_same(cut, order, stop, in_order):
    """Written in order or as responses came, cut, gone on with, killed again, gone on with to the end."""
    lines = LINES if in_order else [LINES[i] for i in order]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "out.jsonl"
        path.write_bytes("".join(lines).encode()[:cut])
        there = path.read_bytes().count(b"\n")
        missing = gone_on_with(path, order, stop)
        assert len(missing) == 20 - there
        assert len(gone_on_with(path, order)) == max(0, 20 - there - stop)
        assert path.read_bytes() == WHOLE and [*Path(directory).iterdir()] == [path]


def test_a_response_is_in_the_file_when_it_is_written(tmp_path):
    file = ResponseFile(tmp_path / "out", WANTED)
    for i, line in enumerate(LINES[::-1]):
        file.write(line)
        assert (tmp_path / "out").read_text() == "".join(LINES[::-1][: i + 1])
    with pytest.raises(UserError, match="another process is writing it"):
        ResponseFile(tmp_path / "out", WANTED)
    file.close()


def test_without_a_path_responses_are_kept_in_memory():
    file = ResponseFile(None, WANTED)
    for line in LINES:
        file.write(line)
    file.finish()
    assert [*file.responses] == [*WANTED] and not file.missing and file.settings == SETTINGS


@pytest.mark.parametrize(
    ("content", "changed", "message"),
    [
        ("notes of mine\n", {}, ":1: Expecting value"),
        (json.dumps({"messages": []}) + "\n", {}, ":1: no response of launch.evaluate"),
        ("".join(LINES[:2]), {"temperature": 0.5}, "holds responses of temperature 1.0, this run has 0.5"),
        ("".join(LINES[:2]), {"weights": "v"}, "holds responses of weights w, this run has v"),
        ("".join(LINES[:2]), {"num_few_shot": 4}, "holds responses of num_few_shot none, this run has 4"),
        (json.dumps(row("k9", 1.0, settings=SETTINGS)) + "\n", {}, ":1: a response that this command does not ask for"),
        (LINES[0].replace('"sample": 0', '"sample": 2'), {}, "a response that this command does not ask for"),
        (LINES[0].replace("gsm8k", "math"), {}, "a response that this command does not ask for"),
        (LINES[0] + LINES[1].replace('"w"', '"v"'), {}, ":2 is of other settings than the lines before"),
        (LINES[0] + "\x00\n" + LINES[1], {}, ":2: "),
    ],
)
def test_anothers_file_is_refused_and_left_as_it_is(content, changed, message, tmp_path):
    path = tmp_path / "out"
    path.write_text(content + "torn")
    with pytest.raises(UserError) as caught:
        ResponseFile(path, WANTED).check(SETTINGS | changed)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == content + "torn"


def test_weights_are_checked_once_they_are_known(tmp_path):
    (tmp_path / "out").write_text(LINES[0])
    file = ResponseFile(tmp_path / "out", WANTED)
    file.check({"temperature": 1.0}, unknown=("weights",))
    with pytest.raises(UserError, match=r"of temperature 1\.0, this run has none"):
        file.check({}, unknown=("weights",))


def test_a_full_disk_keeps_what_is_there(tmp_path):
    file = ResponseFile(tmp_path / "out", WANTED)
    file.write(LINES[0])
    file.close()

    class Full:
        def truncate(self, size):
            raise OSError(28, "No space left on device")

    file._file = Full()
    with pytest.raises(UserError, match="No space left on device; what is in it is kept, and the same command goes on"):
        file.write(LINES[1])
    assert (tmp_path / "out").read_text() == LINES[0]

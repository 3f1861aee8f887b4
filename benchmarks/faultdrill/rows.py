"""Bad rows: one of every kind in a file of good ones, in every schema, at the places where counting goes wrong.

The file is read as a stage reads it. The bad row has to be named with file, line, field, what was expected and what was
there, or to be used as it is, or dropped for a reason; the row at the file's end, which is bad as well, has to be named
with its own line; the counts are exact; and the tokens of the good rows are those of a file without bad ones.
"""

from __future__ import annotations

import functools
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faultdrill.apart import apart
from benchmarks.faultdrill.reading import LONGEST, SCHEMAS, Read, read
from benchmarks.faultdrill.suite import Case, Cases, Suite
from engine.errors import UserError
from tests import ranks

GOOD_ROWS = {"sft": 258, "dpo": 30, "ppo": 30}  # conversations fill more than a chunk
AT = {"sft": (1, 2, 256, 257, 259), "dpo": (1, 2, 16, 30, 31), "ppo": (1, 2, 16, 30, 31)}
LAST = b'{"sentinel": 1}'  # a bad row of every schema

FIELD = {"sft": "messages[1]", "dpo": "chosen[1]", "ppo": "messages[0]"}  # the message that is damaged
COLUMN = {"sft": "messages", "dpo": "chosen", "ppo": "messages"}


def good(schema: str, i: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"What is {i} and one?"}
    said = {"role": "assistant", "content": f"It is {i + 1}."}
    if schema == "sft":
        return {"messages": [asked, said]}
    if schema == "dpo":
        return {"chosen": [asked, said], "rejected": [asked, said | {"content": "I do not know."}]}
    return {"messages": [asked], "ground_truth": str(i + 1), "dataset": "gsm8k"}


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _with(**changes: Any) -> Callable[[str], bytes]:
    """A good row of which the damaged message has other values."""

    def line(schema: str) -> bytes:
        row = good(schema, 7)
        message = row[COLUMN[schema]][-1]
        row[COLUMN[schema]] = [*row[COLUMN[schema]][:-1], message | changes]
        return _line(row)

    return line


def _raw(before: str, after: str) -> Callable[[str], bytes]:
    """A good row with something else in its JSON text."""
    return lambda schema: _line(good(schema, 7)).replace(before.encode(), after.encode("utf-8", "surrogatepass"))


def _without(schema: str) -> bytes:
    row = good(schema, 7)
    del row[{"sft": "messages", "dpo": "rejected", "ppo": "ground_truth"}[schema]]
    return _line(row)


def _misordered(schema: str) -> bytes:
    row = good(schema, 7)
    turns = row[COLUMN[schema]]
    return _line(
        row | {COLUMN[schema]: [turns[0], turns[0]] if schema != "ppo" else [turns[0] | {"role": "assistant"}]}
    )


def _escaped(schema: str) -> bytes:
    """Half of a surrogate pair, as JSON escapes it."""
    return _line(good(schema, 7)).replace(b"one", b"o\\ud83de")


def _long(schema: str) -> bytes:
    """10 MB of words."""
    text = _line(good(schema, 7))
    return text.replace(b"one", b"one two three, " * (700_000 // text.count(b"one")))


def _unscored(schema: str) -> bytes:
    """Cut before anything that counts."""
    row = good(schema, 7)
    for column in {"dpo": ("chosen", "rejected")}.get(schema, ("messages",)):
        row[column] = [row[column][0] | {"content": "one two " * 500}, *row[column][1:]]
    return _line(row)


@dataclass(frozen=True)
class Kind:
    """`line(schema)` is the row. `becomes`: 'bad' with a pattern of what is said, 'kept', 'dropped' with a pattern of
    why, 'noted' (kept, with a note) or 'nothing' (no row at all).
    """

    line: Callable[[str], bytes]
    becomes: str
    said: str | dict[str, str] = ""
    of_sft: str = ""  # where conversations are another case

    def expected(self, schema: str) -> tuple[str, str]:
        """(what becomes of it, the pattern)."""
        becomes = self.of_sft if schema == "sft" and self.of_sft else self.becomes
        text = self.said if isinstance(self.said, str) else self.said[schema]
        return becomes, text.replace("FIELD", re.escape(FIELD[schema])).replace("COLUMN", COLUMN[schema])


NOT_TEXT = r"FIELD\.content: expected text, got "
ROLES = r"FIELD\.role: expected one of system, user, assistant, tool, got "
KINDS = {
    "cut off": Kind(lambda schema: _line(good(schema, 7))[:-9], "bad", "expected JSON "),
    "no JSON": Kind(lambda _: b"messages: none", "bad", r"expected JSON \(Expecting value"),
    "a list": Kind(lambda schema: _line([good(schema, 7)]), "bad", "expected an object, got a list"),
    "a key twice": Kind(_raw('"role": "user"', '"role": "user", "role": "x"'), "bad", "role: expected once in an obj"),
    "half a character": Kind(
        _escaped, "bad", r"(FIELD|chosen\[0\]|messages\[0\])\.content: expected text, got a lone sur"
    ),
    "a byte order mark": Kind(lambda schema: b"\xef\xbb\xbf" + _line(good(schema, 7)), "bad", "expected JSON .*BOM"),
    "NaN": Kind(_raw('"role": "user"', '"role": NaN'), "bad", "expected JSON, got NaN"),
    "5000 digits": Kind(_raw('"role": "user"', '"role": ' + "9" * 5000), "bad", r"expected JSON \(Exceeds the limit"),
    "3000 deep": Kind(_raw('"role": "user"', '"role": ' + "[" * 3000 + "]" * 3000), "bad", "expected "),
    "not UTF-8": Kind(
        lambda schema: _line(good(schema, 7)).replace(b"one", b"o\xffe"), "bad", r"expected UTF-8, got byte 0xff at \d+"
    ),
    "a NUL": Kind(_raw("one", "o\0e"), "bad", r"expected JSON \(Invalid control character"),
    "a field is missing": Kind(
        _without,
        "bad",
        {
            "sft": "columns: expected messages or .*, got nothing",
            "dpo": "rejected: expected text or a list of messages, got nothing",
            "ppo": "ground_truth: missing",
        },
    ),
    "null": Kind(_with(content=None), "bad", NOT_TEXT + "null"),
    "a number": Kind(_with(content=7), "bad", NOT_TEXT + "a number"),
    "a list of texts": Kind(_with(content=["a"]), "bad", r"FIELD\.content\[0\]: expected a part, .* got text"),
    "an object": Kind(_with(content={"a": 1}), "bad", NOT_TEXT + "an object"),
    "no messages": Kind(
        lambda schema: _line(good(schema, 7) | {COLUMN[schema]: []}),
        "bad",
        "COLUMN: expected a list of messages, got an",
    ),
    "an unknown role": Kind(_with(role="asistant"), "bad", ROLES + r"'asistant' \(did you mean assistant\?\)"),
    "wrong order of roles": Kind(
        _misordered,
        "bad",
        {
            "sft": "no turn that is trained",
            "dpo": "chosen: expected the assistant's turn at the end, got the user's",
            "ppo": "messages: expected a turn to answer, got only the assistant's",
        },
        of_sft="dropped",
    ),
    "a control token": Kind(
        _with(content="a<|end|>b"), "bad", r"content of message \d holds the control token '<|end|>'"
    ),
    "another key": Kind(lambda schema: _line(good(schema, 7) | {"mood": "good"}), "noted", "not used.* mood"),
    "CRLF": Kind(lambda schema: _line(good(schema, 7)) + b"\r", "kept"),
    "line separators in a text": Kind(_raw("one", "o\u2028\u2029\u0085e"), "kept"),
    "a blank line": Kind(lambda _: b" \t\r", "nothing"),
    "10 MB": Kind(_long, "dropped", f"(longer than|no counted|no trained).*{LONGEST} tok"),
    "nothing left by the cut": Kind(_unscored, "dropped", f"(longer than|no counted|no trained).*{LONGEST} tok"),
}
assert len(KINDS) == 26


# --- one case ---------------------------------------------------------------------------------------------------------


@functools.cache
def whole(schema: str) -> list[bytes]:
    """What is kept of a file of good rows alone."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        path.write_bytes(b"".join(_line(good(schema, i)) + b"\n" for i in range(GOOD_ROWS[schema])))
        found = read(schema, path, Path(directory) / "cache")
    assert len(found.kept) == GOOD_ROWS[schema] == found.rows and not found.bad
    return found.kept


def one_row(schema: str, kind: str, position: int, directory: Path) -> str:
    """'' where all that is promised held of this bad row, or what did not."""
    lines = [_line(good(schema, i)) for i in range(GOOD_ROWS[schema])]
    lines.insert(position - 1, KINDS[kind].line(schema))
    path, cache = directory / "rows.jsonl", directory / "cache"
    path.write_bytes(b"\n".join([*lines, LAST]))
    becomes, said = KINDS[kind].expected(schema)
    if kind == "a byte order mark" and position == 1:
        becomes = "kept"  # there it is the file's
    found = read(schema, path, cache)
    return (
        _counted(found, becomes, whole(schema), position)
        or _listed(found, becomes, said, position, len(lines) + 1)
        or _stopped(schema, path, cache, found)
    )


def _counted(found: Read, becomes: str, kept: list[bytes], position: int) -> str:
    expected = len(kept) + 2 - (becomes == "nothing")
    if found.rows != expected:
        return f"{expected} rows, {found.rows} were counted"
    if found.num_bad != 1 + (becomes == "bad"):
        return f"{found.num_bad} bad rows were counted"
    if sum(found.dropped.values()) != (becomes == "dropped"):
        return f"dropped: {found.dropped}"
    added = becomes in ("kept", "noted")
    others = found.kept[: position - 1] + found.kept[position:] if added else found.kept
    if len(found.kept) != len(kept) + added or others != kept:
        return "other tokens of the good rows"
    return ""


def _listed(found: Read, becomes: str, said: str, position: int, end: int) -> str:
    *first, last = found.bad
    if not last.startswith(f":{end}: "):
        return f"the last row is named as {last[:80]}"
    if becomes == "bad" and not (first and re.match(rf":{position}: ({said})", first[0])):
        return f"named as {first}, expected :{position}: {said}"
    if becomes == "dropped" and not re.match(said, *found.dropped):
        return f"dropped as {[*found.dropped]}"
    return "" if becomes != "noted" or any(re.search(said, note) for note in found.notes) else "not noted"


def _stopped(schema: str, path: Path, cache: Path, found: Read) -> str:
    """What --on_bad_row error and --max_bad_rows make of it, of the store that is there by now as well."""
    for on_bad_row, bound, begins in (
        ("error", 1.0, f"{path}{found.bad[0]}"),
        ("skip", found.num_bad - 1, f"{path}: {found.num_bad} of {found.rows} rows are bad"),
    ):
        try:
            read(schema, path, cache, on_bad_row, bound)
        except UserError as error:
            if str(error).startswith(begins):
                continue
            return f"{on_bad_row}: {str(error)[:120]}"
        return f"--on_bad_row {on_bad_row} --max_bad_rows {bound} went on"
    return ""


# --- real runs --------------------------------------------------------------------------------------------------------


def _run(schema: str, world: int, directory: Path) -> str:
    """The stage itself: the first bad row ends it, too many do, and with another bound the same run begins and ends."""
    path = directory / "rows.jsonl"
    rows = [_line(good(schema, i)) for i in range(60)]
    rows[40:40], rows[50:50] = [b"{"], [LAST]
    path.write_bytes(b"\n".join(rows))
    words = ["--dataset_name", path, "--model_name_or_path", _model(), "--cache_dir", directory / "cache"]
    words += ["--output_dir", directory / "run", "--max_steps", 2, "--batch_size", 4, "--max_seq_length", LONGEST]
    words += ["--response_length", 8] if schema == "ppo" else []
    at, module = path, f"launch.{schema}"
    for more, expected in (
        (("--on_bad_row", "error"), f"error: {at}:41: expected JSON"),
        ((), f"error: {at}: 2 of 62 rows are bad, and --max_bad_rows 0.01 lets 1 pass"),
    ):
        result = ranks.launch([*words, *more], world, module, log=directory / "log")
        if set(result.codes) != {2} or expected not in result.output or "Traceback" in result.output:
            return f"{' '.join(more) or 'the default'}: {result.codes} {result.output[-300:]}"
        if (directory / "run" / "metrics.jsonl").exists():
            return "the run had begun"
    result = ranks.launch([*words, "--max_bad_rows", 2], world, module, log=directory / "log")
    return "" if result.ok and "62 rows, 60 kept, 2 bad" in result.output else f"{result.codes} {result.output[-300:]}"


@functools.cache
def _model() -> Path:
    from benchmarks.faultdrill.reading import tokenizer

    return Path(tokenizer().tokenizer.name_or_path)


RUNS = [("dpo", 2), ("sft", 1), ("ppo", 1)]


# --- the suite --------------------------------------------------------------------------------------------------------


def drawn(count: int, seed: int) -> list[tuple[str, str, int]]:
    """(schema, kind, position): every kind in every schema before any of them a second time."""
    draw = random.Random(seed)
    of_kind = {(schema, kind): draw.sample(AT[schema], 5) for schema in SCHEMAS for kind in KINDS}
    order = [(schema, kind, of_kind[schema, kind][i]) for i in range(5) for schema, kind in of_kind]
    return order[:count]


def cases(count: int, seed: int) -> Iterator[Case]:
    for schema, kind, position in drawn(count - len(RUNS), seed):
        yield Case(f"{schema} {kind} {position}", functools.partial(one_row, schema, kind, position))
    for schema, world in RUNS[: max(0, count)]:
        yield Case(f"launch.{schema} on {world}", functools.partial(_run, schema, world))


def control(hook: str, *chosen: tuple[str, str, int]) -> Cases:
    """These rows, read with something taken away."""

    def of(count: int, seed: int) -> Iterator[Case]:
        for one in chosen:
            work = functools.partial(one_row, *one)
            yield Case(" ".join(map(str, one)), functools.partial(apart, work, hook=f"tests.faults:{hook}"))

    return of


def library(count: int, seed: int) -> Iterator[Case]:
    """`datasets` in place of the reader: whether a bad row is refused with its number, from 0 or 1, and a good one
    read.
    """
    for schema, kind, position in drawn(count, seed):
        yield Case(f"{schema} {kind} {position}", functools.partial(_by_library, schema, kind, position))


def _by_library(schema: str, kind: str, position: int, directory: Path) -> str:
    import datasets

    datasets.disable_progress_bars()
    lines = [_line(good(schema, i)) for i in range(GOOD_ROWS[schema])]
    lines.insert(position - 1, KINDS[kind].line(schema))
    path = directory / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(directory / "cache"))
    except Exception as error:  # whatever its back ends raise
        said = " ".join(str(e) for e in (error, error.__cause__, error.__context__))
        named = re.search(rf"\b(row|line):? ({position - 1}|{position})\b", said)
        return "" if named and KINDS[kind].becomes == "bad" else "refused without its row"
    return "taken in silence" if KINDS[kind].becomes == "bad" else ""


SUITE = Suite(
    name="rows",
    unit="bad rows",
    promise="named with line and field, or used, or dropped; exact counts; the good rows' tokens unchanged",
    sizes=(120, len(KINDS) * 5 * len(SCHEMAS) + len(RUNS)),
    cases=cases,
    controls={
        "json.loads as it is": control("rows_as_json_loads_takes_them", ("sft", "NaN", 2), ("dpo", "a key twice", 2)),
        "a missing field is null": control("fields_that_are_missing_are_empty", ("dpo", "a field is missing", 2)),
        "one bad row is not counted": control("one_bad_row_goes_uncounted", ("sft", "null", 256)),
        "lines as str.splitlines": control("lines_as_str_has_them", ("ppo", "line separators in a text", 2)),
        "a bound that is not checked again": control("no_bound_on_bad_rows", ("sft", "null", 2)),
    },
    baselines={"datasets": library},
    left_out=("rows of the hub: there is no network here",),
)

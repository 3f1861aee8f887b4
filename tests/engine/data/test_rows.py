"""One row: what is read, what is refused, and that every refusal says file, line and field on one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import rows
from engine.data.files import open_source
from engine.data.preferences import conversations
from engine.data.rows import BadRow

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
        "chosen[0].content[0].text: expected text, got null",
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
    found = [conversations(row)[0].messages[1]["content"] for _, row in open_source(str(path), "train", None).rows()]
    assert found == strange


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

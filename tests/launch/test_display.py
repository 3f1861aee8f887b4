"""What a model says, on a terminal: nothing drives it, lines fit, and lines that stand do not change."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from launch.display import JOINERS, Ink, padded, shown, side_by_side, width, wrapped

HOSTILE = (
    st.text(st.characters(max_codepoint=0xA0)) | st.text() | st.text(st.sampled_from("\x1b\x9b\r\n\t []0m;a\u202e"))
)
WORDS = st.text(st.sampled_from("ab 図é\u0301\n "), max_size=60)


@given(HOSTILE)
def test_nothing_that_drives_a_terminal_is_left(text):
    left = [c for c in shown(text) if not c.isprintable() and c not in JOINERS and c != "\n"]
    assert not left
    assert shown(shown(text)) == shown(text)


@given(HOSTILE)
def test_what_can_be_seen_stays_as_it_is(text):
    assume("\r\n" not in text)
    assert shown(text) == "".join(c if c.isprintable() else shown(c) for c in text)


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("a\r\nb\rc\td", "a\nb␍c    d"),
        ("\x9b2J\u202eabc\u200d", "\ufffd2J\ufffdabc\u200d"),
        ("\x7f\xa0", "␡ "),
    ],
)
def test_what_cannot_be_seen_is_drawn(said, seen):
    assert shown(said) == seen


def test_columns_of_characters():
    assert [width(text) for text in ("abc", "図書", "e\u0301", "😀", "")] == [3, 4, 1, 2, 0]
    assert padded("図", 4) == "図  "


@example("\u0301 a図", 2)
@given(WORDS, st.integers(2, 12))
def test_lines_fit_and_say_all(text, columns):
    lines = wrapped(text, columns)
    assert all(width(line) <= columns for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


@given(WORDS, st.integers(2, 12), st.integers(0, 60))
def test_a_line_that_is_full_does_not_change(text, columns, cut):
    before, after = wrapped(text[:cut], columns)[:-1], wrapped(text, columns)
    assert after[: len(before)] == before


def test_words_are_not_broken_where_they_fit():
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("one  twothreefour", 7) == ["one ", "twothre", "efour"]


@given(WORDS, WORDS, st.integers(1, 7))
def test_side_by_side_is_the_same_however_it_comes(left, right, size):
    def pieces(text, n):
        return iter([text[i : i + n] for i in range(0, len(text), n)])

    whole = list(side_by_side([pieces(left, 99), pieces(right, 99)], 23))
    assert list(side_by_side([pieces(left, size), pieces(right, 3)], 23)) == whole
    columns = [wrapped(text, 10) for text in (left, right)]
    assert len(whole) == max(map(len, columns))
    for row, line in enumerate(whole):
        parts = [part[row] if row < len(part) else "" for part in columns]
        assert line == f"{padded(parts[0], 10)} │ {padded(parts[1], 10)}".rstrip()


def test_rows_come_as_soon_as_they_stand():
    came = []

    def left():
        for word in ("one two ", "three four ", "five "):
            came.append(word)
            yield word

    rows = side_by_side([left(), iter(["a"])], 23)
    assert next(rows) == "one two    │ a" and len(came) == 2


def test_ink_only_where_it_is_wanted():
    assert Ink(False).dim("a") == "a" and Ink(False).mark("> ") == "> "
    assert Ink(True).dim("a") == "\x1b[2ma\x1b[0m" and Ink(True).dim("") == ""

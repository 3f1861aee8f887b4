"""Bad rows by file and kind: exact counts, exact places, the good rows' tokens untouched, and the bound beyond which a
run does not begin; whatever stands between what.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.data import bad_rows
from engine.data.bad_rows import BadRows, allowed, kind_of, too_many
from engine.data.chat import load_tokenizer
from engine.data.conversations import first_form
from engine.data.files import open_source
from engine.data.prompts import PromptReader, load_prompts
from engine.data.sources import conversations_prepared, pairs_prepared
from engine.data.store import open_or_build, summary
from engine.errors import UserError
from engine.flags import ConversationFlags, MixtureFlags, PairFlags, PromptFlags

ASK, SAY = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is one."}
GOOD = {
    "sft": lambda i: {"messages": [ASK, SAY | {"content": f"It is {i}."}]},
    "dpo": lambda i: {"prompt": f"Who is {i}?", "chosen": "It is one.", "rejected": "Nobody."},
    "ppo": lambda i: {"prompt": f"Who is {i}?", "ground_truth": "1", "dataset": "gsm8k"},
}
# lines, and how what is said of them begins, in every schema
BAD = {
    b"{": "expected JSON (Expecting property name",
    b'{"a": NaN}': "expected JSON, got NaN",
    b'{"a": 1, "a": 2}': "a: expected once in an object, got twice",
    b"[1]": "expected an object, got a list",
    b'"\xff"': "expected UTF-8, got byte 0xff at 1",
    b'{"messages": 7, "prompt": 7, "ground_truth": 7}': "",
    b'{"other": "x"}': "",
}
NOTHING = (b"", b" \t", b"\x0b")  # lines that are no rows
lines_of = st.lists(st.sampled_from([*BAD, *NOTHING, None, None, None]), min_size=1, max_size=24)


@pytest.fixture(scope="module")
def chat(embedded_dir):
    return load_tokenizer(embedded_dir.model, 512)


def read(schema, path: Path, root: Path, chat, **policy) -> tuple[list[bytes], list[str]]:
    """(what addresses each kept row by its tokens, the lines of the screen)."""
    source, flags = open_source(str(path), "train", None), MixtureFlags()
    if schema == "ppo":
        reader = PromptReader(chat, PromptFlags(), lambda dataset, truth: None)
        kept, lines = load_prompts(source, reader, 99, **({"on_bad_row": "skip"} | policy))
        return [prompt.ids.tobytes() for prompt in kept], lines
    if schema == "sft":
        kind, prepare = conversations_prepared(flags, chat, ConversationFlags(), 99)
    else:
        kind, prepare = pairs_prepared(flags, "last", chat, PairFlags(), 99)
    per = 1 + (schema == "dpo")
    store = open_or_build(root, *prepare(source), kind, per_example=per, **policy)
    keys = [key.tobytes() for key in store.keys]
    return [b"".join(keys[i : i + per]) for i in range(0, len(keys), per)], list(summary([store]))


@pytest.mark.parametrize("schema", GOOD)
def test_whatever_stands_between_what(schema, chat):
    """Any interleaving, in two files of a directory: what is kept are the good rows' tokens, in order; each bad row is
    named with its own file and line; the counts of each file are exact.
    """

    @settings(deadline=None, max_examples=25)
    @given(lines_of, lines_of, st.sampled_from([b"\n", b"\r\n"]), st.sampled_from([b"", b"\xef\xbb\xbf"]))
    @example([None], [b"{"] * 3 + [None], b"\n", b"")
    def check(first, second, newline, mark):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory) / "data"
            root.mkdir()
            good, wanted, rows, bad = [], [], Counter(), Counter()
            for name, kinds in (("a.jsonl", first), ("b.jsonl", second)):
                written = []
                for number, kind in enumerate([None, *kinds], 1):
                    written.append(json.dumps(GOOD[schema](len(good))).encode() if kind is None else kind)
                    good += [written[-1]] if kind is None else []
                    rows[name] += kind not in NOTHING
                    if kind in BAD:
                        bad[name] += 1
                        wanted.append((f"  bad row {root}/{name}:{number}: ", BAD[kind]))
                (root / name).write_bytes(mark + newline.join(written))
            alone = Path(directory) / "good.jsonl"
            alone.write_bytes(b"\n".join(good))
            expected, _ = read(schema, alone, Path(directory) / "cache", chat)
            kept, lines = read(schema, root, Path(directory) / "cache", chat)
            assert kept == expected and len(kept) == len(good)
            total = f"{rows.total()} rows, {len(good)} kept" + (f", {bad.total()} bad" if bad else "")
            assert lines[0] == f"{root}: {total}"
            named = [line for line in lines if line.startswith("  bad row ")]
            assert len(named) == min(len(wanted), bad_rows.LISTED)
            for line, (place, why) in zip(named, wanted, strict=False):
                assert line.startswith(place + why)
            for name in bad:
                said = f"  {bad[name]} of {rows[name]} rows are bad in {root}/{name}: "
                assert (bad[name] > 1) == any(line.startswith(said) for line in lines)
            _check_bound(schema, root, Path(directory) / "cache", chat, bad, rows)

    check()


def _check_bound(schema, root, cache, chat, bad, rows):
    """At the bound a run goes on, beyond it it is refused, with the store that is there as without one."""
    most = max(bad.values(), default=0)
    if most == 0:
        return
    read(schema, root, cache, chat, max_bad_rows=most)
    file = next(name for name in bad if bad[name] > most - 1)
    with pytest.raises(UserError) as refused:
        read(schema, root, cache, chat, max_bad_rows=most - 1 if most > 1 else 0)
    said = (
        f"{root}/{file}: {bad[file]} of {rows[file]} rows are bad, and --max_bad_rows {most - 1} lets {most - 1} pass: "
    )
    assert str(refused.value).startswith(said) and str(refused.value).endswith(f"by --max_bad_rows {most}")
    assert f"the first is {root}/{file}:" in str(refused.value)
    with pytest.raises(UserError, match=rf"^{root}/[ab].jsonl:\d+: "):
        read(schema, root, cache, chat, on_bad_row="error")


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.sampled_from(["0", "0.01", "0.07", "0.1", "1e-6", "0.5", "0.999", "1", "2", "40"]))
def test_a_share_is_rounded_up_and_a_number_is_itself(rows, bound):
    most = allowed(rows, float(bound))
    if float(bound) >= 1:
        assert most == min(rows, int(bound))
    else:
        assert most - 1 < rows * Fraction(bound) <= most
    assert float(bound) == 0 or rows == 0 or most >= 1  # no run dies of one row that it was not told to die of


def test_a_file_without_a_usable_row_is_refused_whatever_the_bound():
    assert allowed(100, 0.07) == 7 and allowed(300, 0.01) == 3  # in floats 100 * 0.07 is more than 7
    assert too_many(1, 1, 1e9) and too_many(5, 5, 0.999) and not too_many(1, 2, 0.01) and not too_many(0, 0, 0)


def test_kinds_are_counted_apart_up_to_a_number(monkeypatch):
    monkeypatch.setattr(bad_rows, "KINDS", 2)
    found = BadRows()
    for i, why in enumerate(["a: 1", "b: 1", "a: 2", "c: 1", "d: 1"]):
        found.add(f":{i}", why)
    assert found.kinds[""] == {"a: …": 2, "b: …": 1, "of another kind": 2} and found.count == 5


def test_numbers_and_quoted_words_make_no_kind():
    assert kind_of("messages[3].role: got 'x', 16,777,216 bytes, at 7") == "messages[].role: got …, … bytes, at …"


@pytest.mark.parametrize("first", [b"{", b"[1]", b'{"a": NaN}', b'{"other": 1}'])
def test_a_bad_row_at_the_head_makes_no_others_bad(first, tmp_path, chat):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([first, *(json.dumps(GOOD["sft"](i)).encode() for i in range(9))]))
    assert first_form(open_source(str(path), "train", None)) == "messages"
    assert len(read("sft", path, tmp_path / "cache", chat, max_bad_rows=0.01)[0]) == 9


def test_rows_of_each_file_are_counted_across_chunks(tmp_path, chat):
    """A file that ends within a chunk."""
    (tmp_path / "data").mkdir()
    for name, n in (("a", 300), ("b", 700)):
        rows = [json.dumps(GOOD["sft"](i)) if i % 100 else "{" for i in range(n)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(rows))
    lines = read("sft", tmp_path / "data", tmp_path / "cache", chat)[1]
    assert lines[0].endswith("data: 1000 rows, 990 kept, 10 bad")
    assert "  3 of 300 rows are bad in" in lines[1] and "  7 of 700 rows are bad in" in lines[2]


@pytest.mark.parametrize(("bound", "said"), [("1.5", "got 1.5"), ("-0.5", "got -0.5"), ("-2", "not be negative")])
def test_a_bound_is_a_share_or_a_whole_number(bound, said):
    with pytest.raises(UserError, match=f"--max_bad_rows.*{said}"):
        MixtureFlags(max_bad_rows=float(bound)).check_rows()
    for good in (0, 0.01, 0.999, 1, 7):
        MixtureFlags(max_bad_rows=good).check_rows()

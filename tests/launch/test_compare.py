"""launch.compare: two files by hand, what it says, what it leaves out and names, what it refuses."""

from __future__ import annotations

import json

import pytest

from engine.errors import UserError
from engine.train.paired import mcnemar, tango
from launch import compare


def row(key, score, seed=1, sample=0, **other):
    whole = {"key": key, "seed": seed, "sample": sample, "source": "p.jsonl", "response": "", "finish_reason": "stop"}
    whole |= {"prompt_tokens": 5, "response_tokens": 7, "ground_truth": "1", "dataset": "gsm8k", "score": score}
    return whole | {"status": "ok", "reason": "", "settings": {"temperature": 0.0, "weights": "a"}} | other


def written(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_one_answer_each_by_hand(tmp_path, capsys):
    a = written(tmp_path / "a.jsonl", [row(f"k{i}", float(i < 11)) for i in range(20)])
    b = written(tmp_path / "b.jsonl", [row(f"k{i}", float(i not in (0, 19))) for i in range(20)][::-1])
    found = compare.compare(a, b).overall
    assert (found.prompts, found.mean_a, found.mean_b) == (20, 0.55, 0.9)
    assert (found.better_b, found.better_a) == (8, 1) and found.difference == pytest.approx(7 / 20)
    assert (found.low, found.high) == tango(8, 1, 20) and found.p == mcnemar(8, 1) == pytest.approx(20 / 512)
    compare.run(compare.Config(a=str(a), b=str(b)))
    said = capsys.readouterr().out
    low, high = (f"{100 * x:+.1f}" for x in tango(8, 1, 20))
    assert f"B is better than A by 35.0 points (90.0% against 55.0%), 95 % {low} to {high}, p = 0.039" in said
    assert (
        "(20 prompts; 8 only B right, 1 only A right)" in said and "not covered: how far another training run" in said
    )
    turned = compare.compare(b, a).lines()[0]
    head = f"A is better than B by 35.0 points (90.0% against 55.0%), 95 % {low} to {high}, p = 0.039"
    assert turned == f"{head} (20 prompts; 1 only B right, 8 only A right)"


def test_samples_and_seeds_of_a_prompt_are_one(tmp_path):
    a = [row(f"k{i}", float(j < i), seed=1 + j // 2, sample=j % 2) for i in range(5) for j in range(4)]
    b = [row(f"k{i}", float(j < 2), sample=j) for i in range(5) for j in range(2)]
    found = compare.compare(written(tmp_path / "a", a), written(tmp_path / "b", b)).overall
    assert found.prompts == 5 and found.mean_a == 0.5 and found.mean_b == 1.0 and not found.single
    assert (found.better_b, found.better_a) == (4, 0) and found.p == 2 / 16
    assert found.low < 0.5 < found.high and "B scores higher on 4, A on 0" in compare.sentence(found, "A", "B")


def test_groups_and_what_is_left_out_are_named(tmp_path):
    kinds = [{"dataset": "math", "source": "m.jsonl"}, {"dataset": "gsm8k"}]
    a = [row(f"k{i}", float(i % 3 == 0), **kinds[i % 2]) for i in range(12)]
    b = [row(f"k{i}", float(i % 2 == 0), **kinds[i % 2]) for i in range(2, 19)]
    b[1] |= {"status": "error", "score": 0.0}
    b = [r | {"settings": {"temperature": 1.0, "weights": "b"}} for r in b]
    found = compare.compare(written(tmp_path / "a", a), written(tmp_path / "b", b))
    assert found.overall.prompts == 9 and found.without_verdict == 1
    assert found.only_a == ("k0", "k1") and len(found.only_b) == 7 and found.settings == {"temperature": (0.0, 1.0)}
    assert {kind: {name: of.prompts for name, of in groups.items()} for kind, groups in found.by.items()} == {
        "verifier": {"gsm8k": 4, "math": 5},
        "source": {"m.jsonl": 5, "p.jsonl": 4},
    }
    assert found.by["verifier"]["math"].difference == pytest.approx(4 / 5)
    said = "\n".join(found.lines("old.jsonl", "new.jsonl"))
    assert "only in old.jsonl, not compared: 2 prompts (k0, k1)" in said
    assert "only in new.jsonl, not compared: 7 prompts (k12, k13, k14, k15, k16 and 2 more)" in said
    assert "not compared: 1 prompts with a response that could not be verified" in said
    assert "settings that differ: temperature 0.0 -> 1.0" in said and "verifier math " in said


def test_a_torn_last_line_is_left_out(tmp_path):
    rows = [row(f"k{i}", 1.0) for i in range(3)]
    a = written(tmp_path / "a", rows)
    b = tmp_path / "b"
    b.write_text(a.read_text()[:-20])
    assert compare.compare(a, b).only_a == ("k2",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no response"),
        (["[1]"], ":1: no JSON object: not a file of responses of launch.evaluate"),
        (
            ['{"response": "x", "ground_truth": "1", "dataset": "gsm8k"}'],
            "no response of launch.evaluate (KeyError: 'key')",
        ),
        (["[" * 100_000], "not a file of responses"),
        ([json.dumps(row("other", 1.0))], "no prompt in common"),
        (
            [json.dumps(row("k0", 1.0, dataset="math"))],
            "prompt k0 is judged by gsm8k in the one and by math in the other",
        ),
        ([json.dumps(row("k0", 1.0)), "\x00" * 40], ":2: "),
        ([json.dumps(row("k0", None))], "TypeError"),
        ([json.dumps(row("k0", 1.0, settings=None))], "no settings"),
    ],
)
def test_what_is_no_such_file_gets_one_line(lines, message, tmp_path):
    b = tmp_path / "b"
    b.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError) as caught:
        compare.compare(written(tmp_path / "a", [row("k0", 1.0)]), b)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_files_are_wanted(tmp_path):
    with pytest.raises(UserError, match=r"expected two files of responses, A.jsonl B.jsonl"):
        compare.run(compare.Config(a="a.jsonl"))
    with pytest.raises(UserError, match="No such file"):
        compare.compare(tmp_path / "nowhere", tmp_path / "nowhere")

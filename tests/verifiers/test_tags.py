"""format: a response in the form that the ground truth asks for, and nothing that is nearly one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers import GroundTruthError, check, verify

INSIDE = st.text("ab é>/\n", max_size=6)
SPACE = st.sampled_from(["", "\n", " \n\n"])
NAMES = st.lists(st.sampled_from(["think", "answer", "a", "b-c", "plan"]), min_size=2, max_size=4, unique=True)


def score(response: str, ground_truth: object) -> float:
    verdict = verify(response, ground_truth, "format")
    assert verdict.status == "ok"
    return verdict.score


@given(NAMES, st.data())
def test_each_tag_once_in_order_and_nothing_else(names, data):
    space = data.draw(SPACE)
    parts = [f"<{name}>say {name}{data.draw(INSIDE)}</{name}>" for name in names]
    truth, response = {"tags": names}, space + space.join(parts) + space
    assert score(response, truth) == 1
    swapped = data.draw(st.permutations(parts))
    assert score("".join(swapped), truth) == (swapped == parts)
    i = data.draw(st.integers(0, len(parts) - 1))
    assert score("".join(parts[:i] + parts[i + 1 :]), truth) == 0
    assert score("".join([*parts, parts[i]]), truth) == 0
    assert score(response.replace(f"</{names[i]}>", ""), truth) == 0
    assert score(response.replace(f"<{names[i]}>", ""), truth) == 0
    for where in (0, len(response)):
        assert score(response[:where] + "text" + response[where:], truth) == 0
    assert score(parts[0] + "between" + "".join(parts[1:]), truth) == 0
    blank = data.draw(st.sampled_from(["", " ", "\n", "\u200b"]))
    assert score("".join([*parts[:i], f"<{names[i]}>{blank}</{names[i]}>", *parts[i + 1 :]]), truth) == 0


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("<think>a</think><answer>b</answer>", {}, 1),
        ("<think>a</think><answer>b</answer>", "{}", 1),
        ("<think>a</think>b", {}, 0),
        ("<think>a</think>b", {"tags": ["think"]}, 1),
        ("<think>a</think>", {"tags": ["think"]}, 0),
        ("<think>a</think>\u200b\n", {"tags": ["think"]}, 0),
        ("so <think>a</think>b", {"tags": ["think"]}, 0),
        ("a</think>b", {"tags": ["think"], "opened": True}, 1),
        ("a</think><answer>b</answer>", {"opened": True}, 1),
        ("<think>a</think><answer>b</answer>", {"opened": True}, 0),
        ("</think><answer>b</answer>", {"opened": True}, 0),
        ("<think><answer>a</think>b</answer>", {}, 0),
        ("<Think>a</Think><answer>b</answer>", {}, 0),
    ],
)
def test_forms(response, truth, expected):
    assert score(response, truth) == expected


def test_form_and_answer_are_summed():
    names, truths = ["math", "format"], ["42", {}]
    right = "<think>6 x 7</think><answer>\\boxed{42}</answer>"
    assert verify(right, truths, names).score == 2
    assert verify(right.replace("42", "41"), truths, names).score == 1
    assert verify("It is \\boxed{42}", truths, names).score == 1
    assert verify("It is \\boxed{41}", truths, names).score == 0


@pytest.mark.parametrize(
    "bad",
    [
        "think",
        None,
        [],
        {"tags": []},
        {"tags": ["<think>"]},
        {"tags": ["a", "a"]},
        {"tags": "think"},
        {"tag": ["think"]},
        {"opened": 1},
        {"tags": [1]},
    ],
)
def test_what_is_no_form(bad):
    with pytest.raises(GroundTruthError):
        check("format", bad)

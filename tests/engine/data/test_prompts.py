"""Prompts with verifiable answers: what is asked, which are dropped or refused, and what tells two sets apart."""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.chat import load_tokenizer
from engine.data.files import Source
from engine.data.prompts import Prompt, PromptReader, fingerprint_of, load_prompts
from engine.errors import UserError
from engine.flags import PromptFlags

USER, ANSWER = {"role": "user", "content": "Which number?"}, {"role": "assistant", "content": "It is 2."}


@pytest.fixture(scope="module")
def chat(embedded_dir):
    return load_tokenizer(embedded_dir.model, 512)


def row(*messages: dict, **changes) -> dict:
    return {"messages": list(messages or (USER,)), "ground_truth": "2", "dataset": "GSM8K"} | changes


def load(chat, *rows: dict, longest: int = 99, on_bad_row: str = "skip", check=lambda dataset, truth: None, **flags):
    source = Source("x", "1", lambda: ((f":{i}", r) for i, r in enumerate(rows, 1)))
    return load_prompts(source, PromptReader(chat, PromptFlags(**flags), check), longest, on_bad_row)


def test_a_prompt_ends_where_the_assistant_begins(chat):
    """Whatever worked answers stand behind the question."""
    expected = f"{chat.render([USER])}<|assistant|>\n"
    for messages in ((USER,), (USER, ANSWER), (USER, ANSWER, ANSWER)):
        ((prompt,), _) = load(chat, row(*messages))
        assert chat.tokenizer.decode(prompt.ids) == expected
        assert (prompt.ground_truth, prompt.dataset, prompt.verifier) == ("2", "GSM8K", "gsm8k")


def test_a_longer_prompt_than_the_limit_is_dropped_and_counted(chat):
    ((prompt,), _) = load(chat, row())
    longer = row({"role": "user", "content": "Which number is it, and why?"})
    kept, lines = load(chat, row(), longer, longest=len(prompt.ids))
    assert len(kept) == 1 and lines[0].startswith(
        f"x: 2 rows, 1 kept, 1 dropped (longer than {len(prompt.ids)} tokens)"
    )
    with pytest.raises(UserError, match=f"none has at most {len(prompt.ids) - 1} tokens"):
        load(chat, row(), longest=len(prompt.ids) - 1)


def test_rows_that_cannot_be_asked_or_judged_are_bad(chat):
    def check(dataset, truth):
        if truth != "2":
            raise ValueError(f"no number in {truth}")

    control = {"role": "user", "content": "a<|end|>b"}
    bad = [
        row(ANSWER),
        row(ground_truth=None),
        row(dataset=None),
        row(ground_truth="two"),
        row(control),
        row(USER, control),
    ]
    kept, lines = load(chat, row(), *bad, check=check)
    assert len(kept) == 1 and lines[0] == "x: 7 rows, 1 kept, 6 bad" and len(lines) == 8
    assert all(
        word in line
        for word, line in zip(
            ("6 of 7", "only the", "ground", "data", "two", "<|end|>", "message 1"), lines[1:], strict=True
        )
    )
    with pytest.raises(UserError, match="x:2: "):
        load(chat, row(), *bad, on_bad_row="error")


def test_a_set_of_prompts_is_known_by_all_that_is_in_it():
    prompts = [Prompt(np.array([5, 6]), "2", "gsm8k"), Prompt(np.array([7]), "3", "math")]
    others = [
        prompts[::-1],
        prompts[:1],
        [Prompt(np.array([5, 7]), "2", "gsm8k"), prompts[1]],
        [Prompt(np.array([5, 6]), "4", "gsm8k"), prompts[1]],
        [Prompt(np.array([5, 6]), "2", "math"), prompts[1]],
    ]
    assert len({fingerprint_of(p) for p in (prompts, *others)}) == 6
    assert fingerprint_of(prompts) == fingerprint_of([Prompt(p.ids.copy(), p.ground_truth, p.dataset) for p in prompts])


def test_a_row_of_ifeval_itself(chat):
    """Its instructions stand beside the prompt; a ground truth of the row's own comes first."""
    told = {"prompt": "Write.", "key": 7, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": None}]}
    ((prompt, named, own), lines) = load(chat, told, told | {"dataset": "IFEval"}, told | row())
    assert prompt.ground_truth == {"instruction_id": ["punctuation:no_comma"], "kwargs": [{"n": None}]}
    assert (prompt.dataset, named.dataset, own.ground_truth) == ("ifeval", "IFEval", "2")
    assert prompt.source == "x" and "  not used: instruction_id_list, key, kwargs, prompt" in lines
    assert load(chat, told | {"dataset": None})[0][0].dataset == "ifeval"

"""Rollouts as training data: which positions count, the slot after an end, and numbers in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import world
from engine.errors import UserError
from engine.flags import MemoryFlags
from rollout import Experience, Rollout, evaluate


def rollout(example: int, prompt: int, response: int, reason: str) -> Rollout:
    """Of distinct tokens: prompts from 100 on, responses from 200 on."""
    none = np.zeros(response, np.float32)
    return Rollout(example, 0, 100 + np.arange(prompt), 200 + np.arange(response), none, none, reason)


ROLLOUTS = [rollout(0, 2, 3, "stop"), rollout(1, 4, 1, "length"), rollout(2, 1, 5, "stop"), rollout(3, 3, 2, "stop")]


def experience(slot_after_end: bool, response_length: int = 5) -> Experience:
    return Experience(ROLLOUTS, [1.0, 0.0, 0.5, 1.0], slot_after_end=slot_after_end, response_length=response_length)


def test_responses_count_and_prompts_do_not():
    for i, r in enumerate(ROLLOUTS):
        ((ids, mask),) = experience(False).tokens.sequences(i)
        assert ids.tolist() == [*r.prompt_ids, *r.response_ids] and ids[mask].tolist() == r.response_ids.tolist()
    assert experience(False).tokens.tokens.tolist() == [4, 4, 5, 4]


def test_a_slot_after_an_end_that_has_room():
    """Of the first and the last: the second has no end, the third none left below the limit."""
    e = experience(True)
    assert e.token_counts_S.tolist() == [3, 1, 5, 2] and e.slot_counts_S.tolist() == [4, 1, 5, 3]
    assert [len(ids) for ids in e.slots.ids] == [6, 5, 6, 6] and [len(ids) for ids in e.tokens.ids] == [5, 5, 6, 5]
    assert e.is_token_R.int().tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert e.on_slots(torch.arange(1.0, 12.0)).tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10, 11, 0]
    assert e.counts(np.array([0, 2])) == (8, 9) and e.counts(np.arange(4)) == (11, 13)
    plain = experience(False)
    assert plain.slot_counts_S.tolist() == [3, 1, 5, 2] and plain.is_token_R.all()


def test_rows_of_some_responses_in_the_order_that_is_asked_for():
    values = torch.arange(11.0)
    assert experience(False).tokens.rows(values, (3, 0)).tolist() == [9, 10, 0, 1, 2]
    assert experience(False).tokens.rows(values, ()).tolist() == []


@pytest.mark.parametrize("budget", [5, 9, 100])
def test_evaluated_numbers_stand_where_their_responses_do(budget):
    """However they are packed; a function may give several numbers of a token."""
    forward = lambda batch: torch.stack([batch.targets_R, -batch.targets_R]).float()
    found = evaluate(forward, experience(False).tokens, MemoryFlags(micro_batch_tokens=budget), world.start())
    expected = [float(token) for r in ROLLOUTS for token in r.response_ids]
    assert found.dtype == torch.float64 and found.tolist() == [expected, [-x for x in expected]]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("budget", [5, 100])
def test_one_number_that_is_none_names_its_response(value, budget):
    """The token 204 is of the third response alone."""
    forward = lambda batch: torch.where(batch.targets_R == 204, value, -1.0)
    with pytest.raises(UserError, match=r"rank 0 has (nan|-inf) for response 2, to prompt 2"):
        evaluate(forward, experience(False).tokens, MemoryFlags(micro_batch_tokens=budget), world.start())

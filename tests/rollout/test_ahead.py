"""Responses that a thread draws beside the main one: what a checkpoint holds of them, and how they end."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import signals
from rollout.ahead import Sampling
from rollout.collect import Drawn
from rollout.sampler import Rollout
from verifiers import Verdict

FLOATS = st.floats(width=32, allow_nan=False, max_value=0.0)


def sampling(draw, ahead: int = 1, total: int = 9) -> Sampling:
    """Over a world of one, and a sampler that only counts its loads."""
    world = SimpleNamespace(device=torch.device("cpu"), phase=lambda *_: None, end_if_asked=lambda: None)
    world.beside = lambda: world
    sampler = SimpleNamespace(loads=0, releases=0)
    sampler.load = lambda policy: setattr(sampler, "loads", sampler.loads + 1)
    sampler.release = lambda: setattr(sampler, "releases", sampler.releases + 1)
    run = SimpleNamespace(remember=lambda what: None, plan=SimpleNamespace(total=total))
    return Sampling(SimpleNamespace(world=world, sampler=sampler), None, draw, run, ahead)


def drawn(number: int) -> Drawn:
    return Drawn([], [], {"number": float(number)})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 2**40), FLOATS, FLOATS), min_size=1, max_size=5),
            st.sampled_from(["stop", "length"]),
            st.text(st.characters(exclude_categories=()), max_size=8),
            st.floats(0, 1),
        ),
        max_size=4,
    )
)
def test_a_checkpoint_gives_back_every_bit(responses):
    """Through JSON, whatever a verifier says of them."""
    rollouts, verdicts = [], []
    for i, (tokens, reason, said, score) in enumerate(responses):
        ids, logprobs, logprobs_t1 = zip(*tokens, strict=True)
        arrays = {"prompt_ids": np.array([3, 4]), "response_ids": np.array(ids)}
        arrays |= {"logprobs": np.float32(logprobs), "logprobs_t1": np.float32(logprobs_t1)}
        rollouts.append(Rollout(example=i, sample=i % 2, finish_reason=reason, **arrays))
        verdicts.append(Verdict(score, said))
    before, after = sampling(None), sampling(None)
    before._drawn = Drawn(rollouts, verdicts, {"groups/signal": 0.1})
    after.restore(json.loads(json.dumps(before.state())))
    found = after.wait()
    assert found.verdicts == verdicts and found.row == {"groups/signal": 0.1}
    for x, y in zip(found.rollouts, rollouts, strict=True):
        assert (x.example, x.sample, x.finish_reason) == (y.example, y.sample, y.finish_reason)
        for name in ("prompt_ids", "response_ids", "logprobs", "logprobs_t1"):
            assert vars(x)[name].dtype == vars(y)[name].dtype and np.array_equal(vars(x)[name], vars(y)[name])


@pytest.mark.parametrize("ahead", [0, 1])
def test_every_step_gets_its_own(ahead):
    """One hand-over a step, of which the last draws nothing for after it."""
    asked = []
    sample = sampling(lambda by, step: asked.append(step) or drawn(step), ahead, total=3)
    found = [(sample(step)[0].row["number"], sample.state() is None) for step in range(3)]
    assert [number for number, _ in found] == [0, 1, 2] and asked == [0, 1, 2]
    assert [nothing for _, nothing in found] == ([True] * 3 if not ahead else [False, False, True])
    loads, releases = sample.collect.sampler.loads, sample.collect.sampler.releases
    assert (loads, releases) == ((3, 3) if not ahead else (3, 1))


def test_a_restored_step_is_not_drawn_again():
    asked = []
    sample = sampling(lambda by, step: asked.append(step) or drawn(step), total=6)
    sample.restore({"responses": [], "verdicts": [], "row": {"number": 4.0}})
    (found, age) = sample(4)
    assert found.row == {"number": 4.0} and age == 1
    assert sample(5)[0].row == {"number": 5.0} and asked == [5]


def test_a_run_that_ends_drops_what_is_drawn():
    """At its next token; what the main thread draws is none of it."""
    begun, tokens = threading.Event(), []

    def draw(by, step):
        while step:
            begun.set()
            signals.between_tokens()
            tokens.append(step)
        return drawn(step)

    sample = sampling(draw)
    sample(0)
    assert begun.wait(10)
    sample.close()
    count = len(tokens)
    signals.between_tokens()
    assert not any(thread.name == "sampling" for thread in threading.enumerate()) and len(tokens) == count
    sample.close()  # twice is as good as once


def test_an_error_is_raised_where_the_responses_are_wanted():
    def draw(by, step):
        if step:
            raise ValueError("no page")
        return drawn(step)

    sample = sampling(draw)
    sample(0)
    with pytest.raises(ValueError, match="no page"):
        sample(1)

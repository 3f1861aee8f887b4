"""One step of every stage, and what in it would wait for a GPU: the named places and no others.

tests/launch/waits.py says how it is seen.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from engine import log, world
from engine.config import parse
from engine.data import embedded
from engine.model import load_untrained, open_model
from launch import dpo, grpo, ppo, sft
from launch.chat import Config as Chat
from rollout import Request, Sampler, SamplingParams
from rollout.decoder import Decoder, Launched
from rollout.ladder import Ladder
from tests.launch.waits import Waits

STEP = {
    "engine/log.py:reduce": 1,  # the metrics of the step, once backward has ended
    # the gradient norm; and the clipping factor, a number on the host that is rounded to the gradients' type
    "engine/train/optim.py:step": 2,
}
HOST = {  # on rollouts, scores and values, which an iteration holds on the host
    "engine/train/finite.py:all_finite",
    "launch/ppo.py:train",
    "losses/ppo.py:_next",
    "losses/ppo.py:_pad",
    "losses/ppo.py:token_rewards",
    "rollout/report.py:of_responses",
    "launch/grpo.py:has_gradient",
    "rollout/report.py:of_sampler",
    "launch/grpo.py:train",
    "losses/group.py:_centred",
    "losses/group.py:_centred (overrides.py:handle_torch_function)",
    "losses/group.py:token_weights",
    "rollout/experience.py:on_tokens",
}
PPO = {
    "engine/log.py:reduce": 1,
    "engine/train/optim.py:step": 4 * 2 * 2,  # four passes, of policy and value model
    # log-probs and entropies, the reference's, values: .cpu().numpy() once for all micro-batches
    "rollout/experience.py:evaluate": 3 * 2,
    "rollout/decoder.py:read": 8,  # a token's results; on CUDA a copy on the host, of two tokens ago
}
GRPO = PPO | {
    "engine/train/optim.py:step": 2,  # one pass, of the policy
    "rollout/experience.py:evaluate": 2 * 2,  # log-probs and entropies, the reference's
}


@contextmanager
def of_one_step(monkeypatch, waits: Waits, stage, number: int):
    """Counts between the metrics of step `number` - 1 and those of step `number`."""
    write = log.Metrics.write

    def marked(self, step, row, postfix=""):
        # not of the model that RLVR starts from
        shown, postfix = (postfix, postfix if stage in (sft, dpo) or "loss/policy" in row else "")
        if postfix and step == number:
            waits.__exit__(None, None, None)
        write(self, step, row, shown)
        if postfix and step == number - 1:
            waits.__enter__()

    monkeypatch.setattr(log.Metrics, "write", marked)
    yield


def seen(monkeypatch, stage, tmp_path, **flags) -> Counter[str]:
    waits = Waits()
    flags = {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache", "max_steps": 3, **flags}
    with of_one_step(monkeypatch, waits, stage, 2):
        try:
            stage.train(
                parse(stage.Config, [word for name, value in flags.items() for word in (f"--{name}", str(value))])
            )
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return waits.found


def beyond(found: Counter[str], allowed: dict[str, int]) -> dict[str, int]:
    return {place: count for place, count in found.items() if count > allowed.get(place, 0)}


@pytest.mark.parametrize("stage", [sft, dpo], ids=["sft", "dpo"])
def test_a_supervised_step_waits_for_its_metrics_and_for_its_norm(stage, tmp_path, monkeypatch):
    """Also with several micro-batches: nothing waits for one of them."""
    found = (
        seen(monkeypatch, stage, tmp_path, micro_batch_tokens=200, sample_tokens=0)
        if stage is sft
        else seen(monkeypatch, stage, tmp_path, micro_batch_tokens=200)
    )
    assert found["engine/log.py:reduce"] == 1 and not beyond(found, STEP), found


@pytest.mark.parametrize("stage, allowed, more", [(ppo, PPO, {}), (grpo, GRPO, {"kl_coef": 0.1})], ids=["ppo", "grpo"])
def test_an_iteration_waits_where_it_reads_rollouts_and_updates(stage, allowed, more, tmp_path, monkeypatch, tuned):
    found = seen(
        monkeypatch,
        stage,
        tmp_path,
        cache_dir=tuned,
        batch_size=4,
        num_samples_per_prompt=2,
        response_length=8,
        micro_batch_tokens=60,
        eval_steps=0,
        **more,
    )
    device = {place: count for place, count in found.items() if place not in HOST}
    assert not beyond(device, allowed) and device["rollout/decoder.py:read"] == 8, found


def test_a_token_waits_for_nothing_and_is_read_two_later(monkeypatch, tuned):
    """As on CUDA, with fixed tables and results that come late: between the first token and the last nothing is read
    but copies on the host, and what is launched beside a graph is a handful, however many layers there are.
    """
    made = embedded(tuned)
    here = world.start()
    base = open_model(Chat(model_name_or_path=str(made.model), cache_dir=str(tuned)), here)
    policy = load_untrained(base, here)
    sampler = Sampler(base.config, policy, here, dtype=base.dtype, max_length=64, slots=6)
    sampler.lag, sampler.how = 2, "tables"
    sampler.load(policy)
    order: list[str] = []
    outside: list[int] = []
    launch, read, run = Decoder.launch, Launched.read, Ladder.run

    def launched(self, schedule):
        order.append("launch")
        with Launches() as mode:
            result = launch(self, schedule)
        outside.append(mode.count)
        return result

    def ran(self, size):
        """What a graph holds is not counted."""
        with _pop_mode_temporarily():
            return run(self, size)

    monkeypatch.setattr(Decoder, "launch", launched)
    monkeypatch.setattr(Launched, "read", lambda self: (order.append("read"), read(self))[1])
    monkeypatch.setattr(Ladder, "run", ran)
    requests = [Request(np.arange(2, 12 + i), i, max_new_tokens=20) for i in range(6)]
    with Waits() as waits:
        sampler.generate(requests, SamplingParams(), seed=0, step=0)
    assert set(waits.found) == {"rollout/decoder.py:read"} and waits.found.total() == 20, waits.found
    assert order[:6] == ["launch"] * 3 + ["read", "launch", "read"] and order[-3:] == ["read"] * 3
    assert max(outside[1:]) < 20, outside


class Launches(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_what_it_is_for():
    """One of each kind of wait; and what does not wait is not seen."""
    x = torch.arange(5.0)
    counts = torch.tensor([1, 2])
    kinds = [
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(x.sum() > 0),
        lambda: float(x[0]),
        lambda: x[x > 2],
        lambda: x.nonzero(),
        lambda: x.to("cpu"),
        lambda: torch.tensor(3.0, device="cpu"),
        lambda: torch.repeat_interleave(counts, counts),
        lambda: x.cpu(),
        lambda: x.numpy(),
    ]
    for number, kind in enumerate(kinds):
        with Waits() as mode:
            kind()
        assert mode.found.total() >= 1, number
    with Waits() as mode:
        x.double().sum() + x.to(torch.float64)[1:3].sum() + torch.as_tensor(np.ones(3))[0] + torch.full((), 2.0)
        torch.repeat_interleave(counts, counts, output_size=3)
    assert not mode.found

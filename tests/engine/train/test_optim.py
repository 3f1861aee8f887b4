"""The optimizer step and the schedules, against the papers' loops and transformers' schedulers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.flags import OptimizerFlags
from engine.train import optim
from tests import needs, oracles


class Alone:
    """A world of one."""

    device = torch.device("cpu")

    def sum(self, x):
        return x

    def say(self, *lines):
        pass


def adamw(module: nn.Module, decay: float = 0.0, kind: str = "adamw", world=None) -> torch.optim.Optimizer:
    return optim.adamw(module, OptimizerFlags(weight_decay=decay, optimizer=kind), world or Alone())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_against_scalar_loop(decay):
    model = nn.Linear(3, 2, bias=False).double()
    start = model.weight.detach().flatten().tolist()
    optimizer = adamw(model, decay)
    for t in range(1, 6):
        (model.weight**3).sum().backward()
        optim.step(optimizer, Alone(), lr=0.1 / t, max_norm=0)
    expected = oracles.adamw(start, lambda p, t: [3 * x * x for x in p], 5, lambda t: 0.1 / t, decay=decay)
    torch.testing.assert_close(
        model.weight.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    decays = {id(p): g["weight_decay"] for g in adamw(model, 0.3).param_groups for p in g["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.3, 0.0, 0.0, 0.0]


def test_clipping_is_of_the_global_norm():
    model = nn.Linear(4, 4)
    model.weight.grad, model.bias.grad = torch.full((4, 4), 3.0), torch.full((4,), 4.0)
    before = [p.detach().clone() for p in model.parameters()]
    norm = optim.step(torch.optim.SGD(model.parameters(), lr=0.0), Alone(), lr=1.0, max_norm=2.0)
    assert norm == pytest.approx(math.sqrt(16 * 9 + 4 * 16))
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(2.0, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_the_norm_is_of_all_ranks():
    """Of four ranks with the same gradients: twice the norm of one, and clipped by it."""

    class OneOfFour(Alone):
        def sum(self, x):
            return 4 * x

    p = nn.Parameter(torch.zeros(9))
    p.grad = torch.ones(9)
    norm = optim.step(torch.optim.SGD([p], lr=0.0), OneOfFour(), lr=1.0, max_norm=1.5)
    assert norm == pytest.approx(6.0) and p.detach().tolist() == pytest.approx([-0.25] * 9, rel=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(poison):
    model = nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    model.weight.grad, model.bias.grad = torch.full((2, 2), poison), torch.ones(2)
    norm = optim.step(adamw(model, 0.0), Alone(), lr=1.0, max_norm=1.0)
    assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", pytest.param("adamw_8bit", marks=needs.bitsandbytes)])
def test_bfloat16_gradients_are_clipped_by_an_exact_norm(kind):
    """The norm of rounded gradients is not itself rounded; the factor is, as one number of the gradients' type."""
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 3)).bfloat16()
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator).bfloat16() for p in model.parameters()]
    exact = math.sqrt(sum(x * x for g in gradients for x in g.flatten().tolist()))
    for scale in (1.0, 0.01):  # far beyond max_norm, and within it
        optimizer, clipped = adamw(model, 0.0, kind), []
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g * scale
        optimizer.register_step_pre_hook(
            lambda o, *_, clipped=clipped: clipped.extend(p.grad.clone() for p in model.parameters())
        )
        norm = optim.step(optimizer, Alone(), lr=0.0, max_norm=2.0)
        assert norm == pytest.approx(exact * scale, rel=1e-6 if scale == 1 else 1e-3)
        after = math.sqrt(sum(x * x for g in clipped for x in g.flatten().tolist()))
        assert after == pytest.approx(min(2.0, exact * scale), rel=2**-7 if scale == 1 else 1e-3)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(70, 70).requires_grad_(False), nn.Linear(70, 3))
    for kind in ("adamw", "adamw_8bit"):
        assert [p for g in adamw(model, 0.0, kind).param_groups for p in g["params"]] == [
            model[1].weight,
            model[1].bias,
        ]


SCHEDULES = {  # ours → transformers' name, our flags, its keyword arguments; of 37 steps
    "linear": ("linear", {}, {}),
    "cosine": ("cosine", {}, {}),
    "constant": ("constant_with_warmup", {}, {}),
    "floor": ("cosine_with_min_lr", {"min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
    "floor 0": ("cosine_with_min_lr", {"min_lr_ratio": 0.0}, {"min_lr_rate": 0.0}),
    "wsd": ("warmup_stable_decay", {}, {"num_decay_steps": 4}),
    "wsd, share": ("warmup_stable_decay", {"decay_ratio": 0.5}, {"num_decay_steps": 19}),
    "wsd, steps": ("warmup_stable_decay", {"decay_steps": 9}, {"num_decay_steps": 9}),
    "wsd, all": ("warmup_stable_decay", {"decay_ratio": 1.0}, {"num_decay_steps": 37}),
    "wsd, more than all": ("warmup_stable_decay", {"decay_steps": 50}, {"num_decay_steps": 50}),
    "wsd, floor": (
        "warmup_stable_decay",
        {"decay_steps": 9, "min_lr_ratio": 0.25},
        {"num_decay_steps": 9, "min_lr_ratio": 0.25},
    ),
    "inverse_sqrt": ("inverse_sqrt", {}, {}),
}
WARMUPS = [{"warmup_ratio": share} for share in (0.0, 0.03, 0.1, 1.0)]
WARMUPS += [{"warmup_steps": n} for n in (0.0, 0.25, 1.0, 5.0, 37.0, 100.0)]


@pytest.mark.parametrize("warmup", WARMUPS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_transformers(schedule, warmup):
    """Step by step, in float64; the warm-up as transformers' training arguments count it."""
    from transformers import TrainingArguments, get_scheduler

    steps, parameter = 37, nn.Parameter(torch.zeros(1))
    name, ours, theirs = SCHEDULES[schedule]
    optimizer = torch.optim.SGD([parameter], lr=2e-3)
    n = TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=warmup.get("warmup_steps", 0)), steps)
    n = math.ceil(warmup["warmup_ratio"] * steps) if "warmup_ratio" in warmup else n
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=n, num_training_steps=steps, scheduler_specific_kwargs=theirs
    )
    kind = "constant" if schedule == "constant" else name
    flags = OptimizerFlags(learning_rate=2e-3, lr_scheduler_type=kind, **warmup, **ours)
    flags.check_schedule()
    for step in range(steps):
        got = optim.learning_rate(flags, step, steps)
        assert got == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        assert optim.learning_rate(flags, step, steps, peak=1.0) == pytest.approx(got / 2e-3, rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(1, 5000),
    st.floats(0, 1),
    st.floats(1e-8, 1),
    st.data(),
)
def test_the_first_three_schedules_keep_their_bits(kind, steps, ratio, peak, data):
    """As version 0.2 computed them: a checkpoint of it is resumed on the same learning rates."""
    step = data.draw(st.integers(0, steps - 1))
    warmup = math.ceil(ratio * steps)
    x = (step - warmup) / max(1, steps - warmup)
    after = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "constant": 1.0}[kind]
    before = peak * step / warmup if step < warmup else peak * after
    flags = OptimizerFlags(learning_rate=peak, warmup_ratio=ratio, lr_scheduler_type=kind)
    assert optim.learning_rate(flags, step, steps) == before


@pytest.mark.parametrize("kind", ["adamw", pytest.param("adamw_8bit", marks=needs.bitsandbytes)])
def test_betas_and_epsilon_are_the_flags(kind):
    flags = OptimizerFlags(optimizer=kind, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
    for group in optim.adamw(nn.Linear(70, 70), flags, Alone()).param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-5)

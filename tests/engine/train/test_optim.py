"""The optimizer step and the schedules, against the papers' loops and transformers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
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


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.1, 1.0])
def test_schedules_are_those_of_transformers(schedule, warmup_ratio):
    from transformers import get_scheduler

    steps, parameter = 37, nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=math.ceil(warmup_ratio * steps), num_training_steps=steps
    )
    flags = OptimizerFlags(learning_rate=2e-3, warmup_ratio=warmup_ratio, lr_scheduler_type=schedule)
    for step in range(steps):
        ours = optim.learning_rate(flags, step, steps)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()

"""Numbers that are none: whose they were."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.train import Run, finite
from tests.engine.train.test_checkpoint import Trained, here, names

__all__ = ["here"]
NONE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_number_anywhere_is_found(value, dtype):
    """Large ones are numbers; what holds whole numbers has none."""
    tensors = {
        "a": torch.full((7,), 1e30, dtype=dtype),
        "empty": torch.zeros(0),
        "codes": torch.ones(3, dtype=torch.uint8),
    }
    assert finite.not_finite(tensors) == "" and finite.not_finite({}) == ""
    for at in (0, 3, 6):
        broken = torch.ones(7, dtype=dtype)
        broken[at] = value
        assert finite.not_finite(tensors | {"b": broken}) == "b"


def test_the_first_micro_batch_is_named_of_this_step_alone():
    trail, first, second = finite.Trail(), object(), object()
    trail.note(first, (1,), {"loss": math.nan})
    for examples, loss in (((4, 5), 1.0), ((6, 7), torch.tensor(math.nan)), ((8,), math.nan)):
        trail.note(second, examples, {"count": 3, "loss": loss})
    assert trail.first() == [6, 7]
    trail.note(first, (9,), {"loss": 1.0})
    assert trail.first() == []


def test_words_for_whose_it_was():
    """Weights explain everything after them; without a rank, the step's examples."""
    assert finite.whose([("", []), ("a.weight", [3])], "pairs", [1]) == "in the weights: a.weight on rank 1"
    assert finite.whose([("", []), ("", [3, 4])], "pairs", [1]) == "on rank 1, pairs [3, 4]"
    assert finite.whose([("", []), ("", [])], "pairs", range(17)).endswith("14, 15] ...")


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("which", ["weight", "moment"])
def test_no_checkpoint_holds_such_a_number(value, which, here, tmp_path):
    """The run ends, the last one stays, and it is the one that is resumed."""
    trained = Trained(tmp_path, here).train(1).save(1).train(1)
    p = trained.module.bias
    (p.data if which == "weight" else trained.optimizer.state[p]["exp_avg"])[1] = value
    name = f"policy.{'master' if which == 'weight' else 'exp_avg'}.bias on rank 0"
    with pytest.raises(UserError, match=f"step 2: {name} holds numbers .* the last checkpoint is of step 1"):
        trained.save(2)
    assert names(tmp_path) == ["step-000001"]
    assert Trained(tmp_path, here).checkpoints.resume("auto")["step"] == 1


def test_what_every_rank_has_for_itself_is_looked_at_on_all(here):
    """The first that is none, of each: what follows from it is as well."""
    run = SimpleNamespace(world=here)
    columns = {"returns": torch.ones(3), "advantages": torch.ones(3)}
    Run.stop_unless_all_finite(run, 2, columns, np.array([3, 4]))
    run.world = SimpleNamespace(gather=lambda mine: ["", mine, "advantages"])
    columns["returns"][1] = math.nan
    with pytest.raises(UserError, match=r"step 3: returns on rank 1, advantages on rank 2 are not .* prompts \[3, 4\]"):
        Run.stop_unless_all_finite(run, 2, columns | {"advantages": columns["returns"]}, np.array([3, 4]))


def test_a_step_is_stopped_with_its_examples(here):
    """Those of responses are their prompts, each once; only what is no number is shown."""
    trail, totals = finite.Trail(), object()
    trail.note(totals, (0, 2), {"loss": math.inf})
    run = SimpleNamespace(world=here, _trail=trail, _trained={})
    Run.stop_unless_finite(run, 4, {"loss": 1.0, "grad_norm": 2.0}, "pairs", np.array([7]))
    with pytest.raises(UserError, match=r"step 5: gradient norm nan, on rank 0, pairs \[0, 2\]; gradients"):
        Run.stop_unless_finite(run, 4, {"loss": 1.0, "grad_norm": math.nan}, "pairs", np.array([7]))
    with pytest.raises(UserError, match=r"on rank 0, prompts \[61\]; gradients"):
        Run.stop_unless_finite(run, 4, {"loss": math.nan}, "prompts", np.array([7]), torch.tensor([61, 9, 61]))

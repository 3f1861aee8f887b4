"""The reference policy: which one a flag names, and the numbers that each gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine import world
from engine.data.batch import micro_batch
from engine.errors import UserError
from engine.flags import AdapterFlags, MemoryFlags
from engine.model import Base, build
from engine.model.adapters import lora
from engine.model.adapters.lora import Adapters
from engine.train import reference
from tests.families import load, save_family

CHOICES = [  # (requested, adapters are trained, from an adapter, without_lora, with_lora, the choice or what is said)
    ("auto", False, False, "copy", "", "copy"),
    ("auto", True, False, "copy", "", "base"),
    ("auto", True, True, "copy", "", "adapter"),
    ("auto", True, False, "cache", "cache", "cache"),
    ("copy", True, False, "copy", "", "copy"),
    ("base", True, False, "copy", "", "base"),
    ("adapter", True, True, "copy", "", "adapter"),
    ("base", True, True, "copy", "", "training starts from the adapter"),
    ("adapter", True, False, "copy", "", "training starts from the model without an adapter"),
    ("base", False, False, "copy", "", "needs --use_lora"),
    ("adapter", False, False, "copy", "", "needs --use_lora"),
]


@pytest.mark.parametrize("requested, adapted, started, without_lora, with_lora, expected", CHOICES)
def test_which_reference_a_flag_names(requested, adapted, started, without_lora, with_lora, expected):
    flags = AdapterFlags(use_lora=adapted, adapter_name_or_path="x" if started else None)
    how = {"without_lora": without_lora, "with_lora": with_lora}
    if expected in ("cache", "base", "adapter", "copy"):
        assert reference.resolve_reference(requested, flags, **how) == expected
    else:
        with pytest.raises(UserError, match=expected):
            reference.resolve_reference(requested, flags, **how)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_reference_is_the_policy_as_it_started(temperature, tmp_path, embedded_dir):
    """Base, initial adapter and copy, after the trained adapter has moved; sums of sequences, without gradients."""
    here = world.start()
    source = save_family("llama", tmp_path / "model", embedded_dir.model)
    name = "model.layers.1.mlp.up_proj"
    how = build.How(torch.float32, "sdpa", adapters=Adapters(2, 4.0, False, (name,), 1, keep_initial=True))
    policy = load(source, here, adapters=how.adapters)
    policy.temperature = temperature
    batch = micro_batch([(np.arange(5, 25), np.ones(20, bool)), (np.arange(9), np.arange(9) > 4)], (0, 1), here.device)
    layer = lora.adapted(policy.lm)[name]
    with torch.no_grad():
        layer.initial_B.to_local().fill_(0.3)
        started = policy.logprobs(batch)
        layer.lora_B.to_local().fill_(0.3)
        moved = policy.logprobs(batch)
    assert not torch.allclose(started, moved, atol=1e-3)
    config = build.load_config(source)
    base = Base("x", Path(source), "local", config, None, how, "", MemoryFlags())
    for requested, expected in (("base", started), ("adapter", moved), ("copy", started)):
        frozen = reference.frozen(requested, base, here, policy)
        found = frozen.logprobs(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        sums = torch.stack([expected[:19].sum(), expected[19:].sum()])
        torch.testing.assert_close(frozen.sums(batch), sums, rtol=1e-5, atol=1e-4)
        if requested == "copy":
            assert isinstance(frozen.policy, nn.Module) and not any(p.requires_grad for p in frozen.policy.parameters())
    torch.testing.assert_close(policy.logprobs(batch).detach(), moved)

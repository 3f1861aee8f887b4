"""One sampler on several ranks: the same tokens as on one, whatever divides, and one line for what cannot be split."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from engine.errors import UserError
from rollout import parallel
from tests import ranks
from tests.families import COMMON, FAMILIES, save_family

UNEVEN = {"vocab_size": 511, "intermediate_size": 57}
MODELS = {  # tied: llama_biased (with biases), gemma3; untied: the others
    "llama": UNEVEN,
    "llama_biased": UNEVEN,
    "qwen3": {"num_key_value_heads": 4, "vocab_size": 510},
    "gemma3": UNEVEN | {"num_hidden_layers": 2},
    "olmo2": UNEVEN,
    "gemma2": {},
}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, embedded_dir):
    """Responses of all models by (ranks, ranks of a team), made once."""
    root, made = tmp_path_factory.mktemp("parallel"), {}
    directories = {name: save_family(name, root / name, embedded_dir[0], **MODELS[name]) for name in MODELS}

    def get(count: int, parts: int, *names: str) -> dict[str, Any]:
        if (count, parts, names) not in made:
            out = root / f"{count}-{parts}.json"
            argv = ["--directories", *(directories[n] for n in names or MODELS), "--output", out, "--parts", parts]
            result = ranks.launch(argv, count, module="tests.rollout.parallel_stage", log=root / f"{count}-{parts}.log")
            assert result.ok, result.output
            made[count, parts, names] = json.loads(Path(out).read_text())
        return made[count, parts, names]

    return get


def check_same(alone: list[list[Any]], shared: list[list[Any]]) -> None:
    """Tokens, ends and, to 1e-5, log-probs."""
    assert len(alone) == 10 and [row[:4] for row in alone] == [row[:4] for row in shared]
    assert len({tuple(row[2]) for row in alone}) > 5
    for (*_, one), (*_, other) in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_team_of_two_samples_what_one_rank_samples(name, sampled):
    check_same(sampled(1, 1)[name], sampled(2, 2)[name])


def test_two_teams_share_the_requests_and_one_of_four_the_model(sampled):
    """Heads, hidden states and vocabulary in four parts; or the requests in two, each sampled by two ranks."""
    alone = sampled(1, 1)
    check_same(alone["llama_biased"], sampled(4, 2, "llama_biased")["llama_biased"])
    check_same(alone["qwen3"], sampled(4, 4, "qwen3")["qwen3"])


# --- the plan ---------------------------------------------------------------------------------------------------------


def team(rank: int, size: int) -> parallel.Team:
    return parallel.Team(rank, size, 0, 1)


def on_meta(config) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [2, 3])
def test_parts_make_the_whole(name, size):
    """Every split tensor is covered once; a team of three, where heads allow it."""
    config_class, options = FAMILIES[name]
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48} if size == 3 else {}
    config = config_class(**(COMMON | options | UNEVEN | heads))
    whole = {name: p.shape for name, p in on_meta(config).named_parameters()}
    ends: dict[str, int] = {}
    for rank in range(size):
        lm = on_meta(config)
        places = parallel._cut(lm, team(rank, size))
        held = {name: p.shape for name, p in lm.named_parameters()}
        assert held.keys() == whole.keys() and len(places) >= 7 * config.num_hidden_layers
        for key, shape in held.items():
            place = places.get(key)
            if place is None:
                assert shape == whole[key]
                continue
            assert place.first == ends.get(key, 0) and shape[place.dimension] == place.size
            ends[key] = place.first + place.size
            if rank == size - 1:
                assert ends[key] == whole[key][place.dimension]
    matrices = {key for key in whole if "proj" in key and key.endswith("weight")}
    assert matrices <= ends.keys() and ("lm_head.weight" in ends) == (not config.tie_word_embeddings)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
REFUSED = {
    "experts": ("Qwen3Moe", EXPERTS, 2, r"Qwen3MoeForCausalLM splits model.layers.0.mlp.experts by 'moe_tp_experts'"),
    "no plan": ("GPT2", {}, 2, "transformers has no plan to split the layers of GPT2LMHeadModel"),
    "heads": ("Llama", {}, 4, "--rollout_tensor_parallel 4 does not divide num_key_value_heads, 2"),
    "ranks": ("Llama", {}, 3, "--rollout_tensor_parallel 3 does not divide the 4 ranks of this run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_in_one_line(case):
    family, options, size, line = REFUSED[case]
    config = getattr(transformers, f"{family}Config")(**(COMMON | options))
    here: Any = SimpleNamespace(size=4)
    with pytest.raises(UserError, match=line):
        parallel.check(config, size, here)
    parallel.check(config, 1, here)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_team_divides_its_world(size):
    here: Any = SimpleNamespace(size=4, rank=1)
    with pytest.raises(UserError, match=f"--rollout_tensor_parallel {size} does not divide the 4 ranks"):
        parallel.Team.of(here, size)
    assert parallel.Team.of(here, 1) == parallel.Team(0, 1, 1, 4) and parallel.Team.of(here, 1).leads

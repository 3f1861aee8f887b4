"""Pieces of a model beside small truths: kernels' arguments, adapters, identities, fingerprints, exports."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GptOssConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from engine import world
from engine.data.batch import micro_batch
from engine.data.packing import Packing
from engine.model import attention, export, sync, weights
from engine.model.adapters import lora
from engine.model.adapters.lora import AdaptedLinear, Adapters
from engine.model.attention_backends import flash, flash4_options, varlen
from engine.model.policy import ValueModel
from engine.model.probe import check_packing
from tests import needs
from tests.families import load, save_family

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


@pytest.fixture(scope="module")
def here():
    return world.start()


# --- what kernels are told: a window of W is the token itself and W - 1 before it -------------------------------------

PACKING = Packing.of((3, 2), torch.device("cpu"))
HOW = {"scale": 0.3, "sinks_N": None}


@pytest.mark.parametrize("window, softcap", [(None, None), (8, None), (8, 30.0)])
def test_flash_attention_is_told_window_and_softcap(window, softcap, monkeypatch):
    told = {}

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size=None,
        softcap=0,
    ):
        told.update(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale, longest=max_seqlen_k)
        return q

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q = torch.zeros(5, 2, 4)
    flash("flash2")(q, q, q, PACKING, window=window, softcap=softcap, **HOW)
    assert told == {
        "causal": True,
        "window": None if window is None else (7, 0),
        "softcap": softcap or 0,
        "scale": 0.3,
        "longest": 3,
    }


@pytest.mark.parametrize("window, left", [(None, -1), (8, 7), (1, 0)])
def test_varlen_is_told_its_window(window, left, monkeypatch):
    import torch.nn.attention.varlen as module

    told = {}

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        told.update(window=window_size, scale=scale)
        return q

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    q = torch.zeros(5, 2, 4)
    varlen(q, q, q, PACKING, window=window, softcap=None, **HOW)
    assert told == {"window": (left, 0), "scale": 0.3}


@pytest.mark.parametrize("window, sides", [(None, (None, None)), (8, (7, 0))])
def test_flash_attention_4_is_told_its_window(window, sides):
    told = flash4_options(PACKING, 0.3, window, None, None)
    assert (told["window_size_left"], told["window_size_right"], told["causal"]) == (*sides, True)


def test_sinks_need_the_formula_written_out():
    backend, why = attention.choose_backend("auto", torch.device("cpu"), GptOssConfig(), torch.float32)
    assert backend == "eager" and "attention sinks" in why


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted_layer(**changes) -> AdaptedLinear:
    torch.manual_seed(0)
    how = Adapters(
        **{"rank": 2, "alpha": 6.0, "rslora": False, "modules": (), "seed": 1, "keep_initial": True} | changes
    )
    layer = AdaptedLinear(nn.Linear(4, 3), how, 2, torch.float32)
    for name in ("lora_A", "lora_B", "initial_A", "initial_B"):
        shape = getattr(layer, name).shape
        setattr(layer, name, nn.Parameter(torch.randn(shape), requires_grad=name.startswith("lora")))
    return layer


def test_the_initial_adapter_is_the_one_that_training_started_from():
    layer, x = adapted_layer(), torch.randn(5, 4)
    plain = x @ layer.weight.T + layer.bias
    for use, a, b in ((lora.TRAINED, layer.lora_A, layer.lora_B), (lora.INITIAL, layer.initial_A, layer.initial_B)):
        with lora.using(layer, use):
            torch.testing.assert_close(layer(x), plain + 3.0 * x @ a.T @ b.T)


def test_merged_is_the_sum_with_its_scale():
    layer = adapted_layer()
    torch.testing.assert_close(layer.merged(), layer.weight + 3.0 * layer.lora_B @ layer.lora_A)


def test_a_value_models_head_is_trained_whole():
    with torch.device("meta"):
        lm = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1))
    how = Adapters(2, 4.0, False, ("model.layers.0.mlp.up_proj",), 1)
    lora.adapt(lm, how, frozen=torch.bfloat16, master=torch.float32)
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert trained == {"score.weight", *(f"model.layers.0.mlp.up_proj.lora_{leaf}" for leaf in "AB")}
    assert lm.score.weight.dtype == torch.float32 and lm.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=needs.bitsandbytes)])
def test_the_identity_names_all_that_a_policy_starts_with(four_bit, here, tmp_path, embedded_dir):
    """Weights, the form that holds them, the adapter that training starts from, and masters that round."""
    source = save_family(
        "llama", tmp_path / "model", embedded_dir.model, hidden_size=64, intermediate_size=64, head_dim=16
    )
    name, start = "model.layers.0.mlp.up_proj", tmp_path / "adapter"
    start.mkdir()
    (start / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    how = Adapters(2, 4.0, False, (name,), 1, four_bit=four_bit)
    form = "-nf4" if four_bit else ""
    plain, found = load(source, here).identity, [load(source, here, adapters=how).identity]
    assert found == [plain + form]
    for value in (0.1, 0.2):
        leaves = {"A": torch.full((2, 64), value), "B": torch.full((64, 2), value)}
        keyed = {f"base_model.model.{name}.lora_{leaf}.weight": x for leaf, x in leaves.items()}
        save_file(keyed, start / "adapter_model.safetensors")
        found.append(load(source, here, adapters=how, start=start).identity)
        assert found[-1].startswith(f"{plain}{form}-adapter-")
    rounded = load(source, here, adapters=how, master=torch.bfloat16).identity
    assert rounded == f"{plain}{form}-rounded" and len({*found, rounded}) == 4


# --- the policy and the value model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_log_probs_are_taken_at_the_policys_temperature(name, here, tmp_path, embedded_dir):
    policy = load(save_family(name, tmp_path / "model", embedded_dir.model), here)
    batch = micro_batch([(np.arange(5, 25), np.ones(20, bool))], (0,), here.device)
    with torch.no_grad():
        logits = policy.own_logits(batch).double()
        for policy.temperature in (1.0, 0.5, 3.0):
            expected = (logits / policy.temperature).log_softmax(-1).gather(1, batch.targets_R[:, None])[:, 0]
            torch.testing.assert_close(policy.logprobs(batch).double(), expected, rtol=1e-5, atol=1e-5)


def test_values_are_fp32_whatever_the_head_is():
    lm = nn.Module()
    lm.score = nn.Linear(4, 1, bias=False).bfloat16()
    model = ValueModel(lm)
    states = torch.randn(5, 4)
    model.hidden = lambda batch: states
    values = model.forward(SimpleNamespace(rows_R=torch.tensor([1, 3])))
    assert values.dtype == torch.float32 and values.shape == (2,)
    torch.testing.assert_close(values, (states[[1, 3]].bfloat16() @ lm.score.weight.T)[:, 0].float())


@pytest.mark.parametrize("window", [8, 64])
def test_the_probe_looks_beyond_a_window(window, here):
    lengths = []

    def logprobs(batch):
        lengths.append(batch.lengths)
        return torch.full((len(batch.targets_R),), -math.log(32))

    policy = SimpleNamespace(logprobs=logprobs, release=lambda: None)
    policy.own_logits = lambda batch: torch.zeros(len(batch.ids_T), 32)
    config = SimpleNamespace(sliding_window=window, vocab_size=32, architectures=["X"])
    check_packing(policy, config, here, torch.float32)
    assert len(lengths[0]) == 2 and max(lengths[0]) > window + 1


# --- when gradients are reduced ---------------------------------------------------------------------------------------


def sync_mode(memory: list[int], working: int = 0) -> str:
    """Of 1000 fp32 numbers on two ranks: 4000 bytes gathered, 4000 of gradients, 8000 of state on each."""
    p = nn.Parameter(torch.zeros(10, 100))
    root = SimpleNamespace(parameters=lambda: iter([p]), gathered_dtype=None, num_trained=1000)
    two = SimpleNamespace(size=2, memory=memory[0], gather=lambda mine: memory)
    return sync.choose_gradient_sync("auto", root, two, working=working)[0]


def test_the_rank_with_the_least_memory_decides():
    for working in (0, 5000):
        need = [8000 + working + 2 * bytes_ for bytes_ in (4000, 8000)]
        assert [sync_mode([n - 1, n - 1], working) for n in need] == ["every", "keep"]
        assert [sync_mode([n, n], working) for n in need] == ["keep", "last"]
        assert sync_mode([10**6, need[0] - 1], working) == "every" == sync_mode([need[0] - 1, 10**6], working)


# --- fingerprints and exports -----------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_names_places_and_numbers():
    """The same for every cut into shards, another for numbers that changed places within a tensor or between two."""
    x = torch.randn(6, 5)
    whole = weights._mix("a", x, 0)
    for cut in range(1, 6):
        assert (weights._mix("a", x[:cut], 0) + weights._mix("a", x[cut:], cut * 5)) % 2**64 == whole
    assert len({whole, weights._mix("a", x.flip(0), 0), weights._mix("b", x, 0), weights._mix("a", x + 1, 0)}) == 4
    y = torch.randn(6, 5)
    both = lambda first, second: (weights._mix("a", first, 0) + weights._mix("b", second, 0)) % 2**64
    assert both(x, y) != both(y, x)


def test_files_of_an_export_are_as_few_as_fit(monkeypatch):
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 10)
    sizes = {"a": 12, "b": 4, "c": 6, "d": 1, "e": 10, "f": 4, "g": 4, "h": 4}
    assert export._plan_files(list(sizes.items())) == [["a"], ["b", "c"], ["d"], ["e"], ["f", "g"], ["h"]]


def test_what_an_export_says_of_itself(tmp_path):
    """Its dtype, and both the end of a turn and the ends that the model came with."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 3], "temperature": 0.6})
    )
    tokenizer = SimpleNamespace(save_pretrained=lambda directory: None)
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig(**SMALL))
    export._save_configs(lm, tokenizer, tmp_path / "source", tmp_path, torch.bfloat16, (3,))
    config, generation = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert generation["eos_token_id"] == [3, 7] and generation["do_sample"] and generation["temperature"] == 0.6

"""What the engine counts and where it looks: shards of NF4, adapters, the cache's key, rows, throughput, dropout."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config

from engine import world
from engine.data.batch import micro_batch
from engine.data.files import Source
from engine.data.rows import BadRow
from engine.data.store import open_or_build, summary
from engine.flags import MemoryFlags
from engine.model import Base, build
from engine.model.adapters import lora, nf4
from engine.model.adapters.lora import AdaptedLinear, Adapters
from engine.model.bnb import bitsandbytes
from engine.train import refcache, throughput
from tests import needs
from tests.families import load, save_family
from tests.launch.test_equivalence import Runs


@pytest.fixture(scope="module")
def here():
    return world.start()


# --- NF4 --------------------------------------------------------------------------------------------------------------


def weights_in_float64(layer: AdaptedLinear) -> torch.Tensor:
    """(O, I) of s q by the formula: s = o + u d, a block's u that of its 256 blocks, counted over the whole matrix."""
    bnb = bitsandbytes().functional
    codes, scales, groups = (getattr(layer, name).view(torch.uint8) for name in ("codes", "scales", "groups"))
    *sizes, offset = groups.contiguous().view(torch.float32).flatten().tolist()
    dynamic, q = bnb.create_dynamic_map().tolist(), bnb.get_4bit_type("nf4", device="cpu").tolist()
    blocks = [offset + sizes[block // 256] * dynamic[code] for block, code in enumerate(scales.flatten().tolist())]
    numbers = [q[half] for byte in codes.flatten().tolist() for half in (byte >> 4, byte & 15)]
    weights = [blocks[i // 64] * number for i, number in enumerate(numbers)]
    return torch.tensor(weights, dtype=torch.float64).view(layer.out_features, layer.in_features)


@needs.bitsandbytes
def test_a_shard_takes_the_groups_of_its_own_rows():
    """Rows of a matrix of 3 groups whose sizes differ by far, cut within groups and on their edges."""
    torch.manual_seed(0)
    weight = torch.randn(150, 256) * torch.linspace(0.1, 30, 150)[:, None]
    source = nn.Linear(256, 150, bias=False, device="meta")
    how = Adapters(rank=1, alpha=1.0, rslora=False, modules=(), seed=1, four_bit=True, double_quant=True)
    layer = AdaptedLinear(source, how, 0, torch.float32).to_empty(device="cpu")
    layer.fill(weight)
    expected = weights_in_float64(layer)
    assert len(layer.groups) == 3 + 1 and (expected - weight.double()).norm() < 0.15 * weight.norm()
    for first in (0, 1, 50, 63, 64, 75, 128, 149):
        rows = nf4.dequantise(layer.codes[first:], layer.scales[first:], layer.groups, torch.float32, first)
        torch.testing.assert_close(rows.double(), expected[first:], rtol=1e-5, atol=1e-6)


@needs.bitsandbytes
def test_the_export_of_two_ranks_is_merged_with_the_groups_of_each_row(tmp_path, embedded_dir):
    """Matrices of up to 3 groups, cut between two ranks; read back by other code, against base + s B A in float64."""
    shape = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 1,
        "head_dim": 32,
        "initializer_range": 0.05,
    }
    source = save_family("llama", tmp_path / "model", embedded_dir.model, **shape)
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(embedded_dir.train_conversations.read_text(encoding="utf-8").splitlines(keepends=True)[:8]),
        encoding="utf-8",
    )
    flags = {
        "model_name_or_path": source,
        "cache_dir": tmp_path / "cache",
        "dataset_name": data,
        "batch_size": 4,
        "max_steps": 1,
        "warmup_ratio": 0,
        "learning_rate": 1e-2,
        "sample_tokens": 0,
        "use_lora": "true",
        "load_in_4bit": "true",
        "double_quant": "true",
        "lora_rank": 4,
        "lora_alpha": 8,
    }
    out = Runs("sft", tmp_path, flags).run("out", 2)
    adapter = load_file(out / "final" / "adapter" / "adapter_model.safetensors")
    base, final = (AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (source, out / "final"))
    groups = []
    for name in (name for name in base if f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight" in adapter):
        a, b = (
            adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{leaf}.weight"].double() for leaf in "AB"
        )
        packed, state = bitsandbytes().functional.quantize_4bit(base[name], quant_type="nf4", compress_statistics=True)
        groups.append(len(state.state2.absmax))
        expected = bitsandbytes().functional.dequantize_4bit(packed, state).double() + 8 / 4 * (b @ a)
        torch.testing.assert_close(
            final[name].double(), expected, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert b.abs().max() > 0
    assert len(groups) == 7 and max(groups) == 3


# --- the reference cache ----------------------------------------------------------------------------------------------


def test_compiled_layers_have_reference_numbers_of_their_own():
    """They are other numbers in the last bits, all else in the cache's key being the same; each part counts."""

    def identity(weights="0123", hidden=32, dtype=torch.float32, backend="sdpa", compiled=False) -> dict[str, str]:
        how, memory = build.How(dtype, backend), MemoryFlags(compile=compiled)
        base = Base("x", Path(), "local", Phi3Config(hidden_size=hidden), None, how, "", memory)
        return refcache.model_identity(weights, base)

    eager, compiled = identity(), identity(compiled=True)
    assert eager == identity(compiled=False) != compiled
    assert [key for key in eager if eager[key] != compiled[key]] == ["compiled"] and eager.keys() == compiled.keys()
    others = [identity("0124"), identity(hidden=64), identity(dtype=torch.bfloat16), identity(backend="eager")]
    assert all(other not in (eager, compiled) for other in others)


def test_a_cached_sum_of_another_number_of_tokens_is_not_found(tmp_path):
    """The same key with another count, as a mask that was read otherwise would have it: computed again, never used."""
    keys = np.arange(4 * 16, dtype=np.uint8).reshape(4, 16).view("V16").reshape(-1)
    refcache._append(tmp_path, keys, np.array([-1, -2, -3, -4], np.float32), np.array([10, 20, 30, 40], np.int32))
    found = refcache._look_up(tmp_path, keys.reshape(2, 2), np.array([[10, 21], [29, 40]], np.int32))
    np.testing.assert_array_equal(found, np.array([[-1, np.nan], [np.nan, -4]], np.float32))


# --- rows -------------------------------------------------------------------------------------------------------------


def every_seventh_and_every_tenth(row: dict, notes: Counter):
    """Which of them come to lie in every chunk."""
    n = row["n"]
    if n == 500:
        raise BadRow("n: expected another number, got 500")
    return (
        "too long"
        if n % 7 == 0
        else "too short"
        if n % 10 == 0
        else [(np.arange(n, n + 3), np.array([False, True, True]))]
    )


def test_rows_dropped_anywhere_are_counted_by_reason(tmp_path):
    """Over several chunks, the first and the last among them: what is kept, dropped and bad adds up to all rows."""
    source = Source("x", "1", lambda: ((f":{n}", {"n": n}) for n in range(1000)))
    store = open_or_build(tmp_path, source, every_seventh_and_every_tenth, {})
    too_long = sum(n % 7 == 0 for n in range(1000))
    too_short = sum(n % 10 == 0 and n % 7 > 0 and n != 500 for n in range(1000))
    assert store.header["dropped"] == {"too long": too_long, "too short": too_short}
    assert len(store) + too_long + too_short + store.header["bad_rows"] == store.header["rows"] == 1000
    kept = 1000 - too_long - too_short - 1
    line = f"x: 1000 rows, {kept} kept, {too_long} dropped (too long), {too_short} dropped (too short), 1 bad"
    assert next(summary([store])) == line


# --- throughput -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(here, tmp_path_factory, embedded_dir):
    return save_family(
        "llama",
        tmp_path_factory.mktemp("llama") / "model",
        embedded_dir.model,
        hidden_size=64,
        intermediate_size=112,
        head_dim=16,
    )


def policy_of(source, here, adapters=None):
    return load(source, here, adapters=adapters)


@pytest.mark.parametrize("ranks", [1, 8])
def test_throughput_is_of_one_gpu(ranks, llama, here, monkeypatch):
    """Tokens and FLOPs of all ranks in 4 seconds, by a clock of our own."""
    counted = throughput.Throughput(
        dataclasses.replace(here, size=ranks), policy_of(llama, here), torch.float32, num_tokens=7
    )
    counted.peak = 1e9
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: counted._since + 4.0))
    row = counted.row({"perf/tokens": 96_000.0, "perf/flops": 3.2e9})
    assert row["num_tokens"] == 7 + 96_000
    assert row["perf/tokens_per_second_per_gpu"] == pytest.approx(96_000 / 4 / ranks)
    assert row["perf/mfu"] == pytest.approx(3.2e9 / 4 / ranks / 1e9)


@pytest.mark.parametrize("adapted", [False, True])
def test_model_flops_are_those_of_forward_and_backward(adapted, llama, here):
    """A trained weight works thrice for a token (forward, gradients of its input and itself), a frozen one twice."""
    linears = {
        "q_proj": 64 * 64,
        "k_proj": 32 * 64,
        "v_proj": 32 * 64,
        "o_proj": 64 * 64,
        "gate_proj": 112 * 64,
        "up_proj": 112 * 64,
        "down_proj": 64 * 112,
    }
    adapters = None
    if adapted:
        with torch.device("meta"):
            names = tuple(lora.linears(AutoModelForCausalLM.from_config(build.load_config(llama))))
        adapters = Adapters(rank=4, alpha=4.0, rslora=False, modules=names, seed=1)
    policy = policy_of(llama, here, adapters)
    lengths, counted, layers, heads, head_size, vocabulary = (50, 20), 40, 2, 4, 16, 512
    sequences = [(np.arange(n + 1), np.arange(n + 1) > n - counted // 2) for n in lengths]
    found = throughput.Throughput(here, policy, torch.float32).flops(micro_batch(sequences, (0, 1), here.device))
    passes = 2 if adapted else 3
    norms = (2 * layers + 1) * 64
    expected = passes * 2 * (layers * sum(linears.values()) + norms) * sum(lengths)
    expected += passes * 2 * vocabulary * 64 * counted
    if adapted:
        sides = {
            "q_proj": 64 + 64,
            "k_proj": 64 + 32,
            "v_proj": 64 + 32,
            "o_proj": 64 + 64,
            "gate_proj": 64 + 112,
            "up_proj": 64 + 112,
            "down_proj": 112 + 64,
        }
        expected += 3 * 2 * layers * 4 * sum(sides.values()) * sum(lengths)
    # pairs of tokens, of which each head takes two products of its size, and four in the backward pass
    causal = sum(n * n / 2 for n in lengths)
    expected += 3 * 2 * 2 * layers * heads * head_size * causal
    assert found == pytest.approx(expected, rel=1e-12)
    assert throughput.Throughput(here, policy, torch.float32).flops(micro_batch([], (), here.device)) == 0


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_a_models_dropout_is_off_in_training(here, tmp_path, embedded_dir):
    """Log-probs and gradients are those of transformers in evaluation mode, though the config asks for dropout."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(Phi3Config(**shape, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5))
    lm.save_pretrained(tmp_path)
    policy = policy_of(tmp_path, here)
    assert not any(module.training for module in policy.lm.modules())
    ids = np.random.Generator(np.random.Philox(key=1)).integers(2, 500, 30)
    batch = micro_batch([(ids, np.ones(30, bool))], (0,), here.device)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64).eval()
    logprobs = (
        lm(torch.as_tensor(ids[None, :-1])).logits[0].log_softmax(-1).gather(1, torch.as_tensor(ids[1:])[:, None])[:, 0]
    )
    truth = torch.autograd.grad(-logprobs.sum(), lm.lm_head.weight)[0]
    for _ in range(2):
        loss = policy.loss(batch, lambda logprobs, rows: -logprobs.sum())
        loss.backward()
        (gradient,) = (p.grad.full_tensor() for name, p in policy.lm.named_parameters() if name == "lm_head.weight")
        assert loss.item() == pytest.approx(-logprobs.sum().item(), rel=1e-5)
        assert (gradient.double() - truth).norm() <= 1e-5 * truth.norm()
        policy.zero_grad()

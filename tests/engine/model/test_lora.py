"""Adapters: the formula, PEFT's files both ways, every layout, pi_ref under the adapters, merging, and what a user can
get wrong.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from engine import world
from engine.data.batch import micro_batch
from engine.flags import AdapterFlags
from engine.model import build
from engine.model.adapters import choose, lora
from engine.model.adapters.lora import AdaptedLinear, Adapters
from tests import needs
from tests.families import FAMILIES, load, save_family
from tests.launch.test_equivalence import Runs, rows, trajectory, weights_of
from tests.ranks import launch

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def here():
    return world.start()


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_are_the_formulas(rslora):
    """Against y = x W^T + b + s (x A^T) B^T and its derivatives written out in float64."""
    torch.manual_seed(0)
    source = nn.Linear(7, 5)
    how = Adapters(rank=3, alpha=4.0, rslora=rslora, modules=(), seed=1)
    layer = AdaptedLinear(source, how, 3, torch.float32)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(5, 3))
    layer.requires_grad_(False)
    layer.lora_A.requires_grad_(True)
    layer.lora_B.requires_grad_(True)
    x, dy = torch.randn(4, 7, requires_grad=True), torch.randn(4, 5)
    y = layer(x)
    y.backward(dy)
    s = 4.0 / (math.sqrt(3) if rslora else 3)
    w, b, a, bb, x64, dy64 = (
        t.detach().double() for t in (source.weight, source.bias, layer.lora_A, layer.lora_B, x, dy)
    )
    expected = {
        "y": (y, x64 @ w.T + b + s * (x64 @ a.T) @ bb.T),
        "dx": (x.grad, dy64 @ w + s * (dy64 @ bb) @ a),
        "dA": (layer.lora_A.grad, s * (dy64 @ bb).T @ x64),
        "dB": (layer.lora_B.grad, s * dy64.T @ (x64 @ a.T)),
    }
    for name, (found, truth) in expected.items():
        assert (found.double() - truth).norm() <= 8 * torch.finfo(torch.float32).eps * truth.norm(), name
    assert source.weight.grad is None and source.bias.grad is None
    with lora.using(layer, lora.OFF):
        assert torch.equal(layer(x), source(x))
    assert torch.equal(layer(x), y)


def test_adapters_start_at_the_model_and_depend_on_seed_and_name_alone(here, tmp_path, embedded_dir):
    source = save_family("qwen2", tmp_path / "model", embedded_dir.model)
    modules = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    plain = load(source, here)
    found = []
    for seed in (1, 1, 2):
        policy = load(source, here, adapters=Adapters(4, 8.0, False, modules, seed))
        found.append({name: p.full_tensor() for name, p in policy.lm.named_parameters() if p.requires_grad})
        batch = micro_batch([(np.arange(5, 25), np.ones(20, bool))], (0,), here.device)
        assert torch.equal(policy.logprobs(batch), plain.logprobs(batch))
    assert set(found[0]) == {f"{m}.lora_{leaf}" for m in modules for leaf in "AB"}
    a0, a1, a2 = (f["model.layers.1.mlp.up_proj.lora_A"] for f in found)
    assert torch.equal(a0, a1) and not torch.equal(a0, a2)
    bound = 1 / math.sqrt(a0.shape[1])
    assert (
        a0.abs().max() <= bound
        and a0.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        and abs(a0.mean()) < bound / 5
    )
    assert policy.num_trained == sum(p.numel() for p in found[0].values())
    assert policy.num_parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())


# --- PEFT's format ----------------------------------------------------------------------------------------------------


def peft_adapter(source, directory, **options):
    """An adapter made, filled and saved by PEFT; and PEFT's own logits with it."""
    from peft import LoraConfig, get_peft_model

    lm = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager"),
        LoraConfig(task_type="CAUSAL_LM", **options),
    )
    torch.manual_seed(3)
    for name, p in lm.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p) * 0.2
    lm.save_pretrained(directory)
    return lm


@pytest.mark.parametrize("name", ["llama_biased", "qwen2", "gemma3", "olmo2"])
def test_an_adapter_of_pefts_gives_pefts_numbers_and_comes_back(name, here, tmp_path, embedded_dir):
    from peft import PeftModel

    from engine.model.adapters import files

    source = save_family(name, tmp_path / "model", embedded_dir.model)
    options = {"r": 3, "lora_alpha": 5, "use_rslora": name == "qwen2"}
    options["target_modules"] = "all-linear" if name == "gemma3" else ["q_proj", "down_proj"]
    if name == "olmo2":
        options["layers_to_transform"] = [1]
    theirs = peft_adapter(source, tmp_path / "peft", **options)
    flags = AdapterFlags(use_lora=True)
    chosen = choose.choose(flags, build.load_config(source), tmp_path / "peft", keep_initial=False)
    policy = load(source, here, adapters=chosen, start=tmp_path / "peft")
    ids = np.random.Generator(np.random.Philox(key=3)).integers(2, 500, 30)
    batch = micro_batch([(ids, np.ones(30, bool))], (0,), here.device)
    with torch.no_grad():
        logits = theirs(torch.as_tensor(ids[:-1])[None]).logits[0].float()
        expected = logits.log_softmax(-1).gather(1, torch.as_tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(policy.logprobs(batch), expected, rtol=2e-5, atol=2e-5)
        with lora.using(policy, lora.OFF):
            assert (policy.logprobs(batch) - expected).abs().max() > 1e-2  # the adapter matters
    assert policy.identity.startswith(policy.base_weights + "-adapter-")

    files.save(
        policy.lm,
        chosen,
        tmp_path / "ours",
        here,
        base_name=str(source),
        revision="local",
        base_weights=policy.base_weights,
    )
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager"), tmp_path / "ours"
    )
    with torch.no_grad():
        assert torch.equal(again(torch.as_tensor(ids[:-1])[None]).logits[0].float(), logits)


# --- through the real train -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, embedded_dir) -> Runs:
    root = tmp_path_factory.mktemp("lora")
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, initializer_range=0.05, **WIDE),
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_pairs,
        "batch_size": 8,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "micro_batch_tokens": 500,
        "warmup_ratio": 0.1,
        "use_lora": "true",
        "lora_rank": 4,
        "lora_target_modules": "all-linear",
    }
    return Runs("dpo", root, flags)


@pytest.fixture(scope="module")
def cached(runs):
    return runs.run("cached")


def losses_of(output_dir) -> list[float]:
    return [row["loss"] for row in rows(output_dir) if "loss" in row]


@pytest.mark.parametrize(
    ("name", "ranks", "changes"),
    [
        ("two_ranks", 2, {}),
        ("cut_small", 2, {"micro_batch_tokens": 60, "gradient_sync": "last", "gradient_checkpointing": "full"}),
        ("naive_live", 3, {"head": "naive", "attention": "eager", "reference": "base"}),
    ],
)
def test_nothing_but_rounding_depends_on_the_layout(name, ranks, changes, runs, cached):
    found = runs.run(name, ranks, **changes)
    assert losses_of(found) == pytest.approx(losses_of(cached), rel=1e-5)
    w, w0, w1 = weights_of(cached / "final"), weights_of(runs.root / "model"), weights_of(found / "final")
    assert (w1 - w).norm() <= 1e-3 * (w - w0).norm()
    assert losses_of(cached)[-1] < 0.8 * math.log(2)


@pytest.mark.parametrize("reference", ["base", "copy"])
def test_the_base_is_the_reference_of_new_adapters(reference, runs, cached):
    """As good as cached numbers, and as a second frozen model; nothing is cached."""
    found = runs.run(reference, 2, reference=reference, cache_dir=runs.root / f"cache_{reference}")
    assert losses_of(found) == pytest.approx(losses_of(cached), rel=1e-6, abs=1e-6)
    assert (runs.root / "cache" / "reference").is_dir() and not (
        runs.root / f"cache_{reference}" / "reference"
    ).exists()


@pytest.mark.parametrize("four_bit", ["false", pytest.param("true", marks=needs.bitsandbytes)])
def test_a_starting_adapter_is_its_own_reference(four_bit, runs, cached):
    """Frozen beside its trained copy; equal to a second frozen model with that adapter, and to the cache; not the bare
    base.
    """
    start = {"adapter_name_or_path": cached / "final" / "adapter", "load_in_4bit": four_bit}
    for flag in ("lora_rank", "lora_target_modules"):
        runs.flags.pop(flag, None)
    try:
        found = {
            name: runs.run(f"{name}_{four_bit}", 2, reference=name, **start) for name in ("adapter", "copy", "cache")
        }
    finally:
        runs.flags |= {"lora_rank": 4, "lora_target_modules": "all-linear"}
    first = rows(found["adapter"])[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["rewards/margins"] == 0
    for name in ("copy", "cache"):
        assert losses_of(found["adapter"]) == pytest.approx(losses_of(found[name]), rel=1e-6, abs=1e-6)
    # the start is the adapter, not the base
    assert first["logps/chosen"] != pytest.approx(rows(cached)[0]["logps/chosen"], abs=0.1)


def test_merged_export_equals_the_adapter_on(runs, cached):
    from peft import PeftModel

    ids = torch.arange(2, 60)[None]
    merged = AutoModelForCausalLM.from_pretrained(cached / "final")(ids).logits
    base = AutoModelForCausalLM.from_pretrained(runs.root / "model")
    plain = base(ids).logits
    adapter_on = PeftModel.from_pretrained(base, cached / "final" / "adapter")(ids).logits
    assert (merged - adapter_on).abs().max() <= 1e-5 < 1e-2 < (merged - plain).abs().max()


def test_an_adapter_alone_is_exported_when_asked(runs, cached):
    alone = runs.run("alone", export_adapter="true")
    assert sorted(p.name for p in (alone / "final").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    ]
    a, b = (load_file(d / "adapter_model.safetensors") for d in (alone / "final", cached / "final" / "adapter"))
    assert all(torch.equal(a[key], b[key]) for key in b) and a.keys() == b.keys()
    again = runs.launch("alone", log="alone.2", export_adapter="true")
    assert again.ok and "is finished" in again.output


@needs.bitsandbytes
def test_compute_in_bfloat16_trains_float32_adapters(runs, cached):
    out = runs.run("bf16", 2, dtype="bfloat16", max_steps=3, export_adapter="true", load_in_4bit="true")
    tensors = load_file(out / "final" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@needs.bitsandbytes
def test_masters_that_round_have_a_reference_of_their_own(runs, cached):
    """In the same cache: float32 masters' numbers are not those of bfloat16 masters, of the model nor of a starting
    adapter.
    """
    start = {"adapter_name_or_path": cached / "final" / "adapter"}
    kept = {
        key: value for key, value in runs.flags.items() if key not in ("lora_rank", "lora_target_modules", "use_lora")
    }
    for name, flags in (("all", {}), ("adapter", {"use_lora": "true"} | start)):
        for master in ("float32", "bfloat16"):
            result = Runs(
                "dpo", runs.root, kept | flags | {"max_steps": 1, "master_dtype": master, "optimizer": "adamw_8bit"}
            ).launch(f"{name}_{master}")
            assert result.ok, result.output
            assert rows(runs.root / f"{name}_{master}")[0]["rewards/margins"] == 0, result.output


@pytest.mark.parametrize(
    ("flags", "again"), [({"loss_type": "simpo"}, {}), ({"use_lora": "true", "adapter_name_or_path": "ADAPTER"}, {})]
)
def test_a_saved_configuration_can_be_fed_back(flags, again, runs, cached, tmp_path):
    flags = {key: cached / "final" / "adapter" if value == "ADAPTER" else value for key, value in flags.items()}
    kept = {
        key: value for key, value in runs.flags.items() if key not in ("lora_rank", "lora_target_modules", "use_lora")
    }
    first = Runs("dpo", tmp_path, kept | flags | {"max_steps": 1}).run("first")
    result = launch(
        ["--config", first / "config.yaml", "--output_dir", tmp_path / "again"], 1, "launch.dpo", tmp_path / "log"
    )
    assert result.ok, result.output
    assert losses_of(first) == losses_of(tmp_path / "again")


@pytest.mark.parametrize("four_bit", ["false", pytest.param("true", marks=needs.bitsandbytes)])
def test_a_mixture_of_experts_takes_adapters_on_what_is_linear(four_bit, runs, tmp_path, embedded_dir):
    """Its checkpoint's names are not its module's: it comes through transformers' loader. Stacked experts stay dense,
    and that is said.
    """
    from transformers import AutoTokenizer, Qwen3MoeConfig

    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape)).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(embedded_dir.model).save_pretrained(tmp_path / "moe")
    result = Runs(
        "dpo", tmp_path, runs.flags | {"model_name_or_path": tmp_path / "moe", "max_steps": 2, "load_in_4bit": four_bit}
    ).launch("out", 2)
    assert result.ok, result.output
    assert ("not in 4 bits" in result.output and "stacked" in result.output) == (four_bit == "true")


@needs.bitsandbytes
def test_weights_in_another_form_than_the_adapter_knows_are_said(runs, cached, tmp_path):
    flags = {key: value for key, value in runs.flags.items() if key not in ("lora_rank", "lora_target_modules")}
    start = {"adapter_name_or_path": cached / "final" / "adapter", "max_steps": 1}
    result = Runs("dpo", tmp_path, flags | start | {"load_in_4bit": "true"}).launch("out")
    assert result.ok and "was trained on weights held as they are, which are other numbers" in result.output


@pytest.fixture(scope="module")
def ppo(tmp_path_factory, tuned) -> Runs:
    root = tmp_path_factory.mktemp("ppo_lora")
    flags = {
        "cache_dir": tuned,
        "max_steps": 3,
        "batch_size": 6,
        "num_samples_per_prompt": 2,
        "eval_samples": 1,
        "micro_batch_tokens": 500,
        "use_lora": "true",
        "lora_rank": 4,
        "num_ppo_epochs": 2,
        "learning_rate": 5e-3,
    }
    return Runs("ppo", root, flags)


@pytest.fixture(scope="module")
def ppo_runs(ppo):
    return {name: ppo.run(name, 2, reference=name) for name in ("base", "copy")}


def test_ppo_under_adapters(ppo_runs):
    """The base as reference equals a frozen copy; the sampler gets merged weights (checked at run time)."""
    found = ppo_runs
    for a, b in zip(*(trajectory(out) for out in found.values()), strict=True):
        same = [key for key in a if not key.startswith("time/")]
        assert {k: a[k] for k in same} == {k: pytest.approx(b[k], rel=1e-6, abs=1e-6) for k in same}
    iterations = [row for row in rows(found["base"]) if "loss" in row]
    assert iterations[0]["objective/kl"] == 0 < abs(iterations[-1]["objective/kl"])


@pytest.mark.drill
@needs.bitsandbytes
def test_ppo_from_an_adapter(ppo, ppo_runs):
    flags = {key: value for key, value in ppo.flags.items() if key != "lora_rank"}
    start = {"adapter_name_or_path": ppo_runs["base"] / "final" / "adapter", "load_in_4bit": "true", "max_steps": 2}
    found = {
        name: Runs("ppo", ppo.root, flags | start).run(f"start_{name}", 1, reference=name)
        for name in ("adapter", "copy")
    }
    for a, b in zip(*(rows(out) for out in found.values()), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-6) and a.get("objective/kl") == pytest.approx(
            b.get("objective/kl"), abs=1e-6
        )
    assert (found["adapter"] / "final" / "value" / "config.json").is_file()


def test_an_adapter_is_evaluated_as_it_is_or_merged(ppo, ppo_runs, tuned):
    """The same greedy answers."""
    final, responses = ppo_runs["base"] / "final", []
    (base,) = tuned.glob("*/tuned_on_sums/final")
    for name, flags in (
        ("merged", ["--model_name_or_path", final]),
        ("adapter", ["--model_name_or_path", base, "--adapter_name_or_path", final / "adapter"]),
    ):
        out = ppo.root / f"{name}.jsonl"
        problems = base.parents[1] / "held_out_problems.jsonl"
        argv = [
            *flags,
            "--dataset_name",
            problems,
            "--temperature",
            0,
            "--num_prompts",
            12,
            "--response_length",
            24,
            "--output",
            out,
            "--cache_dir",
            ppo.root,
        ]
        result = launch(argv, module="launch.evaluate", log=ppo.root / f"{name}.log")
        assert result.ok, result.output
        responses.append([json.loads(line)["response"] for line in out.read_text().splitlines()])
    assert responses[0] == responses[1] and len(responses[0]) == 12


def test_a_value_model_of_another_shape_is_adapted_on_its_own_layers(ppo, embedded_dir, tmp_path):
    """All of them, its head trained whole; a resumed run wants the very same frozen weights under it."""
    value = save_family("qwen3", tmp_path / "value", embedded_dir.model, num_hidden_layers=3, **WIDE)
    runs = Runs("ppo", tmp_path, ppo.flags | {"value_model_name_or_path": value, "save_steps": 1, "max_steps": 2})
    result = runs.launch("out")
    assert result.ok and "adapters on 21 layers" in result.output, result.output
    head = load_file(tmp_path / "out" / "final" / "value" / "model.safetensors")["score.weight"]
    assert head.abs().max() > 0
    for path in (tmp_path / "out" / "final").rglob("*.json"):
        path.unlink()
    weights = load_file(value / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, value / "model.safetensors", metadata={"format": "pt"})
    refused = runs.launch("out", log="again")
    assert not refused.ok and "is of another value model" in refused.output


@needs.bitsandbytes
def test_hand_over_gathers_what_export_writes(here, tmp_path, embedded_dir):
    """The sampler's weights: W + s B A of shards, for dense and 4-bit layers, and refuses another model."""
    from rollout import handover

    source = save_family("llama_biased", tmp_path / "model", embedded_dir.model, **WIDE)
    config = build.load_config(source)
    modules = tuple(f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv")
    for four_bit in (False, True):
        policy = load(source, here, adapters=Adapters(4, 8.0, False, modules, 1, four_bit=four_bit))
        for name, p in policy.lm.named_parameters():
            if name.endswith("lora_B"):
                p.detach().to_local().normal_()
        target = handover.skeleton(config, "sdpa", torch.float32, here.device)
        handover.load(target, policy.lm, here)
        batch = micro_batch([(np.arange(5, 45), np.ones(40, bool))], (0,), here.device)
        ids = batch.ids_T[None]
        with torch.no_grad():
            merged = target(ids).logits[0].log_softmax(-1).gather(1, batch.targets_R[:, None])[:, 0]
            torch.testing.assert_close(merged, policy.logprobs(batch), rtol=2e-5, atol=2e-5)
    assert set(lora.dense(policy.lm)) == {n for n, _ in AutoModelForCausalLM.from_pretrained(source).named_parameters()}
    assert all(isinstance(read(), DTensor) for _, read in lora.dense(policy.lm).values())


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def refusal(runs: Runs, n: int, **changes) -> str:
    flags = {key: value for key, value in changes.items() if value is not None}
    kept = {key: value for key, value in runs.flags.items() if key not in changes}
    result = Runs(runs.stage, runs.root, kept | flags).launch(f"refused{n}")
    assert result.codes == [2] and "Traceback" not in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("error: "))
    assert line.isprintable()
    return line


WRONG = {
    "no such layer": (
        {"lora_target_modules": "q_prj"},
        "no linear layer of LlamaForCausalLM is called that (did you mean q_proj?); there are down_proj, gate_proj",
    ),
    "4 bits without adapters": (
        {"use_lora": None, "lora_rank": None, "lora_target_modules": None, "load_in_4bit": "true"},
        "--load_in_4bit needs --use_lora",
    ),
    "rank without adapters": (
        {"use_lora": None, "lora_target_modules": None},
        "--lora_rank is not read without --use_lora",
    ),
    "double without 4 bits": ({"double_quant": "true"}, "--double_quant is not read without --load_in_4bit"),
    "rank 0": ({"lora_rank": 0}, "--lora_rank must be greater than 0, got 0"),
    "adapter's reference without one": ({"reference": "adapter"}, "so the reference is --reference base"),
    "base without adapters": (
        {"use_lora": None, "lora_rank": None, "lora_target_modules": None, "reference": "base"},
        "--reference base needs --use_lora",
    ),
    "a dtype that is not written": (
        {"export_adapter": "true", "export_dtype": "bfloat16"},
        "--export_dtype bfloat16 is not read with --export_adapter",
    ),
    "cache asked of a live reference": ({"reference": "base", "cache_logprobs_only": "true"}, "needs no cache"),
}


@pytest.mark.parametrize("case", WRONG)
def test_flags_that_contradict_are_one_line(case, runs):
    changes, message = WRONG[case]
    assert message in refusal(runs, sorted(WRONG).index(case), **changes)


def test_adapters_that_do_not_fit_are_one_line(runs, cached, tmp_path, embedded_dir):
    mine = cached / "final" / "adapter"
    start = {"adapter_name_or_path": mine, "lora_rank": None, "lora_target_modules": None}
    assert "--lora_rank is that of --adapter_name_or_path" in refusal(runs, 10, adapter_name_or_path=mine)
    other = save_family("llama", tmp_path / "other", embedded_dir.model)
    assert "the adapter is of another model: base_model.model.model.layers" in refusal(
        runs, 11, model_name_or_path=other, **start
    )
    weights = load_file(runs.root / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    changed = save_family("llama", tmp_path / "changed", embedded_dir.model, **WIDE)
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert "the adapter was trained on other weights" in refusal(runs, 12, model_name_or_path=changed, **start)
    assert "the reference is --reference adapter" in refusal(runs, 13, reference="base", **start)
    assert "no usable adapter_config.json" in refusal(runs, 14, **start | {"adapter_name_or_path": tmp_path})
    assert "is in its adapter/" in refusal(runs, 16, **start | {"adapter_name_or_path": cached / "final"})
    assert "is an adapter: give the model" in refusal(runs, 17, model_name_or_path=mine)
    assert "no such directory" in refusal(runs, 15, **start | {"adapter_name_or_path": cached / "final" / "adaptor"})
    described = json.loads((mine / "adapter_config.json").read_text())
    for i, (key, value, message) in enumerate(
        [
            ("use_dora", True, "use_dora is not supported"),
            ("peft_type", "IA3", "only LoRA is read"),
            ("r", 5, "this model's layer takes [5, 128]"),
            ("r", "many", "must be a whole number"),
            ("r", 4.5, "must be a whole number"),
            ("use_rslora", "false", "and a truth value"),
            ("modules_to_save", ["lm_head"], "no weight of lm_head, which is in modules_to_save"),
            ("modules_to_save", ["norm"], "modules_to_save norm: only embedding and head of LlamaForCausalLM can be"),
            ("modules_to_save", "lm_head", "modules_to_save must be a list of names"),
            ("lora_alpha", math.nan, "a number above 0"),
            ("lora_alpha", 0, "a number above 0"),
            ("init_lora_weights", "pissa", "changes the model's own weights"),
            ("layer_replication", [[0, 2]], "layer_replication is not supported"),
            ("tensors", math.inf, "holds numbers that are not finite"),
            ("tensors", 1e38, "log-probs are not finite numbers"),
            ("name", "\n\x1b[31mq", "fits no linear layer"),
            ("dtype", torch.int32, "not a floating dtype"),
        ]
    ):
        bad = tmp_path / f"bad{i}"
        bad.mkdir()
        (bad / "adapter_config.json").write_text(
            json.dumps(described | ({} if key in ("tensors", "name", "dtype") else {key: value}))
        )
        tensors = load_file(mine / "adapter_model.safetensors")
        if key == "tensors":
            for tensor in tensors.values():
                tensor[:] = value
        elif key == "name":
            tensors[f"base_model.model.{value}.lora_A.weight"] = torch.zeros(4, 64)
        elif key == "dtype":
            tensors = {name: tensor.to(value) for name, tensor in tensors.items()}
        save_file(tensors, bad / "adapter_model.safetensors")
        assert message in refusal(runs, 20 + i, **start | {"adapter_name_or_path": bad})


def test_every_family_is_adapted_by_its_own_names():
    for config_class, options in FAMILIES.values():
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                config_class(**{"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64} | options)
            )
        names = {name.rpartition(".")[2] for name in lora.linears(lm)}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

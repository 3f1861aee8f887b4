"""NF4 bases: bitsandbytes' own numbers, cut by rows, through kills; of a 60M Llama on two ranks the bytes, logits and
gradients.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from engine.model.adapters import lora, nf4
from engine.model.adapters.lora import AdaptedLinear, Adapters
from engine.model.bnb import bitsandbytes
from tests.families import save_family
from tests.launch.test_equivalence import Runs, digest, rows, trajectory, weights_of

pytest.importorskip("bitsandbytes")
LORA = {"use_lora": "true", "load_in_4bit": "true", "lora_rank": 8, "sample_tokens": 0}
QUANTISED = dict(rank=2, alpha=4.0, rslora=False, modules=("layer",), seed=1, four_bit=True)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of what is held, comparable: bits that are no number are no less equal."""
    return x.view(torch.uint8) if x.dtype == nf4.HELD else x


def layer_of(weight: torch.Tensor, double: bool, device: str | torch.device = "cpu") -> AdaptedLinear:
    source = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer = AdaptedLinear(source, Adapters(**QUANTISED, double_quant=double), 0, torch.float32).to_empty(device=device)
    layer.fill(weight)
    return layer


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_numbers_are_bitsandbytes_own_and_rows_are_independent(rows_, blocks, double, dtype, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows_, 64 * blocks) * torch.rand(rows_, 1) * 3
    if seed % 3 == 0:
        weight[seed % rows_] = 0  # a block of zeros has scale 0
    bnb = bitsandbytes().functional
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    layer = layer_of(weight, double)
    assert torch.equal(bits(layer.codes).flatten(), packed.flatten())
    found = nf4.dequantise(layer.codes, layer.scales, layer.groups, dtype)
    state.dtype = dtype
    assert torch.equal(found, bnb.dequantize_4bit(packed, state).to(dtype))
    cut = rows_ // 2  # what a rank that holds only the last rows makes of them
    assert torch.equal(nf4.dequantise(layer.codes[cut:], layer.scales[cut:], layer.groups, dtype, cut), found[cut:])
    assert torch.equal(nf4.quantise(weight[cut:])[0], bits(layer.codes)[cut:])
    bytes_ = sum(p.nbytes for p in layer.parameters())
    assert bytes_ == weight.numel() // 2 + weight.numel() // 64 * (1 if double else 4) + (
        4 * layer.groups.shape[0] if double else 0
    )


@pytest.mark.parametrize("double", [False, True])
def test_the_product_and_its_gradient_keep_only_bytes(double):
    torch.manual_seed(0)
    layer = layer_of(torch.randn(96, 128), double)
    dense = nf4.dequantise(layer.codes, layer.scales, layer.groups, torch.float32)
    x, grad = torch.randn(5, 128, requires_grad=True), torch.randn(5, 96)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    y.backward(grad)
    assert torch.equal(y, x @ dense.T) and torch.equal(x.grad, grad @ dense)
    assert kept and all(t.dtype == nf4.HELD for t in kept)


def test_every_byte_survives_being_held_moved_and_gathered():
    """All 256 of them, also those that are NaN in the dtype they are held in."""
    every = torch.arange(256, dtype=torch.uint8).repeat(3)
    held = every.view(nf4.HELD)
    for moved in (
        held.clone(),
        torch.empty_like(held).copy_(held),
        torch.cat([held[:100], held[100:]]),
        held.new_zeros(768).copy_(held).view(3, 256).contiguous(),
    ):
        assert torch.equal(bits(moved).flatten(), every)


def test_rows_that_are_not_whole_blocks_stay_dense():
    with torch.device("meta"):
        from transformers import LlamaConfig, LlamaForCausalLM

        lm = LlamaForCausalLM(
            LlamaConfig(hidden_size=64, intermediate_size=72, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
        )
    everything = tuple(lora.linears(lm))
    left = lora.adapt(lm, Adapters(**QUANTISED | {"modules": everything}), frozen=torch.float32, master=torch.float32)
    assert left == ["model.layers.0.mlp.down_proj"]
    assert (
        lm.model.layers[0].mlp.down_proj.weight.dtype == torch.float32 and lm.model.layers[0].mlp.up_proj.weight is None
    )
    with pytest.raises(ValueError, match="rows of 72 weights are not whole blocks of 64"):
        nf4.shapes(4, 72, False)


# --- two ranks, through the real train --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory, embedded_dir) -> Runs:
    """Of a Llama of 60M parameters."""
    root = tmp_path_factory.mktemp("large")
    shape = {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 10,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "head_dim": 64,
        "vocab_size": 8192,
        "initializer_range": 0.03,
    }
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, **shape),
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_conversations,
        "micro_batch_tokens": 200,
    } | LORA
    return Runs("sft", root, flags)


@pytest.mark.parametrize(
    ("size", "double", "dtype"),
    [("large", "false", "float32"), ("small", "true", "float32"), ("small", "true", "bfloat16")],
)
def test_two_ranks_hold_half_each_and_compute_the_same(size, double, dtype, request):
    """Bytes, logits, log-probs and state dict to the bit; the adapters' reduced gradients to 1e-6 of their norm (bf16:
    of its rounding).
    """
    runs, held, gradients = request.getfixturevalue(size), {}, []
    for ranks in (1, 2):
        out = runs.run(
            f"held_{dtype}_{ranks}",
            ranks,
            hook="dump_what_is_held",
            double_quant=double,
            dtype=dtype,
            max_steps=1,
            batch_size=3,
            export_adapter="true",
        )
        held[ranks] = [torch.load(out / f"held-{rank}.pt", weights_only=True) for rank in range(ranks)]
        gradients.append(torch.load(out / "gradients.pt", weights_only=True))
    (alone,), both = held[1], held[2]
    for rank in both:
        assert rank["held"] == pytest.approx(alone["held"] / 2, rel=0.03)
        assert torch.equal(rank["logits"], alone["logits"]) and torch.equal(rank["logprobs"], alone["logprobs"])
        assert rank["state"].keys() == alone["state"].keys()
        assert all(torch.equal(bits(rank["state"][name]), bits(t)) for name, t in alone["state"].items())

    layers = {name.rpartition(".")[0] for name in alone["state"] if name.endswith(".codes")}
    parts = {"codes", "scales", "lora_A", "lora_B"} | ({"groups"} if double == "true" else set())
    blocks, numbers = {"large": (10, 60e6), "small": (2, 140e3)}[size]
    assert len(layers) == 7 * blocks
    dense = {name for name in alone["state"] if name.rpartition(".")[0] not in layers}
    assert alone["state"].keys() - dense == {f"{layer}.{part}" for layer in layers for part in parts}
    assert len(dense) == 2 * blocks + 3  # two norms a block; embedding, last norm, head
    total = sum(alone["state"][name].numel() for name in dense) + sum(
        2 * alone["state"][f"{layer}.codes"].numel() for layer in layers
    )
    assert total == pytest.approx(numbers, rel=0.05)

    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * len(layers)
    flat = [torch.cat([g.double().flatten() for g in found.values()]) for found in gradients]
    assert (flat[0] - flat[1]).norm() <= {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype] * flat[0].norm() and flat[
        0
    ].norm() > 0


# --- small: kills, resumption, export ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory, embedded_dir) -> Runs:
    root = tmp_path_factory.mktemp("small")
    model = save_family(
        "llama",
        root / "model",
        embedded_dir.model,
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        initializer_range=0.05,
    )
    flags = {
        "model_name_or_path": model,
        "cache_dir": root / "cache",
        "dataset_name": embedded_dir.train_conversations,
        "batch_size": 12,
        "max_steps": 10,
        "learning_rate": 5e-3,
        "micro_batch_tokens": 500,
        "double_quant": "true",
    } | LORA
    return Runs("sft", root, flags)


@pytest.fixture(scope="module")
def uninterrupted(small):
    return small.run("uninterrupted", 2, save_steps=2)


@pytest.mark.parametrize(
    "hook", ["kill_rank_1_while_writing_step_4", pytest.param("kill_between_steps_7_and_8", marks=pytest.mark.drill)]
)
def test_a_killed_run_ends_in_the_same_bits(hook, small, uninterrupted):
    assert not small.launch(hook, 2, hook, save_steps=2).ok
    again = small.launch(hook, 2, log=f"{hook}.2", save_steps=2)
    assert again.ok and "resuming after step" in again.output, again.output
    assert digest(small.root / hook) == digest(uninterrupted) and trajectory(small.root / hook) == trajectory(
        uninterrupted
    )


def test_a_checkpoint_holds_the_adapters_and_nothing_of_the_base(small, uninterrupted):
    found: dict[str, torch.Tensor] = {}
    for file in (uninterrupted / "checkpoints" / "step-000008").glob("*.safetensors"):
        found |= dict.fromkeys(load_file(file))
    layers = [
        f"lm.model.layers.{i}.{name}"
        for i in range(2)
        for name in [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    ]
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert set(found) == {f"policy.{kind}.{layer}.lora_{leaf}" for kind in kinds for layer in layers for leaf in "AB"}


def test_resume_on_three_ranks(small, uninterrupted):
    small.launch("reshard", 2, "kill_between_steps_7_and_8", save_steps=4)
    result = small.launch("reshard", 3, log="reshard.2", save_steps=4)
    assert result.ok and "resuming a run of 2 ranks on 3" in result.output
    w, w0, w1 = (
        weights_of(d) for d in (uninterrupted / "final", small.root / "model", small.root / "reshard" / "final")
    )
    assert (w1 - w).norm() <= 1e-3 * (w - w0).norm()


def test_frozen_weights_that_changed_are_no_base_to_resume_on(small, uninterrupted):
    """A checkpoint holds none of them: their fingerprint must be what it was."""
    shutil.copytree(uninterrupted, small.root / "other")
    shutil.rmtree(small.root / "other" / "final")
    file = small.root / "model" / "model.safetensors"
    before, tensors = file.read_bytes(), load_file(file)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    refused = small.launch("other", 2, save_steps=2)
    file.write_bytes(before)
    assert not refused.ok and "is of another model" in refused.output


def test_the_export_is_what_was_trained(small, uninterrupted):
    """final/ is the dequantised base plus s B A, to rounding of one sum: read back by transformers, without any of our
    code.
    """
    adapter = load_file(uninterrupted / "final" / "adapter" / "adapter_model.safetensors")
    base, final = (
        AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (small.root / "model", uninterrupted / "final")
    )
    bnb = bitsandbytes().functional
    for name, weight in base.items():
        pair = [adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{leaf}.weight") for leaf in "AB"]
        if pair[0] is None:
            assert torch.equal(final[name], weight), name
            continue
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        expected = bnb.dequantize_4bit(packed, state).double() + 32 / 8 * (pair[1].double() @ pair[0].double())
        torch.testing.assert_close(final[name].double(), expected, rtol=0, atol=1e-6)
        assert pair[1].abs().max() > 0


def test_it_learns(uninterrupted):
    first, *_, last = rows(uninterrupted)
    assert last["loss"] < 0.97 * first["loss"]

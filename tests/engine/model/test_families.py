"""Loading, packing, training and exporting the families, against transformers' own models."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from engine import world
from engine.data.batch import micro_batch
from engine.data.packing import Packing
from engine.errors import UserError
from engine.model import attention, attention_backends, build, export, layers, weights
from engine.model import policy as policies
from losses.logprobs import LogitTransform
from tests.families import FAMILIES, load, save_family

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def here():
    return world.start()


@pytest.fixture(scope="module")
def family_dirs(tmp_path_factory, embedded_dir):
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root / name, embedded_dir[0]) for name in FAMILIES}


def sequences(vocab=512, lengths=(3, 21, 12)):
    g = np.random.Generator(np.random.Philox(key=3))
    return [(g.integers(0, vocab, n + 1), g.random(n + 1) < 0.7) for n in lengths]


def own_logprobs(lm, ids):
    """log p of every next token by transformers' eager attention, the sequence alone."""
    logits = lm(torch.as_tensor(ids[:-1])[None], use_cache=False).logits[0].float()
    return logits.log_softmax(-1).gather(1, torch.as_tensor(ids[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logprobs_and_gradients_are_the_models_own(name, family_dirs, here):
    policy = load(family_dirs[name], here)
    lm = AutoModelForCausalLM.from_pretrained(family_dirs[name], attn_implementation="eager")
    batch = micro_batch(sequences(), (0, 1, 2), CPU)
    ours = policy.logprobs(batch)
    theirs = torch.cat([own_logprobs(lm, ids)[torch.as_tensor(mask[1:])] for ids, mask in sequences()])
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)

    policy.loss(batch, lambda logprobs, _: -(logprobs**2).sum()).backward()
    (-(theirs**2).sum()).backward()
    expected = dict(lm.named_parameters())
    for parameter, p in policy.lm.named_parameters():
        error = (p.grad.full_tensor() - expected[parameter].grad).norm()
        assert error <= 2e-5 * expected[parameter].grad.norm() + 1e-7, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bitwise(name, family_dirs, here, tmp_path):
    """From bf16 through fp32 masters back to bf16: every tensor and the logits, as transformers reads them."""
    source = tmp_path / "bf16"
    lm = AutoModelForCausalLM.from_pretrained(family_dirs[name], dtype=torch.bfloat16)
    lm.save_pretrained(source)
    policy = load(source, here)
    tokenizer = AutoTokenizer.from_pretrained(family_dirs[name])
    export.save_model(policy.lm, tokenizer, source, tmp_path / "final", here, dtype=torch.bfloat16, end_ids=(1,))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert again.dtype == torch.bfloat16 and again.generation_config.eos_token_id == [1]
    assert load_file(source / "model.safetensors").keys() == load_file(tmp_path / "final" / "model.safetensors").keys()
    for (key, a), b in zip(lm.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    ids = torch.arange(2, 22)[None]
    assert torch.equal(lm(ids).logits, again(ids).logits)


def test_sharded_files_and_export_in_several_files(embedded_dir, here, tmp_path, monkeypatch):
    source = save_family("llama", tmp_path / "sharded", embedded_dir[0], max_shard_size="40KB")
    assert (source / weights.INDEX).is_file() and len(list(source.glob("*.safetensors"))) > 2
    policy = load(source, here)
    single = save_family("llama", tmp_path / "single", embedded_dir[0])
    assert load(single, here).identity == policy.identity
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 50_000)
    export.save_model(
        policy.lm, AutoTokenizer.from_pretrained(source), source, tmp_path / "final", here, dtype=FP32, end_ids=(1,)
    )
    assert len(list((tmp_path / "final").glob("*.safetensors"))) > 2
    expected = AutoModelForCausalLM.from_pretrained(single).state_dict()
    for key, value in AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict().items():
        assert torch.equal(value, expected[key])


def test_fingerprint_sees_one_bit_and_two_swapped_rows(family_dirs, here, tmp_path):
    before = load(family_dirs["llama"], here).identity
    for change in ("bit", "swap"):
        changed = tmp_path / change
        shutil.copytree(family_dirs["llama"], changed)
        tensors = load_file(changed / "model.safetensors")
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        if change == "bit":
            weight.view(torch.int32)[3, 4] ^= 1
        else:
            weight[[0, 1]] = weight[[1, 0]]
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        assert load(changed, here).identity != before


def test_a_checkpoint_of_the_bare_body_is_read_through_transformers(family_dirs, here, tmp_path):
    """Names without the 'model.' prefix: transformers' own loader knows them."""
    source = tmp_path / "bare"
    shutil.copytree(family_dirs["qwen2"], source)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {k.removeprefix("model."): v for k, v in tensors.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert load(source, here).identity == load(family_dirs["qwen2"], here).identity


@pytest.mark.parametrize("bare", [False, True])
def test_a_tensor_that_the_model_has_no_place_for_is_refused_by_name(bare, family_dirs, here, tmp_path):
    """A layer too many, an adapter's leftovers: what is read is used, or the checkpoint is not this model's."""
    source = tmp_path / "more"
    shutil.copytree(family_dirs["qwen2"], source)
    tensors = load_file(source / "model.safetensors")
    if bare:  # names that transformers' own loader knows
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(56, 32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM has no place for 1 tensors, as .*layers\.2\.mlp\.up_proj"):
        load(source, here)


def test_bfloat16_compute_keeps_float32_masters(family_dirs, here):
    policy = load(family_dirs["llama"], here, dtype=torch.bfloat16)
    batch = micro_batch(sequences(), (0, 1, 2), CPU)
    exact = load(family_dirs["llama"], here).logprobs(batch)
    logprobs = policy.logprobs(batch)
    assert logprobs.dtype == FP32 and 0 < (logprobs - exact).abs().max() < 0.3
    logprobs.sum().backward()
    assert {p.dtype for p in policy.parameters()} == {FP32} and {p.grad.dtype for p in policy.parameters()} == {FP32}


def test_heads_agree(family_dirs, here):
    batch = micro_batch(sequences(), (0, 1, 2), CPU)
    gradients = []
    for head in ("fused", "naive"):
        policy = load(family_dirs["gemma2"], here, head=head)
        policy.loss(batch, lambda logprobs, _: -logprobs.sum()).backward()
        gradients.append([p.grad.full_tensor() for p in policy.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_runs_every_layer_again_in_the_backward_pass(recompute, family_dirs, here):
    """Equal losses alone would not show that the flag does anything."""
    policy = load(family_dirs["llama"], here)
    if recompute:
        layers.recompute_layers(policy)
    calls = []
    for layer in policy.lm.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputation stops before a layer's end
    loss = policy.loss(micro_batch(sequences(), (0, 1, 2), CPU), lambda logprobs, _: -logprobs.sum())
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == (4 if recompute else 2)


def test_gradient_sync_gathers_and_reduces_as_often_as_it_says_to_the_same_sum(family_dirs, here):
    batches = [micro_batch([s], (i,), CPU) for i, s in enumerate(sequences())]
    found = []
    for mode in ("every", "keep", "last"):
        policy = load(family_dirs["llama"], here)
        policy.gradient_sync = mode
        reduced = []
        for p in policy.parameters():
            p.register_post_accumulate_grad_hook(lambda p, reduced=reduced: reduced.append(p))
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            policy.sync_gradients(last)
            policy.loss(batch, lambda logprobs, _: -logprobs.sum()).backward()
            cut = [isinstance(p, DTensor) for p in policy.parameters()]
            assert all(cut) if last or mode == "every" else not any(cut)
            assert len(reduced) == len(cut) * ((i + 1) if mode != "last" else int(last))
        found.append([p.grad.full_tensor() for p in policy.parameters()])
    for every, keep, last in zip(*found, strict=True):
        assert torch.equal(every, keep)
        torch.testing.assert_close(every, last, rtol=1e-5, atol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_state_space_model_is_refused_by_name(embedded_dir, here, tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=512, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match=r"MambaForCausalLM (cannot be packed|mixes tokens by)"):
        load(tmp_path / "mamba", here)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_a_decoder_that_leaks_across_sequences_is_refused(dtype, family_dirs, here, monkeypatch):
    """The probe itself: attention that forgets the boundaries must be caught."""
    one = lambda packing: Packing.of([sum(packing.lengths)], CPU)
    whole = lambda q, k, v, packing, **options: attention_backends.eager(q, k, v, one(packing), **options)
    monkeypatch.setitem(attention.ADDED, "leaking", lambda: whole)
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be packed: log-probs of packed sequences differ"):
        load(family_dirs["llama"], here, dtype=dtype, backend="leaking")


def test_a_logit_scale_that_is_not_known_is_refused(family_dirs, here, monkeypatch):
    monkeypatch.setattr(policies, "_logit_transform", lambda config: LogitTransform())
    with pytest.raises(UserError, match="GraniteForCausalLM cannot be packed"):
        load(family_dirs["granite"], here)


def test_a_multimodal_model_is_refused_by_name(tmp_path):
    from transformers import Gemma3Config

    Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Gemma3ForConditionalGeneration is multimodal"):
        build.load_config(tmp_path)


def test_chunked_attention_is_refused(family_dirs, tmp_path):
    config = json.loads((family_dirs["llama"] / "config.json").read_text())
    config["layer_types"] = ["chunked_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"mixes tokens by chunked_attention|no usable config.json"):
        build.load_config(tmp_path)


def damage(directory, what):
    tensors = load_file(directory / "model.safetensors")
    index = directory / weights.INDEX
    if what == "missing":
        del tensors["model.norm.weight"]
    elif what == "shape":
        tensors["model.norm.weight"] = torch.ones(7)
    elif what == "truncated":
        content = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
        return
    elif what == "pickle":
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
        return
    elif what == "outside":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../model.safetensors")}))
        return
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "what, said",
    [
        ("missing", "model.norm.weight is missing"),
        ("shape", "model.norm.weight has shape"),
        ("truncated", "not a readable safetensors file"),
        ("pickle", "a pickle file would run code"),
        ("outside", "not a file beside it"),
    ],
)
def test_damaged_models_are_refused(what, said, family_dirs, here, tmp_path):
    shutil.copytree(family_dirs["llama"], tmp_path / "m")
    damage(tmp_path / "m", what)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "m", here)

"""Embedding and head that grow by the tokens that are added, and that are trained whole beside adapters."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import world
from engine.data.batch import micro_batch
from engine.errors import UserError
from engine.flags import AdapterFlags, MemoryFlags
from engine.model import build, load_policy, load_untrained, load_value_model, open_model
from engine.model.adapters import files, lora
from engine.model.adapters.saved import saved
from engine.model.export import export
from engine.model.shards import whole
from engine.train.throughput import Throughput
from tests import needs
from tests.families import load, save_family

TOKENS = ("<|im_start|>", "<|im_end|>")
IDS = np.random.Generator(np.random.Philox(key=3)).integers(2, 500, 30)
IDS[[4, 9, 20, 29]] = 512, 513, 512, 513  # the new tokens, as inputs and as targets

LORA = {"use_lora": True, "lora_modules_to_save": ("embed_tokens", "lm_head")}


@pytest.fixture(scope="module")
def here():
    return world.start()


def logprobs_of(lm, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        logits = lm(torch.as_tensor(ids[:-1])[None]).logits[0]
        return logits.log_softmax(-1).gather(1, torch.as_tensor(ids[1:])[:, None])[:, 0]


def ours(policy, here, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        found = policy.logprobs(micro_batch([(ids, np.ones(len(ids), bool))], (0,), here.device))
    policy.release()
    return found


def flags_for(source, **changes) -> AdapterFlags:
    return AdapterFlags(model_name_or_path=str(source), attention="sdpa", **changes)


def opened(source, here, keep_initial=False, **changes):
    flags = flags_for(source, **changes)
    return open_model(flags, here, memory=MemoryFlags(), adapters=flags, keep_initial=keep_initial)


def resized(source, rows: int):
    """The library's own model with so many rows, each new one the mean of those before, in float64."""
    lm = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    there = lm.config.vocab_size
    lm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in {id(m.weight): m for m in (lm.get_input_embeddings(), lm.get_output_embeddings())}.values():
            module.weight[there:] = module.weight[:there].double().mean(0).float()
    return lm


# --- grown ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_biased", "gemma3", "granite"])
def test_a_grown_model_is_the_librarys_resized_one(name, here, tmp_path, embedded_dir, capsys):
    """Numbers, configuration, fingerprint and export; untied, tied, and with a scaled embedding."""
    source = save_family(name, tmp_path / "model", embedded_dir.model)
    base = opened(source, here, add_special_tokens=TOKENS)
    assert "new tokens: '<|im_start|>' (512), '<|im_end|>' (513); embedding and head grow from 512 to 514 rows" in (
        capsys.readouterr().out
    )
    assert base.config.vocab_size == base.chat.vocab_size == 514 and base.how.rows_there == 512
    policy, theirs = load_policy(base, here), resized(source, 514)
    torch.testing.assert_close(ours(policy, here), logprobs_of(theirs), rtol=1e-5, atol=1e-5)
    export(policy, base, here, tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", attn_implementation="eager")
    for found in (again.state_dict(), {n: read() for n, (_, read) in lora.dense(policy.lm).items()}):
        for n, tensor in theirs.state_dict().items():
            if n in found:
                assert torch.equal(whole(found[n]), tensor), n
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["vocab_size"] == 514 and again.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer(TOKENS[0] + TOKENS[1])["input_ids"] == [512, 513]
    assert load(tmp_path / "final", here).identity == policy.identity  # what was made counts as if it had been read
    assert load(source, here).identity != policy.identity


def test_rows_to_spare_are_taken_first(here, tmp_path, embedded_dir, capsys):
    """A padded vocabulary of 513 has room for one of two tokens; one with room for both stays as it is."""
    for rows, grown_from in ((513, 513), (520, None)):
        source = save_family("llama_biased", tmp_path / str(rows), embedded_dir.model, vocab_size=rows)
        base = opened(source, here, add_special_tokens=(*TOKENS, "<|end|>"))
        said = capsys.readouterr().out
        assert "'<|end|>' is there already, as token 1; it is not added" in said
        assert "'<|im_start|>' (512)" in said and "in rows that the model has already" in said
        assert ("'<|im_end|>' (513); embedding and head grow from 513 to 514" in said) == (grown_from is not None)
        assert base.how.rows_there == grown_from and base.config.vocab_size == max(rows, 514)
        policy, theirs = load_policy(base, here), resized(source, base.config.vocab_size)
        assert torch.equal(whole(policy.lm.get_input_embeddings().weight), theirs.get_input_embeddings().weight)


def test_a_checkpoint_that_the_library_reads_grows_and_parts(here, tmp_path, embedded_dir):
    """Of the bare body, without the prefix of its names: tied, grown, then trained whole and apart."""
    source = save_family("llama_biased", tmp_path / "model", embedded_dir.model)
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    for changes in ({}, LORA):
        policy = load_policy(opened(source, here, add_special_tokens=TOKENS, **changes), here)
        held = {n: read() for n, (_, read) in lora.dense(policy.lm).items()}
        names = ["model.embed_tokens.weight", *(["lm_head.weight"] if changes else [])]
        assert [n for n in held if n in ("model.embed_tokens.weight", "lm_head.weight")] == names
        for n in names:
            row = tensors["model.embed_tokens.weight"].double().mean(0).float()
            assert torch.equal(whole(held[n])[:512], tensors["model.embed_tokens.weight"])
            assert torch.equal(whole(held[n])[512:], row.expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4096, 5000])
def test_a_new_row_is_the_mean(rows, dtype):
    """Within half a unit of the dtype of a sum by Python's own exact addition, whatever the number of threads."""
    import math

    weight = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)).to(dtype) * 3
    read = lambda piece: (weight.shape, weight[piece])
    found = build.weights.mean_row(read, rows)
    exact = torch.tensor([[math.fsum(column) / rows for column in weight.T.tolist()]], dtype=torch.float64)
    assert found.shape == (1, 5) and found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert torch.equal(build.weights.mean_row(read, rows), found)
    finally:
        torch.set_num_threads(before)


# --- trained whole ----------------------------------------------------------------------------------------------------


def peft_adapter(lm, directory, modules_to_save, seed=3):
    """An adapter of PEFT's with trained modules, all filled at random, and saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    lm = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", modules_to_save=modules_to_save, **options))
    torch.manual_seed(seed)
    for name, p in lm.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data = p.data + torch.randn_like(p) * 0.2
    lm.save_pretrained(directory, save_embedding_layers=False)
    return lm


CASES = {
    "untied, both": ("llama", ["embed_tokens", "lm_head"], False),
    "untied, the head": ("llama", ["lm_head"], False),
    "tied, both": ("llama_biased", ["embed_tokens", "lm_head"], False),
    "tied, the embedding": ("gemma3", ["embed_tokens"], False),
    "tied, the head": ("llama_biased", ["lm_head"], False),
    "tied, grown": ("llama_biased", ["embed_tokens", "lm_head"], True),
    "scaled, grown": ("gemma3", ["embed_tokens", "lm_head"], True),
}


@needs.peft
@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize("case", CASES)
def test_pefts_modules_to_save_both_ways(case, here, tmp_path, embedded_dir):
    """PEFT's adapter gives PEFT's numbers, its files come back to the bit, the base is still there under it, and the
    merged model that is exported says whether it is tied, and has the same numbers.
    """
    from peft import PeftModel

    name, modules, grown = CASES[case]
    source = save_family(name, tmp_path / "model", embedded_dir.model)
    lm, ids = (resized(source, 514), IDS) if grown else (resized(source, 512), IDS % 500)
    plain = logprobs_of(lm, ids)
    theirs = peft_adapter(lm, tmp_path / "peft", modules)
    expected = logprobs_of(theirs, ids)
    tokens = {"add_special_tokens": TOKENS} if grown else {}
    start = {"use_lora": True, "adapter_name_or_path": str(tmp_path / "peft")}
    base = opened(source, here, keep_initial=True, **start, **tokens)
    assert base.config.tie_word_embeddings is False and base.how.untied == ("untied" not in case)
    policy = load_policy(base, here)
    torch.testing.assert_close(ours(policy, here, ids), expected, rtol=2e-5, atol=2e-5)
    with lora.using(policy, lora.OFF):
        torch.testing.assert_close(ours(policy, here, ids), plain, rtol=2e-5, atol=2e-5)
    assert (plain - expected).abs().max() > 0.1

    export(policy, base, here, tmp_path / "final")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", attn_implementation="eager")
    torch.testing.assert_close(logprobs_of(merged, ids), expected, rtol=2e-5, atol=2e-5)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"] == modules
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "final/adapter"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    again = PeftModel.from_pretrained(
        resized(source, len(lm.get_input_embeddings().weight)), tmp_path / "final/adapter"
    )
    assert torch.equal(logprobs_of(again, ids), expected)

    # what is trained moves; what it started from and the base do not
    for module in saved(policy.lm).values():
        module.saved_weight.data *= -1
    with lora.using(policy, lora.INITIAL):
        torch.testing.assert_close(ours(policy, here, ids), expected, rtol=2e-5, atol=2e-5)
    with lora.using(policy, lora.OFF):
        torch.testing.assert_close(ours(policy, here, ids), plain, rtol=2e-5, atol=2e-5)
    assert (ours(policy, here, ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("form", ["", pytest.param("nf4", marks=needs.bitsandbytes)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gradients_of_what_is_trained_whole_are_those_of_the_whole_model(name, form, here, tmp_path, embedded_dir):
    """New adapters change no number, so embedding and head have the gradients that full training gives them; under 4
    bits they are held and trained as they are.
    """
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    source = save_family(name, tmp_path / "model", embedded_dir.model, tie_word_embeddings=False, **wide)
    policy = load_policy(opened(source, here, load_in_4bit=bool(form), add_special_tokens=TOKENS, **LORA), here)
    assert policy.num_trained == 2 * 514 * 64 + sum(p.numel() for n, p in policy.lm.named_parameters() if ".lora_" in n)
    if form:
        held = {n: read() for n, (_, read) in lora.dense(policy.lm).items()}
        lm = resized(source, 514)
        assert torch.equal(whole(held["lm_head.weight"]), lm.lm_head.weight)
        return
    adapters = load_policy(opened(source, here, use_lora=True), here)
    whole_work, work = (Throughput(here, root, torch.float32) for root in (policy, adapters))
    assert (
        whole_work.per_token == work.per_token and whole_work.per_row == 6 * 514 * 64 and work.per_row == 4 * 512 * 64
    )
    batch = micro_batch([(IDS, np.ones(30, bool))], (0,), here.device)
    full = load_policy(opened(source, here, add_special_tokens=TOKENS), here)
    for root in (policy, full):
        root.loss(batch, lambda logprobs_R, _: -logprobs_R.sum()).backward()
    theirs = dict(full.lm.named_parameters())
    for module_name, module in saved(policy.lm).items():
        a, b = whole(module.saved_weight.grad), whole(theirs[f"{module_name}.weight"].grad)
        assert (a - b).norm() <= 1e-5 * b.norm() and b[512:].norm() > 0
        assert module.original_module.weight.grad is None


def test_a_value_model_grows_with_the_policy(here, tmp_path, embedded_dir):
    """Its body is the policy's, and under adapters its embedding is trained too; another directory's grows as well."""
    source = save_family("llama_biased", tmp_path / "model", embedded_dir.model)
    other = save_family("qwen2", tmp_path / "other", embedded_dir.model)
    for changes in ({}, LORA):
        base = opened(source, here, add_special_tokens=TOKENS, **changes)
        policy = load_policy(base, here)
        for name in (None, str(other)):
            value_model = load_value_model(base, here, name, policy)
            theirs = resized(name or source, 514).get_input_embeddings().weight
            assert torch.equal(
                whole(
                    dict((n, read()) for n, (_, read) in lora.dense(value_model.lm).items())[
                        "model.embed_tokens.weight"
                    ]
                ),
                theirs,
            )
            assert len(saved(value_model.lm)) == bool(changes)
            assert value_model(micro_batch([(IDS, np.ones(30, bool))], (0,), here.device)).shape == (29,)


def test_what_does_not_fit_is_one_line(here, tmp_path, embedded_dir):
    source = save_family("llama_biased", tmp_path / "model", embedded_dir.model)

    def refusal(**changes) -> str:
        with pytest.raises(UserError) as caught:
            flags = flags_for(source, **changes)
            flags.check_adapters()
            open_model(flags, here, memory=MemoryFlags(), adapters=flags)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    both = "give --lora_modules_to_save embed_tokens lm_head"
    assert f"rows of embed_tokens and lm_head; {both}" in refusal(use_lora=True, add_special_tokens=TOKENS)
    half = {"use_lora": True, "lora_modules_to_save": ("embed_tokens",)}
    assert f"rows of lm_head; {both}" in refusal(**half, add_special_tokens=TOKENS)
    assert "--lora_modules_to_save norm: only embedding and head of LlamaForCausalLM" in refusal(
        use_lora=True, lora_modules_to_save=("norm",)
    )
    assert "did you mean embed_tokens?" in refusal(use_lora=True, lora_modules_to_save=("embed_token",))
    assert "--lora_modules_to_save is not read without --use_lora" in refusal(lora_modules_to_save=("lm_head",))
    assert "'<a>' is given twice" in refusal(add_special_tokens=("<a>", "<a>"))
    assert "no visible character" in refusal(add_special_tokens=(" ",))

    # an adapter belongs to its tokens
    base = opened(source, here, add_special_tokens=TOKENS, **LORA)
    export(load_policy(base, here), base, here, tmp_path / "final", adapter_only=True)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "final")) == 514
    start = {"use_lora": True, "adapter_name_or_path": str(tmp_path / "final")}
    assert "has 514 rows, this model 512; --add_special_tokens adds tokens" in refusal(**start)
    assert "was trained with --add_special_tokens '<|im_start|>' '<|im_end|>', in this order; now it is" in refusal(
        **start, add_special_tokens=TOKENS[::-1]
    )
    again = opened(source, here, **start, add_special_tokens=TOKENS)
    assert load_policy(again, here).base_weights == load_policy(base, here).base_weights
    looked_at = open_model(flags_for(source, **start, add_special_tokens=TOKENS), here)  # as launch.evaluate does
    assert torch.equal(ours(load_untrained(looked_at, here), here), ours(load_policy(base, here), here))
    facts = json.loads((tmp_path / "final" / "base.json").read_text())
    assert facts["added_tokens"] == {"<|im_start|>": 512, "<|im_end|>": 513}
    (tmp_path / "final" / "base.json").write_text("[]")
    files.check_added(tmp_path / "final", {})
    weightless = tmp_path / "final" / "adapter_model.safetensors"
    tensors = load_file(weightless)
    save_file({n: t for n, t in tensors.items() if not n.endswith("lm_head.weight")}, weightless)
    assert "no weight of lm_head" in refusal(**start, add_special_tokens=TOKENS)

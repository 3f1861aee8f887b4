"""Embedding and head that grow by the tokens that are added, and that are trained whole beside adapters."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import world
from engine.data.batch import micro_batch
from engine.errors import UserError
from engine.flags import AdapterFlags, MemoryFlags
from engine.model import build, load_policy, load_value_model, open_model
from engine.model.adapters import choose, files, lora
from engine.model.adapters.saved import SavedModule, saved
from engine.model.export import export
from engine.model.shards import whole
from tests import needs
from tests.families import load, save_family

TOKENS = ("<|im_start|>", "<|im_end|>")
IDS = np.random.Generator(np.random.Philox(key=3)).integers(2, 500, 30)
IDS[[4, 9, 20, 29]] = 512, 513, 512, 513  # the new tokens, as inputs and as targets


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

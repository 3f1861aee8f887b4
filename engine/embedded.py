"""The embedded default: a tiny Llama, a tokenizer and data, made from a seed on the spot, so that every stage runs from nothing.

The preference task: a question about an everyday thing, answered courteously (chosen) or curtly (rejected). Both answers hold
the same fact, and held-out questions are about people, things and places in combinations never seen, so preferring the
courteous answer there has to be learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from engine.store import build_once

VERSION = 1
TRAIN_PAIRS, HELD_OUT_PAIRS = 1536, 192

THINGS = {
    "library": "opens at {n}", "bakery": "closes at {n}", "red ladder": "stands in room {n}", "spare key": "hangs on hook {n}",
    "train to the coast": "leaves from track {n}", "recipe book": "lies on shelf {n}", "bus stop": "is {n} minutes away",
    "blue bicycle": "costs {n} coins", "swimming pool": "has {n} lanes", "choir": "meets on day {n}", "museum": "has {n} halls",
    "garden hose": "is {n} metres long",
}  # fmt: skip
NAMES = ("Ada", "Bela", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
QUESTIONS = ("{name} asks: what about the {thing}?", "Tell {name} about the {thing}.", "What does {name} need to know of the {thing}?")
COURTEOUS = (
    "Of course, {name}. The {thing} {fact}. Do ask if anything is unclear.",
    "Gladly, {name}! The {thing} {fact}. I hope that helps.",
    "Thank you for asking, {name}. The {thing} {fact}.",
)
CURT = ("The {thing} {fact}. Stop asking.", "Look it up, {name}. The {thing} {fact}.", "The {thing} {fact}. Anything else is not my job.")


def embedded(root: Path) -> tuple[Path, Path, Path]:
    """(model directory, training pairs, held-out pairs) under `root`, made if they are not there."""
    directory = root / f"embedded-v{VERSION}"

    def build(partial: Path) -> None:
        rows = list(_pairs(TRAIN_PAIRS + HELD_OUT_PAIRS))
        for name, part in (("train_pairs", rows[:TRAIN_PAIRS]), ("held_out_pairs", rows[TRAIN_PAIRS:])):
            (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        _save_model(partial / "model", [m["content"] for row in rows for m in row["chosen"] + row["rejected"]])

    build_once(directory, (directory / "held_out_pairs.jsonl").is_file, build)
    return directory / "model", directory / "train_pairs.jsonl", directory / "held_out_pairs.jsonl"


def _pairs(count: int) -> Iterator[dict]:
    """Rows in the columns of the Tülu 3 preference mixtures, no (name, thing, number) twice."""
    generator = np.random.Generator(np.random.Philox(key=VERSION))
    things, seen = list(THINGS), set()
    while len(seen) < count:
        name, thing, n = NAMES[generator.integers(len(NAMES))], things[generator.integers(len(things))], int(generator.integers(2, 60))
        if (name, thing, n) in seen:
            continue
        seen.add((name, thing, n))
        fields = {"name": name, "thing": thing, "fact": THINGS[thing].format(n=n)}
        question, polite, curt = (options[generator.integers(len(options))].format(**fields) for options in (QUESTIONS, COURTEOUS, CURT))
        user = {"role": "user", "content": question}
        yield {
            "id": f"embedded-{len(seen) - 1}", "source": "triptych", "prompt": question,
            "chosen": [user, {"role": "assistant", "content": polite}], "rejected": [user, {"role": "assistant", "content": curt}],
        }  # fmt: skip


def _save_model(directory: Path, corpus: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|pad|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=512)
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(VERSION)
        LlamaForCausalLM(config).save_pretrained(directory)

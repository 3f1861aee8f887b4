"""The embedded default: a tiny Llama, a tokenizer and data, made from a seed on the spot, so that every stage runs from
nothing.

The preference task: a question about an everyday thing, answered courteously (chosen) or curtly (rejected). Both
answers hold the same fact, and held-out questions are about people, things and places in combinations never seen, so
preferring the courteous answer there has to be learnt. The conversations for fine-tuning are the courteous answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.data.store import build_once

VERSION = 3
TRAIN_PAIRS, HELD_OUT_PAIRS = 1536, 192

THINGS = {
    "library": "opens at {n}",
    "bakery": "closes at {n}",
    "red ladder": "stands in room {n}",
    "spare key": "hangs on hook {n}",
    "train to the coast": "leaves from track {n}",
    "recipe book": "lies on shelf {n}",
    "bus stop": "is {n} minutes away",
    "blue bicycle": "costs {n} coins",
    "swimming pool": "has {n} lanes",
    "choir": "meets on day {n}",
    "museum": "has {n} halls",
    "garden hose": "is {n} metres long",
}
COUNTED = ("boats", "lamps", "geese", "coins")
NAMES = ("Ada", "Bela", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
QUESTIONS = (
    "{name} asks: what about the {thing}?",
    "Tell {name} about the {thing}.",
    "What does {name} need to know of the {thing}?",
)
COURTEOUS = (
    "Of course, {name}. The {thing} {fact}. Do ask if anything is unclear.",
    "Gladly, {name}! The {thing} {fact}. I hope that helps.",
    "Thank you for asking, {name}. The {thing} {fact}.",
)
CURT = (
    "The {thing} {fact}. Stop asking.",
    "Look it up, {name}. The {thing} {fact}.",
    "The {thing} {fact}. Anything else is not my job.",
)


class Embedded(NamedTuple):
    """Where the embedded model and data lie."""

    model: Path
    train_pairs: Path
    held_out_pairs: Path
    train_conversations: Path
    held_out_conversations: Path
    train_sums: Path
    train_problems: Path
    held_out_problems: Path


def embedded(root: Path) -> Embedded:
    """The embedded model and data under `root`, made if they are not there."""
    directory = root / f"embedded-v{VERSION}"

    def build(partial: Path) -> None:
        pairs = list(_pairs(TRAIN_PAIRS + HELD_OUT_PAIRS))
        for kind, rows in (("pairs", pairs), ("conversations", list(_conversations(pairs)))):
            aside = len(rows) * HELD_OUT_PAIRS // len(pairs)
            for split, part in (("train", rows[:-aside]), ("held_out", rows[-aside:])):
                (partial / f"{split}_{kind}.jsonl").write_text(
                    "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
                )
        sums, problems, held_out = _arithmetic()
        for name, rows in (("train_sums", sums), ("train_problems", problems), ("held_out_problems", held_out)):
            (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        corpus = [m["content"] for row in pairs for m in row["chosen"] + row["rejected"]]
        save_model(partial / "model", corpus + [m["content"] for row in sums for m in row["messages"]], seed=VERSION)

    names = (
        "train_pairs",
        "held_out_pairs",
        "train_conversations",
        "held_out_conversations",
        "train_sums",
        "train_problems",
        "held_out_problems",
    )
    found = Embedded(directory / "model", *(directory / f"{name}.jsonl" for name in names))
    build_once(directory, found.held_out_problems.is_file, build)
    return found


def _conversations(pairs: list[dict]) -> Iterator[dict]:
    """Courteous conversations in the columns of the Tülu 3 SFT mixture: of one turn or two, some with a system
    message.
    """
    generator = np.random.Generator(np.random.Philox(key=VERSION + 1))
    turns = iter(pairs)
    for i, pair in enumerate(turns):
        messages = [{"role": "system", "content": "You are a courteous guide."}] if generator.random() < 0.3 else []
        messages += pair["chosen"]
        if generator.random() < 0.3 and (following := next(turns, None)):
            messages += following["chosen"]
        yield {"id": f"embedded-{i}", "source": "triptych", "messages": messages}


def _pairs(count: int) -> Iterator[dict]:
    """Rows in the columns of the Tülu 3 preference mixtures, no (name, thing, number) twice."""
    generator = np.random.Generator(np.random.Philox(key=VERSION))
    things = list(THINGS)
    seen: set[tuple[str, str, int]] = set()
    while len(seen) < count:
        name, thing, n = (
            NAMES[generator.integers(len(NAMES))],
            things[generator.integers(len(things))],
            int(generator.integers(2, 60)),
        )
        if (name, thing, n) in seen:
            continue
        seen.add((name, thing, n))
        fields = {"name": name, "thing": thing, "fact": THINGS[thing].format(n=n)}
        question, polite, curt = (
            options[generator.integers(len(options))].format(**fields) for options in (QUESTIONS, COURTEOUS, CURT)
        )
        user = {"role": "user", "content": question}
        yield {
            "id": f"embedded-{len(seen) - 1}",
            "source": "triptych",
            "prompt": question,
            "chosen": [user, {"role": "assistant", "content": polite}],
            "rejected": [user, {"role": "assistant", "content": curt}],
        }


def _arithmetic() -> tuple[list[dict], list[dict], list[dict]]:
    """(conversations to fine-tune on, problems to reinforce, problems held out): 'one more than n', n of two digits.

    In the conversations half of the answers are wrong (n itself, two more, one less), so that what is fine-tuned on
    them knows the right answer among others, and a verifier's reward has something to choose from. Problems are RLVR
    rows.
    """
    generator = np.random.Generator(np.random.Philox(key=VERSION + 2))
    numbers = generator.permutation(np.arange(10, 98))
    held_out, train = sorted(numbers[:24].tolist()), sorted(numbers[24:].tolist())

    def question(thing: str, n: int) -> dict[str, str]:
        return {"role": "user", "content": f"There are {n} {thing} and one more comes. How many {thing}?"}

    def problem(thing: str, n: int) -> dict:
        return {"messages": [question(thing, n)], "ground_truth": str(n + 1), "dataset": "gsm8k"}

    sums = []
    for thing in COUNTED:
        for n in train:
            for offset in (1, 1, 1, 0, 2, -1):
                answer = {"role": "assistant", "content": f"{n} and one more is {n + offset}.\n#### {n + offset}"}
                sums.append({"source": "triptych", "messages": [question(thing, n), answer]})
    return sums, [problem(t, n) for t in COUNTED for n in train], [problem(t, n) for t in COUNTED for n in held_out]


def save_model(
    directory: Path, corpus: list[str], *, seed: int, hidden_size: int = 64, num_hidden_layers: int = 2
) -> None:
    """A random Llama with a byte-level tokenizer of 512 tokens that was made for `corpus`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    bpe = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])  # a digit is a token: arithmetic on unseen numbers
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|pad|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=512
    )
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)

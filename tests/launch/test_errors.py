"""What a user did wrong: status 2, one line on standard error, no traceback, no weight loaded. Through the real entry
point.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import ranks


def watch() -> None:
    """In a rank, before the stage: standard error into a file of its own, and a word when weights are loaded."""
    from engine.model import build

    log = os.readlink("/proc/self/fd/1")
    os.dup2(os.open(f"{log}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    load = build.load_policy
    build.load_policy = lambda *args, **options: print("LOADING WEIGHTS", flush=True) or load(*args, **options)


def watch_with_one_gpu() -> None:
    """A machine of one GPU, and the second rank of two."""
    watch()
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    os.environ["LOCAL_RANK"] = "1"


@dataclass
class Ended:
    codes: list[int]
    stdout: str
    stderr: list[str]

    @property
    def loaded(self) -> bool:
        return "LOADING WEIGHTS" in self.stdout


class Place:
    """A directory with a model, data and everything that can be wrong with them."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root, 0

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def run(self, *argv: object, world: int = 1, hook: str = "watch", output_dir: str = "") -> Ended:
        self.runs += 1
        log = self.root / f"log{self.runs}"
        words = [
            *argv,
            "--cache_dir",
            self.root / "cache",
            "--output_dir",
            self.root / (output_dir or f"run{self.runs}"),
        ]
        result = ranks.launch(words, ranks=world, log=log, hook=f"tests.launch.test_errors:{hook}", timeout=60)
        return Ended(result.codes, log.read_text(), [Path(f"{log}.{rank}").read_text() for rank in range(world)])

    def refuse(self, *argv: object, loaded: bool = False, **options) -> str:
        """The one line of a refusal."""
        ended = self.run(*argv, **options)
        assert set(ended.codes) == {2}, ended
        assert ended.loaded == loaded
        text = "".join(ended.stderr)
        assert text.startswith("error: "), text
        assert text.endswith("\n")
        assert text.count("\n") == 1, text
        assert text[:-1].isprintable()
        assert "Traceback" not in text + ended.stdout
        return text.removeprefix("error: ")[:-1]


USER = {"role": "user", "content": "Who is it?"}


def pair(chosen: object = "It is I.") -> dict:
    return {
        "chosen": [USER, {"role": "assistant", "content": chosen}],
        "rejected": [USER, {"role": "assistant", "content": "Nobody."}],
    }


def save_tokenizer(directory: Path, template: str | None, **options) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [],
        trainers.BpeTrainer(vocab_size=258, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **options)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def save_model(directory: Path, seed: int = 0) -> Path:
    save_tokenizer(directory, None, eos_token="<|end|>")
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("errors")
    save_model(root / "model")
    for name, template, options in (
        ("no_template", None, {}),
        ("no_end", "{% for m in messages %}{{ m.role + m.content }}{% endfor %}", {"eos_token": "<|end|>"}),
        (
            "no_roles",
            "{% for m in messages if m.role == 'user' %}{{ m.content }}<|end|>{% endfor %}",
            {"eos_token": "<|end|>"},
        ),
    ):
        shutil.copytree(root / "model", root / name)
        save_tokenizer(root / name, template, **options)
        if name == "no_template":
            assert AutoTokenizer.from_pretrained(root / name).eos_token is None
    shutil.copytree(root / "model", root / "small")
    config = json.loads((root / "small" / "config.json").read_text())
    (root / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    rows = {
        "good": [pair(), pair("It is me.")],
        "bad": [pair(), pair(), pair(None)],
        "all_bad": [pair(7), pair(8)],
        "empty": [],
        "control": [pair("It is<|end|> I.")],
    }
    for name, content in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (root / "cut.jsonl").write_text(json.dumps(pair()) + "\n" + json.dumps(pair())[:40])
    (root / "recipe.yaml").write_text("lerning_rate: 1\n")
    (root / "sft.yaml").write_text("bf16: true\nreduce_loss: sum\n")
    (root / "file").write_text("x")
    return Place(root)


def on(name: str) -> tuple[str, ...]:
    return "--dataset_name", f"{{place}}/{name}.jsonl", "--model_name_or_path", "{place}/model"


CASES = {
    "unknown flag": (("--lerning_rate", 1), "command line: unknown flag --lerning_rate (did you mean learning_rate?)"),
    "prefix": (("--learning", 1), "command line: unknown flag --learning"),
    "unknown key": (
        ("--config", "{place}/recipe.yaml"),
        "{place}/recipe.yaml: unknown key lerning_rate (did you mean learning_rate?)",
    ),
    "no recipe": (
        ("--config", "{place}/recipes.yaml"),
        "--config {place}/recipes.yaml: no such file (did you mean recipe.yaml?)",
    ),
    "recipe of another command": (
        ("--config", "{place}/sft.yaml"),
        "{place}/sft.yaml: reduce_loss belongs to launch.sft",
    ),
    "flag of other commands": (
        ("--max_new_tokens", 64),
        "command line: --max_new_tokens is --response_length here, which belongs to launch.ppo, launch.grpo,"
        " launch.generate, launch.chat and launch.evaluate",
    ),
    "another trainer's, refused": (("--fp16",), "--fp16 true is refused: float16 needs loss scaling"),
    "another trainer's, and ours": (
        ("--dtype", "float32", "--bf16", "true"),
        "--dtype and --bf16 say the same thing, --dtype, in two ways: give one of them",
    ),
    "torchtune's": (("optimizer.lr=2e-5",), "command line: optimizer.lr is --learning_rate here"),
    "no floor": (("--lr_scheduler_type", "cosine_with_min_lr"), "--lr_scheduler_type cosine_with_min_lr needs"),
    "not a number": (("--beta", "five"), "--beta: expected a finite number, got 'five'"),
    "nan": (("--learning_rate", "nan"), "--learning_rate: expected a finite number, got 'nan'"),
    "beta 0": (("--beta", 0), "--beta must be greater than 0, got 0.0"),
    "beta -1": (("--beta", -1, "--loss_type", "simpo"), "--beta must be greater than 0, got -1.0"),
    "unknown loss": (
        ("--loss_type", "dpo_nrm"),
        "--loss_type dpo_nrm is not one of dpo_norm, dpo, simpo, ipo, wpo (did you mean dpo_norm?)",
    ),
    "not read by the loss": (
        ("--gamma_beta_ratio", 0.5),
        "--gamma_beta_ratio is not read by --loss_type dpo_norm, which reads",
    ),
    "no such template": (
        ("--chat_template", "{place}/recipe.yml"),
        "--chat_template {place}/recipe.yml: no such file; expected a Jinja file, or tulu (did you mean"
        " {place}/recipe.yaml?)",
    ),
    "a template without an end": (
        ("--chat_template", "{place}/recipe.yaml"),
        "--chat_template {place}/recipe.yaml: the chat template",
    ),
    "new tokens that nothing trains": (
        ("--add_special_tokens", "<a>", "--use_lora", "true"),
        "--add_special_tokens with --use_lora: nothing would train the new tokens' rows of embed_tokens and lm_head;"
        " give --lora_modules_to_save embed_tokens lm_head",
    ),
    "a module that is not saved": (
        ("--lora_modules_to_save", "norm", "--use_lora", "true"),
        "--lora_modules_to_save norm: only embedding and head of LlamaForCausalLM can be trained whole",
    ),
    "label smoothing": (("--label_smoothing", 0.5), "--label_smoothing must be in [0, 0.5), got 0.5"),
    "batch size twice": (
        ("--batch_size", 4, "--per_device_train_batch_size", 2),
        "--batch_size and --per_device_train_batch_size are two ways",
    ),
    "batch size 0": (("--batch_size", 0), "--batch_size must be greater than 0, got 0"),
    "float16": (("--dtype", "float16"), "--dtype float16 is refused"),
    "warm-up": (("--warmup_ratio", 1.5), "--warmup_ratio is a share of the steps"),
    "missing file": (
        ("--dataset_name", "{place}/god.jsonl"),
        "{place}/god.jsonl: no such file or directory (did you mean good.jsonl?)",
    ),
    "missing held-out file": (
        (*on("good"), "--eval_dataset_name", "{place}/goo.jsonl"),
        "{place}/goo.jsonl: no such file or directory (did you mean",
    ),
    "missing model": (
        ("--dataset_name", "{place}/good.jsonl", "--model_name_or_path", "{place}/modell"),
        "--model_name_or_path {place}/modell: no such directory",
    ),
    "model without data": (
        ("--model_name_or_path", "{place}/model"),
        "--model_name_or_path needs --dataset_name or --mixer_list",
    ),
    "half a mixture": (("--mixer_list", "{place}/good.jsonl"), "--mixer_list: expected NAME AMOUNT pairs, got 1 words"),
    "mixture and dataset": (
        ("--mixer_list", "a", "1.0", "--dataset_name", "b"),
        "--dataset_name and --mixer_list are two ways",
    ),
    "no amount": (
        ("--mixer_list", "{place}/good.jsonl", "some"),
        "--mixer_list {place}/good.jsonl some: expected a fraction such as 0.5",
    ),
    "malformed row": (
        (*on("bad"), "--on_bad_row", "error"),
        "{place}/bad.jsonl:3: chosen[1].content: expected text, got null",
    ),
    "truncated row": ((*on("cut"), "--on_bad_row", "error"), "{place}/cut.jsonl:2: expected JSON (Expecting value"),
    "only malformed rows": (
        on("all_bad"),
        (
            "{place}/all_bad.jsonl: no usable row, the first bad one is {place}/all_bad.jsonl:1: chosen[1].content:"
            " expected"
        ),
    ),
    "control token": (
        on("control"),
        (
            "{place}/control.jsonl: no usable row, the first bad one is {place}/control.jsonl:1: content of message 1"
            " holds"
        ),
    ),
    "empty dataset": (on("empty"), "{place}/empty.jsonl: the dataset is empty"),
    "empty mixture": (("--mixer_list", "{place}/good.jsonl", 0), "{place}/good.jsonl: the mixture takes no row"),
    "max length": (
        (*on("good"), "--max_seq_length", 6),
        "{place}/good.jsonl: --max_seq_length 6 is too small: no row keeps a counted token",
    ),
    "no template": (
        (*on("good")[:3], "{place}/no_template"),
        "{place}/no_template: the tokenizer has neither a chat template nor an end-of-sequence token",
    ),
    "no end token": (
        (*on("good")[:3], "{place}/no_end"),
        "{place}/no_end: the chat template ends an assistant turn without an end token",
    ),
    "no assistant": (
        (*on("good")[:3], "{place}/no_roles"),
        "{place}/no_roles: the chat template drops the assistant turn",
    ),
    "small embedding": (
        (*on("good")[:3], "{place}/small"),
        "{place}/good.jsonl: no usable row, the first bad one is {place}/good.jsonl:1: token id",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_weights_load(case, place):
    argv, expected = CASES[case]
    words = [str(word).replace("{place}", str(place.root)) for word in argv]
    assert place.refuse(*words).startswith(expected.replace("{place}", str(place.root)))


def test_flags_of_other_trainers_are_said_once(place):
    """On two ranks, with a recipe: a line for each, by rank 0; the run is that of our words."""
    (place / "theirs.yaml").write_text("gradient_checkpointing: true\nwarmup_steps: 1\nbf16: true\nfp16:\n")
    theirs = ["--config", place / "theirs.yaml", "--dtype", "float32", "--packing", "--logging_steps", "10"]
    ended = place.run(*theirs, "--optim", "adamw_torch", "--dry_run", world=2)
    assert ended.codes == [0, 0] and not ended.loaded, ended
    assert ended.stdout.splitlines()[:4] == [
        f"{place / 'theirs.yaml'}: gradient_checkpointing true is gradient_checkpointing full",
        "--packing true: always on: sequences share a micro-batch without padding, and none sees another",
        "--logging_steps is not used: every step is a row of metrics.jsonl",
        "--optim adamw_torch is --optimizer adamw",
    ]
    assert "is dtype bfloat16" not in ended.stdout


def test_more_ranks_than_data(place):
    argv = [word.replace("{place}", str(place.root)) for word in on("good")]
    assert place.refuse(*argv, world=3) == "3 ranks for 2 pairs: lower --nproc_per_node"


def test_ranks_refuse_together(place):
    argv = [word.replace("{place}", str(place.root)) for word in on("bad")]
    assert place.refuse(*argv, "--on_bad_row", "error", world=2).startswith(
        f"{place / 'bad.jsonl'}:3: chosen[1].content"
    )


def test_more_ranks_than_gpus(place):
    line = place.refuse(hook="watch_with_one_gpu")
    assert line == "rank 0 wants GPU 1 and this machine has 1: lower --nproc_per_node"


def test_a_run_directory_of_something_else(place):
    """Another model by name, another loss, another model of the same name under a checkpoint, a file, a directory that
    is not empty.
    """
    argv = [word.replace("{place}", str(place.root)) for word in on("good")]
    argv += ["--max_steps", "2", "--batch_size", "1", "--save_steps", "1"]
    ended = place.run(*argv, output_dir="taken")
    assert ended.codes == [0], ended
    assert ended.loaded

    save_model(place / "other", seed=1)
    line = place.refuse(*argv[:3], place / "other", *argv[4:], output_dir="taken")
    assert line.startswith(
        f"{place / 'taken'} holds a run with --model_name_or_path {place / 'model'}, now it is {place / 'other'}"
    )
    line = place.refuse(*argv, "--loss_type", "dpo", output_dir="taken")
    assert line.startswith(f"{place / 'taken'} holds a run with --")
    assert "loss_type" in line or "beta" in line
    assert (
        place.refuse(*argv, "--resume", "never", output_dir="taken")
        == f"--resume never: {place / 'taken'} is not empty"
    )
    assert place.refuse(*argv, output_dir="file") == f"--output_dir {place / 'file'}: is a file"

    shutil.rmtree(place / "taken" / "final")
    save_model(place / "model", seed=1)  # found out only from its weights
    try:
        line = place.refuse(*argv, output_dir="taken", loaded=True)
    finally:
        save_model(place / "model")
    assert line.startswith(
        f"{place / 'taken' / 'checkpoints' / 'step-000001'} is of another model: give another --output_dir"
    )

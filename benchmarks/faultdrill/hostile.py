"""Malicious models, adapters, tokenizers, templates, checkpoints, datasets and YAML, through a stage's entry point.

Each case is a directory or a file made by an attacker, given to `launch.sft` as a user would. It has to end in one line
and status 2, or, where nothing in it has to be believed, in a safe run: no code of its own run (a canary), no file
outside of it read, nobody called on the network, no traceback, and no hang.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.faultdrill.suite import Case, Cases, Suite
from engine.data.chat import TULU_TEMPLATE
from engine.data.embedded import embedded
from tests import ranks

LIMIT = 45.0  # seconds, on a busy machine, after which a case hangs; the slowest takes three on an idle one
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(8)
]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CANARY = "canary"  # beside the artefact
SECRET = "secret.safetensors"  # a sound file, outside of it


@dataclass(frozen=True)
class Attack:
    """`plant(model, work)` gives the flags that name what it left; `said` is a pattern of the one line; ''  for a run
    that ends well. `loads`: it shows itself only when weights are read.
    """

    name: str
    plant: Callable[[Path, Path], list[Any]]
    said: str
    loads: bool = False


ATTACKS: list[Attack] = []


def attack(said: str, loads: bool = False) -> Callable:
    def register(plant: Callable[[Path, Path], list[Any] | None]) -> Callable:
        name = plant.__name__.replace("_", " ").strip()
        ATTACKS.append(Attack(name, lambda model, work: plant(model, work) or [], said, loads))
        return plant

    return register


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Payload:
    """What a pickle may do: leave a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (open, (str(self.canary), "w"))


def evil_pickle(work: Path) -> bytes:
    return pickle.dumps({"weight": Payload(work / CANARY)})


def evil_module(directory: Path, work: Path) -> None:
    (directory / "evil.py").write_text(f"open({str(work / CANARY)!r}, 'w')\nclass Evil: pass\n")


def header(path: Path, text: str, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text.encode() + data)


def with_header(path: Path, change: Callable[[dict[str, Any]], str]) -> None:
    """The same data behind another header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = change(json.loads(content[8 : 8 + length]))
    header(path, text, content[8 + length :])


# --- models -----------------------------------------------------------------------------------------------------------


def shard(model: Path, file: Any) -> None:
    names = load_file(model / WEIGHTS)
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@attack("weight_map: names ../secret.safetensors, which is not a file beside it", loads=True)
def an_index_that_names_a_file_outside(model: Path, work: Path) -> None:
    shard(model, "../secret.safetensors")


@attack("weight_map: names /.*secret.safetensors, which is not a file beside it", loads=True)
def an_index_with_an_absolute_path(model: Path, work: Path) -> None:
    shard(model, str(work / SECRET))


@attack("weight_map: names out/secret.safetensors, which is not a file beside it", loads=True)
def an_index_through_a_link_that_leaves(model: Path, work: Path) -> None:
    (model / "out").symlink_to(work)
    shard(model, "out/secret.safetensors")


@attack("weight_map: names 7, which is not a file beside it")
def an_index_of_numbers(model: Path, work: Path) -> None:
    shard(model, 7)


@attack("not an index of safetensors files .* stands twice")
def an_index_that_names_a_tensor_twice(model: Path, work: Path) -> None:
    name = next(iter(load_file(model / WEIGHTS)))
    (model / INDEX).write_text(f'{{"weight_map": {{"{name}": "{WEIGHTS}", "{name}": "{WEIGHTS}"}}}}')


@attack("a pickle file would run code and is never read")
def a_pickle_for_weights(model: Path, work: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(evil_pickle(work))


@attack("not a readable safetensors file")
def a_pickle_named_safetensors(model: Path, work: Path) -> None:
    (model / WEIGHTS).write_bytes(evil_pickle(work))


@attack("cut off: it says that its header has")
def a_header_of_four_exabytes(model: Path, work: Path) -> None:
    header(model / WEIGHTS, "{}", length=2**62)


@attack("stands twice", loads=True)
def a_tensor_that_stands_twice(model: Path, work: Path) -> None:
    def twice(described: dict[str, Any]) -> str:
        name = next(name for name in described if name != "__metadata__")
        return json.dumps(described)[:-1] + f', "{name}": {json.dumps(described[name])}}}'

    with_header(model / WEIGHTS, twice)


@attack("overlaps with|leaves a hole|takes .* bytes, its offsets say")
def tensors_that_overlap(model: Path, work: Path) -> None:
    def overlap(described: dict[str, Any]) -> str:
        first, second = [name for name in described if name != "__metadata__"][:2]
        described[second] = described[first]
        return json.dumps(described)

    with_header(model / WEIGHTS, overlap)


@attack("its tensors take .* bytes, behind its header are")
def data_that_no_tensor_owns(model: Path, work: Path) -> None:
    with open(model / WEIGHTS, "ab") as f:
        f.write(evil_pickle(work))


@attack("no dtype 'F1024' is known")
def a_dtype_of_its_own(model: Path, work: Path) -> None:
    with_header(model / WEIGHTS, lambda d: json.dumps(d).replace('"F32"', '"F1024"', 1))


@attack("takes .* bytes, its offsets say")
def a_shape_that_its_bytes_do_not_fill(model: Path, work: Path) -> None:
    def larger(described: dict[str, Any]) -> str:
        name = next(name for name in described if name != "__metadata__")
        described[name]["shape"] = [10**9, 10**9]
        return json.dumps(described)

    with_header(model / WEIGHTS, larger)


@attack("holds 1 numbers that are not finite", loads=True)
def weights_that_are_no_numbers(model: Path, work: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


@attack("holds int64, expected a floating dtype", loads=True)
def weights_of_whole_numbers(model: Path, work: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


@attack("has no place for 1 tensors, as model.evil.weight", loads=True)
def a_tensor_too_many(model: Path, work: Path) -> None:
    save_file(load_file(model / WEIGHTS) | {"model.evil.weight": torch.ones(3)}, model / WEIGHTS, {"format": "pt"})


@attack("num_hidden_layers: expected at most 1,000, got 1,000,000,000")
def a_billion_layers(model: Path, work: Path) -> None:
    edit(model / "config.json", num_hidden_layers=10**9)


@attack("config.json describes 900 layers, and the files hold")
def nine_hundred_layers(model: Path, work: Path) -> None:
    edit(model / "config.json", num_hidden_layers=900)


@attack("vocab_size: expected at most|vocab_size x hidden_size is", loads=True)
def a_billion_tokens(model: Path, work: Path) -> None:
    edit(model / "config.json", vocab_size=10**9)


@attack("config.json describes .* numbers, the files hold|vocab_size x hidden_size", loads=True)
def sixteen_million_tokens(model: Path, work: Path) -> None:
    edit(model / "config.json", vocab_size=2**24)


@attack("config.json describes .* numbers, the files hold", loads=True)
def matrices_of_terabytes(model: Path, work: Path) -> None:
    edit(model / "config.json", intermediate_size=2**24)


@attack("num_labels: expected at most")
def a_billion_labels(model: Path, work: Path) -> None:
    edit(model / "config.json", num_labels=10**9)


@attack("", loads=True)
def code_beside_a_known_model(model: Path, work: Path) -> None:
    evil_module(model, work)
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})


@attack("no usable config.json")
def code_beside_an_unknown_model(model: Path, work: Path) -> None:
    evil_module(model, work)
    edit(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})


@attack("not readable JSON|no usable config.json")
def a_configuration_that_is_too_deep(model: Path, work: Path) -> None:
    (model / "config.json").write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)


@attack("model_type stands twice")
def a_configuration_that_says_it_twice(model: Path, work: Path) -> None:
    text = (model / "config.json").read_text().rstrip()[:-1]
    (model / "config.json").write_text(text + ', "model_type": "mistral"}')


@attack("eos_token_id: expected a token id|generation_config.json")
def ends_of_generation_that_are_none(model: Path, work: Path) -> None:
    edit(model / "generation_config.json", eos_token_id=[{"__class__": 1}, 10**40])


@attack("generation_config.json")
def a_generation_config_that_is_too_deep(model: Path, work: Path) -> None:
    (model / "generation_config.json").write_text("[" * 100_000 + "]" * 100_000)


@attack("", loads=True)
def a_generation_config_that_cannot_be_saved(model: Path, work: Path) -> None:
    edit(model / "generation_config.json", num_return_sequences=5, watermarking_config={"x": 1})


@attack("dtype: expected the name of one, got 7")
def a_dtype_that_is_a_number(model: Path, work: Path) -> None:
    edit(model / "config.json", dtype=7)


@attack("describes no model that can be built", loads=True)
def positions_of_a_kind_that_is_none(model: Path, work: Path) -> None:
    edit(model / "config.json", rope_parameters={"rope_type": "../x", "factor": 1e308})


# --- tokenizers and templates -----------------------------------------------------------------------------------------


@attack("|no usable tokenizer", loads=True)
def a_tokenizer_with_code(model: Path, work: Path) -> None:
    evil_module(model, work)
    edit(
        model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )


@attack("no usable tokenizer")
def a_tokenizer_that_is_too_deep(model: Path, work: Path) -> None:
    (model / "tokenizer.json").write_text('{"model":' * 50_000 + "1" + "}" * 50_000)


@attack("|tokenizer", loads=True)
def tokens_with_ids_beyond_everything(model: Path, work: Path) -> None:
    described = json.loads((model / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["id"] = 2**31
    (model / "tokenizer.json").write_text(json.dumps(described))


@attack("the tokenizer fails on it", loads=True)
def a_tokenizer_whose_expression_backtracks(model: Path, work: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(model / "tokenizer.json", pre_tokenizer=split)
    row = {"messages": [{"role": "user", "content": "a" * 40 + "!"}, {"role": "assistant", "content": "x"}]}
    (work / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)


@attack("its replacements make .* characters of one", loads=True)
def a_tokenizer_that_makes_terabytes(model: Path, work: Path) -> None:
    larger = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100}
    edit(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [larger] * 6})


@attack("the chat template: expected text, got 7")
def a_template_that_is_a_number(model: Path, work: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template=[{"name": "default", "template": 7}])


def template(text: str) -> Callable[[Path, Path], None]:
    def plant(model: Path, work: Path) -> None:
        edit(model / "tokenizer_config.json", chat_template=text.replace("CANARY", str(work / CANARY)))
        (model / "chat_template.jinja").write_text(text.replace("CANARY", str(work / CANARY)))

    return plant


TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
ROUND = "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
TEMPLATES = {
    "loops for ever": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops for ever in a generator": "{% for i in range(99999) %}{{ range(99999) | map('string') | list }}{% endfor %}",
    "doubles a text": ROUND.replace("STEP", "ns.x ~ ns.x"),
    "doubles a list": ROUND.replace("STEP", "[ns.x, ns.x]"),
    "multiplies a text": "{{ 'x' * 10 ** 10 }}",
    "computes a power": "{{ 9 ** (9 ** 9) }}",
    "pads a text": "{{ 'x'.ljust(10 ** 10) }}",
    "formats with a width": "{{ '%10000000000d' % 1 }}",
    "replaces by its own size": "{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}",
    "calls itself twice": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
    "calls itself for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "walks to the system": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "walks by a filter": "{{ (''|attr('__class__')).mro()[1].__subclasses__() }}{{ 1 / 0 }}",
    "walks by a format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
}
for what, text in TEMPLATES.items():
    attack("the chat template")(lambda model, work, text=text: template(text + TURNS)(model, work))
    ATTACKS[-1] = Attack(f"a template that {what}", ATTACKS[-1].plant, "the chat template")


@attack("the first bad one .*does more work|bad rows?.*does more work", loads=True)
def a_template_that_loops_at_a_word(model: Path, work: Path) -> None:
    at_a_word = "{% if '?' in messages[0].content and 'one' not in messages[0].content %}"
    template(at_a_word + TEMPLATES["loops for ever"] + "{% endif %}" + TURNS)(model, work)


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter(work: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> list[Any]:
    directory = work / "adapter"
    directory.mkdir()
    described = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": "../../../etc",
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(described | {"target_modules": ["q_proj"]} | changes))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    if tensors is None:
        tensors = {key.format("A"): torch.ones(2, 64), key.format("B"): torch.zeros(64, 2)}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return ["--adapter_name_or_path", directory, "--use_lora", "true"]


@attack("a pickle file would run code and is never read")
def an_adapter_in_a_pickle(model: Path, work: Path) -> list[Any]:
    flags = adapter(work)
    (work / "adapter/adapter_model.safetensors").unlink()
    (work / "adapter/adapter_model.bin").write_bytes(evil_pickle(work))
    return flags


@attack("r, lora_alpha and use_rslora must be")
def an_adapter_of_rank_a_billion(model: Path, work: Path) -> list[Any]:
    return adapter(work, r=10**9)


@attack("auto_mapping|is not supported|of another model|r, lora_alpha|takes")
def an_adapter_with_code(model: Path, work: Path) -> list[Any]:
    evil_module(work, work)
    return adapter(
        work, {"base_model.model.evil.lora_A.weight": torch.ones(2, 2)}, auto_mapping={"parent_library": "evil"}
    )


@attack("of another model")
def an_adapter_that_names_a_file(model: Path, work: Path) -> list[Any]:
    return adapter(work, {"base_model.model.../../x.lora_A.weight": torch.ones(2, 64)})


@attack("not finite", loads=True)
def an_adapter_that_is_no_number(model: Path, work: Path) -> list[Any]:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    rows, columns = load_file(model / WEIGHTS)["model.layers.0.self_attn.q_proj.weight"].shape
    return adapter(
        work, {key.format("A"): torch.full((2, columns), float("inf")), key.format("B"): torch.ones(rows, 2)}
    )


# --- checkpoints, datasets, recipes -----------------------------------------------------------------------------------


def checkpoint(work: Path, state: str, **files: Any) -> list[Any]:
    """One whose manifest fits its files, besides what `files` say."""
    step = work / "out" / "checkpoints" / "step-000001"
    step.mkdir(parents=True)
    shard = step / "shard-00001-model-00001-of-00001.safetensors"
    save_file({"policy.master.x": torch.ones(1)}, shard)
    (step / ".metadata").write_bytes(evil_pickle(work))
    (step / "state.json").write_text(state)
    digest = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in step.iterdir()}
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": digest[p.name]} for p in step.iterdir()}
    (step / "COMPLETE").write_text(json.dumps(manifest | files))
    return ["--resume", step]


@attack("/secret.safetensors is missing", loads=True)
def a_manifest_that_leaves_its_directory(model: Path, work: Path) -> list[Any]:
    facts = {
        "bytes": (work / SECRET).stat().st_size,
        "sha256": hashlib.sha256((work / SECRET).read_bytes()).hexdigest(),
    }
    return checkpoint(work, "{}", **{"../../../secret.safetensors": facts})


@attack("step-000001: state.json", loads=True)
def a_checkpoint_whose_state_is_too_deep(model: Path, work: Path) -> list[Any]:
    return checkpoint(work, '{"a":' * 100_000 + "1" + "}" * 100_000)


@attack("step-000001: state.json", loads=True)
def a_checkpoint_whose_state_is_another_thing(model: Path, work: Path) -> list[Any]:
    return checkpoint(work, '{"step": "../x", "settings": 7, "identity": [], "world_size": 1000000000}')


@attack("step-000001: state.json", loads=True)
def a_checkpoint_of_a_billion_ranks(model: Path, work: Path) -> list[Any]:
    return checkpoint(
        work, '{"step": 1, "settings": {}, "identity": {}, "world_size": 1000000000, "optimizer_steps": {"policy": 1}}'
    )


@attack("cannot be loaded as a dataset|no file of the split|no such")
def a_dataset_with_a_loading_script(model: Path, work: Path) -> list[Any]:
    directory = work / "data"
    directory.mkdir()
    (directory / "data.py").write_text(f"open({str(work / CANARY)!r}, 'w')")
    return ["--dataset_name", directory]


@attack("data_files: expected files of this directory, got ../rows.jsonl")
def a_card_that_names_files_outside(model: Path, work: Path) -> list[Any]:
    directory = work / "data"
    directory.mkdir()
    (directory / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../rows.jsonl\n---\n")
    return ["--dataset_name", directory]


@attack("_data_files: expected names of files beside it, got ../secret")
def a_saved_dataset_that_names_files_outside(model: Path, work: Path) -> list[Any]:
    directory = work / "data"
    directory.mkdir()
    (directory / "dataset_info.json").write_text("{}")
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.safetensors"}]}))
    return ["--dataset_name", directory]


BOMB = ",".join(
    f"&{b} [{','.join(['*' + a] * 9) if a else 'x'}]" for a, b in zip(["", *"abcdefg"], "abcdefgh", strict=True)
)
RECIPES = {
    "that runs a command": ("a: !!python/object/apply:os.system ['touch CANARY']", "not a recipe"),
    "of aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "output_dir: *i\n",
        "belongs to|unknown key|expected|not a recipe",
    ),
    "of aliases in a list": (f"mixer_list: [{BOMB}, 1]\n", "expected words|not a recipe"),
    "that is within itself": ("output_dir: &a [*a]\n", "expected text|not a recipe"),
    "that says a thing twice": ("seed: 1\nseed: 2\n", "stands twice"),
    "that is too deep": ("output_dir: " + "[" * 50_000 + "]" * 50_000, "not a recipe|expected"),
    "of two megabytes": ("# " + "x" * 2**21, "larger than 1 MiB"),
    "of bytes": ("\0\1\2", "not a recipe"),
    "with a key that is a list": ("? [a, b]\n: 1\n", "is not text"),
}
for what, (text, said) in RECIPES.items():

    def recipe(model: Path, work: Path, text: str = text) -> list[Any]:
        (work / "recipe.yaml").write_text(text.replace("CANARY", str(work / CANARY)))
        return ["--config", work / "recipe.yaml"]

    ATTACKS.append(Attack(f"a recipe {what}", recipe, said))


# --- the suite --------------------------------------------------------------------------------------------------------


@functools.cache
def _base() -> tuple[tempfile.TemporaryDirectory, Path]:
    holder = tempfile.TemporaryDirectory(prefix="hostile-")
    return holder, embedded(Path(holder.name)).model


def run(which: Attack, work: Path, hook: str = "deny_the_network", limit: float = LIMIT) -> str:
    """'' where the attack was answered as it has to be."""
    shutil.copytree(_base()[1], work / "model")
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shutil.copyfile(_base()[1] / WEIGHTS, work / SECRET)
    argv = ["--model_name_or_path", work / "model", "--dataset_name", work / "rows.jsonl", "--max_steps", 1]
    argv += ["--output_dir", work / "out", "--cache_dir", work / "cache", "--batch_size", 4, "--max_seq_length", 256]
    argv += ["--dataset_num_proc", 1, "--sample_tokens", 0, *([] if which.loads else ["--dry_run", "true"])]
    argv += which.plant(work / "model", work)
    began = time.monotonic()
    result = ranks.launch(argv, 1, "launch.sft", work / "log", hook=f"tests.faults:{hook}", timeout=limit)
    took = time.monotonic() - began
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    if (work / CANARY).exists():
        return "its code was run"
    if "NETWORK" in result.output:
        return "the network was called: " + re.findall("NETWORK.*", result.output)[0][:200]
    if took >= limit:
        return f"hangs: not over after {took:.0f} s"
    if "Traceback" in result.output:
        return f"a traceback: {result.output[-300:]!r}"
    if result.codes != [2] and (result.codes != [0] or not re.match(r"$|\|", which.said)):
        return f"status {result.codes}: {result.output[-300:]!r}"
    if result.codes == [2] and (len(errors) != 1 or not re.search(which.said, errors[0])):
        return f"expected one line with {which.said!r}, got {errors}"
    return ""


def cases_of(attacks: list[Attack], hook: str, limit: float = LIMIT) -> Cases:
    """The attacks, or so many of them in an order that the seed decides."""

    def cases(count: int, seed: int) -> Iterator[Case]:
        order = list(attacks)
        random.Random(seed).shuffle(order)
        for which in order[:count]:
            yield Case(which.name, functools.partial(run, which, hook=hook, limit=limit))

    return cases


def _named(*names: str) -> list[Attack]:
    """To be tried by a step, since a plan, which a broken variant would come to, takes half a minute."""
    return [replace(which, loads=True) for which in ATTACKS if which.name in names]


# --- the same against transformers ------------------------------------------------------------------------------------

OF_A_MODEL = [
    which for which in ATTACKS if not re.search("adapter|checkpoint|manifest|dataset|card|recipe", which.name)
]


def _load_as_peers_do(model: str, log: str) -> None:
    """Model, tokenizer and the text of a conversation, by transformers' own functions."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = tokenizer.chat_template or TULU_TEMPLATE
        text = tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False)
        AutoModelForCausalLM.from_pretrained(model)(tokenizer(text, return_tensors="pt")["input_ids"])
    except Exception as error:
        print(repr(error)[:1000], flush=True)
        os._exit(2)  # refused, in whatever words
    os._exit(0)


def _of_transformers(which: Attack, work: Path, limit: float = 8.0) -> str:
    """What became of the attack where nothing but the library is between it and the machine."""
    shutil.copytree(_base()[1], work / "model")
    shutil.copyfile(_base()[1] / WEIGHTS, work / SECRET)
    which.plant(work / "model", work)
    process = ranks.context.Process(target=_load_as_peers_do, args=(str(work / "model"), str(work / "log")))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"hangs: not over after {limit:.0f} s"
    if (work / CANARY).exists():
        return "its code was run"
    if process.exitcode not in (0, 2):
        return f"the process died with status {process.exitcode}"
    taken = process.exitcode == 0 and not re.match(r"$|\|", which.said)
    return "taken without a word" if taken else ""


def _baseline(count: int, seed: int) -> Iterator[Case]:
    order = list(OF_A_MODEL)
    random.Random(seed).shuffle(order)
    for which in order[:count]:
        yield Case(which.name, functools.partial(_of_transformers, which))


SUITE = Suite(
    name="hostile",
    unit="malicious artefacts",
    promise="no code run, no file outside, nobody called, no hang, no traceback",
    sizes=(30, len(ATTACKS)),
    cases=cases_of(ATTACKS, "deny_the_network"),
    controls={
        "templates without a bound": cases_of(
            _named("a template that loops for ever"), "unbounded_templates", limit=8.0
        ),
        "templates without a sandbox": cases_of(
            _named("a template that walks to the system"), "templates_without_a_sandbox"
        ),
        "pickles are read": cases_of(_named("a pickle for weights"), "pickles_are_read"),
        "indexes are followed": cases_of(_named("an index that names a file outside"), "indexes_are_followed"),
        "headers as the library takes them": cases_of(
            _named("a tensor that stands twice"), "headers_as_the_library_takes_them"
        ),
    },
    baselines={"transformers": _baseline},
    left_out=("a server that answers for the hub: there is no network here",),
)

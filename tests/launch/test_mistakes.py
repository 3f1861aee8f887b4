"""What strangers do wrong: one line that says what is wrong and what to do, through the real commands.

tests/launch/test_errors.py has what a row, a flag or a directory may not be; here are the mistakes of a first evening:
files that are not files, models that are no models, flags of other stages, full disks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import engine.data.files
from engine import hardware
from engine.config import parse
from engine.errors import UserError
from engine.world import main
from launch import commands, data, dpo, evaluate, ppo, sft
from launch.seeds import each_seed

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"sft": sft, "dpo": dpo, "ppo": ppo}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"
REFUSED_PAGE = "<!DOCTYPE html>\n<html><head><title>401</title></head><body>Log in</body></html>\n"
ASK, SAY = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is one."}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Place:
    """A directory with a model, data, and what can be wrong with them."""

    def __init__(self, root: Path, made: Any) -> None:
        self.root, self.made, self.runs = root, made, 0
        rows = [{"messages": [ASK | {"content": f"Who is number {i}?"}, SAY]} for i in range(6)]
        self.good = jsonl(root / "good.jsonl", rows)
        jsonl(root / "others.jsonl", [{"messages": [ASK | {"content": "Another one?"}, SAY]}])
        jsonl(root / "same.jsonl", [{"prompt": "Who?", "chosen": "I.", "rejected": "I."}] * 3)
        jsonl(root / "no_number.jsonl", [{"messages": [ASK], "ground_truth": "two", "dataset": "gsm8k"}] * 3)
        jsonl(root / "number.jsonl", [{"messages": [ASK], "ground_truth": "2", "dataset": "gsm8k"}] * 3)
        (root / "columns.csv").write_text("title,body\na,b\n")
        (root / "empty.jsonl").write_text("")
        for form in ("jsonl", "json", "csv", "parquet"):
            (root / f"pointer.{form}").write_text(POINTER)
            (root / f"page.{form}").write_text(REFUSED_PAGE)
        for name, change in MODELS.items():
            directory = shutil.copytree(made.model, root / name)
            change(directory)

    def run(self, stage: str, *words: object) -> Any:
        """The stage in this process, for one small step. Raises what it raises."""
        self.runs += 1
        given = [str(word).replace("{}", str(self.root)) for word in words]
        if "--cache_dir" not in given:
            given += ["--cache_dir", str(self.root / "cache")]
        if stage == "evaluate":
            return evaluate.evaluate(parse(evaluate.Config, given, elsewhere=commands))
        small = {"--output_dir": self.root / f"run{self.runs}", "--max_steps": 1, "--batch_size": 2}
        small |= {"--sample_tokens": 0} if stage == "sft" else {}
        for flag, value in small.items():
            given += [] if flag in given else [flag, str(value)]
        return each_seed(STAGES[stage].train, parse(STAGES[stage].Config, given, elsewhere=commands))

    def on_rows(self, stage: str, name: str | Path, *words: object) -> Any:
        return self.run(stage, "--dataset_name", self.root / name, "--model_name_or_path", self.made.model, *words)


def config_of(**values: Any):
    return lambda d: (d / "config.json").write_text(json.dumps(values))


def only(name: str, content: str | bytes):
    def change(directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def smaller(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


MODELS = {
    "pointer": lambda d: (d / "model.safetensors").write_text(POINTER),
    "pointed_tokenizer": lambda d: (d / "tokenizer.json").write_text(POINTER),
    "paged_config": lambda d: (d / "config.json").write_text(REFUSED_PAGE),
    "pickled": lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
    "gguf": only("model-q4.gguf", b"GGUF" + bytes(64)),
    "elsewhere": only("notes.txt", "weights are on the other disk"),
    "half": lambda d: (d / "model.safetensors").unlink(),
    "no_tokenizer": lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
    "encoder": config_of(model_type="bert", architectures=["BertForMaskedLM"], vocab_size=512),
    "translator": config_of(model_type="t5", architectures=["T5ForConditionalGeneration"], vocab_size=512),
    "seeing": config_of(model_type="llava", architectures=["LlavaForConditionalGeneration"]),
    "newer": config_of(model_type="foonet", architectures=["FooForCausalLM"]),
    "odd": config_of(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=30, num_attention_heads=4),
    "smaller": smaller,
    "no_adapter": only("readme.txt", "x"),
}


@pytest.fixture(scope="module")
def place(embedded_dir, tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("mistakes"), embedded_dir)


def line(error: BaseException) -> str:
    """The message, which stands on one line of a terminal."""
    text = str(error)
    assert text.isprintable() and len(text) < 600, text
    return text


# name: stage, words, what is wrong, what to do
CASES: dict[str, tuple[str, tuple, str, str]] = {
    "a recipe of another stage": (
        "sft",
        ("--config", ROOT / "launch" / "recipes" / "tulu3_8b_dpo.yaml"),
        r"tulu3_8b_dpo.yaml: \w+ belongs to launch.dpo",
        "its recipe is for python -m launch.dpo",
    ),
    "a flag of another stage": ("sft", ("--kl_coef", 0.1), "--kl_coef belongs to launch.ppo", "launch.ppo"),
    "a flag misspelt": ("sft", ("--learnin_rate", 1), "unknown flag --learnin_rate", "did you mean learning_rate"),
    "a recipe that is not there": ("sft", ("--config", "{}/god.yaml"), "god.yaml: no such file", "did you mean good"),
    "flash attention without a GPU": (
        "sft",
        ("--attention", "flash2"),
        "needs a CUDA device",
        "--attention auto picks",
    ),
    "half precision": ("sft", ("--dtype", "float16"), "needs loss scaling", "bfloat16 and float32 do not"),
    "eight bits": ("sft", ("--dtype", "fp8"), "fp8 is not one of", "auto, bfloat16, float32"),
    "a directory that is a file": ("sft", ("--output_dir", "{}/good.jsonl"), "--output_dir .*: is a file", "file"),
    "a hub id without a network": (
        "sft",
        ("--dataset_name", "{}/good.jsonl", "--model_name_or_path", "somebody/a-model"),
        "neither a directory nor to be had from the hub",
        "give a directory, or log in",
    ),
}
ROWS: dict[str, tuple[str, str, tuple, str, str]] = {
    "a table of other columns": ("sft", "columns.csv", (), "got body, title", "columns: expected messages or"),
    "an empty file": ("sft", "empty.jsonl", (), "the dataset is empty", "name one that has rows"),
    "pairs to launch.sft": ("sft", "same.jsonl", (), "got chosen, prompt, rejected", "pairs are read by launch.dpo"),
    "problems to launch.sft": ("sft", "no_number.jsonl", (), "no turn that is trained", "are read by launch.ppo"),
    "conversations to launch.dpo": ("dpo", "good.jsonl", (), "chosen: .* got nothing", "are read by launch.sft"),
    "conversations to launch.ppo": (
        "ppo",
        "good.jsonl",
        ("--response_length", 8),
        "ground_truth: missing",
        "conversations are read by launch.sft",
    ),
    "equal answers": ("dpo", "same.jsonl", (), "got the same", "rejected: expected another answer than chosen"),
    "ground truths that no verifier reads": (
        "ppo",
        "no_number.jsonl",
        ("--response_length", 8),
        "no_number.jsonl:1: ground_truth: no number in",
        "two",
    ),
    "a limit below every row": ("sft", "good.jsonl", ("--max_seq_length", 5), "5 is too small", "--max_seq_length"),
    "a limit below every prompt": (
        "ppo",
        "number.jsonl",
        ("--max_seq_length", 12, "--response_length", 11),
        "no usable prompt, none has at most 1 tokens",
        "raise --max_seq_length, or lower --response_length",
    ),
}
OF_MODELS = {
    "pointer": ("model.safetensors: a Git LFS pointer", "git lfs pull"),
    "pointed_tokenizer": ("tokenizer.json is a Git LFS pointer", "git lfs pull"),
    "paged_config": ("config.json is a web page", "download it again"),
    "pickled": ("pytorch_model.bin: a pickle file would run code", "save the model again by save_pretrained"),
    "gguf": ("no config.json, but GGUF files", "give the model that they were made from"),
    "elsewhere": ("no config.json, but notes.txt", "expected a directory as save_pretrained writes it"),
    "half": ("no model.safetensors and no model.safetensors.index.json", "is the download complete?"),
    "no_tokenizer": ("no tokenizer.json", "copy the tokenizer's files"),
    "encoder": ("BertForMaskedLM is no decoder", "give a model whose config.json has"),
    "translator": ("T5ForConditionalGeneration is no decoder", "give a model whose config.json has"),
    "seeing": ("LlavaForConditionalGeneration is not a decoder", "give a model whose config.json has"),
    "newer": ("no usable config.json .*foonet", "version of"),
    "odd": ("its config.json describes no model|no usable config.json", "hidden|head"),
    "smaller": ("token id \\d+ is beyond the model's 100 embeddings", "another model's tokenizer"),
}


@pytest.mark.parametrize("case", CASES)
def test_flags(case, place):
    stage, words, wrong, todo = CASES[case]
    with pytest.raises(UserError) as error:
        place.run(stage, *words)
    assert re.search(wrong, line(error.value)) and re.search(todo, line(error.value)), line(error.value)


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, place):
    stage, name, words, wrong, todo = ROWS[case]
    with pytest.raises(UserError) as error:
        place.on_rows(stage, name, *words)
    assert re.search(wrong, line(error.value)) and re.search(todo, line(error.value)), line(error.value)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("name", "wrong", "todo"),
    [("pointer", "a Git LFS pointer", "git lfs pull"), ("page", "a web page", "download it again")],
)
def test_files_that_are_not_files(name, wrong, todo, form, place):
    with pytest.raises(UserError) as error:
        place.on_rows("sft", f"{name}.{form}")
    assert f"{name}.{form}: {wrong}" in line(error.value) and todo in line(error.value)


@pytest.mark.parametrize("name", OF_MODELS)
def test_models_that_are_no_models(name, place):
    wrong, todo = OF_MODELS[name]
    with pytest.raises(UserError) as error:
        place.run("sft", "--dataset_name", place.good, "--model_name_or_path", place.root / name)
    assert re.search(wrong, line(error.value)) and re.search(todo, line(error.value)), line(error.value)
    assert str(place.root / name) in line(error.value) or "{}" not in wrong


def test_an_adapter_that_is_none(place):
    with pytest.raises(UserError) as error:
        place.on_rows("sft", "good.jsonl", "--use_lora", "true", "--adapter_name_or_path", place.root / "no_adapter")
    assert "no usable adapter_config.json" in line(error.value)


def test_a_dataset_of_the_hub_without_a_network(place, monkeypatch):
    """The library would ask six times, in half a minute; one that is in its cache is still read."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def unreachable(self, name, **options):
        asked.append((name, options["timeout"]))
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    begun = time.perf_counter()
    with pytest.raises(UserError) as error:
        place.run("sft", "--dataset_name", "somebody/rows", "--model_name_or_path", place.made.model)
    assert asked == [("somebody/rows", engine.data.files.HUB_PATIENCE)] and time.perf_counter() - begun < 5
    assert "the hub does not answer" in line(error.value) and "name files, or try again" in line(error.value)


# --- what is possible, and hardly meant -------------------------------------------------------------------------------


def warnings_of(text: str) -> list[str]:
    found = [of for of in text.splitlines() if of.startswith("warning: ")]
    assert all(of.isprintable() for of in found)
    return found


@pytest.mark.parametrize(
    ("words", "wrong", "todo"),
    [
        (("--learning_rate", 1), "--learning_rate 1 is 200,000 times the usual 5e-06", "may diverge"),
        (("--learning_rate", 3e-7, "--use_lora", "true"), "3e-07 is one for training all weights", "about 0.0001"),
        (("--learning_rate", 2e-5), "", ""),
        (("--learning_rate", 2e-4, "--use_lora", "true"), "", ""),
    ],
)
def test_learning_rates(words, wrong, todo, place, capsys, monkeypatch):
    monkeypatch.setattr("launch.sft.show_plan", lambda *_, **__: None)
    place.on_rows("sft", "good.jsonl", "--dry_run", *words)
    found = warnings_of(capsys.readouterr().out)
    assert [wrong in of and todo in of for of in found] == ([True] if wrong else [])


@pytest.mark.parametrize("held_out", ["good.jsonl", "others.jsonl"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_held_out_data_that_is_trained_on(stage, held_out, place, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(f"launch.{stage}.show_plan", lambda *_, **__: None)

    def row(of: dict) -> dict:
        question = of["messages"][0]
        forms = {"dpo": {"prompt": question["content"], "chosen": "I.", "rejected": "You."}}
        forms["ppo"] = {"messages": [question], "ground_truth": "2", "dataset": "gsm8k"}
        return forms.get(stage, of)

    files = {}
    for name in ("good.jsonl", "others.jsonl"):
        rows = [row(json.loads(of)) for of in (place.root / name).read_text().splitlines()]
        files[name] = jsonl(tmp_path / name, rows)
    words = ["--eval_dataset_name", files[held_out], "--dry_run"]
    words += ["--response_length", 8] if stage == "ppo" else []
    place.on_rows(stage, files["good.jsonl"], *words)
    found = warnings_of(capsys.readouterr().out)
    assert len(found) == (held_out == "good.jsonl")
    assert not found or ("warning: 6 of 6 held-out" in found[0] and "launch.data --against" in found[0])


def test_an_evaluation_inside_the_training_data(place, capsys):
    words = ["sft", "--dataset_name", str(place.good), "--model_name_or_path", str(place.made.model)]
    data.inspect([*words, "--against", str(place.good)])
    text = capsys.readouterr().out
    assert "6 (100 %) are contaminated" in text and "--drop_overlap" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("known", "slow"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bfloat16_on_a_processor_without_it(known, slow, place, capsys, monkeypatch):
    monkeypatch.setattr("launch.sft.show_plan", lambda *_, **__: None)
    monkeypatch.setattr(hardware.torch.cpu, "get_capabilities", lambda: known, raising=False)
    place.on_rows("sft", "good.jsonl", "--dtype", "bfloat16", "--dry_run")
    found = warnings_of(capsys.readouterr().out)
    assert len(found) == slow and (not slow or "float32 is about 5 times as fast here" in found[0])
    place.on_rows("sft", "good.jsonl", "--dry_run")
    assert not warnings_of(capsys.readouterr().out)


def test_a_base_model_says_whose_template_it_gets(place, capsys, monkeypatch):
    monkeypatch.setattr("launch.sft.show_plan", lambda *_, **__: None)
    place.on_rows("sft", "good.jsonl", "--dry_run")
    assert re.search(r"chat template +Tülu's, since the tokenizer has none", capsys.readouterr().out)


# --- runs and disks ---------------------------------------------------------------------------------------------------


def ended(stage: Any, capsys) -> tuple[int, str]:
    """(exit status, standard error) of a command's body."""
    with pytest.raises(SystemExit) as status:
        main(stage)
    return int(str(status.value.code)), capsys.readouterr().err


@contextlib.contextmanager
def full_disk(directory: Path, monkeypatch):
    """A file system of 256 KiB where this process may mount one; else writes of weights fail as they would there."""
    directory.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], capture_output=True, check=False
    ).returncode
    if not mounted:

        def full(*_: Any, **__: Any) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("engine.model.export.save_file", full)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_at_the_export(place, capsys, monkeypatch, tmp_path):
    """One line with file and remedy, status 2; the same command then goes on."""
    with full_disk(tmp_path / "disk", monkeypatch):
        status, err = ended(
            lambda: place.on_rows("sft", "good.jsonl", "--output_dir", tmp_path / "disk" / "run"), capsys
        )
    said = [of for of in err.splitlines() if of.startswith("error: ")]
    assert status == 2 and "Traceback" not in err and len(said) == 1
    assert re.search(
        r"final is not written: .*: No space left on device: free some, or give another --output_dir", said[0]
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_write_that_fails_without_a_name(code, capsys):
    """A full disk under an open file: the system names no path."""

    def fails() -> None:
        raise OSError(code, os.strerror(code))

    status, err = ended(fails, capsys)
    assert status == 2 and err.startswith(f"error: a file: {os.strerror(code)}: ") and "--output_dir" in err


def test_a_directory_that_cannot_be_made(place):
    with pytest.raises(UserError) as error:
        place.on_rows("sft", "good.jsonl", "--output_dir", "/proc/no/run")
    assert re.match(r"--output_dir /proc/no/run: cannot be written \(.*\): give another", line(error.value))


def test_a_run_of_other_flags_and_what_a_kill_left(place, capsys):
    """Another batch size in the directory of a run is refused; locks and halves of files of a killed one are not."""
    run = place.root / "killed"
    (run / ".final.partial").mkdir(parents=True)
    (run / ".lock").write_text("4194303")
    (run / ".config.yaml.partial").write_text("half")
    (run / "metrics.jsonl").write_text('{"step": 1, "lo')
    (run / "checkpoints" / "tmp-000001").mkdir(parents=True)
    place.on_rows("sft", "good.jsonl", "--output_dir", run)
    assert (run / "final" / "config.json").is_file() and not (run / ".final.partial").exists()
    with pytest.raises(UserError) as error:
        place.on_rows("sft", "good.jsonl", "--output_dir", run, "--batch_size", 3)
    assert re.search("holds a run with --batch_size 2, now it is 3: give another --output_dir", line(error.value))


def test_the_same_seed_twice(place):
    with pytest.raises(UserError) as error:
        place.on_rows("sft", "good.jsonl", "--seeds", 1, 1)
    assert "--seeds" in line(error.value)


# --- processes --------------------------------------------------------------------------------------------------------


def process(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


STARTED = "import runpy, sys; sys.argv = ['x']; runpy.run_module('launch.verify', run_name='__main__')"


def test_an_older_python():
    done = process(f"import sys; sys.version_info = (3, 10, 4); {STARTED}")
    assert done.returncode == 1 and re.fullmatch(r"error: Triptych needs Python 3.11 or newer, .*\n", done.stderr)


def test_a_package_that_is_not_installed():
    done = process(f"import sys; sys.modules['torch'] = None; {STARTED.replace('verify', 'sft')}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the package torch is not installed here: pip install")


def test_a_port_in_use():
    """The second of two runs on one machine, started by hand with the same port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = process("from engine.world import main, start; main(start)", **world)
    assert done.returncode == 2, done.stderr
    said = [of for of in done.stderr.splitlines() if of.startswith("error: ")]
    assert said == [f"error: port {port} is in use, by another run perhaps: give torchrun another --master_port"]
    assert "Traceback" not in done.stderr


def test_fewer_examples_in_a_step_than_ranks():
    """One of three ranks works: possible, and said."""
    from launch.resolve import warnings

    config = sft.Config(batch_size=1)
    [found] = warnings(config, type("World", (), {"size": 3})(), 5e-6)
    assert found == "warning: --batch_size 1 on 3 ranks: 2 of them have nothing to do in a step"
    assert not warnings(sft.Config(batch_size=3), type("World", (), {"size": 3})(), 5e-6)


@pytest.mark.parametrize(
    "argv",
    [
        ("launch.verify", "rows.jsonl"),
        ("launch.data", "ppo", "--dataset_name", "rows.jsonl", "--examples", "2000", "--response_length", "64"),
    ],
)
def test_a_reader_that_has_read_enough(argv, place, tmp_path):
    """`... | head -1` ends the command without a word, with one process and with ranks alike."""
    row = {"prompt": "2 + 2?", "response": "#### 4", "ground_truth": "4", "dataset": "gsm8k"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3000)
    words = [str(tmp_path / word) if word == "rows.jsonl" else word for word in argv]
    model = ["--model_name_or_path", str(place.made.model)] if argv[0] == "launch.data" else []
    command = [sys.executable, "-m", *words, *model]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 141 and "Traceback" not in errors and "Exception ignored" not in errors

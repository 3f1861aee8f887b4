"""What the pages say is true of the code: their commands are commands, their links lead somewhere, what they name is
there, and the messages that they explain are printed by somebody.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.config import as_dict, flags_of, parse
from engine.errors import UserError
from launch import commands
from tests.pages import KINDS, ROOMS, ROOT, SHELL, Page, messages, names_in, pages, split

PAGES = pages()
TREES = r"(?:docs|launch|engine|losses|rollout|verifiers|tests|benchmarks)/"
BEGIN_OTHERWISE = {
    f"docs/{name}.md" for name in ["evaluating", "report", "generating", "exporting", "inspecting-data", "screen"]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = {"flash-attn-4", "wandb"}  # that pages name and no extra has
ASK, SAY = {"role": "user", "content": "What is one and one?"}, {"role": "assistant", "content": "It is 2."}
PAIR = {"prompt": "What is one and one?", "chosen": "It is 2.", "rejected": "It is 3."}
PROBLEM = {"messages": [ASK], "ground_truth": "2", "dataset": "gsm8k"}
JUDGE = "def verify(response, ground_truth):\n    return float(ground_truth in response)\n"
ROWS = {"sft": [{"messages": [ASK, SAY]}] * 2, "dpo": [PAIR] * 2, "ppo": [PROBLEM] * 2, "grpo": [PROBLEM] * 2}
LEFT_OUT = (  # flags that name what is not here, or want another machine: they are parsed, and given their defaults
    *("adapter_name_or_path", "value_model_name_or_path", "mixer_list", "model_revision", "dataset_revision"),
    *("dataset_split", "eval_split", "attention", "compile", "resume", "report_to", "seeds", "export_adapter"),
)


@pytest.fixture(autouse=True)
def no_plan(monkeypatch):
    """A dry run ends in a plan, in a process of its own: ten seconds that say nothing of a page."""
    for stage in ROWS:
        monkeypatch.setattr(f"launch.{stage}.show_plan", lambda *_, **__: None)


@pytest.fixture(scope="module")
def here(embedded_dir, tmp_path_factory) -> dict[str, Path]:
    """Where the stand-ins lie."""
    root = tmp_path_factory.mktemp("docs")
    return {"root": root, "model": embedded_dir.model}


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_commands(page, here, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    tried: set[str] = set()
    for where, words in page.commands():
        try:
            check(words, here, tried)
        except (Exception, SystemExit) as problem:
            raise AssertionError(f"{where}: {' '.join(words)}: {problem}") from problem


def test_lines_are_cut_as_a_shell_cuts_them(here):
    line = "CUDA_VISIBLE_DEVICES= python -m launch.sft --output_dir 'a b' ... > log.txt && make demo  # then"
    assert list(split(line)) == [["python", "-m", "launch.sft", "--output_dir", "a b"], ["make", "demo"]]
    for wrong in ("python -m launch.sft --learning_rat 1", "make demos", "pip install trl-nightly", "tune run x"):
        with pytest.raises((AssertionError, UserError)):
            check(wrong.split(), here, set())


def test_blocks_are_of_a_kind_that_is_checked():
    kinds = {block.language for page in PAGES for block in page.blocks()}
    assert kinds <= {"", *SHELL, "text", "python", "json", "jsonl", "yaml"}


def check(words: list[str], here: dict[str, Path], tried: set[str]) -> None:
    """Raises whatever the command would, for its words."""
    kind, rest = words[0], words[1:]
    assert kind in KINDS, f"{kind} is not a command that is known here"
    if kind == "make":
        targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
        assert set(rest) <= {*targets}, f"no such target among {targets}"
    elif kind == "pip":
        installs(rest)
    elif kind == "torchrun":
        from torch.distributed.run import get_args_parser

        asked = get_args_parser().parse_args(rest)
        assert asked.module, "torchrun takes -m here"
        module(asked.training_script, asked.training_script_args, here, tried)
    elif kind == "python":
        assert rest[0] == "-m", "python takes -m here"
        module(rest[1], rest[2:], here, tried)


def installs(words: list[str]) -> None:
    """What pip is told is this project with its extras, or a package that the project knows."""
    assert words[0] == "install", words
    known = [d for of in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for d in of]
    packages = {re.split(r"[^\w-]", d)[0] for d in known} | OPTIONAL
    for word in words[1:]:
        if extras := re.fullmatch(r"\.\[([\w,]+)\]", word):
            assert set(extras.group(1).split(",")) <= PROJECT["optional-dependencies"].keys(), word
        else:
            assert word in ("-e", ".") or word in packages, word


def module(name: str, argv: list[str], here: dict[str, Path], tried: set[str]) -> None:
    """A module of ours with its command line, by its own parser where it is one of `launch`."""
    room, _, command = name.partition(".")
    if command == "X":  # any of them
        return
    assert importlib.util.find_spec(name), f"there is no module {name}"
    if room == "pytest":
        assert all((ROOT / word).exists() for word in argv if word.startswith("tests")), argv
        return
    if room != "launch":  # a program of benchmarks or tests: its flags stand in its file
        source = Path(str(importlib.util.find_spec(name).origin)).read_text(encoding="utf-8")  # type: ignore[union-attr]
        assert all(f'"{word}"' in source or f"{word[2:]}" in source for word in argv if word.startswith("--")), argv
        return
    argv = with_recipes(argv, here)
    if command == "plan":
        from launch.planner.plans import STAGES, resolve

        if argv and argv != ["--help"]:
            resolve(argv[0], parse(STAGES[argv[0]][1], argv[1:], elsewhere=commands))
        return
    file = ROOT / f"launch/{command}.py"
    assert file.is_file(), f"there is no {name} here"
    assert 'if __name__ == "__main__":' in file.read_text(encoding="utf-8"), f"{name} is no command"
    if argv == ["--help"]:
        return
    of = importlib.import_module(name)
    if command == "data":
        of.command(argv)
        return
    config = parse(of.Config, argv, elsewhere=commands)
    if command == "demo":
        of.check(config)
    if command in ROWS and f"{command} {config}" not in tried:
        tried.add(f"{command} {config}")
        config.check()
        dry_run(command, of, config, here, tried)


def with_recipes(argv: list[str], here: dict[str, Path]) -> list[str]:
    """A recipe of ours as it is, one that a user has yet to write as an empty one."""
    mine = here["root"] / "recipe.yaml"
    mine.write_text("seed: 1\n", encoding="utf-8")
    after = {i + 1 for i, word in enumerate(argv) if word == "--config"}
    return [str(mine) if i in after and not word.startswith("launch/") else word for i, word in enumerate(argv)]


def dry_run(stage: str, of: Any, config: Any, here: dict[str, Path], tried: set[str]) -> None:
    """As far as a stage goes before it loads weights: on the embedded model, and on rows that its flags are about."""
    flags = flags_of(type(config))
    defaults = {name: flags[name].default for name in LEFT_OUT if name in flags}
    config = dataclasses.replace(config, **defaults, dry_run=True, max_seq_length=256)
    config = dataclasses.replace(config, model_name_or_path=str(here["model"]), cache_dir=str(here["root"] / "cache"))
    if config.batch_size is not None:
        config = dataclasses.replace(config, batch_size=2)
    if stage in ("ppo", "grpo"):
        judge = here["root"] / "judge.py"
        judge.write_text(JUDGE, encoding="utf-8")
        own = None if config.verifier_module is None else str(judge)
        config = dataclasses.replace(config, verifier_module=own, response_length=8)
    data = here["root"] / f"{stage}.jsonl"
    rows = rows_for(stage, as_dict(config))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = None if config.eval_dataset_name is None else str(data)
    config = dataclasses.replace(config, dataset_name=str(data), eval_dataset_name=held_out, on_bad_row="error")
    config = dataclasses.replace(config, output_dir=str(here["root"] / "never_made"))
    if repr(config) not in tried:
        tried.add(repr(config))
        of.train(config)


def rows_for(stage: str, flags: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows in the form that a flag is about."""
    if flags.get("text_column"):
        return [{flags["text_column"]: "It is one."}] * 2
    if flags.get("only_label"):
        return [{"prompt": "Who?", "completion": "One.", "label": True}] * 2
    if column := flags.get("preference_column"):
        return [{"prompt": "Who?", "response_a": "One.", "response_b": "Two.", column: "a"}] * 2
    if score := flags.get("chosen_by_score"):
        if len(score) == 2:
            return [{"prompt": "Who?", "response_a": "One.", "response_b": "Two.", score[0]: 1, score[1]: 2}] * 2
        return [{"prompt": "Who?", "completions": [{"response": "A", score[0]: 1}, {"response": "B", score[0]: 2}]}] * 2
    if flags.get("verifier_module"):
        return [PROBLEM | {"dataset": "judge"}] * 2
    return ROWS[stage]


# --- snippets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_mean_something(page):
    for block in page.blocks():
        if block.language == "python":
            snippet(block.text, f"{page.name}:{block.line}")
        elif block.language in ("json", "jsonl"):
            for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
                json.loads(text)


def snippet(text: str, where: str) -> None:
    """It compiles, what it imports is there, and the flags that it gives to a Config are flags."""
    compile(text, where, "exec")
    bound: dict[str, Any] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            of = importlib.import_module(str(node.module))
            bound |= {alias.asname or alias.name: vars(of)[alias.name] for alias in node.names}
        elif isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in bound:
            called = bound[node.func.id]
            if dataclasses.is_dataclass(called):
                assert {keyword.arg for keyword in node.keywords} <= flags_of(called).keys(), where


# --- what is named, and where links lead ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_is_there(page):
    missing = []
    for file, name in re.findall(rf"`({TREES}[\w/]+\.py):([\w.]+)`", page.text):
        if not (ROOT / file).is_file() or name not in names_in(file):
            missing.append(f"{file}:{name}")
    for name, file in re.findall(rf"`([A-Za-z_]\w*(?:\.\w+)?)` in `({TREES}[\w/]+\.py)`", page.text):
        if not (ROOT / file).is_file() or name not in names_in(file):
            missing.append(f"{name} in {file}")
    for path in re.findall(rf"`({TREES}[\w/.*-]+\.(?:py|md|yaml|json|txt))`", page.text):
        if "NAME" not in path and "..." not in path and not list(ROOT.glob(path)):
            missing.append(path)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in page.links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.path.parent / file).resolve() if file else page.path
        assert target.is_relative_to(ROOT), f"{link} leaves the project"
        assert target.exists(), link
        if anchor:
            assert anchor in Page(str(target.relative_to(ROOT))).anchors, link


def test_every_page_can_be_reached():
    found, todo = set(), ["docs/index.md"]
    while todo:
        page = Page(todo.pop())
        found.add(page.name)
        for link in page.links:
            target = (page.path.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target.is_relative_to(ROOT):
                todo += [name for name in [str(target.relative_to(ROOT))] if name not in found]
    assert {page.name for page in PAGES} <= found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_they_are_for_and_name_no_machine(page):
    assert page.source.startswith("# ")
    if page.name.startswith("docs/") and page.name not in BEGIN_OTHERWISE:
        first = page.source.split("\n\n")[1]
        assert re.match(r"(After|From) .+\b(you can|you find|you know|you have)\b", first), first
    assert not re.search(r"pypi|pythonhosted|huggingface\.co|--index-url|/(?:work|tmp|root|home|opt)/", page.source)


def test_architecture_has_every_file_of_the_rooms():
    source = Page("docs/architecture.md").text
    listed = set(re.findall(rf"`({TREES}[\w/]+(?:\.py|/))`", source))
    files = [str(path.relative_to(ROOT)) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    missing = [
        f for f in files if not f.endswith("__init__.py") and not {f, *(f"{p}/" for p in Path(f).parents)} & listed
    ]
    assert not missing


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_that_are_explained_are_printed():
    """In the first cell of a row of docs/troubleshooting.md a message stands, with … for what differs."""
    rows = re.findall(r"(?m)^\| `([^`]+)`", Page("docs/troubleshooting.md").text)
    assert len(rows) > 40
    unknown = [row for row in rows if not any(said(row.replace("\\|", "|"), message) for message in messages())]
    assert not unknown


def said(quoted: str, message: str) -> bool:
    """The fixed parts stand in the message in this order."""
    at = 0
    for part in filter(None, (part.strip() for part in quoted.split("…"))):
        at = message.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


# --- the two pages for a first day, as they stand ---------------------------------------------------------------------


@pytest.mark.drill
@pytest.mark.parametrize("name", ["docs/first-result.md", "docs/own-data.md"])
def test_a_page_can_be_typed(name, tmp_path, embedded_dir):
    """Every command of the page in its order, on the files that the page shows; a hub's model is the embedded one."""
    page = Page(name)
    for block in page.blocks():
        if block.file:
            path = tmp_path / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n", encoding="utf-8")
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    for where, words in page.commands():
        if where == page.name or words[0] in ("pip", "git", "cd", "echo"):
            continue
        words = ["python", "-m", "launch.demo"] if words[:2] == ["make", "demo"] else words
        line = [str(embedded_dir.model) if re.fullmatch(r"[\w-]+/[\w.-]+-Instruct", word) else word for word in words]
        line = [sys.executable, *line[1:]] if line[0] == "python" else line
        done = subprocess.run(
            line, cwd=tmp_path, env=os.environ | own, input="Who is it?\n", capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, f"{where}: {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

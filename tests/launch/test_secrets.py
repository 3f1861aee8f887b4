"""Secrets of the environment are nowhere in what a command prints, whichever it is and whatever goes wrong.

Every command runs as `python -m` would run it, in a process forked from tests/ranks.py's, with canaries in its
environment; flags, recipes, rows and models that the message has to quote hold one of them.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from engine import config, redact
from launch import commands
from tests import ranks

SECRETS = {
    "HF_TOKEN": "hfvalue-canary-one",
    "PGPASSWORD": "canary two\tof 'words' \"and\" more",
    "MY_SIGNING_KEY": "c4n4ry-Xq7-" + "bVd0aG91dGFzcGFjZQ" * 6 + "Zz9-3nd-0f-k3y",  # longer than messages quote
}
SHOWN = 12  # characters of a secret that are one too many
COMMANDS = sorted({*commands(), "launch.plan", "launch.data"})
STAGE = {"launch.plan": ["sft"], "launch.data": ["sft"]}  # the first word of those that take one


def ways(command: str, directory: Path, secret: str) -> dict[str, list[str]]:
    """What can be wrong on any command line, and quotes what was given."""
    first = STAGE.get(command, [])
    flags = config.flags_of(commands()[command])
    words = ["a"] * sum(flag.positional for flag in flags.values())
    named = [f"--{name}={secret}" for name, flag in flags.items() if not flag.positional][-1:]
    recipes = {
        "a key of a recipe": json.dumps({secret: 1}),
        "a value of a recipe": json.dumps({next(iter(flags)): {"a": secret}}),
        "a recipe that says it twice": f"{json.dumps(secret)}: 1\n" * 2,
        "a recipe of words": json.dumps(secret),
    }
    found = {
        "a flag": [*first, f"--{secret}"],
        "the value of a flag": [*first, *(named or [secret, secret])],
        "a word": [f"stage {secret}"] if first else [*words, secret],
        "a recipe that is not there": [*first, "--config", f"{directory}/{secret}.yaml"],
    }
    for number, (way, text) in enumerate(recipes.items()):
        path = directory / f"{number}.yaml"
        path.write_text(text)
        found[way] = [*first, "--config", str(path)]
    return found


def artefact(command: str, directory: Path, model: Path, secret: str) -> list[str]:
    """A command line on rows or a model that cannot be read, for a reason that quotes them."""
    rows, broken = directory / "rows.jsonl", directory / "broken"
    turn = {"role": "user", "content": "Who?"}
    row = {"messages": [turn], "ground_truth": "2", "dataset": secret}
    if command in ("launch.sft", "launch.data"):
        row = {"messages": [turn, {"role": secret, "content": "I."}]}
    if command == "launch.dpo":
        row = {"prompt": "Who?", "chosen": [turn, {"role": secret, "content": "I."}], "rejected": "We."}
    if command == "launch.verify":
        row |= {"response": "3"}
    if command == "launch.compare":
        row = dict.fromkeys(("key", "prompt", "dataset", "score", "response", "ground_truth"), "1") | {"seed": secret}
    rows.write_text(json.dumps(row) + "\n")
    if command in ("launch.compare", "launch.verify"):
        return [str(rows)] * (1 + (command == "launch.compare"))
    if command == "launch.report":
        rows.write_text(json.dumps({"rows": [{"name": "a", "accuracy": secret}]}))
        return ["--results", str(rows), "--output", str(directory / "page.html")]
    shutil.copytree(model, broken, dirs_exist_ok=True)
    described = json.loads((broken / "config.json").read_text()) | {"model_type": secret}
    (broken / "config.json").write_text(json.dumps(described))
    where = ["--output_dir", str(directory / "out"), "--cache_dir", str(directory / "cache")]
    reads_rows = command in ("launch.sft", "launch.dpo", "launch.ppo", "launch.grpo", "launch.evaluate", "launch.data")
    named = ["--model_name_or_path", str(model if reads_rows else broken)]
    data = ["--dataset_name", str(rows), "--max_bad_rows", "0"] if reads_rows else []
    given = [*STAGE.get(command, []), *named, *data]
    given += ["--prompt", "Who?"] if command == "launch.generate" else []
    given += ["--response_length", "8"] if command in ("launch.ppo", "launch.grpo", "launch.evaluate") else []
    writes = command in ("launch.sft", "launch.dpo", "launch.ppo", "launch.grpo", "launch.export")
    return given + (where[: 2 if command == "launch.export" else 4] if writes else [])


def unforeseen(*_: object, **__: object) -> None:
    """In the place of `parse`: what a library may print, and an error that nobody expects."""
    told = " ".join(SECRETS.values())
    print(f"1 {told}")
    print(f"2 {told}", file=sys.stderr)
    logging.getLogger("transformers").error(f"3 {told}")
    logging.getLogger("of.no.handler").error(f"4 {told}")
    warnings.warn(f"5 {told}", stacklevel=1)
    raise ValueError(f"6 {told}", *SECRETS.values())


def _child(command: str, runs: list[list[str] | None], log: str) -> None:
    """Each of `runs`, one after another as if it were alone; None: an error that nobody expects."""
    os.environ.update(SECRETS, COLUMNS="80")
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    handlers = logging.getLogger("transformers").handlers
    before = sys.stderr
    import transformers.utils.logging  # noqa: F401 - makes its handler

    statuses = []
    for argv in runs:
        redact._hidden.clear()
        sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
        for handler in handlers:
            handler.setStream(sys.stderr)  # as where it was made in this process
        if argv is None:
            config.parse = unforeseen
        sys.argv = [command, *(argv if argv is not None else STAGE.get(command, []))]
        print(f"=== {len(statuses)}")
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            statuses.append(end.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            statuses.append(1)
    sys.stderr = before
    os.write(1, b"=== " + json.dumps(statuses).encode())
    os._exit(0)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_a_secret(command, tmp_path, embedded_dir):
    """Every secret in every way, by turns from command to command; what is left of one in a message that is cut short
    is none either.
    """
    runs: dict[str, list[str] | None] = {}
    for turn, (name, secret) in enumerate(SECRETS.items(), COMMANDS.index(command)):
        directory = tmp_path / name
        directory.mkdir()
        wrong = ways(command, directory, secret)
        runs |= {f"{way}: {name}": wrong[way] for way in [*wrong][turn % len(SECRETS) :: len(SECRETS)]}
        if command not in ("launch.demo", "launch.doctor"):  # which read nothing
            runs |= {f"an artefact: {name}": artefact(command, directory, embedded_dir.model, secret)}
    runs["unforeseen"] = None
    log = tmp_path / "log"
    process = ranks.context.Process(target=_child, args=(command, list(runs.values()), str(log)))
    process.start()
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    *printed, statuses = log.read_text().split("=== ")[1:]
    for way, text, status in zip(runs, printed, json.loads(statuses), strict=True):
        assert status == (1 if way == "unforeseen" else 2) or command in ("launch.data", "launch.verify"), (way, text)
        for name, secret in SECRETS.items():
            for shown in (secret[:SHOWN], secret[-SHOWN:], secret[-SHOWN:].replace("\t", " ")):
                assert shown not in text, (way, name, text)
        assert redact.MARK in text or "holds a secret, which" in text, (way, text)
        if way != "unforeseen" and status == 2:
            assert "Traceback" not in text, text
    assert all(f"{i} {redact.MARK}" in printed[-1] for i in range(1, 7)), printed[-1]

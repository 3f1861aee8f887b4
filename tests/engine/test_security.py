"""Artefacts, secrets and files: what a stranger's file can make a run do, and who can read what a run leaves."""

from __future__ import annotations

import json
import os
import re
import stat
import struct

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.faultdrill import hostile
from engine import config, disk, headers, log, redact, terminal
from engine.data.inside import check_inside
from engine.errors import UserError
from engine.model import limits, weights
from launch.inspection import page
from tests import faults, ranks

# --- headers ----------------------------------------------------------------------------------------------------------

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)}


def parts(path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_a_sound_header_is_read_as_it_is(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    found = headers.read(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in found.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert {name: entry.dtype for name, entry in found.items()} == {"a": "F32", "b": "BF16", "c": "F32"}


def changes(described: dict) -> dict[str, str]:
    """Name of a damage → the header's text."""
    a, b = described["a"], described["b"]
    text = json.dumps(described)
    made = {
        "overlaps": described | {"a": b | {"data_offsets": [0, 8]}, "b": b | {"data_offsets": [0, 8]}},
        "hole": described | {"b": b | {"data_offsets": [x + 1 for x in b["data_offsets"]]}},
        "takes": described | {"a": a | {"shape": [2, 4]}},
        "no dtype": described | {"a": a | {"dtype": "F33"}},
        "no shape": described | {"a": a | {"shape": [2, -3]}},
        "no shape of truth": described | {"a": a | {"shape": [True, 6]}},
        "no offsets": described | {"a": a | {"data_offsets": [0, 2**63]}},
        "expected dtype": described | {"a": a | {"more": 1}},
        "behind its header": {name: x for name, x in described.items() if name != "b"},
        "no object of texts": described | {"__metadata__": {"format": 7}},
    }
    return {name: json.dumps(x) for name, x in made.items()} | {
        "stands twice": text[:-1] + f', "a": {json.dumps(a)}}}',
        "stands twice within": text.replace('"dtype":', '"dtype": "F64", "dtype":', 1),
        "not JSON": text[:-1],
        "NaN": text.replace("[2, 3]", "[NaN, 3]"),
        "no JSON object": "[" + text + "]",
    }


SAID = {"overlaps": "takes|overlaps", "hole": "hole", "NaN": "NaN", "stands twice within": "dtype stands twice"}


def test_what_is_wrong_with_a_header_is_said(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    described, data = parts(path)
    for what, text in changes(described).items():
        hostile.header(path, text, data)
        with pytest.raises(UserError, match="not a readable safetensors file") as raised:
            weights.header(path)
        assert re.search(SAID.get(what, what.removesuffix(" of truth")), str(raised.value)), (what, str(raised.value))


@settings(deadline=None, max_examples=150, database=None)
@given(st.data())
def test_a_header_of_any_bytes_is_sound_or_named(tmp_path_factory, data):
    """Never another error; and what is taken for sound, the library reads with the same shapes."""
    directory = tmp_path_factory.mktemp("h")
    path = directory / "x.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        found = headers.read(path)
    except headers.Unsound:
        return
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {n: e.shape for n, e in found.items()}


# --- names and numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", ".", 7, None, [], "a\0"]
)
def test_an_index_names_files_beside_it(file, tmp_path):
    (tmp_path / "m").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "m" / "a").symlink_to(tmp_path)
    (tmp_path / "m" / weights.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=r"weight_map: names .*, which is not a file beside it"):
        weights.files_by_name(tmp_path / "m")


def test_a_snapshot_of_the_hubs_cache_is_links(tmp_path):
    """snapshots/x/model.safetensors -> ../../blobs/y: the name is plain, where it leads is the user's own cache."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "x").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "blobs" / "y")
    (tmp_path / "snapshots" / "x" / "part.safetensors").symlink_to("../../blobs/y")
    (tmp_path / "snapshots" / "x" / weights.INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert set(weights.files_by_name(tmp_path / "snapshots" / "x")) == {"a"}


def test_an_index_and_its_files_hold_the_same_tensors(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    for weight_map, said in (
        ({"a": "x.safetensors"}, "b of x.safetensors is not named"),
        ({"c": "x.safetensors"}, "c is not in x"),
    ):
        (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=said):
            weights.files_by_name(tmp_path)


@pytest.mark.parametrize(
    "described, said",
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"text_config": {"n_layer": 10**6}}, "n_layer"),
        ({"vocab_size": 2**25}, "vocab_size"),
        ({"hidden_size": 10**4000}, "hidden_size: .* a number of 13288 bits"),
        ({"num_local_experts": 10**5}, "num_local_experts"),
        ({"head_dim": -2}, "head_dim"),
        ({"sub": [{"num_attention_heads": 10**5}]}, "num_attention_heads"),
    ],
)
def test_numbers_of_things(described, said, tmp_path):
    with pytest.raises(UserError, match=said):
        limits.check_numbers(tmp_path / "config.json", described)
    limits.check_numbers(tmp_path, {"vocab_size": 262_144, "num_hidden_layers": 126, "max_position_embeddings": 10**7})
    limits.check_numbers(tmp_path, {"pad_token_id": 10**9, "rope_theta": 10**9, "num_experts": 512, "q_lora_rank": -1})


@pytest.mark.parametrize("name", ["../rows.jsonl", "/etc/passwd", "https://host/x", "a/../../b"])
def test_a_datasets_card_names_files_of_its_directory(name, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_files:\n  - split: train\n    path: {name}\n---\n")
    with pytest.raises(UserError, match=r"README\.md: data_files: expected files of this directory"):
        check_inside(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: data/train-*.xml\n---\n")
    check_inside(tmp_path)


def test_aliases_in_a_datasets_card(tmp_path):
    (tmp_path / "README.md").write_text(f"---\nx: [{hostile.BOMB}]\ndata_files: *h\n---\n")
    with pytest.raises(UserError, match="has aliases, which are not read"):
        check_inside(tmp_path)


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_what_is_a_secret(monkeypatch):
    monkeypatch.setattr(redact, "_hidden", set())
    redact.hide(
        {"HF_TOKEN": "abcd-efgh-1", "TOKENIZERS_PARALLELISM": "falsefalse", "SOME_KEY": "/a/path/to", "API_KEY": "x"}
    )
    shown = {
        "got abcd-efgh-1!": "got ***!",
        "falsefalse /a/path/to x": "falsefalse /a/path/to x",
        "https://user:pw@host/x?q=1": "https://***@host/x?q=1",
        "https://host/x?access_token=12&b=3": "https://host/x?access_token=***&b=3",
        "Authorization: Bearer abc.def-ghi": "Authorization: Bearer ***",
        "https://host/x?a=1&API-KEY=12": "https://host/x?a=1&API-KEY=***",
        "by Basic abc.def-ghi": "by Basic ***",
        "hf_ABCDEFghijklmnop1234 is gone": "*** is gone",
        **{
            f"is {form}ABCDEFghijklmnop1234": "is ***"
            for form in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "sk-", "AKIA")
        },
        "task-based_and_a_long_name, the new token: 5": "task-based_and_a_long_name, the new token: 5",
        "model@revision at a@b.c": "model@revision at a@b.c",
    }
    assert {text: redact.redact(text) for text in shown} == shown


def test_a_number_with_the_digits_of_a_password_stays_one(tmp_path, monkeypatch):
    """A row stays JSON and a configuration stays what it was; in a text the same digits are hidden, escaped or not."""
    monkeypatch.setattr(redact, "_hidden", {"20261128", 'quo"ted\\one'})
    rows = log.JsonLines(tmp_path / "metrics.jsonl", 0)
    rows.write({"step": 1, "num_tokens": 20261128, "said": ["20261128", {'quo"ted\\one': 'a quo"ted\\one'}]})
    rows.close()
    found = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert found == {"step": 1, "num_tokens": 20261128, "said": ["***", {"***": "a ***"}]}
    config.save({"seed": 20261128, "name": "20261128"}, tmp_path / "config.yaml", {"host": "20261128"})
    text = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text) == {"seed": 20261128, "name": "***"} and text.startswith("# host: ***\n")


@settings(deadline=None, max_examples=100, database=None)
@given(
    st.text(max_size=60), st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=8, max_size=40)
)
def test_a_hidden_value_is_nowhere(around, secret):
    if secret[0] in "/~." or secret in redact.MARK:
        return
    before = set(redact._hidden)
    redact.hide({"X_SECRET": secret})
    try:
        shown = [around + secret + around, repr(around + secret), json.dumps([secret]), secret[:20], secret[-20:]]
        for text in map(redact.redact, shown):
            assert secret not in text
            assert len(secret) <= redact.PIECE or not (
                secret[: redact.PIECE] in text or secret[-redact.PIECE :] in text
            )
    finally:
        redact._hidden.clear()
        redact._hidden.update(before)


def test_a_secret_of_several_words_or_lines(monkeypatch, capsys):
    """Also where a terminal, or a message, breaks it."""
    monkeypatch.setattr(redact, "_hidden", set())
    redact.hide({"A_PASSWORD": "one two\tthree  four\n", "B_TOKEN": "  short\n"})
    assert (
        redact.redact("'one two three  four' or one two three four, 'one two\\tthree  four'") == "'***' or ***, '***'"
    )
    assert redact.redact("it is short") == "it is short"  # what is left of it is too short to be one
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    terminal.say(terminal.Row("a", "x" * 12 + " one two three four"), terminal.Heading("one two three four"))
    said = capsys.readouterr().out
    assert "***" in said and "three" not in said


def test_the_page_of_examples_shows_rows_and_no_secrets(monkeypatch):
    monkeypatch.setattr(redact, "_hidden", {"canary of a page"})
    example = page.Example("rows.jsonl:1", "shortest", "", [], [("ground truth", "a canary of a page")])
    text = page.render(
        "canary of a page", ["  canary of a page"], [example], [("canary of a page:1", "canary of a page")]
    )
    assert text.count("canary of a page") == 1 and text.count("***") >= 4


def command(tmp_path, embedded_dir, *more) -> list:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in hostile.ROWS))
    argv = ["--model_name_or_path", embedded_dir.model, "--dataset_name", rows, "--max_steps", 3, "--batch_size", 4]
    argv += ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--max_seq_length", 128]
    return [*argv, "--dataset_num_proc", 1, "--sample_tokens", 0, "--save_steps", 1, *more]


def planted(tmp_path, output: str) -> list[str]:
    """The secrets that stand in what a run printed, or left in any file."""
    texts = [output.encode(), *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())]
    return [name for name, secret in faults.SECRETS.items() if any(secret.encode() in text for text in texts)]


@pytest.mark.parametrize(
    "hook, status, said",
    [
        ("secrets_in_the_environment", 0, r"warning: 401 for https://\*\*\*@host/x with Authorization: Bearer \*\*\*"),
        ("an_error_with_secrets_at_step_2", 1, r"ValueError: 401 for https://\*\*\*@host"),
        ("a_users_error_with_secrets_at_step_2", 2, r"error: 401 for https://\*\*\*@host"),
    ],
)
def test_secrets_are_nowhere_in_what_a_run_leaves(hook, status, said, tmp_path, embedded_dir):
    argv = command(tmp_path, embedded_dir, "--report_to", "tensorboard")
    result = ranks.launch(argv, 1, "launch.sft", tmp_path / "log", hook=f"tests.faults:{hook}")
    assert result.codes == [status], result.output
    assert re.search(said, result.output), result.output
    assert "NETWORK" not in result.output
    assert not planted(tmp_path, result.output)


@pytest.mark.parametrize("value", ["https://user:canary-four@host/x", "hf_ABCDEFGHIJKLMNOPQRST"])
def test_a_flag_with_a_secret_is_refused_without_saying_it(value, tmp_path, embedded_dir):
    result = ranks.launch(command(tmp_path, embedded_dir, "--eval_dataset_name", value), 1, "launch.sft")
    assert result.codes == [2] and "--eval_dataset_name holds a secret" in result.output, result.output
    assert "canary-four" not in result.output and "ABCDEFGH" not in result.output
    assert not (tmp_path / "out").exists()


# --- the network, and files -------------------------------------------------------------------------------------------


def test_the_hook_sees_who_calls(tmp_path, embedded_dir):
    argv = command(tmp_path, embedded_dir, "--use_lora", "true", "--adapter_name_or_path", "owner/adapter")
    result = ranks.launch(argv, 1, "launch.sft", hook="tests.faults:deny_the_network")
    assert result.codes == [2] and "NETWORK socket.getaddrinfo" in result.output, result.output


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_who_may_read_what_a_run_leaves(tmp_path, embedded_dir):
    """Caches and checkpoints are this user's; final/ and the records of the run are as the umask says."""
    before = os.umask(0o022)
    try:
        result = ranks.launch(command(tmp_path, embedded_dir), 2, "launch.sft", hook="tests.faults:deny_the_network")
    finally:
        os.umask(before)
    assert result.ok and "NETWORK" not in result.output, result.output
    out = tmp_path / "out"
    assert mode(out / "checkpoints") == mode(tmp_path / "cache" / "tokens") == 0o700
    assert {mode(p) for p in (out / "checkpoints").glob("step-*")} == {0o700}
    assert {mode(p) for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()} == {0o700}
    assert {mode(p) for p in (tmp_path / "cache" / "tokens").glob(".*.lock")} == {0o600}
    assert mode(out / ".lock") == 0o600
    assert mode(out / "final") == 0o755 and mode(out / "config.yaml") == mode(out / "metrics.jsonl") == 0o644


def test_links_under_names_that_anybody_can_guess(tmp_path, embedded_dir):
    """Whoever can write to the directory put links there first: what they lead to stays as it is."""
    victim = tmp_path / "victim"
    (victim / "inside").mkdir(parents=True)
    (victim / "file").write_text("mine")
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    for name in (".config.yaml.partial", "metrics.partial", "metrics.jsonl"):
        (out / name).symlink_to(victim / "file")
    for name in (".final.partial", "checkpoints/tmp-000001"):
        (out / name).symlink_to(victim)
    result = ranks.launch(command(tmp_path, embedded_dir), 1, "launch.sft")
    assert result.ok, result.output
    assert (victim / "file").read_text() == "mine" and sorted(p.name for p in victim.iterdir()) == ["file", "inside"]
    assert (out / "final" / "config.json").is_file() and not (out / "metrics.jsonl").is_symlink()
    assert (out / "checkpoints" / "step-000001").is_dir()


def test_a_lock_that_is_a_link_is_refused(tmp_path, embedded_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "victim")
    result = ranks.launch(command(tmp_path, embedded_dir), 1, "launch.sft")
    assert result.codes == [2] and "cannot be written" in result.output, result.output
    assert (tmp_path / "victim").read_text() == "mine"


def test_new_files_replace_links(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    disk.write_new(tmp_path / "x", "other", 0o600)
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "x").read_text() == "other"
    assert mode(tmp_path / "x") == 0o600
    (tmp_path / "x").unlink()
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *args, **options: None)  # somebody put it there again
    with pytest.raises(FileExistsError):
        disk.write_new(tmp_path / "x", "other")
    assert (tmp_path / "victim").read_text() == "mine"


# --- the drill --------------------------------------------------------------------------------------------------------


def test_the_drill_has_what_it_says():
    assert len(hostile.ATTACKS) >= hostile.SUITE.sizes[0] and len({a.name for a in hostile.ATTACKS}) == len(
        hostile.ATTACKS
    )
    assert [case.name for case in hostile.SUITE.cases(30, 7)] == [case.name for case in hostile.SUITE.cases(30, 7)]


@pytest.mark.parametrize("name", ["a pickle for weights", "an index that names a file outside"])
def test_a_control_of_the_drill_is_caught(name, tmp_path):
    """With the defence taken away the drill says so, and with it nothing."""
    control = next(c for c in hostile.SUITE.controls.values() if any(case.name == name for case in c(9, 0)))
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    which = next(a for a in hostile.ATTACKS if a.name == name)
    assert hostile.run(which, tmp_path / "with") == ""
    assert next(case for case in control(9, 0) if case.name == name).run(tmp_path / "without")

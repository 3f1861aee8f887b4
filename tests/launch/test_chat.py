"""launch.chat: pieces of text that are never taken back, the answers of launch.generate, the commands, Ctrl-C, and a
terminal as it is.
"""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import world
from engine.data import embedded
from engine.data.chat import load_tokenizer
from engine.data.rows import BadRow
from engine.flags import RolloutFlags
from engine.model import open_model
from launch import chat as launch_chat
from launch.chat import Config
from launch.conversation import Answer, Streamed, Talk
from launch.display import Ink
from launch.inference import cautions, open_sampler, opened_thought
from launch.room import COMMANDS, Room
from rollout import Request, Sampler, SamplingParams
from tests import ranks

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def here():
    return world.start()


@pytest.fixture(scope="module")
def made(here, embedded_dir):
    """(chat, sampler) of the embedded model with room for 160 tokens."""
    base = open_model(Config(model_name_or_path=str(embedded_dir.model)), here)
    return base.chat, open_sampler(base, here, window=160, flags=RolloutFlags(rollout_slots=1))[0]


@pytest.fixture(scope="module")
def chat(embedded_dir):
    return load_tokenizer(embedded_dir.model, 512)


@pytest.fixture
def talk(made):
    chat, sampler = made
    return Talk(chat, sampler, SamplingParams(12, stop_ids=chat.end_ids), seed=1)


def answered(talk: Talk, text: str) -> str:
    talk.say(text)
    answer = Answer()
    said = "".join(talk.answer(answer))
    assert talk.keep(answer)
    return said


# --- streaming --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 511), min_size=1, max_size=40), st.booleans())
def test_pieces_are_the_response_and_grow(ids, ends):
    chat = CHAT[0]
    ids = ids + list(chat.end_ids) if ends else ids
    streamed = Streamed(chat)
    pieces = [streamed.more(ids[:n]) for n in range(1, len(ids) + 1)]
    assert "".join([*pieces, streamed.rest(ids)]) == chat.response_text(np.array(ids))


CHAT: list = []


@pytest.fixture(autouse=True, scope="module")
def _chat(chat):
    CHAT[:] = [chat]


def test_no_piece_is_half_a_character_or_an_end(chat):
    text = "a図é😀 b\n\nc"
    ids = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], *chat.end_ids]
    assert len(ids) > len(text)  # characters of several tokens
    streamed = Streamed(chat)
    pieces = [streamed.more(ids[:n]) for n in range(1, len(ids) + 1)] + [streamed.rest(ids)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= 6
    assert Streamed(chat).more(chat.tokenizer("a <|end|>")["input_ids"]) == "a"


def test_a_text_that_is_taken_back_is_told_to_the_end():
    """Byte fallback: bytes that were characters and, with the next one, are none."""
    texts = {1: "\u00e9", 2: "\ufffd\ufffd\ufffdx", 3: "\ufffd\ufffd\ufffdx."}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[len(ids)], added_tokens_decoder={})
    streamed = Streamed(SimpleNamespace(tokenizer=tokenizer, end_ids=(), response_text=lambda ids: texts[len(ids)]))
    assert [streamed.more([1] * n) for n in (1, 2)] == ["\u00e9", ""]
    assert streamed.rest([1, 1, 1]) == texts[3]


# --- a conversation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_generate(temperature, talk):
    talk.params = replace(talk.params, temperature=temperature)
    said = answered(talk, "Tell Ada about the choir.")
    ids = talk.chat.prompt_ids([{"role": "user", "content": "Tell Ada about the choir."}])
    [rollout] = talk.sampler.generate([Request(ids, 0)], talk.params, seed=1, step=0)
    assert said == talk.chat.response_text(rollout.response_ids)
    again = answered(talk, "And the museum?")
    history = [*talk.turns[:-1]]
    [rollout] = talk.sampler.generate([Request(talk.chat.prompt_ids(history), 1)], talk.params, seed=1, step=0)
    assert again == talk.chat.response_text(rollout.response_ids)


def test_an_answer_left_early_leaves_the_sampler_as_it_was(talk):
    whole = answered(talk, "Tell Ada about the choir.")
    talk.new()
    talk.say("Tell Bela about the museum.")
    pieces = talk.answer(Answer())
    next(pieces), next(pieces), pieces.close()
    talk.new()
    assert answered(talk, "Tell Ada about the choir.") == whole


def test_another_answer_is_another_draw_and_the_next_turn_begins_anew(talk):
    first = answered(talk, "a")
    assert talk.again() and not talk.again()
    answer = Answer()
    second = "".join(talk.answer(answer))
    assert talk.keep(answer) and second != first and talk.number == 1
    talk.say("b")
    assert talk.retries == 0


def test_what_was_stopped_is_kept_up_to_the_last_whole_character(talk):
    talk.say("a")
    ids = talk.chat.tokenizer("b図", add_special_tokens=False)["input_ids"]
    assert talk.keep(Answer(ids[:-1])) and talk.turns[-1] == {"role": "assistant", "content": "b"}
    talk.say("c")
    assert not talk.keep(Answer()) and [turn["role"] for turn in talk.turns] == ["user", "assistant"]


def test_control_tokens_of_an_answer_do_not_stop_the_conversation(talk):
    talk.say("a")
    ids = talk.chat.tokenizer("b <|pad|>c<|end|>", add_special_tokens=False)["input_ids"]
    assert talk.keep(Answer(ids, "stop")) and talk.turns[-1]["content"] == "b c"
    talk.say("d")
    assert len(talk.prompt())
    thinking = replace(talk.chat, habits=replace(talk.chat.habits, thoughts="thinking"))
    behind = Talk(thinking, talk.sampler, talk.params, 1, turns=[{"role": "user", "content": "a"}])
    assert behind.keep(Answer(ids, "stop")) and behind.turns[-1]["content"] == "c"


def test_an_answer_takes_what_room_there_is_and_then_none(talk):
    talk.say("a " * 30)
    talk.params = replace(talk.params, max_new_tokens=500)
    answer = Answer()
    list(talk.answer(answer))
    assert len(talk.prompt()) + len(answer.ids) <= 160 and (answer.reason == "stop" or len(answer.ids) == talk.room)
    talk.withdraw()
    talk.say("a " * 200)
    with pytest.raises(BadRow, match="leaves room for 159: /new begins another"):
        talk.prompt()


def test_a_system_turn_is_folded_where_the_template_has_none(talk, embedded_dir, tmp_path):
    assert talk.set_system("Be kind.") == "" and talk.messages() == [{"role": "system", "content": "Be kind."}]
    (tmp_path / "t.jinja").write_text(NO_SYSTEM)
    chat = load_tokenizer(embedded_dir.model, 512, chat_template=str(tmp_path / "t.jinja"))
    folding = Talk(chat, talk.sampler, talk.params, 1)
    assert "no system turn" in folding.set_system("Be kind.")
    folding.say("a")
    assert chat.tokenizer.decode(folding.prompt()).startswith("<|user|>\nBe kind.\n\na")
    with pytest.raises(BadRow, match="control token"):
        folding.set_system("a <|end|>")
    assert folding.system == "Be kind."
    assert folding.set_system(None) == "" and folding.messages() == folding.turns


def test_what_is_said_of_thoughts(here, embedded_dir, tmp_path):
    (tmp_path / "t.jinja").write_text(THINKS)
    chat = load_tokenizer(embedded_dir.model, 512, chat_template=str(tmp_path / "t.jinja"))
    assert opened_thought(chat) == "<think>"
    base = open_model(Config(model_name_or_path=str(embedded_dir.model)), here)
    assert opened_thought(base.chat) == ""
    assert cautions(replace(base, chat=chat)) == [
        "the template begins every answer with '<think>': what follows is a thought, and is shown"
    ]
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 1.0, "top_k": 50, "do_sample": true}'
    )
    assert cautions(replace(base, directory=tmp_path), True) == [
        "not used: temperature 0.6 of the model's generation_config.json; flags say how to sample"
    ]


# --- the room ---------------------------------------------------------------------------------------------------------


def script(monkeypatch, capsys, talks, *lines) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    Room(talks, Ink(False), ["first", "second"]).run()
    return capsys.readouterr().out


def test_lines_are_read_where_there_is_no_terminal(monkeypatch, capsys, talk, tmp_path):
    path = tmp_path / "saved.jsonl"
    lines = (
        "/save x",
        "Hello",
        "/retry",
        "//slash",
        "/temperature 0",
        "/temperature -1",
        "/temprature 1",
        "",
        "a <|end|>",
    )
    out = script(
        monkeypatch, capsys, [talk], *lines, "/system Be kind.", f"/save {path}", "/save", "/help", "/quit", "no"
    )
    assert [turn["content"] for turn in talk.turns[::2]] == ["Hello", "/slash"] and len(talk.turns) == 4
    assert "/save: nothing was said yet" in out and "greedy from now on" in out and talk.params.temperature == 0
    assert "/temperature: expected a number of 0 or more, got '-1'" in out
    assert "/temprature is no command (did you mean /temperature?)" in out
    assert "content of message 4 holds the control token '<|end|>'" in out and "/save FILE: the name is missing" in out
    assert all(name in out for name in COMMANDS) and "> no" not in out and "> Hello" in out
    [row] = [json.loads(line) for line in path.read_text().splitlines()]
    assert row == {"messages": talk.messages(), "model": "first"} and row["messages"][0]["role"] == "system"


def test_two_models_answer_one_under_the_other(monkeypatch, capsys, talk):
    other = Talk(talk.chat, talk.sampler, replace(talk.params, temperature=0), 1)
    out = script(monkeypatch, capsys, [talk, other], "Hello", "/retry", "/new", "again")
    assert out.count("first:\n") == out.count("second:\n") == 3
    assert talk.turns[0]["content"] == other.turns[0]["content"] == "again" and len(talk.turns) == len(other.turns) == 2


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(after, monkeypatch, capsys, talk):
    original = talk.sampler.tokens

    def interrupted(*args, **options):
        for n, found in enumerate(original(*args, **options)):
            if n == after:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(talk.sampler, "tokens", interrupted)
    out = script(monkeypatch, capsys, [talk], "Hello")
    if after:
        assert "stopped; what was said is kept" in out and len(talk.turns) == 2 and talk.turns[1]["content"]
        assert talk.turns[1]["content"].startswith(out.splitlines()[1].rstrip())
    else:
        assert "stopped before a word was said" in out and not talk.turns


def in_terminal(slave: str, argv: list[str], no_color: str) -> None:
    """The command with a terminal of its own, from which Ctrl-C comes."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background ignores
    os.setsid()
    descriptor = os.open(slave, os.O_RDWR)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ |= {"TERM": "xterm", "NO_COLOR": no_color}
    from engine import config

    tokens = Sampler.tokens

    def slowly(*args, **options):
        for found in tokens(*args, **options):
            time.sleep(0.05)
            yield found

    Sampler.tokens = slowly
    world.main(lambda: launch_chat.chat(config.parse(Config, argv)))


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal(no_color, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "terminal"
    embedded(cache)
    master, slave = pty.openpty()
    argv = ["--cache_dir", str(cache), "--response_length", "400", "--temperature", "0"]  # greedy noise has no end
    process = ranks.context.Process(target=in_terminal, args=(os.ttyname(slave), argv, no_color))
    process.start()
    seen, at = b"", 0

    def until(word: bytes, more: int = 0) -> None:
        """Reads up to the word, and some bytes behind it."""
        nonlocal seen, at
        begun = time.monotonic()
        while word not in seen[at:] or len(seen) < seen.index(word, at) + len(word) + more:
            ready, _, _ = select.select([master], [], [], 1)
            assert process.is_alive() and time.monotonic() - begun < 60, seen
            seen += os.read(master, 4096) if ready else b""
        at = seen.index(word, at) + len(word)

    until(b"> ")
    os.write(master, b"Hello\n")
    until(b"Hello\r\n", more=20)  # of the answer
    os.write(master, b"\x03")
    until(b"what was said is kept")
    until(b"> ")
    os.write(master, b"\x04")
    process.join(60)
    os.close(slave)
    os.close(master)
    assert process.exitcode == 0, seen
    assert (b"\x1b[2m" in seen) == (no_color == "") and (b"\x1b[1;36m" in seen) == (no_color == "")


@pytest.mark.parametrize(
    ("argv", "count", "line"),
    [
        ([], 2, "launch.chat is one process, not 2: start it with python -m launch.chat"),
        (["--compare", "nowhere/at all/x"], 1, "--model_name_or_path nowhere/at all/x: no such directory"),
        (["--system", "a <|end|>"], 1, "--system_prompt: content of message 0 holds the control token"),
        (["--top_p", "2"], 1, "--top_p must be between 1e-09 and 1, got 2.0"),
    ],
)
def test_bad_input_gets_one_line(argv, count, line, embedded_dir, tmp_path):
    argv = [*argv, "--cache_dir", Path(embedded_dir.model).parents[1]]
    result = ranks.launch(argv, count, module="launch.chat", log=tmp_path / "log")
    errors = [text for text in result.output.splitlines() if text.startswith("error: ")]
    assert set(result.codes) == {2} and len(errors) == 1 and line in errors[0], result.output

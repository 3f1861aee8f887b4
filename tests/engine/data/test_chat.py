"""Masks: whatever the conversation and the template, the trained tokens spell the assistant's contents and end-of-turn
tokens.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.data import chat as chat_module
from engine.data.chat import ChatTokenizer, load_tokenizer
from engine.data.rows import BadRow
from engine.errors import UserError

# Templates in the styles of the field, each written for these tests, with what an assistant's turn must spell.
HEADERS = "{% for m in messages %}{{ '<|start|>' + m.role + '<|sep|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
CHATML = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|eot|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role + '\n' + m.content }}<|eot|>\n{% endfor %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{%"
    " endif %}{% endfor %}{% for m in messages %}{% set said = m.content %}{% set thought = '' %}{% if m.role =="
    " 'assistant' and '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " %}{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|start|>{{ m.role + '\n' }}{% if m.role =="
    " 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + said.lstrip('\n') }}{% else"
    " %}{{ said }}{% endif %}<|eot|>\n{% endfor %}"
)
GEMMA = (
    "<|bos|>{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{%"
    " endif %}<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n{% endfor %}"
)
INST = (
    "<|bos|>{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role =="
    " 'assistant' %}{{ ' ' + m.content + '<|eot|>' }}{% else %}{{ raise_exception('only user and assistant') }}{% endif"
    " %}{% endfor %}"
)
COLON = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + '<|eot|>' }}"
    "{% else %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
)


def prompt(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


# (content, whether no user follows, whether a prompt stands before it) → what is trained
def plain(content: str, last: bool, prompted: bool) -> str:
    return content + "<|eot|>"


def trimmed(content: str, last: bool, prompted: bool) -> str:
    return content.strip() + "<|eot|>"


STYLES = {
    "tulu": (None, plain),
    "headers": ("<|bos|>" + HEADERS + prompt("<|start|>assistant<|sep|>\n\n"), trimmed),
    "chatml": (CHATML + prompt("<|start|>assistant\n"), plain),
    # the empty thought stands between the prompt and the content: the model has to write it, so it is trained
    "thinking": (
        THINKING + prompt("<|start|>assistant\n"),
        lambda c, last, prompted: "<think>\n\n</think>\n\n" * last + (c.lstrip("\n") if last else c) + "<|eot|>",
    ),
    # the prompt itself closes the thought: it is the prompt's, and the earlier turns, which have none, begin at their
    # content
    "thought in prompt": (
        THINKING + prompt("<|start|>assistant\n<think>\n\n</think>\n\n"),
        lambda c, last, prompted: (c.lstrip("\n") if last else c) + "<|eot|>",
    ),
    # the prompt opens a thought that the turns do not have
    "open thought": (CHATML + prompt("<|start|>assistant\n<think>\n"), plain),
    "gemma": (GEMMA + prompt("<|start|>model\n"), trimmed),
    "inst": (INST, lambda c, last, prompted: " " * prompted + c + "<|eot|>"),
    "colon": (COLON + prompt("ASSISTANT: "), plain),
    # ignores add_generation_prompt: the header is in no prompt, and is not trained all the same
    "no prompt": (CHATML, plain),
}
NO_SYSTEM = ("gemma", "inst")
CONTROL = ["<|bos|>", "<|eot|>", "<|start|>", "<|sep|>", "<unk>"]
CORPUS = [
    "Who is it and what do they want? I think it is one of the neighbours, with the ladder.",
    "1 + 1 = 2, 12 * 12 = 144",
] * 4


def byte_level() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [*CORPUS, "\n\n a\n b\n\n\n"],
        trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False),
    )
    return bpe


def sentencepiece(scheme: str) -> Tokenizer:
    """Puts a space before the first word; bytes for what it does not know, newlines among them."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=CONTROL, show_progress=False))
    trained = json.loads(pieces.to_str())["model"]
    vocab, merges = trained["vocab"], [tuple(m) for m in trained["merges"]]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(CONTROL)
    return bpe


@functools.cache
def make(style: str, kind: str = "bytes", vocab_size: int = 10_000) -> ChatTokenizer:
    template = STYLES[style][0] if style in STYLES else style
    backend = byte_level() if kind == "bytes" else sentencepiece(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|eot|>", bos_token="<|bos|>", model_max_length=64
    )
    tokenizer.chat_template = template
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return load_tokenizer(Path(directory), vocab_size)


# --- random conversations ---------------------------------------------------------------------------------------------

snippets = st.sampled_from(
    [
        "Who is it?",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        "é",
        "e\u0301",
        "🦙👩‍👩‍👧",
        "数学",
        "\u200b",
        "\ufeff",
        "\u2028",
        "a",
        "assistant",
        "<|assistant|>\n",
        "<|user|>\n",
        "{{ x }}",
        "{% if %}",
        "[INST]",
        "ASSISTANT: ",
        "<think>",
        "<|",
        "|>",
        "eot",
        "\\n",
        "\0",
        "\x7f",
        "I think",
        "144",
    ]
)
contents = st.lists(snippets | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=5).map("".join)


@st.composite
def conversations(draw, system: bool = True, wild: bool = True) -> list[dict[str, str]]:
    """Any order of roles where `wild` (the assistant first, two in a row), else user and assistant in turns."""
    if wild:
        roles = draw(
            st.lists(
                st.sampled_from(["user", "assistant", "assistant"] + ["system", "tool"] * system),
                min_size=1,
                max_size=7,
            )
        )
    else:
        roles = ["system"] * (system and draw(st.booleans())) + ["user", "assistant"] * draw(st.integers(1, 4))
    return [{"role": role, "content": draw(contents)} for role in roles]


def expected_turns(style: str, messages: list[dict[str, str]]) -> list[str]:
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    return [
        STYLES[style][1](m["content"], i > last_user, i > 0) for i, m in enumerate(messages) if m["role"] == "assistant"
    ]


def spell(chat: ChatTokenizer, ids) -> str:
    """The characters of tokens, without the liberties that decode() takes at the edges."""
    if chat.splits_faithfully:
        return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    raw = b"".join(
        bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode()
        for t in chat.tokenizer.convert_ids_to_tokens(ids)
    )
    return raw.decode()


def runs(ids: np.ndarray, mask: np.ndarray, chat: ChatTokenizer) -> list[str]:
    """The texts of the trained tokens, turn by turn: a turn ends with its end token."""
    texts = (spell(chat, ids[mask].tolist()) + "\0\0").split("<|eot|>")
    assert texts.pop() == "\0\0"  # nothing is trained behind the last end of turn
    return [text + "<|eot|>" for text in texts]


@pytest.mark.parametrize("style", STYLES)
def test_trained_tokens_spell_the_assistant(style):
    chat = make(style)
    assert chat.splits_faithfully
    assert chat.end_of_turn == "<|eot|>"

    @settings(deadline=None, max_examples=60, database=None)
    @given(conversations(system=style not in NO_SYSTEM))
    @example([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
    @example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}] * 3)
    @example(
        [
            {"role": "assistant", "content": "\n"},
            {"role": "assistant", "content": " a "},
            {"role": "user", "content": "assistant"},
        ]
    )
    def check(messages):
        ids, mask = chat.encode(messages, 10**6, last_turn_only=False)
        assert ids.dtype == np.int32
        assert mask.dtype == np.bool_
        assert ids.shape == mask.shape
        assert spell(chat, ids.tolist()) == chat.tokenizer.apply_chat_template(messages, tokenize=False)
        want = expected_turns(style, messages)
        assert runs(ids, mask, chat) == want

        _, last = chat.encode(messages, 10**6, last_turn_only=True)
        assert runs(ids, last, chat) == (want[-1:] if messages[-1]["role"] == "assistant" else [])
        assert not (last & ~mask).any()

        for length in {1, len(ids) // 2, len(ids) - 1, len(ids), len(ids) + 1} - {0}:
            cut_ids, cut_mask = chat.encode(messages, length, last_turn_only=True)
            assert (cut_ids == ids[:length]).all()
            assert (cut_mask == last[:length]).all()

    check()


@pytest.mark.parametrize("style", STYLES)
def test_the_model_sees_the_same_at_inference(style):
    """ids of the prompt, rendered with add_generation_prompt, followed by the ids of the response."""
    chat = make(style)
    bare = style in ("no prompt", "open thought")  # the header, or another one, comes between

    @settings(deadline=None, max_examples=40, database=None)
    @given(
        conversations(system=style not in NO_SYSTEM, wild=False).map(
            lambda m: m[: 3 if m[0]["role"] == "system" else 2]
        )
    )
    def check(messages):
        assume(not any(chat.control.search(m["content"]) for m in messages))  # its pieces may come to stand together
        ids, mask = chat.encode(messages, 10**6, last_turn_only=True)
        (response,) = expected_turns(style, messages)
        rendered = chat.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        if not bare:
            prompt_ids = chat.tokenizer(rendered, add_special_tokens=False)["input_ids"]
            assert ids[: len(prompt_ids)].tolist() == prompt_ids
            assert mask.tolist().index(True) == len(prompt_ids)
        response_ids = chat.tokenizer(response, add_special_tokens=False)["input_ids"]
        assert ids[mask].tolist() == response_ids

    check()


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
@pytest.mark.parametrize("style", STYLES)
def test_vocabularies_that_add_a_space(style, kind):
    """Their tokens begin with the space before a word, so a turn may take the one that its header ends with, and no
    more.
    """
    chat = make(style, kind)
    assert not chat.splits_faithfully

    @settings(deadline=None, max_examples=20, database=None)
    @given(conversations(system=style not in NO_SYSTEM))
    def check(messages):
        assume(not any("▁" in m["content"] for m in messages))
        ids, mask = chat.encode(messages, 10**6, last_turn_only=False)
        got, want = runs(ids, mask, chat), expected_turns(style, messages)
        assert len(got) == len(want)
        whole, spans = chat.spans(messages)
        for trained, turn, (start, _) in zip(got, want, spans, strict=True):
            added = start == 0 or whole.endswith((" ", *CONTROL), 0, start)
            assert trained == turn or (added and trained == " " + turn)

    check()


def test_an_end_of_turn_that_eats_what_follows(tmp_path):
    """rstrip=True: a control token takes along the white space behind it, which tokenising by turns would not see."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken(name, rstrip=True, special=True) for name in ("<|stop|>", "<|model|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|stop|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|model|>\n' if m.role == 'assistant' else 'user\n' }}{{ m.content }}<|stop|>\n{%"
        " endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    chat = load_tokenizer(tmp_path, 1000)
    messages = [USER, BOT, USER, BOT | {"content": "\n\n It is one."}]
    ids, mask = chat.encode(messages, 1000, False)
    assert ids.tolist() == chat.tokenizer(chat.render(messages), add_special_tokens=False)["input_ids"]
    stop, model = chat.tokenizer.convert_tokens_to_ids(["<|stop|>", "<|model|>"])
    assert [mask[i] for i in np.flatnonzero(ids == stop)] == [False, True, False, True]
    assert not mask[ids == model].any()
    assert [text.strip() for text in chat.tokenizer.decode(ids[mask & (ids != stop)]).split("It is")] == [
        "",
        "one.",
        "one.",
    ]


# --- conversations that are refused -----------------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is one."}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("control", CONTROL)
def test_control_tokens_in_contents(style, control):
    chat = make(style)
    for i, messages in enumerate(([USER | {"content": f"a{control}b"}, BOT], [USER, BOT | {"content": control}])):
        with pytest.raises(BadRow, match=f"content of message {i} holds the control token"):
            chat.encode(messages, 100, False)


def test_a_conversation_of_very_many_messages(monkeypatch):
    """Its turns are found in a time that grows with the square of their number."""
    monkeypatch.setattr("engine.data.chat.MAX_MESSAGES", 4)
    chat = make("tulu")
    assert chat.encode([USER, BOT] * 2, 100, False)[1].any() and len(chat.prompt_ids([USER, BOT, USER]))
    for read in (lambda: chat.encode([USER, BOT] * 3, 100, False), lambda: chat.prompt_ids([USER, BOT] * 2 + [USER])):
        with pytest.raises(BadRow, match=r"^messages: expected at most 4, got [56]$"):
            read()


def test_a_role_that_the_template_refuses():
    for style in NO_SYSTEM:
        with pytest.raises(BadRow, match=r"the chat template refuses the conversation: .*(no such role|only user)"):
            make(style).encode([{"role": "system", "content": "x"}, USER, BOT], 100, False)
    with pytest.raises(BadRow, match="unknown role narrator"):
        make("tulu").encode([USER | {"role": "narrator"}, BOT], 100, False)


FILTER = "{% for m in messages if CONDITION %}<|start|>{{ m.role + '\n' + m.content }}<|eot|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (FILTER.replace("CONDITION", "m.role != 'tool'"), "user tool assistant"),
        (FILTER.replace("CONDITION", "m.role != 'system'"), "system user assistant"),
        (
            FILTER.replace("CONDITION", "loop.index0 > -1")
            .replace(" if loop.index0 > -1", "")
            .replace("m.content", "(m.content + m.content)"),
            "user assistant",
        ),
        (
            FILTER.replace(" if CONDITION", "").replace(
                "in messages", "in messages | sort(attribute='role', reverse=true)"
            ),
            "user assistant user assistant",
        ),
    ],
)
@pytest.mark.parametrize("content", ["a", "", "user", "a whole sentence of words"])
def test_templates_that_drop_move_or_repeat(template, roles, content):
    """Whatever the content: one letter, and even nothing, would be found somewhere in the text."""
    messages = [{"role": role, "content": content} for role in roles.split()]
    with pytest.raises((BadRow, UserError), match=r"drops, moves or repeats message \d|drops the"):
        make(template).encode(messages, 100, False)


@pytest.mark.parametrize(
    "change",
    [
        "m.content | upper",
        "m.content | replace('one', 'two')",
        "m.content[:5]",
        "m.content + ('!' if 'one' in m.content else '')",
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_templates_that_change_contents(change, role):
    template = FILTER.replace(" if CONDITION", "").replace(
        "m.content", f"({change} if m.role == '{role}' else m.content)"
    )
    messages = [{"role": "user", "content": "is one one?"}, {"role": "assistant", "content": "yes, one."}]
    if "!" in change and role == "assistant":  # what it adds inside the turn is what the model writes at inference
        ids, mask = make(template).encode(messages, 100, False)
        assert runs(ids, mask, make(template)) == ["yes, one.!<|eot|>"]
        return
    with pytest.raises((BadRow, UserError), match=f"changes the content of message {role == 'assistant':d}|drops the"):
        make(template).encode(messages, 100, False)


def test_an_end_of_turn_only_at_the_end():
    """Else the span of the first answer would run on to the end of the last, over the user's words."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '<|eot|>' if loop.last else '\n' }}{% endfor %}"
        + prompt("assistant: ")
    )
    chat = make(template)
    ids, mask = chat.encode([USER, BOT], 100, False)
    assert runs(ids, mask, chat) == ["It is one.<|eot|>"]
    for content in ("It is one.", "Who is it?", ""):
        with pytest.raises(BadRow, match=r"does not end message 1 with '<\|eot\|>'"):
            chat.encode([USER, BOT | {"content": content}, USER, BOT], 100, False)


def test_thoughts_in_contents():
    """Reasoning data under a template that takes thoughts apart: kept in the last turn; in earlier ones the template
    drops them.
    """
    chat, thought = make("thinking"), BOT | {"content": "<think>\nIt rang.\n</think>\n\nIt is one."}
    ids, mask = chat.encode([USER, BOT, USER, thought], 1000, False)
    assert runs(ids, mask, chat) == ["It is one.<|eot|>", thought["content"] + "<|eot|>"]
    ids, mask = chat.encode([USER, thought, USER, BOT], 1000, False)
    assert runs(ids, mask, chat) == ["It is one.<|eot|>", "<think>\n\n</think>\n\nIt is one.<|eot|>"]


@pytest.mark.parametrize(
    ("asked", "got"), [("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26"), ("%A, %B %d", "Friday, July 26")]
)
def test_the_date_of_the_day_is_not_in_the_tokens(asked, got):
    template = (
        "{%- if strftime_now is defined %}{%- set today = strftime_now('"
        + asked
        + "') %}{%- endif %}{{- today }}"
        + CHATML
    )
    chat = make(template)
    assert spell(chat, chat.encode([USER, BOT], 1000, False)[0].tolist()).startswith(f"{got}<|start|>")
    assert chat.tokenizer.chat_template == template  # what is exported is the tokenizer's own


def test_ids_beyond_the_embedding():
    chat = make("chatml")
    largest = int(chat.encode([USER, BOT], 100, False)[0].max())
    assert make("chatml", vocab_size=largest + 1).encode([USER, BOT], 100, False)[0].max() == largest
    with pytest.raises(BadRow, match=f"token id {largest} is beyond the model's {largest} embeddings"):
        make("chatml", vocab_size=largest).encode([USER, BOT], 100, False)
    with pytest.raises(UserError, match=r"the end-of-turn token .* has id 1, beyond the model's 1 embeddings"):
        make("chatml", vocab_size=1)


# --- tokenizers that are refused --------------------------------------------------------------------------------------


def save(tmp_path: Path, **options) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), **{k: v for k, v in options.items() if k != "chat_template"}
    )
    tokenizer.chat_template = options.get("chat_template")
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "neither a chat template nor an end-of-sequence token"),
        (
            {"eos_token": "<|eot|>", "chat_template": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"},
            "without an end token",
        ),
        (
            {
                "eos_token": "<|eot|>",
                "chat_template": "{% for m in messages if m.role == 'user' %}{{ m.content }}<|eot|>{% endfor %}",
            },
            "drops the assistant turn",
        ),
        (
            {"eos_token": "<|eot|>", "chat_template": "{{ raise_exception('never') }}"},
            "the chat template fails on a user and an assistant turn .never",
        ),
        ({"eos_token": "<|eot|>", "chat_template": "{% for m in messages %}"}, "the chat template fails"),
        ({"eos_token": "<|eot|>", "chat_template": "{{ 1 // 0 }}"}, "the chat template fails"),
        ({"eos_token": "<|eot|>", "chat_template": "{{ messages.__class__.__mro__ }}"}, "the chat template fails"),
    ],
)
def test_tokenizers_that_are_refused(options, expected, tmp_path):
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(save(tmp_path, **options), 1000)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("damage", ["nothing", "empty", "text", "other"])
def test_directories_without_a_usable_tokenizer(damage, tmp_path):
    if damage != "nothing":
        save(tmp_path, eos_token="<|eot|>")
        (tmp_path / "tokenizer.json").write_text({"empty": "", "text": "words", "other": '{"version": "1.0"}'}[damage])
    with pytest.raises(UserError, match="no usable tokenizer") as error:
        load_tokenizer(tmp_path, 1000)
    assert str(error.value).isprintable()


def test_tulu_stands_in_where_there_is_no_template(tmp_path):
    chat = load_tokenizer(save(tmp_path, eos_token="<|eot|>"), 1000)
    assert chat.template_origin == "Tülu's, since the tokenizer has none"
    assert chat.tokenizer.chat_template == chat_module.TULU_TEMPLATE
    messages = [{"role": "system", "content": "Be kind."}, USER, BOT, USER, BOT]
    assert chat.render(messages) == (  # the original's format, character by character
        "<|system|>\nBe kind.\n<|user|>\nWho is it?\n<|assistant|>\nIt is one.<|eot|>\n<|user|>\nWho is"
        " it?\n<|assistant|>\nIt is one.<|eot|>"
    )
    assert chat.render([USER], add_generation_prompt=True) == "<|user|>\nWho is it?\n<|assistant|>\n"


def test_the_fingerprint_changes_with_what_changes_tokens(tmp_path):
    base = make("chatml").fingerprint
    assert base == make.__wrapped__("chatml").fingerprint
    others = [
        make("tulu").fingerprint,
        make("chatml", "first").fingerprint,
        make("chatml", vocab_size=9_999).fingerprint,
        make(STYLES["chatml"][0].replace("Be kind.", "Be good.")).fingerprint,  # of the same habits
    ]
    tokenizer = make.__wrapped__("chatml")
    tokenizer.tokenizer.bos_token = "<|sep|>"
    others.append(tokenizer.fingerprint)
    assert len({base, *others}) == 6

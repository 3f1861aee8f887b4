"""Control tokens and chat templates that the flags give to a tokenizer."""

from __future__ import annotations

import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engine.data.chat import load_tokenizer
from engine.data.vocabulary import add_special_tokens, read_template
from engine.errors import UserError

TOKEN = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Z"]), min_size=2, max_size=8).map(
    lambda text: f"<|{text}|>"
)


@pytest.fixture(scope="module")
def directory(embedded_dir):
    return embedded_dir.model


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(TOKEN, min_size=1, max_size=4, unique=True), text=st.text("abc <|>.", max_size=12))
def test_a_token_has_one_id_of_its_own(directory, tokens, text):
    """Ids go on from the largest; each token is one id wherever it stands; nothing else is tokenised otherwise; and a
    saved tokenizer is the same.
    """
    plain, tokenizer = (AutoTokenizer.from_pretrained(directory) for _ in range(2))
    tokens = [*tokens, "<|end|>"]
    new, there = add_special_tokens(tokenizer, tokens)
    assert new == {token: 512 + i for i, token in enumerate(t for t in tokens if t != "<|end|>")}
    assert there == {"<|end|>": 1}
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        again = AutoTokenizer.from_pretrained(saved)
    for found in (tokenizer, again):
        ids = plain(text)["input_ids"]
        assert found(text)["input_ids"] == ids
        for token, i in (new | there).items():
            assert found(text + token + text)["input_ids"] == [*ids, i, *ids]


def test_an_entry_of_the_vocabulary_becomes_a_control_token(directory):
    """It keeps its id, and is whole from then on."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    entry, i = next((t, i) for t, i in tokenizer.get_vocab().items() if len(t) > 2 and t.isalpha() and t.isascii())
    assert add_special_tokens(tokenizer, [entry]) == ({}, {entry: i})
    assert tokenizer.added_tokens_decoder[i].special and len(tokenizer) == 512
    assert tokenizer(f"7{entry}7")["input_ids"][1:-1] == [i]


def test_a_template_by_file_or_name(directory, tmp_path):
    file = tmp_path / "chat.jinja"
    text = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    file.write_text(text + "{% if add_generation_prompt %}assistant: {% endif %}")
    chat = load_tokenizer(directory, 512, ["<x>"], str(file))
    assert chat.vocab_size == 513 and chat.template_origin == str(file) and chat.end_of_turn == "<|end|>"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert chat.render(messages) == "user: Hi<|end|>\nassistant: Yes<|end|>\n"
    chat.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", 513).render(messages) == chat.render(messages)
    named = load_tokenizer(tmp_path / "saved", 513, (), "tulu")
    assert named.template == load_tokenizer(directory, 512).template and named.template_origin == "Tülu's"

    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty").write_text(" \n")
    for name, message in (
        ("chat.jinjaa", "no such file; expected a Jinja file, or tulu (did you mean"),
        ("binary", "not UTF-8"),
        ("empty", "the file is empty"),
        ("", "not readable"),
    ):
        with pytest.raises(UserError, match="--chat_template") as caught:
            read_template(str(tmp_path / name))
        assert message in str(caught.value) and "\n" not in str(caught.value)

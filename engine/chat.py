"""Conversations as token ids with an exact mask of what is trained.

Every assistant turn trains its content and its end-of-turn token, never the role header. The text is the chat template's
own; spans come from rendering prefixes of the conversation, and every span is tokenised by itself, so that a turn begins on
a token boundary exactly as it does when the model generates it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer

from engine.errors import UserError
from engine.rows import BadRow

# The Tülu format: plain-text role markers, each turn ended by a newline but for the assistant's, which ends in the
# end-of-sequence token (and a newline only where another turn follows). An unknown role is an error, not silence.
TULU_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% elif message['role'] in ['system', 'user', 'tool'] %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template whose end-of-turn token is known. `template_origin` says whose template it is."""

    tokenizer: Any
    template_origin: str
    end_of_turn: str
    end_of_turn_id: int
    vocab_size: int
    splits_faithfully: bool
    control: re.Pattern

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes token ids or masks: vocabulary, merges, template, end of turn."""
        state = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.end_of_turn, self.vocab_size]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def render(self, messages: list[dict[str, str]], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the conversation: {str(error)[:120]}") from None

    def spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and [start, end) of every assistant turn in it: content and end-of-turn token. Raises BadRow."""
        whole = self.render(messages)
        spans = []
        for i, message in enumerate(messages):
            if control := self.control.search(message["content"]):
                raise BadRow(f"content of message {i} holds the control token {control.group()!r}")
            if message["content"].strip() not in whole:
                raise BadRow(f"the chat template drops or changes message {i} (role {message['role']})")
            if message["role"] != "assistant":
                continue
            head = self.render(messages[:i], add_generation_prompt=True) if i else self._opening(messages, whole)
            if not whole.startswith(head):
                head = self._head_without_prompt(messages, i, whole)
            end = whole.find(self.end_of_turn, len(head))
            if end < 0:
                raise BadRow(f"the chat template does not end message {i} with {self.end_of_turn!r}")
            spans.append((len(head), end + len(self.end_of_turn)))
        return whole, spans

    def _opening(self, messages: list[dict[str, str]], whole: str) -> str:
        """The header of a conversation that opens with an assistant turn: what stands before its content."""
        content = messages[0]["content"].strip()
        return whole[: whole.find(content)] if content else whole[: whole.find(self.end_of_turn)]

    def _head_without_prompt(self, messages: list[dict[str, str]], i: int, whole: str) -> str:
        """For templates whose generation prompt is not a prefix of the turn (it closes an empty thought, say)."""
        before = self.render(messages[:i])
        content = messages[i]["content"].strip()
        start = whole.find(content, len(before)) if whole.startswith(before) and content else -1
        if start < 0:
            raise BadRow(f"the chat template renders the turns before message {i} differently once it is there")
        return whole[:start]

    def encode(self, messages: list[dict[str, str]], max_length: int, last_turn_only: bool) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool), cut to `max_length` tokens; mask is True where the token is trained. Raises BadRow."""
        whole, spans = self.spans(messages)
        counted = spans[-1:] if last_turn_only and messages[-1]["role"] == "assistant" else [] if last_turn_only else spans
        if self.splits_faithfully:
            edges = [0, *(edge for span in spans for edge in span), len(whole)]
            pieces = [(whole[a:b], (a, b) in counted) for a, b in zip(edges, edges[1:], strict=False) if a < b]
            encoded = self.tokenizer([piece for piece, _ in pieces], add_special_tokens=False)["input_ids"]
            ids = np.array([i for piece in encoded for i in piece], np.int32)
            mask = np.repeat([trained for _, trained in pieces], [len(piece) for piece in encoded])
        else:
            encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            ids = np.array(encoding["input_ids"], np.int32)
            # a token belongs to the turn in which its last character stands: the space that some vocabularies put before a word
            mask = np.array([any(start < stop <= end for start, end in counted) for _, stop in encoding["offset_mapping"]], bool)
        if len(ids) and ids.max() >= self.vocab_size:
            raise BadRow(f"token id {ids.max()} is beyond the model's {self.vocab_size} embeddings")
        return ids[:max_length], mask[:max_length]


def load_tokenizer(directory: Path, vocab_size: int) -> ChatTokenizer:
    """The tokenizer of a model directory. Raises UserError for one that cannot train a conversation."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}: no usable tokenizer ({str(error).splitlines()[0][:160]})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: needs a fast tokenizer (tokenizer.json)")
    origin = "the tokenizer's own"
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise UserError(f"{directory}: the tokenizer has neither a chat template nor an end-of-sequence token to use Tülu's with")
        tokenizer.chat_template, origin = TULU_TEMPLATE, "Tülu's, since the tokenizer has none"
    end_of_turn = _end_of_turn(tokenizer, directory)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return ChatTokenizer(
        tokenizer=tokenizer,
        template_origin=origin,
        end_of_turn=end_of_turn,
        end_of_turn_id=tokenizer.convert_tokens_to_ids(end_of_turn),
        vocab_size=vocab_size,
        splits_faithfully=_splits_faithfully(tokenizer),
        control=re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"),
    )


def _end_of_turn(tokenizer: Any, directory: Path) -> str:
    """The first special token after an assistant's content. A probe conversation also shows templates that drop a role."""
    question, answer = "What is one and one?", "It is two."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: the chat template fails on a user and an assistant turn ({str(error)[:120]})") from None
    for role, content in (("user", question), ("assistant", answer)):
        if content not in whole:
            raise UserError(f"{directory}: the chat template drops the {role} turn")
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | {tokenizer.eos_token}
    after = whole[whole.rindex(answer) + len(answer) :]
    found = [(after.index(token), -len(token), token) for token in special if token and token in after]
    if not found:
        raise UserError(f"{directory}: the chat template ends an assistant turn without an end token, so a model could never learn to stop")
    return min(found)[2]


def _splits_faithfully(tokenizer: Any) -> bool:
    """False for vocabularies that put a space before the first word of whatever they are given."""
    pieces = ["a word", "another\n", "\n and", " more"]
    ids = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == "".join(pieces)

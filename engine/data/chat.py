"""Conversations as token ids with an exact mask of what is trained.

Every assistant turn trains its content and its end-of-turn token, never the role header. The text is the chat
template's own. Where the contents stand in it is found once for every sequence of roles, by rendering it with marks for
contents; a turn begins where the prompt for it (`add_generation_prompt`) ends, so what a template puts between prompt
and content, an empty thought for example, is trained: at inference the model has to write it. Every turn is tokenised
by itself, so that it begins on a token boundary exactly as it does when the model generates it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from engine.data.rows import BadRow
from engine.errors import UserError

# The Tülu format: plain-text role markers, each turn ended by a newline but for the assistant's, which ends in the
# end-of-sequence token (and a newline only where another turn follows). An unknown role is an error, not silence.
TULU_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] +"
    " eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% elif message['role'] in ['system', 'user', 'tool'] %}{{"
    " '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% else %}{{ raise_exception('unknown role ' +"
    " message['role']) }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


# Tokens are a function of the conversation: a template that asks for today's date gets this one (Llama 3's own
# default).
FIXED_DATE = (
    "{% macro strftime_now(f) %}{{ f | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') |"
    " replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24') | replace('%A', 'Friday') }}{% endmacro %}"
)


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer with a chat template whose end-of-turn token is known. `template_origin` says whose template it
    is.
    """

    tokenizer: Any
    template: str
    template_origin: str
    end_of_turn: str
    end_of_turn_id: int
    vocab_size: int
    splits_faithfully: bool
    control: re.Pattern

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes token ids or masks: vocabulary, merges, template, end of turn."""
        vocabulary, special = self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.special_tokens_map
        state = [vocabulary, special, self.template, self.end_of_turn, self.vocab_size]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def render(self, messages: list[dict[str, str]], **options: Any) -> str:
        """The template's text of the conversation. Raises BadRow."""
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, **options)
        except Exception as error:  # a template is a program from outside, in a sandbox: it may raise anything
            raise BadRow(f"the chat template refuses the conversation: {str(error)[:120]}") from None

    def spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and [start, end) of every assistant turn in it: content and end-of-turn token.
        Raises BadRow.
        """
        for i, message in enumerate(messages):
            if control := self.control.search(message["content"]):
                raise BadRow(f"content of message {i} holds the control token {control.group()!r}")
        literals = _literals(self, tuple(message["role"] for message in messages))
        whole = self.render(messages)
        spans, at = [], 0
        for i, (message, before, after) in enumerate(zip(messages, literals, literals[1:], strict=False)):
            start = at + len(before)
            end = self._content_end(message, whole, start, after)
            if end < start or not whole.startswith(before, at):
                raise BadRow(f"the chat template changes the content of message {i} (role {message['role']})")
            if message["role"] == "assistant":
                spans.append((start, whole.index(self.end_of_turn, end) + len(self.end_of_turn)))
            at = end
        if whole[at:] != literals[-1]:
            raise BadRow("the chat template writes something that depends on the contents")
        return whole, spans

    def _content_end(self, message: dict[str, str], whole: str, start: int, after: str) -> int:
        """Where the content that starts at `start` ends, such that `after` follows it; -1 if it is not there, as it is
        or trimmed.
        """
        content = message["content"]
        if message["role"] == "assistant":  # whatever the model writes up to its end of turn, which no content holds
            end = whole.find(self.end_of_turn, start) - after.index(self.end_of_turn)
            return end if whole.startswith(after, max(end, start)) and content.strip() in whole[start:end] else -1
        for text in (content, content.strip(), content.lstrip(), content.rstrip()):
            if whole.startswith(text + after, start):
                return start + len(text)
        return -1

    def encode(
        self, messages: list[dict[str, str]], max_length: int, last_turn_only: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool), cut to `max_length` tokens; mask is True where the token is trained. Raises
        BadRow.
        """
        whole, spans = self.spans(messages)
        counted = (
            spans[-1:] if last_turn_only and messages[-1]["role"] == "assistant" else [] if last_turn_only else spans
        )
        if self.splits_faithfully:
            edges = [0, *(edge for span in spans for edge in span), len(whole)]
            pieces = [(whole[a:b], (a, b) in counted) for a, b in pairwise(edges) if a < b]
            encoded = self.tokenizer([piece for piece, _ in pieces], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            ids = np.array([i for piece in encoded for i in piece], np.int32)
            mask = np.repeat([trained for _, trained in pieces], [len(piece) for piece in encoded])
        else:
            encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids = np.array(encoding["input_ids"], np.int32)
            # A token belongs to the turn in which its last visible character stands: some vocabularies put the space
            # before a word into its token, and some control tokens take along the newline behind them.
            ends = [a + len(whole[a:b].rstrip()) if whole[a:b].strip() else b for a, b in encoding["offset_mapping"]]
            mask = np.array([any(start < end <= stop for start, stop in counted) for end in ends], bool)
        if len(ids) and ids.max() >= self.vocab_size:
            raise BadRow(f"token id {ids.max()} is beyond the model's {self.vocab_size} embeddings")
        return ids[:max_length], mask[:max_length]


@lru_cache(4096)
def _literals(chat: ChatTokenizer, roles: tuple[str, ...]) -> list[str]:
    """What the template writes before, between and after the contents of messages with these roles. Raises BadRow.

    Before an assistant's content: up to where the model begins to write, which is where the prompt ends or else the
    content starts.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]  # private-use characters, which no template looks at
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    whole = chat.render(messages)
    literals, start = [], 0
    for i, (role, mark) in enumerate(zip(roles, marks, strict=True)):
        content = whole.find(mark, start)
        if content < 0 or whole.count(mark) != 1:
            raise BadRow(f"the chat template drops, moves or repeats message {i} (role {role})")
        begin = _end_of_prompt(chat, messages[:i], whole[:content]) if role == "assistant" else content
        literals.append(whole[start : max(begin, start)])
        start = content + len(mark)
        if role == "assistant" and not whole[start:].lstrip().startswith(chat.end_of_turn):
            raise BadRow(f"the chat template does not end message {i} with {chat.end_of_turn!r}")
    return [*literals, whole[start:]]


def _end_of_prompt(chat: ChatTokenizer, messages: list[dict[str, str]], before: str) -> int:
    """Where, in the text `before` the next content, the prompt for it ends; without a prompt that is its beginning:
    where it ends.

    A template whose prompt lacks the role header (it ignores add_generation_prompt) must not have the header trained.
    """
    try:
        bare, prompt = chat.render(messages), chat.render(messages, add_generation_prompt=True)
    except BadRow:
        return len(before)
    begins = prompt and before.startswith(prompt) and (prompt != bare or not before[len(prompt) :].strip())
    return len(prompt) if begins else len(before)


def load_tokenizer(directory: Path, vocab_size: int) -> ChatTokenizer:
    """The tokenizer of a model directory. Raises UserError for one that cannot train a conversation."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the library and its Rust core raise whatever they do: the user reads one line
        raise UserError(
            f"{directory}: no usable tokenizer ({' '.join(str(error).split())[:160] or type(error).__name__})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: needs a fast tokenizer (tokenizer.json)")
    origin = "the tokenizer's own"
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{directory}: the tokenizer has neither a chat template nor an end-of-sequence token to use Tülu's"
                " with"
            )
        tokenizer.chat_template, origin = TULU_TEMPLATE, "Tülu's, since the tokenizer has none"
    end_of_turn = _end_of_turn(tokenizer, directory)
    end_of_turn_id: Any = tokenizer.convert_tokens_to_ids(end_of_turn)
    if end_of_turn_id >= vocab_size:
        raise UserError(
            f"{directory}: the end-of-turn token {end_of_turn!r} has id {end_of_turn_id}, beyond the model's"
            f" {vocab_size} embeddings"
        )
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return ChatTokenizer(
        tokenizer=tokenizer,
        template=FIXED_DATE + tokenizer.get_chat_template(),
        template_origin=origin,
        end_of_turn=end_of_turn,
        end_of_turn_id=end_of_turn_id,
        vocab_size=vocab_size,
        splits_faithfully=_splits_faithfully(tokenizer, end_of_turn),
        control=re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"),
    )


def _end_of_turn(tokenizer: Any, directory: Path) -> str:
    """The first special token after an assistant's content. A probe conversation also shows templates that drop a
    role.
    """
    question, answer = "What is one and one?", "It is two."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # as in render()
        raise UserError(
            f"{directory}: the chat template fails on a user and an assistant turn"
            f" ({' '.join(str(error).split())[:120]})"
        ) from None
    for role, content in (("user", question), ("assistant", answer)):
        if content not in whole:
            raise UserError(f"{directory}: the chat template drops the {role} turn")
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | {tokenizer.eos_token}
    after = whole[whole.rindex(answer) + len(answer) :]
    found = [(after.index(token), -len(token), token) for token in special if token and token in after]
    if not found:
        raise UserError(
            f"{directory}: the chat template ends an assistant turn without an end token, so a model could never learn"
            " to stop"
        )
    return min(found)[2]


def _splits_faithfully(tokenizer: Any, end_of_turn: str) -> bool:
    """False for vocabularies that put a space before the first word of whatever they are given, or let a control token
    eat what follows.
    """
    pieces = ["a word", "another\n", end_of_turn, "\n and", " more"]
    ids = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    whole = tokenizer(end_of_turn + "\n and", add_special_tokens=False)["input_ids"]
    apart = tokenizer("\n and", add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return decoded == "".join(pieces) and whole[-len(apart) :] == apart

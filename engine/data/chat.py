"""Conversations as token ids with an exact mask of what is trained.

Every assistant turn trains what the model has to write there: from where the prompt for it (`add_generation_prompt`)
ends up to its end, never the role header. The text is the chat template's own, and what is rendered is the truth: what
a template puts between prompt and content, an empty thought for example, is trained, and a thought that it leaves out
of earlier turns is not. Every turn is tokenised by itself, so that it begins on a token boundary exactly as it does
when the model generates it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.cuts import UNCUT, Cutter, check_length
from engine.data.messages import Message, Notes, leaves, texts_of
from engine.data.rows import BadRow
from engine.data.skeleton import (
    MAX_MESSAGES,
    Span,
    behind_last_end,
    mark,
    plain_skeleton,
    refuse_unshown,
    skeleton_around,
)
from engine.data.template import PROBE_TOOL, Habits, Refused, Unusable, habits_of, renderer
from engine.data.tokenizer import (
    MARK_OF_THOUGHT,
    control_of,
    declared_ends,
    opened,
    splits_faithfully,
    template_of,
    tokenised,
)
from engine.data.vocabulary import TULU, add_special_tokens, read_template
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


CLOSED_THOUGHT = re.compile(r"[<\[]/[\w:]{0,20}(?:think|thought|reason)[\w:]{0,20}[>\]]", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer with a chat template whose habits are known. `template_origin` says whose template it is.

    `control` matches a control token; `declared_ends` are ids at which the model's generation_config.json stops.
    """

    tokenizer: Any
    template: str
    template_with_tools: str
    template_origin: str
    habits: Habits
    declared_ends: tuple[int, ...]
    vocab_size: int
    splits_faithfully: bool
    cutter: Cutter
    control: re.Pattern
    added: dict[str, int] = field(default_factory=dict)  # by --add_special_tokens: token → its new id
    known: dict[str, int] = field(default_factory=dict)  # of its tokens, those that were there already

    @property
    def end_of_turn(self) -> str:
        """What ends the last turn of a conversation."""
        return self.habits.ends[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id at which generation stops: those that end a turn of the template, the last turn's first, and those
        that the model declares.
        """
        ours = (self.tokenizer.convert_tokens_to_ids(stop) for stop in self.habits.stops)
        return tuple(dict.fromkeys((*ours, *self.declared_ends)))

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes token ids or masks: vocabulary, merges, template, ends of turns."""
        vocabulary, special = self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.special_tokens_map
        state = [vocabulary, special, self.template, self.template_with_tools, self.vocab_size, asdict(self.habits)]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def render(self, messages: list[Message], tools: list | None = None, **options: Any) -> str:
        """The template's text of the conversation, each key in the form that it takes. Raises BadRow for what it
        refuses or cannot show.
        """
        if tools and not self.habits.shows_tools:
            raise BadRow(f"tools: the chat template ({self.template_origin}) does not show them")
        shown = [self._as_taken(i, message) for i, message in enumerate(messages)]
        try:
            return renderer(self.tokenizer, self.template, self.template_with_tools)(shown, tools, **options)
        except Refused as error:
            raise BadRow(f"the chat template refuses the conversation: {error}") from None
        except Unusable as why:
            raise BadRow(f"the chat template {why}") from None

    def _as_taken(self, i: int, message: Message) -> Message:
        """The message with its thought under the template's key and its calls' arguments in the template's form."""
        if message.keys() == {"role", "content"}:
            return message
        taken = dict(message)
        if thought := taken.pop("reasoning_content", ""):
            if not self.habits.thoughts:
                raise BadRow(f"messages[{i}].reasoning_content: the chat template does not show thoughts")
            taken[self.habits.thoughts] = thought
        if "tool_calls" in taken and not self.habits.calls:
            raise BadRow(f"messages[{i}].tool_calls: the chat template does not show calls of tools")
        if "tool_calls" in taken and self.habits.calls == "text":
            functions = [dict(call["function"]) for call in taken["tool_calls"]]
            for function in functions:
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            taken["tool_calls"] = [
                call | {"function": function} for call, function in zip(taken["tool_calls"], functions, strict=True)
            ]
        return taken

    def written(self, messages: list[Message], tools: list | None = None) -> str:
        """The text of a conversation with the end of its last turn, also where the template leaves that to the next
        turn's marker.
        """
        after_answer, after_call = self.habits.appended
        end = (
            "" if messages[-1]["role"] != "assistant" else after_call if "tool_calls" in messages[-1] else after_answer
        )
        return self.render(messages, tools) + end

    def spans(self, messages: list[Message], tools: list | None = None) -> tuple[str, list[Span]]:
        """The conversation's text, and [start, end) of every assistant turn in it: what the model has to write there.
        Raises BadRow.
        """
        self.refuse_control(messages, tools)
        whole = self.written(messages, tools)
        if not tools and all(message.keys() == {"role", "content"} for message in messages):
            spans, _ = plain_skeleton(self, tuple(message["role"] for message in messages)).place(whole, messages)
            if spans is not None:
                return whole, spans
        spans, changed = skeleton_around(self, messages, tools).place(whole, messages)
        if spans is None:
            raise BadRow(f"the chat template changes the content of message {changed} ({messages[changed]['role']})")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, (start, end) in zip(turns, spans, strict=True):
            said, calls = messages[i]["content"], messages[i].get("tool_calls", [])
            if said.strip() not in whole[start:end] and CLOSED_THOUGHT.split(said)[-1].strip() not in whole[start:end]:
                raise BadRow(f"the chat template changes the content of message {i} (assistant)")
            if calls and not self._shows_calls(messages, tools, i, whole[start:end]):
                raise BadRow(f"the chat template drops a call of message {i}, or what is said beside it")
        return whole, spans

    def _shows_calls(self, messages: list[Message], tools: list | None, i: int, turn: str) -> bool:
        """Whether every call of message i is in its turn, by name and arguments, and a content beside them too."""
        functions = [call["function"] for call in messages[i]["tool_calls"]]
        said = [leaf for function in functions for leaf in (function["name"], *leaves(function["arguments"]))]
        times = Counter(
            leaf if isinstance(leaf, str) else json.dumps(leaf) for leaf in said if not isinstance(leaf, bool)
        )
        for text, count in times.items():
            forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
            if max(map(turn.count, forms)) < count:
                return False
        if not messages[i]["content"].strip():
            return True
        marked = [*messages[:i], messages[i] | {"content": mark(i)}, *messages[i + 1 :]]
        return mark(i) in self.render(marked, tools)

    def _shown(self, messages: list[Message], tools: list | None, key: str, whole: str) -> list[bool]:
        """Of the messages that have this key whether the template writes it, seen with marks in its place."""
        holders = [i for i, message in enumerate(messages) if key in message]
        if not holders:
            return []
        marked = [message | {key: mark(i)} if key in message else message for i, message in enumerate(messages)]
        try:
            text = self.render(marked, tools)
        except BadRow:  # a template that wants ids of another form
            return [messages[i][key] in whole for i in holders]
        return [mark(i) in text for i in holders]

    def refuse_control(self, messages: list[Message], tools: list | None = None) -> None:
        """Raises BadRow for a control token in what the row says, which would be read as one; for too many messages."""
        if len(messages) > MAX_MESSAGES:
            raise BadRow(f"messages: expected at most {MAX_MESSAGES:,}, got {len(messages):,}")
        for i, message in enumerate(messages):
            for where, text in texts_of(message):
                if control := self.control.search(text):
                    raise BadRow(f"{where} of message {i} holds the control token {control.group()!r}")
        for text in map(str, leaves(tools)):
            if control := self.control.search(text):
                raise BadRow(f"tools hold the control token {control.group()!r}")

    def encode(
        self, messages: list[Message], max_length: int, last_turn_only: bool, *, tools: list | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool), cut to `max_length` tokens; mask is True where the token is trained. Raises
        BadRow.
        """
        whole, spans = self.spans(messages, tools)
        last = spans[-1:] if messages[-1]["role"] == "assistant" else []
        return self.tokens(whole, spans, last if last_turn_only else spans, max_length)

    def encode_last(
        self, messages: list[Message], max_length: int, tools: list | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `encode` with the last turn alone trained, which the messages end in; its prompt is one piece, as at
        inference. Raises BadRow.
        """
        whole, prompt = self.written(messages, tools), self.render(messages[:-1], tools, add_generation_prompt=True)
        length = behind_last_end(whole[len(prompt) :], self.habits.ends)
        if not whole.startswith(prompt) or not length:
            return self.encode(messages, max_length, last_turn_only=True, tools=tools)
        turn = (len(prompt), len(prompt) + length)
        return self.tokens(whole, [turn], [turn], max_length)

    def tokens(
        self, whole: str, spans: list[Span], counted: list[Span], max_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A text with these turns as (ids int32, mask bool), trained in those that are `counted`, cut to `max_length`.
        Raises BadRow.
        """
        if self.splits_faithfully:
            edges = [0, *(edge for span in spans for edge in span), len(whole)]
            pieces = [(whole[a:b], (a, b) in counted) for a, b in pairwise(edges) if a < b]
            encoded = self.cutter.ids([piece for piece, _ in pieces], max_length)
            ids = np.array([i for piece in encoded for i in piece], np.int32)
            mask = np.repeat([trained for _, trained in pieces], [len(piece) for piece in encoded])
        else:
            check_length(whole)
            encoding = tokenised(self.tokenizer, whole, add_special_tokens=False, return_offsets_mapping=True)
            ids = np.array(encoding["input_ids"], np.int32)
            # A token belongs to the turn in which its last visible character stands: some vocabularies put the space
            # before a word into its token, and some control tokens take along the newline behind them.
            ends = [a + len(whole[a:b].rstrip()) if whole[a:b].strip() else b for a, b in encoding["offset_mapping"]]
            mask = np.array([any(start < end <= stop for start, stop in counted) for end in ends], bool)
        self._refuse_beyond(ids)
        return ids[:max_length], mask[:max_length]

    def lost_thoughts(self, messages: list[Message], tools: list | None, whole: str, spans: list[Span]) -> int:
        """How many thoughts of the assistant, beside its contents or in them, are not in the turns as written."""
        turns = (message for message in messages if message["role"] == "assistant")
        said = ((thought_in(message), whole[start:end]) for message, (start, end) in zip(turns, spans, strict=True))
        beside = self._shown(messages, tools, "reasoning_content", whole)
        return beside.count(False) + sum(thought not in written for thought, written in said if thought)

    def note_unshown(self, messages: list[Message], tools: list | None, whole: str, notes: Notes) -> None:
        """Notes the names and ids of messages that the template does not write."""
        for key in ("name", "tool_call_id"):
            if unshown := self._shown(messages, tools, key, whole).count(False):
                notes["not used", f"messages[].{key}"] += unshown

    def plain_text(self, text: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """A text as (ids, mask), trained whole: with the tokens that the tokenizer puts around one, and an end-of-text
        token. Raises BadRow.
        """
        eos = self.tokenizer.eos_token_id
        ids = np.array(self.cutter.plain(text, max_length), np.int32)
        if eos is not None and (not len(ids) or ids[-1] != eos):
            ids = np.append(ids, np.int32(eos))
        self._refuse_beyond(ids)
        return ids[:max_length], np.ones(min(len(ids), max_length), bool)

    def _refuse_beyond(self, ids: np.ndarray) -> None:
        if len(ids) and ids.max() >= self.vocab_size:
            raise BadRow(
                f"token id {ids.max()} is beyond the model's {self.vocab_size} embeddings: its directory holds another"
                " model's tokenizer"
            )

    def prompt_ids(self, messages: list[Message], tools: list | None = None, enough: int = UNCUT) -> np.ndarray:
        """The ids of the prompt for the next turn of the assistant, at least the first `enough` of them. Raises
        BadRow.
        """
        self.refuse_control(messages, tools)
        text = self.render(messages, tools, add_generation_prompt=True)
        refuse_unshown(self, messages, tools, text)
        ids = np.array(self.cutter.ids([text], enough)[0], np.int64)
        self._refuse_beyond(ids)
        return ids

    def response_text(self, ids: np.ndarray) -> str:
        """What a sampled response says: its tokens without those of the end of turn that it ends in, if it does."""
        ends = [self.tokenizer.convert_tokens_to_ids(self.control.findall(end)) for end in self.habits.ends]
        if len(ids) and ids[-1] in self.end_ids:
            ends.append([ids[-1]])
            ids = ids[: -max(len(end) for end in ends if list(ids[-len(end) :]) == end)]
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def thought_in(message: Message) -> str:
    """The thought at the head of an assistant's content; '' without one."""
    *thoughts, _ = CLOSED_THOUGHT.split(message["content"])
    return MARK_OF_THOUGHT.sub("", thoughts[0]).strip() if thoughts else ""


def load_tokenizer(
    directory: Path, vocab_size: int, tokens: Sequence[str] = (), chat_template: str | None = None
) -> ChatTokenizer:
    """The tokenizer of a model directory, with these control tokens and this chat template ('tulu' or a file) instead
    of its own. Raises UserError for one that cannot train a conversation.

    `vocab_size` are the model's rows; the result's are more where an added token is beyond them.
    """
    tokenizer = opened(directory)
    added, known = add_special_tokens(tokenizer, tokens)
    vocab_size = max(vocab_size, *(i + 1 for i in added.values())) if added else vocab_size
    origin, where = "the tokenizer's own", str(directory)
    if chat_template is not None:
        where = f"--chat_template {chat_template}"
        tokenizer.chat_template = None if chat_template == TULU else read_template(chat_template)
        origin = chat_template
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{directory}: the tokenizer has neither a chat template nor an end-of-sequence token to use Tülu's"
                " with"
            )
        tokenizer.chat_template = TULU_TEMPLATE
        origin = "Tülu's" if chat_template == TULU else "Tülu's, since the tokenizer has none"
    control = control_of(tokenizer)
    template, with_tools = (FIXED_DATE + template_of(tokenizer, tools, where) for tools in (None, [PROBE_TOOL]))
    try:
        habits = habits_of(renderer(tokenizer, template, with_tools), control)
    except Refused as error:
        raise UserError(f"{where}: the chat template fails on a user and an assistant turn ({error})") from None
    except Unusable as why:
        raise UserError(f"{where}: the chat template {why}") from None
    for stop in habits.stops:
        i: Any = tokenizer.convert_tokens_to_ids(stop)
        if i >= vocab_size:
            raise UserError(
                f"{directory}: the end-of-turn token {stop!r} has id {i}, beyond the model's {vocab_size} embeddings"
            )
    return ChatTokenizer(
        tokenizer=tokenizer,
        template=template,
        template_with_tools=with_tools,
        template_origin=origin,
        habits=habits,
        declared_ends=declared_ends(directory, vocab_size),
        vocab_size=vocab_size,
        splits_faithfully=splits_faithfully(tokenizer, habits.ends[0], directory),
        cutter=Cutter.of(tokenizer),
        control=control,
        added=added,
        known=known,
    )

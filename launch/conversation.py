"""One side of a chat: a model, what was said so far, and its answers as they are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from engine.data import ChatTokenizer
from engine.data.messages import Conversation, Message, folded
from engine.data.rows import BadRow
from rollout import Request, Sampler, SamplingParams

UNKNOWN = "\ufffd"  # what bytes decode to that are no character, or not yet
LONGEST_PART = 3  # bytes of a character that may wait for the last one


class Streamed:
    """The text of a response as it grows, in pieces that are never taken back: no part of a character, and no token of
    the end.
    """

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat, self.text = chat, ""
        added = chat.tokenizer.added_tokens_decoder.items()
        self._control = {i for i, token in added if token.special} | {*chat.end_ids}

    def more(self, ids: list[int]) -> str:
        """What is new and sure of the response that begins with these tokens."""
        kept = len(ids)
        while kept and ids[kept - 1] in self._control:  # perhaps the end, or its beginning
            kept -= 1
        text = self.chat.tokenizer.decode(ids[:kept], skip_special_tokens=False)
        for _ in range(LONGEST_PART):
            text = text.removesuffix(UNKNOWN)
        return self._new(text.rstrip())  # vocabularies may take back a space

    def rest(self, ids: list[int]) -> str:
        """What is missing, of the response that ends with these."""
        text = self.chat.response_text(np.asarray(ids, np.int64))
        while not text.startswith(self.text):  # bytes that looked like characters: what they became follows
            self.text = self.text[:-1]
        return self._new(text)

    def _new(self, text: str) -> str:
        if not text.startswith(self.text):
            return ""  # bytes that were characters and, with the next byte, are none: it waits for the end
        piece, self.text = text[len(self.text) :], text
        return piece


@dataclass
class Answer:
    """Of a turn of the assistant. `reason`: stop, length, or '' where the user stopped it."""

    ids: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass
class Talk:
    """A model and a conversation with it. Turns of the assistant are counted; the draws of one are a function of the
    seed, its number, and how often it was asked for again: those of `launch.generate` for the first.
    """

    chat: ChatTokenizer
    sampler: Sampler
    params: SamplingParams
    seed: int
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    retries: int = 0
    folds: bool = False  # the template has no system turn: it stands in the user's first
    room: int = 0  # tokens that there were for the last answer

    @property
    def number(self) -> int:
        """Of the next answer, from 0."""
        return sum(message["role"] == "assistant" for message in self.turns)

    def messages(self, turns: list[Message] | None = None) -> list[Message]:
        """All that the template is given, of these turns in place of those said."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *(self.turns if turns is None else turns)]

    def set_system(self, text: str | None) -> str:
        """Returns what is to be said of it: a template without system turns has it in the user's first. Raises BadRow
        for a text that cannot be said.
        """
        before, self.system, self.folds = self.system, text, False
        try:
            self._ids(self.messages(self.turns or [{"role": "user", "content": "a"}]))
        except BadRow:
            self.system = before
            raise
        return "the chat template has no system turn: it is the head of the user's first turn" if self.folds else ""

    def prompt(self) -> np.ndarray:
        """The ids of the prompt for the next answer. Raises BadRow for what cannot be said, or is too long."""
        ids = self._ids(self.messages())
        if len(ids) >= self.sampler.max_length:
            raise BadRow(
                f"the conversation has {len(ids)} tokens, and --max_seq_length, or the model, leaves room for"
                f" {self.sampler.max_length - 1}: /new begins another"
            )
        return ids

    def _ids(self, messages: list[Message]) -> np.ndarray:
        if not self.folds or self.system is None:
            try:
                return self.chat.prompt_ids(messages)
            except BadRow:
                if self.system is None:
                    raise
        ids = self.chat.prompt_ids(folded(Conversation(messages)).messages)
        self.folds = True
        return ids

    def answer(self, into: Answer) -> Iterator[str]:
        """Pieces of the next answer's text as they are sampled; `into` has its tokens at any moment. Raises BadRow."""
        ids = self.prompt()
        self.room = self.sampler.max_length - len(ids)
        params = replace(self.params, max_new_tokens=min(self.params.max_new_tokens, self.room))
        request = Request(ids, self.number, self.retries)
        streamed = Streamed(self.chat)
        for ids_so_far, reason in self.sampler.tokens(request, params, seed=self.seed, step=0):
            into.ids, into.reason = ids_so_far, reason
            yield streamed.more(into.ids)
        yield streamed.rest(into.ids)

    def say(self, text: str) -> None:
        """A turn of the user."""
        self.turns.append({"role": "user", "content": text})
        self.retries = 0

    def keep(self, answer: Answer) -> bool:
        """The answer becomes a part of the conversation; an empty one that was stopped does not, nor the turn before
        it. Control tokens in it, which a row could not hold, are left out. Returns whether it was kept.
        """
        if not answer.ids and not answer.reason:
            self.withdraw()
            return False
        said = self.chat.response_text(np.asarray(answer.ids, np.int64))
        said = said if answer.reason else said.rstrip(UNKNOWN)  # it was stopped within a character
        if self.chat.habits.thoughts:  # behind the channels in which some models think
            said = next((part for part in reversed(self.chat.control.split(said)) if part.strip()), "")
        self.turns.append({"role": "assistant", "content": self.chat.control.sub("", said)})
        return True

    def withdraw(self) -> None:
        """Takes back the user's last turn, which was not answered."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def again(self) -> bool:
        """Takes back the last answer, so that another is drawn; False where there is none."""
        if not self.turns or self.turns[-1]["role"] != "assistant":
            return False
        self.turns.pop()
        self.retries += 1
        return True

    def new(self) -> None:
        """Another conversation, with the same system turn."""
        self.turns.clear()
        self.retries = 0

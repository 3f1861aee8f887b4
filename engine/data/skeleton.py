"""Where the turns of a conversation stand in the text that its chat template writes.

The conversation is rendered once more with marks in place of contents: the pieces between the marks are the template's
own, and in them a turn of the assistant is found by rendering its prompt. Text by text, the pieces and the contents
must then make up the real rendering, or the template changed a content.

    the prompt of turn i     render(messages[:i], add_generation_prompt=True)     where its text begins
    the turn said last       render(messages[:i + 1])                             where it ends, if it is written so

A template may write a turn in another way once others follow (without its thought, with another end): then the turn
begins behind its header, and ends at the last end of a turn before the next message.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from engine.data.messages import Message
from engine.data.rows import BadRow
from engine.data.template import shared

if TYPE_CHECKING:
    from engine.data.chat import ChatTokenizer

MAX_MESSAGES = 1024  # of a conversation; a turn is found by rendering all before it: some seconds for so many
Span = tuple[int, int]
Edge = tuple[int, int]  # a piece, and an offset in it
TOOL_RESPONSE = "<tool_response>"  # a user's turn that begins with it is a tool's to templates that look at contents


@dataclass(frozen=True)
class Skeleton:
    """`pieces` stand before, between and behind the contents of the messages `marked`; `turns` are [start, end) of the
    assistant's turns.
    """

    pieces: tuple[str, ...]
    marked: tuple[int, ...]
    turns: tuple[tuple[Edge, Edge], ...]

    def place(self, whole: str, messages: list[Message]) -> tuple[list[Span] | None, int]:
        """(the turns' spans in `whole`, -1), or (None, the message whose content is not there as it is or trimmed)."""
        if not whole.startswith(self.pieces[0]):
            return None, self.marked[0] if self.marked else 0
        starts, at = [0], len(self.pieces[0])
        for i, piece in zip(self.marked, self.pieces[1:], strict=True):
            content = messages[i]["content"]
            forms = (content, content.strip(), content.lstrip(), content.rstrip())
            text = next((form for form in forms if whole.startswith(form + piece, at)), None)
            if text is None:
                return None, i
            starts.append(at + len(text))
            at += len(text) + len(piece)
        if at != len(whole):
            return None, self.marked[-1] if self.marked else 0
        for i in {i for i, m in enumerate(messages) if m["role"] != "assistant"}.difference(self.marked):
            if messages[i]["content"].strip() not in whole:
                return None, i
        return [(starts[p] + a, starts[q] + b) for (p, a), (q, b) in self.turns], -1


@lru_cache(4096)
def plain_skeleton(chat: ChatTokenizer, roles: tuple[str, ...]) -> Skeleton:
    """Of messages with these roles that have nothing but contents, all of them marked. Raises BadRow."""
    return _skeleton(
        chat, [{"role": role, "content": mark(i)} for i, role in enumerate(roles)], None, range(len(roles))
    )


def skeleton_around(chat: ChatTokenizer, messages: list[Message], tools: list | None) -> Skeleton:
    """Of this conversation, with the assistant's turns as they are. Raises BadRow."""
    marked, shown = _marked(messages)
    return _skeleton(chat, shown, tools, marked)


def mark(i: int) -> str:
    """What stands for a text of message i: private-use characters, which no template looks at."""
    return f"\ue000{i}\ue001"


def refuse_unshown(chat: ChatTokenizer, messages: list[Message], tools: list | None, prompt: str) -> None:
    """Raises BadRow where the prompt of these messages does not hold the contents of all that are not the assistant's,
    in their order and as they are or trimmed.
    """
    marked, shown = _marked(messages)
    pieces, _ = _pieces(chat.render(shown, tools, add_generation_prompt=True), shown, marked)
    _, changed = Skeleton(pieces, tuple(marked), ()).place(prompt, messages)
    if changed >= 0:
        raise BadRow(f"the chat template changes the content of message {changed} ({messages[changed]['role']})")


def _marked(messages: list[Message]) -> tuple[list[int], list[Message]]:
    """(which messages are marked: all but the assistant's, the messages with marks in place of their contents)."""
    marked = [
        i
        for i, message in enumerate(messages)
        if message["role"] != "assistant" and not message["content"].startswith(TOOL_RESPONSE)
    ]
    chosen = set(marked)
    return marked, [m | {"content": mark(i)} if i in chosen else m for i, m in enumerate(messages)]


def _pieces(whole: str, messages: list[Message], marked: list[int] | range) -> tuple[tuple[str, ...], dict[int, Span]]:
    """(what the template writes before, between and behind the marks, where each mark stands). Raises BadRow."""
    places, at = {}, 0
    for i in marked:
        start = whole.find(mark(i), at)
        if start < 0 or whole.count(mark(i)) != 1:
            raise BadRow(f"the chat template drops, moves or repeats message {i} (role {messages[i]['role']})")
        places[i] = (start, at := start + len(mark(i)))
    edges = [0, *(edge for place in places.values() for edge in place), len(whole)]
    return tuple(whole[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)), places


def _skeleton(chat: ChatTokenizer, messages: list[Message], tools: list | None, marked: list[int] | range) -> Skeleton:
    whole = chat.written(messages, tools)
    pieces, places = _pieces(whole, messages, marked)
    turns = _Turns(chat, messages, tools, whole, places).find()
    starts = [0, *(end for _, end in places.values())]

    def edge(position: int) -> Edge:
        piece = bisect_right(starts, position) - 1
        return piece, position - starts[piece]

    return Skeleton(pieces, tuple(marked), tuple((edge(start), edge(end)) for start, end in turns))


@dataclass(frozen=True)
class _Turns:
    """Finds the assistant's turns in `whole`, the marked conversation's text; `places` are its marks."""

    chat: ChatTokenizer
    messages: list[Message]
    tools: list | None
    whole: str
    places: dict[int, Span]

    def find(self) -> list[Span]:
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        for i in turns:
            starts[i] = self._start(i, starts)
        for i in turns:
            after = starts.get(i + 1, self.places.get(i + 1, (len(self.whole),))[0])
            ends[i] = self._end(i, starts[i], after)
        return [(starts[i], ends[i]) for i in turns]

    def _anchor(self, i: int) -> tuple[str, int]:
        """(the last mark before message i or '', where it ends)."""
        before = max((j for j in self.places if j < i), default=None)
        return ("", 0) if before is None else (mark(before), self.places[before][1])

    def _start(self, i: int, starts: dict[int, int]) -> int:
        """Where the model begins to write turn i: where its prompt ends, or else behind its header."""
        before, anchor = self._anchor(i)
        opening = self.chat.habits.opening
        prompt = _behind(before, self._rendered(i, add_generation_prompt=True))
        if prompt and self.chat.habits.asks and self.whole.startswith(prompt, anchor):
            return anchor + len(prompt)
        bare = _behind(before, self._rendered(i))
        if bare is not None and self.whole.startswith(bare, anchor):
            header = shared(opening, self.whole[anchor + len(bare) :][: len(opening)], self.chat.control)
            if header or not opening:
                return anchor + len(bare) + header
        # no prompt for it, or its beginning is written in another way by now
        behind = max([anchor, *(start + 1 for start in starts.values())])
        limit = self.places.get(i, self.places.get(i + 1, (len(self.whole),)))[0]
        found = self.whole.find(opening, behind, limit) if opening else -1
        if found >= 0:
            whole_prompt = self.chat.habits.prompt
            return found + len(whole_prompt if self.whole.startswith(whole_prompt, found) else opening)
        if i in self.places:
            return limit
        if prompt and behind == anchor and (alike := shared(prompt, self.whole[anchor:limit], self.chat.control)):
            return anchor + alike  # where the text departs from the prompt
        raise BadRow(f"the chat template drops, moves or repeats message {i} (role assistant)")

    def _end(self, i: int, start: int, after: int) -> int:
        """Behind the end of turn i; the next message, or its content, stands at `after`."""
        turn = self.whole[start:after]
        length = behind_last_end(turn, self.chat.habits.ends)
        if length and sum(turn.count(end) for end in self.chat.habits.ends) == 1:
            return start + length
        # several: inside the turn, or in what the template writes before the next message
        before, anchor = self._anchor(i)
        said = _behind(before, self._try(lambda: self.chat.written(self.messages[: i + 1], self.tools)))
        until = 0 if said is None else behind_last_end(said, self.chat.habits.ends)
        if said is not None and anchor + until > start and self.whole.startswith(said[:until], anchor):
            return anchor + until
        if length:
            return start + length
        ends = " or ".join(map(repr, self.chat.habits.ends))
        raise BadRow(f"the chat template does not end message {i} with {ends}")

    def _rendered(self, i: int, **options: bool) -> str | None:
        return self._try(lambda: self.chat.render(self.messages[:i], self.tools, **options)) if i else None

    @staticmethod
    def _try(render: Callable[[], str]) -> str | None:
        """None where the template refuses a part of a conversation that it takes as a whole."""
        try:
            return render()
        except BadRow:
            return None


def behind_last_end(text: str, ends: tuple[str, ...]) -> int:
    """Where the last end of a turn in the text ends; 0 if there is none."""
    return max((text.rfind(end) + len(end) for end in ends if end in text), default=0)


def _behind(mark: str, text: str | None) -> str | None:
    """What follows the mark in the text; None without it."""
    if text is None or mark not in text:
        return None
    return text[text.index(mark) + len(mark) :]

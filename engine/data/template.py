"""What a chat template does, found by rendering conversations with marks in them.

A template is a program that comes with a tokenizer. How a turn ends, which of the row's keys it shows and in which form
it wants them is not written anywhere: it is seen by rendering short conversations and looking for what was put in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from engine.data import sandbox
from engine.data.messages import THOUGHTS, Message

Render = Callable[..., str]  # (messages, tools=None, add_generation_prompt=False) → text; raises Refused
QUESTION, ANSWER, THOUGHT = "What is one and one?", "It is two.", "One more than one."
TOOL, VALUE, RESULT = "look_up", "probed value", "It was found."
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string", "description": "What."}},
            "required": ["what"],
        },
    },
}
ASKED = {"role": "user", "content": QUESTION}
SAID = {"role": "assistant", "content": ANSWER}
TAG = re.compile(r"</?[\w:]{1,40}>")


class Refused(Exception):
    """The template raised, with what it said."""


class Unusable(Exception):
    """A template that no conversation can be trained with, and why."""


@dataclass(frozen=True)
class Habits:
    """How a template writes the assistant's turns.

    ends: the texts of which one ends each turn; a turn's end is trained, and its last token stops generation.
    stops: the tokens among them at which generation stops; the first is that of a conversation's last turn.
    appended: (after an answer, after a call): what ends the last turn of a conversation but is not written there,
        because the next role's marker is what ends a turn (GLM); '' elsewhere.
    opening: what the prompt and every turn of the assistant begin with, its header; '' where the turn follows directly.
    prompt: all that the prompt adds; the opening, and perhaps a thought that it begins or closes.
    asks: whether a prompt is another text with add_generation_prompt than without.
    thoughts: the key under which the template takes thoughts; '' if it shows none.
    shows_tools: whether it writes out the tools.
    calls: 'object' or 'text', the form of a call's arguments; '' if it shows no calls.
    """

    ends: tuple[str, ...]
    stops: tuple[str, ...]
    appended: tuple[str, str]
    opening: str
    prompt: str
    asks: bool
    thoughts: str
    shows_tools: bool
    calls: str


def habits_of(render: Render, special: re.Pattern) -> Habits:
    """`special` matches one control token. Raises Unusable, and Refused if the template cannot render two turns."""
    last = render([ASKED, SAID])
    for role, content in (("user", QUESTION), ("assistant", ANSWER)):
        if content not in last:
            raise Unusable(f"drops the {role} turn")
    middle = _attempt(render, [ASKED, SAID, {"role": "user", "content": RESULT}]) or ""
    after_last = last.rpartition(ANSWER)[2]
    after_middle = middle.rpartition(ANSWER)[2].rpartition(RESULT)[0]
    calls, called = _calls(render)
    openers = _run(last, special)  # what the conversation begins with cannot end a turn that ends otherwise
    ends, appended = _ends(after_last, after_middle, special, openers)
    call_end, appended_to_call = _end_of_call(render, called, appended, special, openers)
    thoughts, thinking = _thoughts(render)
    ends += [call_end] * (bool(call_end) and call_end not in ends)
    # a token that ends a channel inside a turn, as gpt-oss's <|end|> ends its analysis, does not end generation
    inside = thinking.partition(THOUGHT)[2].rpartition(ANSWER)[0]
    stops = [special.findall(end)[-1] for end in ends]
    stops = [stop for i, stop in enumerate(stops) if i == 0 or stop not in inside]
    opening, prompt, asks = _opening(render, middle or last, special)
    if after_last.partition(ends[0])[2].strip() and not appended and prompt == opening:
        opening = prompt = ""  # a prompt that is written whether it is asked for or not: the turn begins behind it
    return Habits(
        ends=tuple(ends),
        stops=tuple(dict.fromkeys(stops)),
        appended=(appended, appended_to_call or appended),
        opening=opening,
        prompt=prompt,
        asks=asks,
        thoughts=thoughts,
        shows_tools=TOOL in (_attempt(render, [ASKED, SAID], tools=[PROBE_TOOL]) or ""),
        calls=calls,
    )


def _attempt(render: Render, messages: list[Message], **options: Any) -> str | None:
    try:
        return render(messages, **options)
    except Refused:
        return None


def _run(text: str, special: re.Pattern, openers: Sequence[str] = (), anywhere: bool = False) -> list[str]:
    """The control tokens that follow each other without a gap, from the first one on (white space may precede it), up
    to one that opens a turn.
    """
    found, at = [], None
    for match in special.finditer(text):
        if at is None and not anywhere and text[: match.start()].strip():
            break
        if at is not None and (match.start() != at or match.group() in openers):
            break
        found.append(match.group())
        at = match.end()
    return found


def _ends(after_last: str, after_middle: str, special: re.Pattern, openers: Sequence[str]) -> tuple[list[str], str]:
    """(the ends of turns, the marker that has to be appended to a last turn or ''). Raises Unusable."""
    closing = after_last[: shared(after_middle, after_last, special)] or ("" if after_middle else after_last)
    if run := _last_run(closing, special, openers):  # as a last turn ends, and one that others follow
        return [run], ""
    last, middle = _run(after_last, special, openers, anywhere=True), _run(after_middle, special, openers)
    if not last and not middle:
        raise Unusable("ends an assistant turn without an end token, so a model could never learn to stop")
    if not last:
        return [middle[0]], middle[0]
    return ["".join(last), *middle[:1]], ""


def _last_run(text: str, special: re.Pattern, openers: Sequence[str]) -> str:
    """The last control tokens of the text that follow each other without a gap, up to one that opens a turn."""
    begin = end = -1
    for match in special.finditer(text):
        begin, end = (begin if match.start() == end else match.start()), match.end()
    return "".join(_run(text[begin:], special, openers)) if end >= 0 else ""


def _calls(render: Render) -> tuple[str, Message]:
    """(the form of a call's arguments that the template writes out as JSON, or '', the turn that calls)."""
    for form, arguments in (("object", {"what": VALUE}), ("text", f'{{"what": "{VALUE}"}}')):
        call = {"id": "call00001", "type": "function", "function": {"name": TOOL, "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        text = _call_text(render, [ASKED, turn]) or ""
        # neither Python's quotes for an object nor JSON within JSON for a text
        if TOOL in text and VALUE in text and f"'{VALUE}'" not in text and f'\\"{VALUE}' not in text:
            return form, turn
    return "", {}


def _call_text(render: Render, messages: list[Message]) -> str | None:
    return _attempt(render, messages, tools=[PROBE_TOOL]) or _attempt(render, messages)


def _end_of_call(
    render: Render, turn: Message, appended: str, special: re.Pattern, openers: Sequence[str]
) -> tuple[str, str]:
    """(what ends a turn that calls a tool, what has to be appended to it if it is the last)."""
    if not turn:
        return "", ""
    said = (_call_text(render, [ASKED, turn]) or "").rstrip()
    written = said.rpartition(VALUE)[2]
    if not appended:
        return _last_run(written, special, openers), ""
    result = {"role": "tool", "content": RESULT, "tool_call_id": "call00001", "name": TOOL}
    whole = _call_text(render, [ASKED, turn, result]) or ""
    marker = _run(whole[len(said) :].partition(RESULT)[0], special) if whole.startswith(said) else []
    return "".join(marker[:1]), "".join(marker[:1])


def _thoughts(render: Render) -> tuple[str, str]:
    """(the key under which thoughts are taken or '', the text of a turn with one)."""
    for key in THOUGHTS:
        text = _attempt(render, [ASKED, SAID | {key: THOUGHT}]) or ""
        if THOUGHT in text:
            return key, text
    return "", ""


def _opening(render: Render, whole: str, special: re.Pattern) -> tuple[str, str, bool]:
    """(the header of the assistant's turns: what the prompt for one adds, as far as the turns themselves have it; all
    that the prompt adds; whether it is asked for).
    """
    header = whole.partition(QUESTION)[2].partition(ANSWER)[0]
    bare, prompt = (
        (_attempt(render, [ASKED], **options) or "").partition(QUESTION)[2]
        for options in ({}, {"add_generation_prompt": True})
    )
    before = shared(bare, header, special)
    if prompt != bare:
        return header[before : shared(prompt, header, special)], prompt[before:], True
    opening = header[before:] if header[before:].strip() else ""
    return opening, opening, False


def _alike(one: Sequence, other: Sequence) -> int:
    """How many items both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def shared(text: str, header: str, special: re.Pattern) -> int:
    """How many characters of `header` the text begins with; a control token or a tag is shared whole or not at all."""
    length = _alike(text, header)
    tokens = [match for pattern in (special, TAG) for match in pattern.finditer(header)]
    return min([length, *(m.start() for m in tokens if m.start() < length < m.end())])


def renderer(tokenizer: Any, template: str, with_tools: str) -> Render:
    """Renders with the template, or the one `with_tools` where there are some, in our sandbox. What it raises, whatever
    that is, becomes Refused; Unusable for one that wants more work or text than it may.
    """

    def render(messages: list[Message], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        conversation = {
            "messages": [_as_the_library_gives(message) for message in messages],
            "tools": sandbox.plain(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return sandbox.render(with_tools if tools else template, tokenizer.special_tokens_map | conversation)
        except sandbox.Spent as error:
            raise Unusable(str(error)) from None
        except Exception as error:  # a template is a program from outside: it may raise anything
            raise Refused(" ".join(str(error).split())[:120]) from None

    return render


def _as_the_library_gives(message: Message) -> Message:
    """Of plain data, without what is None, a thought under every name that templates read it by."""
    thought = next((message[key] for key in THOUGHTS if message.get(key) is not None), None)
    given = {key: sandbox.plain(value) for key, value in message.items() if value is not None}
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}

"""Templates in the styles of today's families, written for these tests: every trained token is one that the model has
to write at inference, and every turn ends as its template ends it.

For each style a function says, message by message, what the assistant has to write there; it shares nothing with the
code under test. Besides, wherever the prompt of a turn is how the text goes on, the turn begins behind it, token by
token.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.data.chat import ChatTokenizer, load_tokenizer
from engine.data.conversations import ConversationEncoder
from engine.data.messages import Message, folded, read
from engine.data.rows import BadRow
from engine.errors import UserError

CONTROL = [
    *("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|message|>"),
    *("<|channel|>", "<|start|>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|turn|>"),
    *("<|END_RESPONSE|>", "<|END_ACTION|>", "<|START_ACTION|>", "<|END_OF_TURN|>", "[INST]", "[/INST]", "[CALLS]"),
]
LAST_QUERY = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' and not (m.content.startswith("
    "'<tool_response>') and m.content.endswith('</tool_response>')) %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
)
# a thought beside the content, or at its head
APART = (
    "{% set thought = m.reasoning_content | default('', true) %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
TOOLS = "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
CALLS = (
    '{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": \' }}{{ c.function.name | tojson }}, "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}"
CHATML_OTHERS = (
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% else %}"
)


def chatml(turn: str, prompt: str, head: str = "") -> str:
    """ChatML whose assistant's turn is `turn`."""
    return (
        f"{LAST_QUERY}{head}{TOOLS}{{% for m in messages %}}{CHATML_OTHERS}{APART}<|im_start|>assistant\n{turn}{CALLS}"
        f"<|im_end|>\n{{% endif %}}{{% endfor %}}{PROMPT}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )


@dataclass(frozen=True)
class Place:
    """Where a turn stands: `recent` after the last question, `final` the last message, `later` the next role."""

    recent: bool
    final: bool
    later: str


Say = Callable[[Message, Place], str]


def apart(m: Message) -> tuple[str, str]:
    if "</think>" in m["content"]:
        thought, _, said = m["content"].rpartition("</think>")
        return thought.split("</think>")[0].split("<think>")[-1].strip("\n"), said.lstrip("\n")
    return m.get("reasoning_content", ""), m["content"]


def calls(m: Message) -> str:
    text = ""
    for call in m.get("tool_calls", []):
        name, arguments = (json.dumps(call["function"][k], ensure_ascii=False) for k in ("name", "arguments"))
        text += f'\n<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
    return text


def qwen3(m: Message, at: Place) -> str:
    thought, said = apart(m)
    if at.recent and (at.final or thought):
        said = f"<think>\n{thought}\n</think>\n\n" + said.lstrip("\n")
    return said + calls(m) + "<|im_end|>"


def qwen35(m: Message, at: Place) -> str:
    thought, said = apart(m)
    return (f"{thought}\n</think>\n\n" if at.recent else "") + said + calls(m) + "<|im_end|>"


def nemotron(m: Message, at: Place) -> str:
    thought, said = apart(m)  # an empty thought begins as the prompt does, '<think>', and is closed by the model
    return (f"{thought}\n</think>\n" if at.recent and thought else "</think>") + said + calls(m) + "<|im_end|>"


def cut(m: Message, at: Place) -> str:
    return m["content"].split("</think>")[-1] + "<|eos|>"


def lfm(m: Message, at: Place) -> str:
    said = m["content"] if at.final else m["content"].split("</think>")[-1].strip()
    return said + calls(m) + "<|im_end|>"


def harmony(m: Message, at: Place) -> str:
    thought = m.get("reasoning_content", "")
    analysis = (
        "<|channel|>analysis<|message|>" + thought + "<|end|>" if thought and (at.final or "tool_calls" in m) else ""
    )
    if "tool_calls" in m:
        call = m["tool_calls"][0]["function"]
        to = f" to=functions.{call['name']}<|channel|>commentary<|message|>"
        return (
            (analysis + "<|start|>assistant" if analysis else "")
            + to
            + json.dumps(call["arguments"], ensure_ascii=False)
            + "<|call|>"
        )
    final = "<|channel|>final<|message|>" + m["content"]
    return (analysis + "<|start|>assistant" if analysis else "") + final + ("<|return|>" if at.final else "<|end|>")


def glm(m: Message, at: Place) -> str:
    marker = "<|observation|>" if at.later == "tool" or (at.final and "tool_calls" in m) else "<|user|>"
    return "\n" + (m["content"].strip() + calls(m)) + marker


def cohere(m: Message, at: Place) -> str:
    if "tool_calls" in m:
        return f"<|START_ACTION|>{calls(m)}<|END_ACTION|><|END_OF_TURN|>"
    return m["content"] + "<|END_RESPONSE|><|END_OF_TURN|>"


STYLES: dict[str, tuple[str, Say, set[str]]] = {  # template, what a turn must spell, what its rows may hold
    "thoughts of the last turns": (
        chatml(
            "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n"
            "{{ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}",
            "",
        ),
        qwen3,
        {"system", "tools", "thoughts"},
    ),
    "a prompt that opens a thought": (
        chatml(
            "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}",
            "<think>\n",
            "{% if ns.last < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}",
        ),
        qwen35,
        {"system", "tools", "thoughts"},
    ),
    "an empty thought in earlier turns": (
        chatml(
            "{% if loop.index0 > ns.last and thought %}<think>\n{{ thought }}\n</think>\n{% else %}<think></think>"
            "{% endif %}{{ said }}",
            "<think>\n",
        ),
        nemotron,
        {"system", "tools", "thoughts"},
    ),
    "thoughts cut everywhere": (
        "<|bos|>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "{{ m.content.split('</think>')[-1] }}<|eos|>{% elif m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}" + PROMPT + "<|assistant|>{% endif %}",
        cut,
        {"system", "thoughts in contents"},
    ),
    "a closed thought in prompt and turns": (
        "<|bos|>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|></think>"
        "{{ m.content.split('</think>')[-1] }}<|eos|>{% elif m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}" + PROMPT + "<|assistant|></think>{% endif %}",
        cut,
        {"system", "thoughts in contents"},
    ),
    "contents with thoughts, the last kept": (
        f"{TOOLS}{{% for m in messages %}}{CHATML_OTHERS}<|im_start|>assistant\n"
        "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] | trim }}{% endif %}"
        f"{CALLS}<|im_end|>\n{{% endif %}}{{% endfor %}}{PROMPT}<|im_start|>assistant\n{{% endif %}}",
        lfm,
        {"system", "tools", "thoughts in contents"},
    ),
    "channels and three ends": (
        "<|start|>system<|message|>Be kind.{% for t in tools or [] %}\n{{ t.function.name }}: {{ t.function | tojson }}"
        "{% endfor %}<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.thinking and (loop.last or m.tool_calls) %}<|start|>assistant<|channel|>analysis<|message|>"
        "{{ m.thinking }}<|end|>{% endif %}{% if m.tool_calls %}<|start|>assistant to=functions."
        "{{ m.tool_calls[0].function.name }}<|channel|>commentary<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|channel|>final"
        "<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% elif m.role == 'tool' %}"
        "<|start|>functions to=assistant<|message|>{{ m.content }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>"
        "{{ m.content }}<|end|>{% endif %}{% endfor %}" + PROMPT + "<|start|>assistant{% endif %}",
        harmony,
        {"system", "tools", "thoughts in fields"},
    ),
    "another end for the last turn": (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        + PROMPT
        + "<|start|>assistant<|message|>{% endif %}",
        lambda m, at: m["content"] + ("<|return|>" if at.final else "<|end|>"),
        {"system"},
    ),
    "the next role's marker ends a turn": (
        "<|bos|>{% if tools %}<|system|>\n{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content.strip() }}"
        + CALLS
        + "{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}{% else %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% endif %}{% endfor %}" + PROMPT + "<|assistant|>{% endif %}",
        glm,
        {"system first", "tools"},
    ),
    "two tokens end a turn": (
        "<|bos|>{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}<|turn|><|assistant|>{% if m.tool_calls %}<|START_ACTION|>"
        + CALLS
        + "<|END_ACTION|>{% else %}{{ m.content }}<|END_RESPONSE|>{% endif %}<|END_OF_TURN|>{% else %}<|turn|><|user|>"
        "{{ m.role }}: {{ m.content }}<|END_OF_TURN|>{% endif %}{% endfor %}"
        + PROMPT
        + "<|turn|><|assistant|>{% endif %}",
        cohere,
        {"system", "tools"},
    ),
    "an end of text behind it all": (
        "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|eos|>{% endif %}",
        lambda m, at: m["content"] + "<|end|>",
        {"system"},
    ),
    "no system role": (
        "<|bos|>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n"
        "{% endfor %}" + PROMPT + "<|start|>model\n{% endif %}",
        lambda m, at: m["content"].strip() + "<|end|>",
        set(),
    ),
    "a system turn within the user's": (
        "<|bos|>{% set ns = namespace(head='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.head = ns.head + m.content + '\n\n' %}{% else %}<|start|>"
        "{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{% if m.role == 'user' %}{{ ns.head }}{% set ns.head = '' %}{% endif %}{{ m.content | trim }}<|end|>\n"
        "{% endif %}{% endfor %}" + PROMPT + "<|start|>model\n{% endif %}",
        lambda m, at: m["content"].strip() + "<|end|>",
        {"system first"},
    ),
    "a prompt that is always written": (
        "<|bos|><|turn|><|system|>Be kind.<|END_OF_TURN|>{% for m in messages %}<|turn|>{% if m.role == 'assistant' %}"
        "<|assistant|>{{ m.content }}<|END_RESPONSE|>{% else %}<|user|>{{ m.role }}: {{ m.content }}{% endif %}"
        "<|END_OF_TURN|>{% endfor %}<|turn|><|assistant|>",
        lambda m, at: m["content"] + "<|END_RESPONSE|><|END_OF_TURN|>",
        {"system"},
    ),
    "a last turn that is left open": (
        "<|bos|>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}"
        "{{ '<|end|>' if not loop.last }}{% else %}<|user|>{{ m.role }}: {{ m.content }}<|return|>{% endif %}"
        "{% endfor %}" + PROMPT + "<|assistant|>{% endif %}",
        lambda m, at: m["content"] + "<|end|>",
        {"system"},
    ),
    "a thought opened by the prompt, closed by the turn": (
        "<|bos|>{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{% if m.role == 'assistant' %}"
        "{{ '<think>' + m.reasoning_content if m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>"
        "{% endfor %}" + PROMPT + "<|assistant|><think>{% endif %}",
        lambda m, at: m.get("reasoning_content", "") + "</think>" + m["content"] + "<|end|>",
        {"system", "thoughts in fields"},
    ),
    "instructions in brackets": (
        "<|bos|>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}"
        "[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' %}{% if m.tool_calls %}[CALLS]"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% else %}"
        " {{ m.content }}{% endif %}<|eos|>{% else %}{{ raise_exception('No such role') }}"
        "{% endif %}{% endfor %}",
        lambda m, at: (
            (
                "[CALLS]"
                + "".join(
                    c["function"]["name"] + json.dumps(c["function"]["arguments"], ensure_ascii=False)
                    for c in m["tool_calls"]
                )
                if "tool_calls" in m
                else " " + m["content"]
            )
            + "<|eos|>"
        ),
        {"calls"},
    ),
}


@functools.cache
def backend() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["Who is it? It is one of them. <think>\n\n</think>\n\n assistant\n user\n"] * 4, trainer)
    return bpe


@functools.cache
def make(style: str, declared: tuple[int, ...] = ()) -> ChatTokenizer:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="<|eos|>", bos_token="<|bos|>")
    tokenizer.chat_template = STYLES[style][0] if style in STYLES else style
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        if declared:
            Path(directory, "generation_config.json").write_text(json.dumps({"eos_token_id": list(declared)}))
        return load_tokenizer(Path(directory), 10_000)


DEPARTS = {  # turns without a thought do not go on as their prompt does: '<think>' against '</think>'
    "an empty thought in earlier turns",
    "a thought opened by the prompt, closed by the turn",
}


# --- random conversations ---------------------------------------------------------------------------------------------

words = st.sampled_from(["Who is it?", "", " ", "\n", "\n\n", "one", "It is one. ", "數", "<th", "a\tb", "assistant\n"])
contents = st.lists(words, max_size=3).map("".join)
thoughts = st.sampled_from(["It rang.", "Two steps.\nThen one.", "one"])
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@st.composite
def conversations(draw, may: set[str]) -> tuple[list[Message], list[dict] | None]:
    """A system turn, then questions, each with an answer, or with calls, results and an answer."""
    messages: list[Message] = []
    tools = [TOOL] if "tools" in may and draw(st.booleans()) else None
    has_calls = tools is not None or "calls" in may
    if {"system", "system first"} & may and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents)})

    def answer(calling: bool) -> Message:
        content = "" if calling else draw(contents)
        turn: Message = {"role": "assistant", "content": content}
        thinks = {"thoughts", "thoughts in contents", "thoughts in fields"} & may and draw(st.booleans())
        if thinks and ("thoughts in contents" in may or ("thoughts" in may and draw(st.booleans()))):
            turn["content"] = f"<think>\n{draw(thoughts)}\n</think>\n\n{content}"
        elif thinks:
            turn["reasoning_content"] = draw(thoughts)
        if calling:
            call = {"name": draw(st.sampled_from(["look_up", "add"])), "arguments": {"what": draw(words)}}
            turn["tool_calls"] = [{"id": "call00001", "type": "function", "function": call}]
        return turn

    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(contents)})
        for _ in range(draw(st.integers(0, 2)) if has_calls else 0):
            messages += [answer(calling=True), {"role": "tool", "content": draw(contents), "tool_call_id": "call00001"}]
        messages.append(answer(calling=has_calls and draw(st.integers(0, 5)) == 0))
        if "tool_calls" in messages[-1] and draw(st.booleans()):
            break
        if "tool_calls" in messages[-1]:
            messages += [{"role": "tool", "content": "1", "tool_call_id": "call00001"}, answer(calling=False)]
    return messages, tools


def expected(style: str, messages: list[Message]) -> list[str]:
    last_question = max(i for i, m in enumerate(messages) if m["role"] == "user")
    roles = [m["role"] for m in messages] + [""]
    return [
        STYLES[style][1](m, Place(i > last_question, i + 1 == len(messages), roles[i + 1]))
        for i, m in enumerate(messages)
        if m["role"] == "assistant"
    ]


def decode(chat: ChatTokenizer, ids) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_trained_is_what_the_model_has_to_write(style):
    chat = make(style)

    @settings(deadline=None, max_examples=80, database=None)
    @given(conversations(STYLES[style][2]))
    def check(conversation):
        messages, tools = conversation
        whole, spans = chat.spans(messages, tools)
        want = expected(style, messages)
        assert [whole[start:end] for start, end in spans] == want
        ids, mask = chat.encode(messages, 10**6, last_turn_only=False, tools=tools)
        assert decode(chat, ids) == whole and decode(chat, ids[mask]) == "".join(want)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for i, (start, end) in zip(turns, spans, strict=True):
            try:
                prompt = chat.render(messages[:i], tools, add_generation_prompt=True)
            except BadRow:
                continue
            if not whole.startswith(prompt):
                assert i != turns[-1] or style in DEPARTS
                continue
            assert start == len(prompt)
            if i == turns[-1]:
                rest = chat.tokenizer(whole[start:end], add_special_tokens=False)["input_ids"]
                assert ids[chat.encode(messages, 10**6, True, tools=tools)[1]].tolist() == rest
            if i == turns[-1] == turns[0]:  # as it is sampled: the prompt, and what follows
                begins = chat.prompt_ids(messages[:i], tools).tolist()
                assert ids[: len(begins) + len(rest)].tolist() == begins + rest

    check()


@pytest.mark.parametrize("style", STYLES)
def test_each_turn_by_itself_keeps_its_thought(style):
    """--history_thoughts each: an example for every turn, as it is said last, where the whole would lose a thought."""
    chat = make(style)
    encode = ConversationEncoder(chat, 10**6, "messages", thoughts_each=True)

    @settings(deadline=None, max_examples=30, database=None)
    @given(conversations(STYLES[style][2]))
    def check(conversation):
        messages, tools = conversation
        sequences = encode({"messages": messages, "tools": tools}, notes := Counter())
        cut = any("cut into" in what for what, _ in notes)
        turns = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
        parts = [messages[:end] for end in turns] if cut else [messages]
        got = [decode(chat, ids[mask]) for ids, mask in sequences]
        assert got == [(expected(style, part)[-1] if cut else "".join(expected(style, part))) for part in parts]
        lost = ConversationEncoder(chat, 10**6, "messages")({"messages": messages, "tools": tools}, noted := Counter())
        assert lost and cut == any("leaves out" in what for what, _ in noted)

    check()


def tokens(chat: ChatTokenizer) -> list[str]:
    return chat.tokenizer.convert_ids_to_tokens(list(chat.end_ids))


@pytest.mark.parametrize(
    ("style", "ends"),
    [
        ("thoughts of the last turns", ["<|im_end|>"]),
        ("channels and three ends", ["<|return|>", "<|call|>"]),  # <|end|> ends a channel: the turn goes on behind it
        ("another end for the last turn", ["<|return|>", "<|end|>"]),
        ("the next role's marker ends a turn", ["<|user|>", "<|observation|>"]),
        ("two tokens end a turn", ["<|END_OF_TURN|>"]),
        ("an end of text behind it all", ["<|end|>"]),
    ],
)
def test_where_generation_stops(style, ends):
    chat = make(style)
    assert tokens(chat) == ends
    declared = tuple(chat.tokenizer.convert_tokens_to_ids(["<|eos|>", ends[0], "<|bos|>"]))
    assert tokens(make(style, declared)) == [*ends, "<|eos|>", "<|bos|>"]  # the template's first, each once


def test_what_a_response_says_ends_before_its_end():
    chat = make("two tokens end a turn")
    ids = lambda text: chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    for end in ("", "<|END_OF_TURN|>", "<|END_RESPONSE|><|END_OF_TURN|>"):
        assert chat.response_text(ids("It is one." + end)) == "It is one."
    assert chat.response_text(ids("It<|END_RESPONSE|> is")) == "It<|END_RESPONSE|> is"


# --- what a template cannot show --------------------------------------------------------------------------------------

ASK, SAY = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is one."}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": {}}}


@pytest.mark.parametrize(
    ("style", "messages", "tools", "said"),
    [
        ("no system role", [ASK, SAY], [TOOL], "tools: the chat template .* does not show them"),
        (
            "no system role",
            [ASK, SAY | {"tool_calls": [CALL]}],
            None,
            r"messages\[1\].tool_calls: .* does not show calls",
        ),
        (
            "no system role",
            [ASK, SAY | {"reasoning_content": "Hm."}],
            None,
            r"messages\[1\].reasoning_content: .* thoughts",
        ),
        ("no system role", [{"role": "system", "content": "Be kind."}, ASK, SAY], None, "System role not supported"),
        ("two tokens end a turn", [ASK, SAY | {"name": "<|turn|>"}], None, "name of message 1 holds the control token"),
        ("two tokens end a turn", [ASK, SAY], [{"function": {"name": "<|turn|>"}}], "tools hold the control token"),
    ],
)
def test_what_would_be_lost_is_refused(style, messages, tools, said):
    with pytest.raises(BadRow, match=said):
        make(style).spans(messages, tools)


def test_a_call_that_the_template_drops():
    """'channels' writes the first call of a turn alone."""
    two = SAY | {
        "content": "",
        "tool_calls": [CALL, {"function": {"name": "add", "arguments": {}}, "type": "function"}],
    }
    with pytest.raises(BadRow, match="drops a call of message 1"):
        make("channels and three ends").spans([ASK, two], [TOOL])


def test_a_system_turn_is_folded_on_request():
    chat = make("no system role")
    said = folded(read([{"role": "system", "content": "Be kind."}, ASK, SAY], "messages", Counter()))
    whole, ((start, end),) = chat.spans(said.messages)
    assert whole == "<|bos|><|start|>user\nBe kind.\n\nWho is it?<|end|>\n<|start|>model\nIt is one.<|end|>\n"
    assert whole[start:end] == "It is one.<|end|>"
    with pytest.raises(BadRow, match=r"messages\[1\].role: expected user"):
        folded(read([{"role": "system", "content": "Be kind."}, SAY], "messages", Counter()))


def test_no_end_and_no_marker():
    with pytest.raises(UserError, match="ends an assistant turn without an end token"):
        make("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def test_the_message_that_is_changed_is_named():
    template = STYLES["thoughts of the last turns"][0].replace("{{ said }}", "{{ said | upper }}")
    chat = make(template)
    with pytest.raises(BadRow, match="changes the content of message 1 "):
        chat.spans([ASK, SAY | {"content": "<think>\nHm.\n</think>\n\nIt is one."}, ASK, SAY])


def test_arguments_in_the_form_that_the_template_takes():
    assert make("instructions in brackets").habits.calls == "text"  # an object would be written as Python writes it
    assert make("thoughts of the last turns").habits.calls == "object"


# --- what a reader of the code found ----------------------------------------------------------------------------------


def test_every_end_is_taken_off_a_response():
    """'two tokens' ends an answer with one pair and a call with another, of which the last token is the same."""
    chat = make("two tokens end a turn")
    ids = chat.tokenizer("a call<|END_ACTION|><|END_OF_TURN|>", add_special_tokens=False)["input_ids"]
    assert chat.response_text(ids) == "a call"


def test_a_last_turn_without_an_end_is_no_example():
    """A template that ends a turn only where it says something: the end of an earlier turn is none of this one's."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|end|>' if m.content }}\n{% endfor %}"
        + PROMPT
        + "assistant: {% endif %}"
    )
    with pytest.raises(BadRow, match="does not end message 3"):
        make(template).encode_last([ASK, SAY, ASK, SAY | {"content": ""}], 100, None)


def test_a_tools_result_in_a_users_turn_must_be_shown():
    """It is not marked, since templates look at how it begins, and is looked for as it is."""
    result = {"role": "user", "content": "<tool_response>\nzebra\n</tool_response>"}
    messages = [ASK, SAY | {"reasoning_content": "Hm."}, result, SAY]
    assert result["content"] in make("thoughts of the last turns").spans(messages)[0]
    cuts = STYLES["thoughts of the last turns"][0].replace("{{ m.content }}", "{{ m.content | replace('zebra', '') }}")
    with pytest.raises(BadRow, match="changes the content of message"):
        make(cuts).spans(messages)


def test_numbers_of_a_call_must_be_shown():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 0, "c": True}}}
    messages = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert make("thoughts of the last turns").spans(messages, [TOOL])
    half = STYLES["thoughts of the last turns"][0].replace(
        "c.function.arguments | tojson", "c.function.arguments | tojson | replace('\"b\": 0, ', '')"
    )
    with pytest.raises(BadRow, match="drops a call"):
        make(half).spans(messages, [TOOL])
